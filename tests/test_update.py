"""update_alignment: the three terms of a layer's change, against NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlar
import reference
from jlar._update import update_alignment

SHAPES = {"tall": (40, 12, 30), "wide": (7, 20, 30), "one row": (1, 9, 5), "one token": (6, 9, 1)}
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5, "float64": 1e-12}


def before_and_after(shape: str = "tall", dtype: str = "float32"):
    m, n, t = SHAPES[shape]
    rng = np.random.default_rng(0)
    W0, X0 = rng.normal(size=(m, n)), rng.normal(size=(t, n))
    W = W0 + np.outer(rng.normal(size=m), X0[0]) + 0.1 * rng.normal(size=(m, n))
    X = X0 + 0.3 * X0[:1] + 0.1 * rng.normal(size=(t, n))
    return tuple(jnp.asarray(a, dtype) for a in (W0, W, X0, X))


def three_terms(W0, W, X0, X, mask=None):
    W0, W, X0, X = (reference.as_float64(a) for a in (W0, W, X0, X))
    return [reference.lar(a, b, mask) for a, b in ((W - W0, X0), (W0, X - X0), (W - W0, X - X0))]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(shape, dtype, x64):
    arrays = before_and_after(shape, dtype)
    result = update_alignment(*arrays)
    assert result._fields == ("alpha", "omega", "u")
    for value, expected in zip(result, three_terms(*arrays), strict=True):
        assert value.dtype == ("float64" if dtype == "float64" else "float32")
        np.testing.assert_allclose(value, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_full_alignment():
    # A rank-one update along the direction of the inputs and of their change.
    rng = np.random.default_rng(0)
    W0, direction = rng.normal(size=(50, 16)), rng.normal(size=16)
    X0 = np.outer(rng.normal(size=30), direction)
    W = W0 + np.outer(rng.normal(size=50), direction)
    result = update_alignment(*(jnp.asarray(a, jnp.float32) for a in (W0, W, X0, 3 * X0)))
    np.testing.assert_allclose([result.alpha, result.u], 1, atol=1e-6)


@pytest.mark.parametrize(("m", "n"), [(256, 256), (512, 128), (4, 512)])
def test_the_bound_on_omega_at_random_initialisation(m, n):
    # The docstring's 1/2 + log_n(1 + sqrt(n/m)), attained by inputs that change along v_1.
    W0 = np.random.default_rng(0).normal(size=(m, n))
    top = np.linalg.svd(W0, full_matrices=False)[2][0]
    W0, dX = jnp.asarray(W0, jnp.float32), jnp.asarray(top[None], jnp.float32)
    omega = update_alignment(W0, 2 * W0, jnp.zeros_like(dX), dX).omega
    bound = 0.5 + np.log(1 + np.sqrt(n / m)) / np.log(n)
    np.testing.assert_allclose(omega, bound, atol=0.01)


def test_pooled_before_the_logarithm():
    W0, W, X0, X = before_and_after()
    X = X * jnp.arange(1.0, 31, dtype=X.dtype)[:, None]
    per_token = jax.vmap(lambda X0, X: update_alignment(W0, W, X0, X))(X0, X)
    pooled = update_alignment(W0, W, X0, X)
    for mean, value in zip(map(jnp.mean, per_token), pooled, strict=True):
        assert abs(float(mean - value)) > 1e-3
    batched = update_alignment(W0, W, X0.reshape(5, 6, -1), X.reshape(5, 6, -1))
    chex.assert_trees_all_close(batched, pooled, rtol=1e-5)


def test_mask():
    W0, W, X0, X = before_and_after()
    mask = jnp.arange(30) % 3 > 0
    expected = three_terms(W0, W, X0, X, mask)
    dirty = X0.at[3].set(jnp.nan), X.at[0].set(jnp.inf)
    np.testing.assert_allclose(update_alignment(W0, W, *dirty, mask=mask), expected, rtol=1e-5)


def test_invariances():
    W0, W, X0, X = before_and_after()
    expected = update_alignment(W0, W, X0, X)
    chex.assert_trees_all_close(update_alignment(3 * W0, 3 * W, -X0, -X), expected, rtol=1e-5)
    rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0], "f4")
    rotated = update_alignment(W0 @ rotation, W @ rotation, X0 @ rotation, X @ rotation)
    chex.assert_trees_all_close(rotated, expected, rtol=1e-4)


@pytest.mark.parametrize("same", ["W", "X", "both"])
def test_no_change_is_nan(same):
    W0, W, X0, X = before_and_after()
    W = W0 if same in ("W", "both") else W
    X = X0 if same in ("X", "both") else X
    found = {k for k, v in update_alignment(W0, W, X0, X)._asdict().items() if jnp.isnan(v)}
    assert (
        found == {"W": {"alpha", "u"}, "X": {"omega", "u"}, "both": {"alpha", "omega", "u"}}[same]
    )


def test_under_transformations():
    arrays = before_and_after("wide")
    traced = jax.jit(chex.assert_max_traces(lambda *a: update_alignment(*a), n=1))
    chex.assert_trees_all_close(traced(*arrays), update_alignment(*arrays), rtol=1e-5)
    traced(*(2 * a for a in arrays))
    stacks = [jnp.stack([a, jnp.sin(a)]) for a in arrays]
    each = [update_alignment(*(s[i] for s in stacks)) for i in range(2)]
    both = jax.jit(jax.vmap(update_alignment))(*stacks)
    chex.assert_trees_all_close(both, jax.tree.map(lambda *a: jnp.stack(a), *each), rtol=1e-5)
    W0, W, X0, X = arrays
    gradient = jax.grad(lambda W: update_alignment(W0, W, X0, X).alpha)(W)
    chex.assert_trees_all_close(gradient, jax.grad(jlar.lar)(W - W0, X0), rtol=1e-5)


ERRORS = {
    "W0 and W must have the same shape": lambda W0, W, X0, X: update_alignment(W0, W[1:], X0, X),
    "X0 and X must have the same shape": lambda W0, W, X0, X: update_alignment(W0, W, X0, X[1:]),
    r"W must have shape \(m, n\)": lambda W0, W, X0, X: update_alignment(W0[0], W[0], X0, X),
    r"kernel\.T": lambda W0, W, X0, X: update_alignment(W0.T, W.T, X0, X),
    "mask must have one entry per token": (
        lambda W0, W, X0, X: update_alignment(W0, W, X0, X, mask=X)
    ),
    "X0 must be real": (lambda W0, W, X0, X: update_alignment(W0, W, X0.astype(jnp.complex64), X)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_misuse_is_named_at_trace_time(message, unchecked):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ERRORS[message], *before_and_after())
