"""Moments of p and q against the spectra of the NumPy reference, and which of them need an eigh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlar
import reference
from cases import CASES, gaussian

WITHOUT_EIGH = ("pp", "pq", "qq_bound", "sigma_p", "lar")
WITH_EIGH = ("qq", "sigma_q", "corr")


@pytest.mark.parametrize("name", CASES)
def test_definition(name):
    W, X = (jnp.asarray(a, jnp.float32) for a in CASES[name]())
    m, r = jlar.moments(W, X), reference.spectra(W, X)
    np.testing.assert_allclose(m.pp, np.sum(r.p**2), rtol=1e-5)
    np.testing.assert_allclose(m.pq, np.sum(r.p * r.q), rtol=1e-4)
    np.testing.assert_allclose(m.sigma_p, np.std(r.p), atol=1e-6)
    np.testing.assert_allclose(m.lar, reference.lar(W, X), atol=1e-5)
    assert m.qq_bound >= np.sum(r.q**2) * (1 - 1e-5)


def test_what_needs_the_basis(x64):
    """Where singular values coincide q is not unique, so only of a pair without such."""
    W, X = gaussian(40, 12, 30)
    m, r = jlar.moments(jnp.asarray(W), jnp.asarray(X)), reference.spectra(W, X)
    np.testing.assert_allclose(m.qq, np.sum(r.q**2), rtol=1e-10)
    np.testing.assert_allclose(m.sigma_q, np.std(r.q), rtol=1e-10)
    np.testing.assert_allclose(m.corr, np.corrcoef(r.p, r.q)[0, 1], rtol=1e-10)


def test_the_bound_is_attained_by_commuting_grams():
    W = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    m = jlar.moments(W, W)
    np.testing.assert_allclose(m.qq_bound, m.qq, rtol=1e-6)


def test_a_uniform_spectrum_has_no_spread():
    """The difference of two equal moments would leave the root of a rounding error."""
    assert jlar.moments(jnp.eye(100), jnp.ones((1, 100))).sigma_p < 1e-8


@pytest.mark.parametrize("name", WITHOUT_EIGH + WITH_EIGH)
def test_an_eigh_only_where_said(name):
    W, X = (jnp.asarray(a, jnp.float32) for a in gaussian(6, 4, 5))
    program = str(jax.make_jaxpr(lambda W, X: getattr(jlar.moments(W, X), name))(W, X))
    assert ("eigh" in program) == (name in WITH_EIGH)


def test_several_readings_share_one_eigh():
    W, X = (jnp.asarray(a, jnp.float32) for a in gaussian(6, 4, 5))
    both = jax.jit(lambda W, X: (m := jlar.moments(W, X)) and (m.corr, m.sigma_q, m.qq))
    assert both.lower(W, X).compile().as_text().count("lapack_ssyevd") == 1


def test_nan_for_nothing():
    m = jlar.moments(jnp.zeros((3, 4)), jnp.ones((2, 4)))
    assert jnp.isnan(m.pp) and jnp.isnan(m.lar) and jnp.isnan(m.corr)
