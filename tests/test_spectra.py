"""Spectra, Grams and alignment: the paper's identities over every kind of pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

import jlar
import reference
from cases import CASES, gaussian

# In units of p_1: an eigh of W^T W errs by order eps, an SVD of W by order eps sqrt(p_i p_1).
P_TOLERANCE = {"svd": 5e-7, "gram": 3e-6}
METHODS = list(P_TOLERANCE)


def pair(name: str, dtype: str = "float32"):
    return tuple(jnp.asarray(a, dtype) for a in CASES[name]())


def distinct(p: np.ndarray) -> np.ndarray:
    """Where p is far from its neighbours, so that its direction, and q there, is determined."""
    gaps = np.abs(np.diff(p, prepend=np.inf, append=-np.inf))
    return np.minimum(gaps[:-1], gaps[1:]) > 1e-3 * p[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_definition(name, method):
    W, X = pair(name)
    s, r = jlar.spectra(W, X, method=method), reference.spectra(W, X)
    tolerance = P_TOLERANCE[method] * r.p[0]
    np.testing.assert_allclose(s.p, r.p, atol=tolerance)
    clear = distinct(r.p)
    np.testing.assert_allclose(s.q[clear], r.q[clear], atol=2e-3 * r.q.max())
    assert (jnp.diff(s.p) <= 0).all() and (s.p >= 0).all() and (s.q >= 0).all()
    np.testing.assert_allclose([s.p.sum(), s.q.sum()], 1, atol=1e-5)
    assert s.p.shape == s.q.shape == (W.shape[1],)
    np.testing.assert_allclose(s.lar, reference.lar(W, X), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_definition_in_double_precision(name, method, x64):
    W, X = pair(name, "float64")
    s, r = jlar.spectra(W, X, method=method), reference.spectra(W, X)
    np.testing.assert_allclose(s.p, r.p, atol=1e-14)
    clear = distinct(r.p)
    np.testing.assert_allclose(s.q[clear], r.q[clear], atol=1e-10)
    np.testing.assert_allclose(s.lar, reference.lar(W, X), rtol=1e-11)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_decomposed_in_float32(dtype):
    W, X = pair("aligned", dtype)
    for method in METHODS:
        s = jlar.spectra(W, X, method=method)
        assert s.p.dtype == s.q.dtype == jnp.float32
        np.testing.assert_allclose(s.p, reference.spectra(W, X).p, atol=3e-6)


def test_p_is_padded_with_zeros_on_the_null_space():
    W, X = pair("wide")
    s = jlar.spectra(W, X, method="svd")
    assert not s.p[7:].any() and (s.q[7:] > 0).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "one token"])
def test_identities(name, method):
    """Equations (3), (4), (5), (7), (8), B.2, B.4 and L_k + D_k = LAR."""
    W, X = pair(name)
    s = jlar.spectra(W, X, method=method)
    n, lar = W.shape[1], float(reference.lar(W, X))
    p, q = reference.as_float64(s.p), reference.as_float64(s.q)
    cov = np.mean(p * q) - np.mean(p) * np.mean(q)

    def half_log(a):
        return 1 + reference.log_n(a, n) / 2

    np.testing.assert_allclose(half_log((p * q).sum()), lar, atol=1e-5)  # (3)
    np.testing.assert_allclose(half_log(n * cov + 1 / n), lar, atol=1e-5)  # (4)
    spread = float(s.sigma_p) * float(s.sigma_q) * float(s.corr)
    np.testing.assert_allclose(half_log(n * spread + 1 / n), lar, atol=2e-5)  # (5)
    assert -1e-7 <= (p * q).sum() <= q.max() + 1e-6 <= 1 + 2e-6  # (7), (8)
    np.testing.assert_allclose(s.sigma_p, np.sqrt(np.mean((p - 1 / n) ** 2)), atol=1e-7)
    assert 0 <= float(s.sigma_p) ** 2 <= (n - 1) / n**2 + 1e-6
    renyi = -np.log2(np.sum(p**2))
    np.testing.assert_allclose(float(s.sigma_p) ** 2, (2**-renyi - 1 / n) / n, atol=1e-6)  # B.4
    np.testing.assert_allclose(s.participation_p, 2**renyi, rtol=1e-5)
    np.testing.assert_allclose(s.participation_q, 1 / np.sum(q**2), rtol=1e-5)
    np.testing.assert_allclose(s.stable_rank, reference.stable_rank(W), rtol=1e-4)
    # An eigh leaves n - r values of order eps p_1 where p is 0, whose roots are not small.
    rtol = 1e-3 if method == "svd" or np.linalg.matrix_rank(W) == n else 0.2
    np.testing.assert_allclose(s.effective_rank, reference.effective_rank(W), rtol=rtol)
    for k in (1, 2, n):
        L, D = s.top(k)
        np.testing.assert_allclose(L + D, s.lar, rtol=1e-6)
        np.testing.assert_allclose(L, half_log((p * q)[:k].sum()), atol=1e-5)
    assert float(D) == 0  # D_n


def test_correlations_match_scipy():
    for name in ("aligned", "opposed", "wide"):
        W, X = pair(name)
        s = jlar.spectra(W, X)
        p, q = np.asarray(s.p), np.asarray(s.q)
        np.testing.assert_allclose(s.corr, scipy.stats.pearsonr(p, q)[0], atol=1e-5)
        np.testing.assert_allclose(s.rank_corr, scipy.stats.spearmanr(p, q)[0], atol=1e-5)
    assert jlar.spectra(*pair("aligned")).corr > 0.9 > 0 > jlar.spectra(*pair("opposed")).corr


def test_a_dominant_direction_sets_the_spreads():
    """When direction 1 dominates: sigma_p ~ p_1/sqrt(n), sigma_p sigma_q ~ n^(2 L_1 - 3)."""
    n = 256
    e = jnp.zeros(n).at[0].set(1)
    W = jnp.outer(jnp.ones(300), e) + 0.02 * jnp.asarray(gaussian(300, n, 1).W, jnp.float32)
    X = jnp.outer(jnp.ones(50), e) + 0.02 * jnp.asarray(gaussian(50, n, 1).W, jnp.float32)
    s = jlar.spectra(W, X)
    L1 = s.top(1).L
    np.testing.assert_allclose(s.sigma_p, s.p[0] / n**0.5, rtol=0.01)
    np.testing.assert_allclose(s.sigma_p * s.sigma_q, n ** (2 * L1 - 3), rtol=0.02)


def test_no_correlation_means_one_half():
    """Uniform p, isotropic q, or neither: the covariance vanishes (B.2)."""
    W, X = pair("aligned")
    np.testing.assert_allclose(jlar.lar(jnp.eye(24), X), 0.5, atol=1e-6)
    np.testing.assert_allclose(jlar.lar(W, jnp.eye(24)), 0.5, atol=1e-6)
    assert jnp.isnan(jlar.spectra(jnp.eye(24), X).corr)


def test_q_tends_to_the_second_moment():
    """Equation (9): q_i -> v_i^T C v_i / tr C for a batch drawn with second moment C."""
    rng = np.random.default_rng(5)
    root = rng.normal(size=(6, 6))
    W, X = rng.normal(size=(9, 6)), rng.normal(size=(200_000, 6)) @ root.T
    C, V = root @ root.T, reference.spectra(W, X[:1]).basis
    s = jlar.spectra(jnp.asarray(W, jnp.float32), jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(s.q, [v @ C @ v / np.trace(C) for v in V], atol=0.01)


@settings(deadline=None, max_examples=20)
@given(m=st.integers(2, 6), n=st.integers(2, 6), seed=st.integers(0, 2**32 - 1))
def test_invariances(m, n, seed):
    rng = np.random.default_rng(seed)
    W, X = rng.normal(size=(m, n)), rng.normal(size=(7, n))
    rotation = np.linalg.qr(rng.normal(size=(n, n)))[0]
    first = jlar.spectra(jnp.asarray(W, jnp.float32), jnp.asarray(X, jnp.float32))
    for w, x in ((W @ rotation, X @ rotation), (3 * W, -0.1 * X), (W, rng.permutation(X))):
        s = jlar.spectra(jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(s.p, first.p, atol=1e-5)
        np.testing.assert_allclose(s.lar, first.lar, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_alignment_under_jit_and_vmap(method):
    W, X = pair("aligned")
    one = jlar.alignment(W, X, method=method)
    np.testing.assert_allclose(one.lar, jlar.lar(W, X), atol=2e-6)
    Ws, Xs = jnp.stack([W, W[::-1] * 2]), jnp.stack([X, X])
    many = jax.jit(jax.vmap(lambda w, x: jlar.alignment(w, x, method=method)))(Ws, Xs)
    np.testing.assert_allclose(many.p, jnp.stack([one.p, one.p]), atol=1e-5)
    np.testing.assert_allclose(many.lar, [one.lar, one.lar], atol=1e-5)


def test_stacked_grams_and_traced_k():
    W, X = pair("aligned")
    stacked = jax.vmap(lambda x: jlar.grams(W, x))(X.reshape(4, 20, -1))
    s = stacked.spectra()
    assert s.p.shape == (4, 24) and s.corr.shape == s.rank_corr.shape == (4,)
    np.testing.assert_allclose(stacked.sum().spectra().lar, jlar.lar(W, X), atol=2e-6)
    L, D = jax.vmap(lambda k: jlar.spectra(W, X).top(k))(jnp.array([1, 2, 24]))
    assert (jnp.diff(L) > 0).all() and D[-1] == 0


@pytest.mark.parametrize("method", METHODS)
def test_spectra_pool_over_masks(method):
    W, X = pair("aligned")
    mask = jnp.arange(80) % 2
    s = jlar.spectra(W, X.at[0].set(jnp.nan), mask=mask, method=method)
    np.testing.assert_allclose(s.p, reference.spectra(W, X).p, atol=3e-6)
    np.testing.assert_allclose(s.lar, reference.lar(W, X, mask), atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_nan_out(method):
    W, X = pair("tall")
    with jax.debug_nans(False):
        assert jnp.isnan(jlar.spectra(0 * W, X, method=method).p).all()
        assert jnp.isnan(jlar.spectra(W, 0 * X, method=method).q).all()
        for w, x in ((W.at[0, 0].set(jnp.nan), X), (W, X.at[0, 0].set(jnp.nan))):
            s = jlar.spectra(w, x, method=method)
            assert jnp.isnan(s.q).all() and jnp.isnan(s.rank_corr) and jnp.isnan(s.corr)


def test_lar_of_grams_needs_no_eigh():
    program = str(jax.make_jaxpr(lambda W, X: jlar.grams(W, X).lar)(*pair("tall")))
    assert "eigh" not in program
