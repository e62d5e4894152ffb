"""lar, Energies and the effective dimension against the definition."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import jlar
import reference
from cases import CASES, gaussian, subspace
from jlar import _pool

# Relative error of each dtype's rounding of the inputs, with a margin for the sums.
TOLERANCE = {"float32": 2e-6, "float64": 1e-12, "bfloat16": 1e-2, "float16": 1e-3}


def pair(name: str, dtype: str = "float32"):
    return tuple(jnp.asarray(a, dtype) for a in CASES[name]())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_definition(name, dtype):
    if dtype == "float16" and name == "small and large":
        pytest.skip("1e6 is not a float16")
    W, X = pair(name, dtype)
    expected = reference.lar(W, X)  # of the rounded inputs: the sums themselves are float32
    for value in (
        jlar.lar(W, X),
        jax.jit(jlar.lar)(W, X),
        jlar.energies(W, X).lar,
        jlar.grams(W, X).lar,
    ):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, rtol=TOLERANCE["float32"], atol=2e-6)
    given_Y = (X @ W.T).astype(dtype)
    np.testing.assert_allclose(
        jlar.lar(W, X, Y=given_Y), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("name", CASES)
def test_definition_in_double_precision(name, x64):
    W, X = pair(name, "float64")
    expected = reference.lar(W, X)
    for value in (jlar.lar(W, X), jlar.energies(W, X).lar, jlar.grams(W, X).lar):
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_mixed_dtypes_meet_in_float32():
    W, X = pair("aligned")
    X = X.astype(jnp.bfloat16)
    np.testing.assert_allclose(jlar.lar(W, X), reference.lar(W, X), rtol=2e-6)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int32"])
def test_narrow_dtypes_are_summed_in_float32(dtype, unchecked):
    W, X = (jnp.asarray(4 * a, dtype) for a in CASES["aligned"]())
    np.testing.assert_allclose(
        jlar.lar(W, X), reference.lar(W.astype(jnp.float32), X.astype(jnp.float32)), rtol=2e-6
    )


def test_any_number_of_token_axes():
    W, X = pair("aligned")
    expected = jlar.lar(W, X)
    np.testing.assert_allclose(jlar.lar(W, X.reshape(2, 4, 10, -1)), expected, rtol=1e-6)
    np.testing.assert_allclose(jlar.lar(W, X[0]), reference.lar(W, X[:1]), rtol=2e-6)


@pytest.mark.parametrize("mask_dtype", [bool, jnp.int32, jnp.float32, jnp.bfloat16])
def test_mask_counts_only_kept_tokens(mask_dtype):
    W, X = pair("aligned")
    X = X.reshape(4, 20, -1).at[0, 3].set(jnp.nan)  # what padding may hold
    mask = (jnp.arange(80).reshape(4, 20) % 3 > 0).astype(mask_dtype)
    expected = reference.lar(W, X, mask)
    e = jlar.energies(W, X, mask=mask)
    np.testing.assert_allclose(e.lar, expected, rtol=2e-6)
    np.testing.assert_allclose(jlar.energies(W, X, Y=X @ W.T, mask=mask).lar, expected, rtol=2e-6)
    np.testing.assert_allclose(jlar.grams(W, X, mask=mask).lar, expected, rtol=2e-6)
    assert int(e.count) == int(mask.sum()) == 53
    np.testing.assert_allclose(e.keep_rate, 53 / 80)


@pytest.mark.parametrize("statistic", [jlar.energies, jlar.grams])
def test_pooling_equals_the_concatenated_batch(statistic):
    W, X = pair("aligned")
    parts = [X[:7], X[7:30] * 3, X[30:]]
    whole = statistic(W, jnp.concatenate(parts))
    for pooled in (
        sum(statistic(W, part) for part in parts),
        statistic(W, parts[0]) + (statistic(W, parts[1]) + statistic(W, parts[2])),
    ):
        chex.assert_trees_all_close(
            jax.tree.leaves((pooled.lar, pooled.count, pooled.keep_rate)),
            jax.tree.leaves((whole.lar, whole.count, whole.keep_rate)),
            rtol=2e-6,
        )


@pytest.mark.parametrize("statistic", [jlar.energies, jlar.grams])
def test_sum_pools_what_vmap_and_scan_stack(statistic):
    W, X = pair("aligned")
    batches = X.reshape(4, 20, -1)
    whole = statistic(W, X)
    stacked = jax.vmap(lambda x: statistic(W, x))(batches)
    assert stacked.lar.shape == (4,) and stacked.count.tolist() == [20] * 4
    _, scanned = jax.lax.scan(lambda _, x: (None, statistic(W, x)), None, batches)
    carried, _ = jax.lax.scan(
        lambda total, x: (total + statistic(W, x), None), type(whole).zeros(X.shape[-1]), batches
    )
    square = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), stacked)
    for pooled in (stacked.sum(), scanned.sum(axis=0), carried, square.sum((0, 1))):
        np.testing.assert_allclose(pooled.lar, whole.lar, rtol=1e-6)
        assert int(pooled.count) == 80
    # The mean of the logarithms is another number: the pooled one is what the library gives.
    assert abs(float(stacked.lar.mean() - whole.lar)) > 1e-4


def test_counts_do_not_saturate():
    W = jnp.ones((1, 2))
    big = jlar.energies(W, jnp.ones((2**24, 2), jnp.bfloat16))
    one = jlar.energies(W, jnp.ones((1, 2)), mask=jnp.ones((1,), jnp.bfloat16))
    assert int((big + one).count) == 2**24 + 1
    many = jax.tree.map(lambda a: jnp.broadcast_to(a, (5, *a.shape)), big + one)
    assert int(many.sum().count) == 5 * (2**24 + 1)


@pytest.mark.parametrize(("calls", "tokens"), [(20_000, 1023), (1_000_000, 7)])
def test_long_pooling(calls, tokens):
    """Neither counts nor sums lose anything over very many calls."""
    W, X = (jnp.asarray(a, jnp.float32) for a in gaussian(5, 4, tokens))
    one = jlar.energies(W, X)
    pooled = jax.jit(
        lambda e: jax.lax.fori_loop(0, calls, lambda _, s: s + e, jlar.Energies.zeros(4))
    )(one)
    assert int(pooled.count) == calls * tokens and int(pooled.calls) == calls
    for name in ("y", "x", "w"):
        exact = float(getattr(one, name)) * calls
        np.testing.assert_allclose(getattr(pooled, name), exact, rtol=3e-7)
    np.testing.assert_allclose(pooled.lar, one.lar, rtol=3e-6)


def test_counts_past_their_limit_are_told():
    W, X = (jnp.asarray(a, jnp.float32) for a in gaussian(5, 4, 6))
    e = jlar.energies(W, X)
    many = jlar.Energies(e.sums.at[4, 0].set(3.1e9), 4)
    assert int(many.count) == -1 and float(many.keep_rate) > 1


SCALES = [1e-30, 1e-20, 1e-19, 1e-15, 1e-12, 1e-10, 1e-6, 1.0, 1e6, 1e9, 1e12, 1e18, 1e19, 1e30]


@pytest.mark.parametrize("w", SCALES)
@pytest.mark.parametrize("x", SCALES)
def test_small_and_large_numbers_are_right_or_nan(w, x):
    W, X = (jnp.asarray(a, jnp.float32) for a in gaussian(9, 8, 7))
    found = float(jlar.lar(np.float32(w) * W, np.float32(x) * X))
    wanted = reference.lar(W, X)
    assert abs(found - wanted) < 1e-5
    pooled = float(jlar.energies(np.float32(w) * W, np.float32(x) * X).lar)
    assert np.isnan(pooled) or abs(pooled - wanted) < 1e-5
    if 1e-8 < w * x < 1e15 and 1e-8 <= min(w, x) and max(w, x) < 1e18:
        assert not np.isnan(pooled)


def test_lost_squares_are_not_made_up():
    """Entries whose squares are lost one by one, beside some that are not."""
    W, X = (jnp.asarray(a, jnp.float32) for a in gaussian(9, 8, 700))
    for scale in (3e-20, 1e-19, 3e-19):
        assert abs(float(jlar.lar(W, scale * X)) - reference.lar(W, X)) < 1e-5
        pooled = float(jlar.energies(W, scale * X).lar)
        assert np.isnan(pooled) or abs(pooled - reference.lar(W, X)) < 1e-5


def right_or_nan(found, wanted, atol=1e-5):
    return np.isnan(float(found)) or abs(float(found) - wanted) < atol


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3, 1e-4, 3e-5, 1e-7, 5e-20, 1e-20, 1e-25])
def test_a_product_that_its_dtype_cannot_hold_is_nan(scale, dtype):
    W, X = (jnp.asarray(scale * a, dtype) for a in gaussian(24, 16, 40))
    if not (W.any() and X.any()):
        pytest.skip("all zero")
    wanted, Y = reference.lar(W, X), X @ W.T
    tolerance = {"bfloat16": 2e-3, "float16": 1e-4}.get(dtype, 1e-5)
    assert right_or_nan(jlar.lar(W, X), wanted)
    found = [jlar.lar(W, X, Y=Y), jlar.energies(W, X, Y=Y).lar]
    _, measured = jlar.capture(lambda w, X: X @ w["W"].T)({"W": W}, X)
    for value in (*found, measured["W"].lar):
        assert right_or_nan(value, wanted, tolerance)
    if scale >= {"float16": 1e-2}.get(dtype, 1e-4):
        assert not np.isnan([*found, measured["W"].lar]).any()


def test_a_product_of_zeros_is_believed_where_it_can_be():
    W, X = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
    zero = jnp.zeros((1, 1))
    assert jlar.lar(W, X, Y=zero) == jlar.energies(W, X, Y=zero).lar == -jnp.inf
    assert jnp.isnan(jlar.lar(1e-20 * W, 1e-20 * X, Y=zero))


def test_float16_is_too_coarse_only_for_entries_that_count():
    """Of masked tokens, of a W of zeros, and of other groups nothing is rounded."""
    W, X = (jnp.asarray(a, jnp.float16) for a in gaussian(16, 16, 1000))
    # The root mean square of Y is 1e-5 where it counts, and below the limit, 2e-6, over all zeros.
    W, X = W * jnp.float16(0.01), X.at[5:].set(0) * jnp.float16(2.5e-4)
    mask = jnp.arange(1000) < 5
    wanted = reference.lar(W, X[:5])
    for value in (jlar.lar, lambda *a, **k: jlar.energies(*a, **k).lar):
        np.testing.assert_allclose(value(W, X, Y=X @ W.T, mask=mask), wanted, atol=2e-3)
    none = jnp.zeros_like(W)
    one = jlar.energies(W, X, Y=X @ W.T, mask=mask)
    pooled = jlar.energies(none, X, Y=X @ none.T, mask=mask) + one
    np.testing.assert_allclose(pooled.y, one.y, rtol=1e-5)
    padded = jnp.concatenate([W, none])
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        lambda W, X: jlar.lar(W, X, Y=X @ W.T, mask=mask, axes={"m": "d"}),
        mesh=mesh,
        in_specs=(jax.P("d"), jax.P()),
        out_specs=jax.P(),
    )
    np.testing.assert_allclose(split(padded, X), reference.lar(padded, X[:5]), atol=2e-3)
    experts = jnp.stack([W] * 64)
    _, measured = jlar.capture(
        lambda w, X, sizes: jax.lax.ragged_dot(X, jnp.swapaxes(w["e"], 1, 2), sizes)
    )({"e": experts}, X[:64].at[:].set(X[0]), jnp.ones(64, jnp.int32))
    np.testing.assert_allclose(measured["e"].lar, reference.lar(W, X[:1]), atol=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_large_entry_takes_nothing_from_the_others(dtype):
    """Massive activations, in a direction that W does not read."""
    W, X = gaussian(64, 64, 512)
    W[:, 0], X[:, 1:], X[:, 0] = 0, 1e-3 * X[:, 1:], 3e4
    W, X = (jnp.asarray(a, dtype) for a in (W, X))
    np.testing.assert_allclose(jlar.lar(W, X), reference.lar(W, X), rtol=1e-5)


def test_entries_that_may_be_subnormal_are_nan():
    W, X = (jnp.asarray(a, jnp.float32) for a in gaussian(9, 8, 7))
    np.testing.assert_allclose(jlar.lar(np.float32(1e-29) * W, X), reference.lar(W, X), rtol=1e-5)
    for small in (1e-32, 1e-37, 1e-38):
        assert jnp.isnan(jlar.lar(np.float32(small) * W, X))
        assert jnp.isnan(jlar.alignment(W, np.float32(small) * X).lar)
    assert jnp.isnan(jlar.lar(jnp.array([[2e-38, 1.1e-38]]), jnp.array([[0.0, 1.0]])))


@pytest.mark.parametrize("statistic", [jlar.energies, jlar.grams])
@pytest.mark.parametrize("scale", [1e-12, 1e-10, 1e-9, 1e10, 1e19])
def test_the_gradient_of_a_nan_is_nan(statistic, scale):
    W, X = (jnp.asarray(scale * a, jnp.float32) for a in gaussian(8, 8, 8))
    value, slope = jax.value_and_grad(lambda W: statistic(W, X).lar)(W)
    assert jnp.isnan(value) and jnp.isnan(slope).all()


def test_integers_of_64_bits_are_not_wrapped(unchecked):
    X = np.array([[1.0, 0.0]])
    W = np.array([[3_100_000_000, 3_000_000_000]])
    np.testing.assert_allclose(jlar.lar(W, X), reference.lar(W, X), rtol=1e-5)
    np.testing.assert_allclose(jlar.lar(np.array([[2**32, 1]]), X), 1, rtol=1e-6)


def test_a_mask_longer_than_an_int32():
    """Only traced: no part of 3.1e9 tokens that is summed is more than an int32 can count."""
    long = jax.ShapeDtypeStruct((31, 100_000_000), bool)
    parts = jax.make_jaxpr(lambda keep: _pool._kept(keep, jnp.dtype("float32")))(long).eqns
    sums = [eqn for eqn in parts if eqn.primitive.name == "reduce_sum"]
    sizes = [eqn.invars[0].aval.size for eqn in sums if eqn.outvars[0].aval.dtype == jnp.int32]
    assert sum(sizes) == 3_100_000_000 and max(sizes) < 2**31


def test_effective_dimension():
    np.testing.assert_allclose(
        jlar.effective_dimension(jnp.array([1.0, 0.5, 0.75, 0.0]), 16), [1, 16, 4, 256], rtol=1e-5
    )
    for k in (1, 5, 16):  # equation (6): p uniform on k directions that hold all of q
        W, X = (jnp.asarray(a, jnp.float32) for a in subspace(k, 20, 16, 40))
        np.testing.assert_allclose(jlar.energies(W, X).effective_dimension, k, rtol=1e-5)
        np.testing.assert_allclose(jlar.lar(W, X), 1 - np.log(k) / np.log(16) / 2, atol=1e-6)


def test_extremes():
    W = jnp.outer(jnp.arange(1.0, 5), jnp.array([0.0, 3.0, 4.0]))
    along, across = jnp.array([[0.0, 0.6, 0.8]]), jnp.array([[1.0, 0.0, 0.0]])
    np.testing.assert_allclose(jlar.lar(W, along), 1, atol=1e-6)
    assert jlar.lar(W, across) == -jnp.inf
    assert jlar.energies(W, across).effective_dimension == jnp.inf
    np.testing.assert_allclose(jlar.lar(jnp.eye(6), jnp.ones((3, 6))), 0.5, atol=1e-6)


@pytest.mark.parametrize("of", ["W", "X", "mask", "nan", "inf W", "inf X"])
def test_nan_out(of):
    W, X = pair("tall")
    mask, Y = None, X @ W.T
    if of == "W":
        W, Y = jnp.zeros_like(W), jnp.zeros_like(Y)
    elif of == "X":
        X, Y = jnp.zeros_like(X), jnp.zeros_like(Y)
    elif of == "mask":
        mask = jnp.zeros(X.shape[:-1])
    elif of == "nan":
        X = X.at[0, 0].set(jnp.nan)
    elif of == "inf W":
        W = W.at[0, 0].set(jnp.inf)
    else:
        X = X.at[0, 0].set(jnp.inf)
    with jax.debug_nans(False):
        assert jnp.isnan(jlar.lar(W, X, mask=mask))
        assert jnp.isnan(jlar.lar(W, X, Y=Y, mask=mask))
        assert jnp.isnan(jlar.energies(W, X, mask=mask).effective_dimension)
        assert jnp.isnan(jlar.grams(W, X, mask=mask).lar)
        for method in ("svd", "gram"):
            assert jnp.isnan(jlar.alignment(W, X, mask=mask, method=method).lar)
    assert jnp.isnan(jlar.Energies.zeros(12).lar)


def test_derivatives_to_order_two(x64):
    W, X = (jnp.asarray(a) for a in gaussian(5, 4, 6))
    mask = jnp.array([1, 1, 0, 1, 1, 1])
    check_grads(lambda W, X: jlar.lar(W, X, mask=mask), (W, X), order=2)
    check_grads(lambda W, X, Y: jlar.lar(W, X, Y=Y), (W, X, X @ W.T), order=2)
    masked = jax.grad(lambda X: jlar.lar(W, X, mask=mask))(X.at[2].set(jnp.nan))
    assert jnp.isfinite(masked).all() and not masked[2].any()


def test_statistics_stop_gradients():
    W, X = pair("tall")
    for statistic in (
        lambda W, X: jlar.spectra(W, X).corr,
        lambda W, X: jlar.spectra(W, X, method="gram").lar,
        lambda W, X: jlar.spectra(W, X).effective_rank + jlar.principal_dimension(X),
    ):
        chex.assert_trees_all_equal(
            jax.grad(statistic, argnums=(0, 1))(W, X), (jnp.zeros_like(W), jnp.zeros_like(X))
        )


def test_energies_have_the_gradient_of_lar():
    W, X = pair("tall")
    of_lar = jax.grad(jlar.lar, argnums=(0, 1))(W, X)
    of_energies = jax.grad(lambda W, X: jlar.energies(W, X).lar, argnums=(0, 1))(W, X)
    chex.assert_trees_all_close(of_lar, of_energies, rtol=1e-6)
    assert all(jnp.any(g != 0) for g in of_energies)


def test_transformations_compose_without_retracing():
    W, X = pair("square")
    traced = jax.jit(chex.assert_max_traces(jlar.lar, n=1))
    np.testing.assert_allclose(traced(W, X), jlar.lar(W, X), rtol=1e-6)
    traced(W + 1, X)
    Ws, Xs = jnp.stack([W, 2 * W + 1]), jnp.stack([X, X - 1])
    each = [jlar.lar(w, x) for w, x in zip(Ws, Xs, strict=True)]
    np.testing.assert_allclose(jax.jit(jax.vmap(jlar.lar))(Ws, Xs), each, rtol=1e-6)
    gradient = jax.vmap(jax.grad(jlar.lar))(Ws, Xs)
    np.testing.assert_allclose(gradient[1], jax.grad(jlar.lar)(Ws[1], Xs[1]), atol=1e-6)


small = st.integers(2, 6)


@settings(deadline=None, max_examples=30)
@given(m=small, n=small, t=small, seed=st.integers(0, 2**32 - 1))
def test_invariances_and_bounds(m, n, t, seed):
    rng = np.random.default_rng(seed)
    W, X = rng.normal(size=(m, n)), rng.normal(size=(t, n))
    rotate_in, rotate_out = (np.linalg.qr(rng.normal(size=(k, k)))[0] for k in (n, m))
    expected = float(reference.lar(W, X))
    a, b = rng.uniform(1e-3, 1e3, 2)
    for w, x in (
        (W, X),
        (a * W, -b * X),
        (rotate_out @ W @ rotate_in, X @ rotate_in),
        (W, rng.permutation(X)),
    ):
        value = float(jlar.lar(jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)))
        assert value <= 1 + 1e-6
        np.testing.assert_allclose(value, expected, atol=2e-5)


ERRORS = {
    "W must have shape": lambda W, X: jlar.lar(W[None], X),
    r"at least one row; got shape \(0, 12\)": lambda W, X: jlar.lar(W[:0], X),
    "must be at least 2; got n = 1": lambda W, X: jlar.lar(W[:, :1], X[:, :1]),
    r"X must have shape \(..., 12\)": lambda W, X: jlar.energies(W, X[:, :5]),
    r"kernel\.T": lambda W, X: jlar.lar(W.T, X),
    "tokens first": lambda W, X: jlar.grams(W, jnp.float32(1)),
    "Y must be X @ W.T": lambda W, X: jlar.lar(W, X, Y=X),
    r"mask must have one entry per token, shape \(30,\)": lambda W, X: jlar.lar(W, X, mask=X),
    "W must be real": lambda W, X: jlar.lar(W.astype(jnp.complex64), X),
    'method must be "gram" or "svd"; got \'qr\'': lambda W, X: jlar.spectra(W, X, method="qr"),
    "k must be from 1 to n = 12": lambda W, X: jlar.spectra(W, X).top(13),
    "argument n": lambda W, X: jlar.effective_dimension(jnp.float32(0.5), 1),
    "fraction is a share": lambda W, X: jlar.principal_dimension(X, 95.0),
    "at least one token axis": lambda W, X: jlar.principal_dimension(X[0]),
    "same weight matrix": lambda W, X: jlar.energies(W, X) + jlar.energies(W[:, :5], X[:, :5]),
    "statistics have 0; got 0": lambda W, X: jlar.energies(W, X).sum(),
    "statistics have 1; got -1": lambda W, X: jlar.Energies.zeros(3, (2,)).sum(-1),
}


@pytest.mark.parametrize("message", ERRORS)
def test_misuse_is_named_at_trace_time(message, unchecked):
    W, X = pair("tall")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ERRORS[message], W, X)
