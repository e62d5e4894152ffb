"""tap: the primitive, in models of other frameworks and in shapes equinox does not have."""

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlar
import reference
from jlar.probes import tap

KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (3, 5, 8))
zeros = jlar.Energies.zeros


def test_bare_function():
    W = jax.random.normal(KEYS[1], (4, 8))

    def loss(W, probe):
        return jnp.sum(tap(probe, W, X, X @ W.T) ** 2)

    gradient, e = jax.jit(jax.grad(loss, argnums=(0, 1)))(W, zeros(8))
    np.testing.assert_allclose(e.lar, reference.lar(W, X), rtol=1e-5)
    assert e.count == 15 and e.keep_rate == 1
    chex.assert_trees_all_equal(gradient, jax.jit(jax.grad(lambda W: jnp.sum((X @ W.T) ** 2)))(W))


def test_mlp_bit_for_bit():
    weights = [jax.random.normal(key, (16, 16)) / 4 for key in KEYS[:3]]
    x = jax.random.normal(KEYS[3], (100, 16))

    def loss(weights, probes):
        h = x
        for i, W in enumerate(weights):
            Y = h @ W.T
            h = jax.nn.gelu(Y if probes is None else tap(probes[i], W, h, Y))
        return jnp.mean(h**2)

    probes = [zeros(16)] * 3
    value, (gradient, e) = jax.jit(jax.value_and_grad(loss, (0, 1)))(weights, probes)
    plain = jax.jit(jax.value_and_grad(lambda w: loss(w, None)))(weights)
    chex.assert_trees_all_equal((value, gradient), plain)
    np.testing.assert_allclose(e[0].lar, reference.lar(weights[0], x), rtol=1e-5)


def test_masked_tokens_do_not_count():
    """Padding, and documents packed into one row: one LAR for each."""
    W = jax.random.normal(KEYS[1], (4, 8))
    documents = jnp.array([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2], [0, 0, 0, 0, -1]])

    def loss(probes):
        Y = X.at[2, 4].set(jnp.inf) @ W.T
        for i in range(3):
            probe = jax.tree.map(lambda a, i=i: a[i], probes)
            Y = tap(probe, W, X, Y, mask=documents == i)
        return jnp.sum(jnp.where(documents[..., None] >= 0, Y, 0) ** 2)

    e = jax.grad(loss)(zeros(8, (3,)))
    wanted = [reference.lar(W, X, documents == i) for i in range(3)]
    np.testing.assert_allclose(e.lar, wanted, rtol=1e-5)
    assert e.count.tolist() == [7, 5, 2]
    np.testing.assert_allclose(e.keep_rate, np.array([7, 5, 2]) / 15)


@pytest.mark.parametrize("shared", [True, False])
def test_mixture_of_experts(shared):
    """One LAR per expert, each over its own tokens; loss and gradients bit for bit."""
    experts, tokens = 3, X.reshape(-1, 8)
    W = jax.random.normal(KEYS[1], (experts, 4, 8))
    routed = jax.random.bernoulli(KEYS[2], 0.4, (experts, len(tokens)))
    inputs = tokens if shared else jnp.stack([tokens * (1 + i) for i in range(experts)])

    def block(W, probes):
        Y = jnp.einsum("emn,tn->etm" if shared else "emn,etn->etm", W, inputs)
        if probes is not None:
            axes = (0, 0, None if shared else 0, 0)
            each = jax.vmap(lambda p, w, x, y, m: tap(p, w, x, y, mask=m), (*axes, 0))
            Y = each(probes, W, inputs, Y, routed)
        return jnp.sum(jnp.where(routed[..., None], Y, 0) ** 2)

    (loss, (gradient, e)) = jax.jit(jax.value_and_grad(block, (0, 1)))(W, zeros(8, (experts,)))
    plain = jax.jit(jax.value_and_grad(lambda W: block(W, None)))(W)
    chex.assert_trees_all_equal((loss, gradient), plain)
    for i in range(experts):
        x = inputs if shared else inputs[i]
        np.testing.assert_allclose(e.lar[i], reference.lar(W[i], x, routed[i]), rtol=1e-5)
    assert e.count.tolist() == routed.sum(1).tolist()


def test_several_input_and_output_axes():
    """Attention projections as Flax DenseGeneral stores them."""
    q, o = jax.random.normal(KEYS[1], (8, 2, 3)), jax.random.normal(KEYS[2], (2, 3, 8))

    def loss(probes):
        Y = tap(probes[0], q, X, jnp.einsum("btd,dhk->bthk", X, q))
        return jnp.sum(tap(probes[1], o, Y, jnp.einsum("bthk,hkd->btd", Y, o)) ** 2)

    e = jax.grad(loss)((zeros(8), zeros(6)))
    Y = np.einsum("btd,dhk->bthk", *(reference.as_float64(a) for a in (X, q))).reshape(3, 5, 6)
    np.testing.assert_allclose(e[0].lar, reference.lar(q.reshape(8, 6).T, X), rtol=1e-5)
    np.testing.assert_allclose(e[1].lar, reference.lar(o.reshape(6, 8).T, Y), rtol=1e-5)
    assert e[0].count == e[1].count == 15


def test_flax_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(8, 6, use_bias=False, rngs=rngs)

        def __call__(self, x, probe):
            return tap(probe, self.hidden.kernel[...], x, self.hidden(x))

    model = Model(nnx.Rngs(0))
    gradient, e = nnx.grad(lambda m, probe: jnp.sum(m(X, probe) ** 2), argnums=(0, 1))(
        model, zeros(8)
    )
    np.testing.assert_allclose(e.lar, reference.lar(model.hidden.kernel[...].T, X), rtol=1e-5)
    assert gradient.hidden.kernel[...].shape == (8, 6)


def test_flax_linen_remat_and_scan():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, probe):
            dense = linen.Dense(8, use_bias=False)
            y = dense(x)
            return jnp.tanh(tap(probe, dense.variables["params"]["kernel"], x, y)), None

    scanned = linen.scan(
        linen.remat(Layer, policy=jlar.probes.save_statistics()),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=0,
        length=3,
    )()
    variables = scanned.init(KEYS[0], X, zeros(8, (3,)))

    def loss(variables, probes):
        return jnp.sum(scanned.apply(variables, X, probes)[0] ** 2)

    e = jax.jit(jax.grad(loss, argnums=1))(variables, zeros(8, (3,)))
    x = reference.as_float64(X)
    (kernels,) = jax.tree.leaves(variables)
    for i, kernel in enumerate(kernels):
        np.testing.assert_allclose(e.lar[i], reference.lar(kernel.T, x), rtol=1e-5)
        x = np.tanh(x @ reference.as_float64(kernel))


def test_nothing_is_computed_where_nobody_differentiates():
    W = jax.random.normal(KEYS[1], (4, 8))
    compiled = jax.jit(lambda W, X, p: tap(p, W, X, X @ W.T)).lower(W, X, zeros(8)).compile()
    plain = jax.jit(lambda W, X: X @ W.T).lower(W, X).compile()
    assert compiled.cost_analysis()["flops"] == plain.cost_analysis()["flops"]


def test_a_nan_product_still_counts_its_tokens():
    W = jnp.full((4, 8), jnp.nan)
    with jax.debug_nans(False):
        e = jax.grad(lambda p: jnp.sum(tap(p, W, X, X @ W.T)))(zeros(8))
        assert e.count == 15 and jnp.isnan(e.lar)


def test_shapes_that_do_not_fit(unchecked):
    W = jnp.ones((4, 8))
    for args in ((W, X[..., :4], X @ W.T), (W, X, X), (W[:, :3], X, X @ W.T), (W, X, X[0] @ W.T)):
        with pytest.raises(ValueError, match="a probe of width n = 8 expects"):
            tap(zeros(8), *args)
    with pytest.raises(ValueError, match="mask must have one entry per token"):
        tap(zeros(8), W, X, X @ W.T, mask=jnp.ones(15))
