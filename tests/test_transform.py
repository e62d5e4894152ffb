"""value_and_grad and evaluate: every layer's energies through every transformation, exactly."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlar
import models
import reference
from models import BATCH, LAYERS, LENGTH, Block, Decoder, batch, loss_fn

POLICIES = {
    "no remat": lambda layer: layer,
    "full remat": jax.checkpoint,
    "statistics saved": lambda layer: jax.checkpoint(layer, policy=jlar.probes.save_statistics()),
    "dots and statistics saved": lambda layer: jax.checkpoint(
        layer,
        policy=jlar.probes.save_statistics(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        ),
    ),
    "everything saved": lambda layer: jax.checkpoint(
        layer, policy=jax.checkpoint_policies.everything_saveable
    ),
}


def decoder(remat="no remat") -> Decoder:
    return Decoder(jax.random.key(0), POLICIES[remat])


def expected(model, tokens) -> dict[str, np.ndarray]:
    """The LAR of every matrix in float64, one per layer."""

    def weight(path, row):
        layer = model
        for name in path.split("."):
            layer = getattr(layer, name)
        return layer.weight[row] if layer.weight.ndim == 3 else layer.weight

    return {
        path: np.array([reference.lar(weight(path, i), x) for i, x in enumerate(rows)])
        for path, rows in models.layer_inputs(model, tokens).items()
    }


def assert_lars(lars, model, tokens, tolerance=1e-5):
    wanted = expected(model, tokens)
    assert lars.keys() == wanted.keys()
    for path, e in lars.items():
        np.testing.assert_allclose(np.atleast_1d(e.lar), wanted[path], rtol=tolerance)
        assert (np.atleast_1d(e.count) == tokens.size).all()


def assert_bitwise(a, b):
    chex.assert_trees_all_equal(eqx.filter(a, eqx.is_array), eqx.filter(b, eqx.is_array))


@pytest.mark.parametrize("remat", POLICIES)
def test_scanned_transformer(remat):
    """Loss and gradients bit for bit, statistics to float32, under every remat policy."""
    model, tokens = decoder(remat), batch()
    (loss, lars), grads = eqx.filter_jit(jlar.value_and_grad(loss_fn))(model, tokens)
    plain_loss, plain_grads = eqx.filter_jit(eqx.filter_value_and_grad(loss_fn))(model, tokens)
    assert_bitwise((loss, grads), (plain_loss, plain_grads))
    assert jax.tree.structure(grads) == jax.tree.structure(plain_grads)
    assert_lars(lars, model, tokens)
    assert lars["blocks.up"].lar.shape == (LAYERS,) and lars["head"].lar.shape == ()


def test_statistics_are_saved_not_recomputed():
    """With the policy the recomputation of a block no longer holds its last product."""
    _, tokens = decoder(), batch()

    def products(remat):
        step = lambda model: jlar.value_and_grad(loss_fn)(model, tokens)  # noqa: E731
        return str(eqx.filter_make_jaxpr(step)(decoder(remat))[0]).count("dot_general")

    assert products("statistics saved") < products("full remat")


def test_evaluate_is_forward_only():
    model, tokens = decoder(), batch()
    jaxpr = eqx.filter_make_jaxpr(jlar.evaluate(loss_fn))(model, tokens)[0]
    plain = eqx.filter_make_jaxpr(loss_fn)(model, tokens)[0]
    assert str(jaxpr).count("dot_general") == str(plain).count("dot_general")
    loss, lars = jlar.evaluate(loss_fn)(model, tokens)
    np.testing.assert_allclose(loss, loss_fn(model, tokens), rtol=1e-6)
    assert_lars(lars, model, tokens)


def test_aux_and_other_arguments():
    model, tokens = decoder(), batch()

    def with_aux(model, tokens, *, scale):
        return scale * loss_fn(model, tokens), {"tokens": tokens.size, "name": "text"}

    call = jlar.value_and_grad(with_aux, has_aux=True, where=lambda m: m.head)
    (loss, aux, lars), grads = call(model, tokens, scale=1024.0)  # loss scaling
    assert aux == {"tokens": tokens.size, "name": "text"} and list(lars) == ["head"]
    np.testing.assert_allclose(loss, 1024 * loss_fn(model, tokens), rtol=1e-6)
    np.testing.assert_allclose(lars["head"].lar, expected(model, tokens)["head"][0], rtol=1e-5)
    assert grads.head.weight.shape == model.head.weight.shape


def test_where_takes_layers_lists_and_submodules():
    model, tokens = decoder(), batch()
    for where, paths in (
        (lambda m: [m.head, m.blocks.up], ["blocks.up", "head"]),
        (lambda m: m.blocks, [f"blocks.{name}" for name in ("q", "k", "v", "o", "up", "down")]),
    ):
        (_, lars), _ = jlar.value_and_grad(loss_fn, where=where)(model, tokens)
        assert sorted(lars) == sorted(paths)


def test_micro_batches_pool_to_the_whole_batch():
    model, tokens = decoder(), batch()
    call = jlar.value_and_grad(loss_fn)
    (_, whole), _ = call(model, tokens)

    def micro(total, tokens):
        (_, lars), _ = call(model, tokens)
        return jax.tree.map(jnp.add, total, lars), None

    zeros = jax.tree.map(jnp.zeros_like, whole)
    pooled, _ = jax.jit(lambda t: jax.lax.scan(micro, zeros, t))(tokens.reshape(2, 2, LENGTH))
    for path in whole:
        np.testing.assert_allclose(pooled[path].lar, whole[path].lar, rtol=1e-6)
        np.testing.assert_array_equal(pooled[path].count, whole[path].count)


def test_vmap_over_examples_and_over_models():
    model, tokens = decoder(), batch()
    call = jlar.value_and_grad(loss_fn)
    (_, whole), _ = call(model, tokens)
    per_example = eqx.filter_vmap(lambda t: call(model, t)[0][1])(tokens[:, None])
    for path, e in per_example.items():
        assert e.lar.shape == (BATCH, *whole[path].lar.shape)
        np.testing.assert_allclose(e.sum().lar, whole[path].lar, rtol=1e-5)
    ensemble = eqx.filter_vmap(Decoder)(jax.random.split(jax.random.key(3), 2))
    (_, lars), _ = eqx.filter_jit(eqx.filter_vmap(call, in_axes=(eqx.if_array(0), None)))(
        ensemble, tokens
    )
    second = jax.tree.map(lambda a: a[1] if eqx.is_array(a) else a, ensemble)
    assert_lars(jax.tree.map(lambda a: a[1], lars), second, tokens)


def test_cond_in_the_model():
    layers = eqx.nn.Linear(8, 8, key=jax.random.key(0)), eqx.nn.Linear(8, 8, key=jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (5, 8))

    def loss(layers, first):
        branches = [lambda x, layer=layer: jax.vmap(layer)(x) for layer in layers]
        return jnp.sum(jax.lax.cond(first, *branches, x) ** 2)

    call = jax.jit(lambda first: jlar.value_and_grad(loss)(layers, first)[0][1])
    lars = call(True)
    np.testing.assert_allclose(lars["0"].lar, reference.lar(layers[0].weight, x), rtol=1e-5)
    assert lars["1"].count == 0 and jnp.isnan(lars["1"].lar)  # not taken: nothing to pool
    total = jax.tree.map(jnp.add, lars, call(False))
    np.testing.assert_allclose(total["1"].lar, reference.lar(layers[1].weight, x), rtol=1e-5)


def test_custom_vjp_around_a_block():
    block, x = Block(jax.random.key(0)), jax.random.normal(jax.random.key(1), (LENGTH, 8))

    @jax.custom_vjp
    def call(arrays, x):
        return eqx.combine(arrays, static)(x)

    def forward(arrays, x):
        return jax.vjp(lambda arrays, x: eqx.combine(arrays, static)(x), arrays, x)

    def backward(pull_back, ct):
        return pull_back(ct)

    call.defvjp(forward, backward)
    static = None

    def loss(block, custom):
        nonlocal static
        arrays, static = eqx.partition(block, eqx.is_array)
        return jnp.sum((call(arrays, x) if custom else block(x)) ** 2)

    (_, lars), _ = jlar.value_and_grad(loss)(block, True)
    (_, plain), _ = jlar.value_and_grad(loss)(block, False)
    chex.assert_trees_all_close(lars, plain, rtol=1e-6)


def test_a_shared_layer_pools_its_calls():
    layer, x = (
        eqx.nn.Linear(8, 8, False, key=jax.random.key(0)),
        jax.random.normal(jax.random.key(1), (5, 8)),
    )
    twice = lambda f, x: jnp.sum(jax.vmap(lambda x: f(f(x)))(x))  # noqa: E731
    (_, lars), _ = jlar.value_and_grad(twice)(layer, x)
    both = np.concatenate([x, np.asarray(x) @ np.asarray(layer.weight).T])
    np.testing.assert_allclose(lars["linear"].lar, reference.lar(layer.weight, both), rtol=1e-5)
    assert lars["linear"].count == 10


def test_layers_stacked_by_vmap():
    """Weights made by eqx.filter_vmap and used side by side: one row per layer."""
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 4, key=key))(
        jax.random.split(jax.random.key(0), 3)
    )
    x = jax.random.normal(jax.random.key(1), (3, 5, 8))
    loss = lambda layers, x: jnp.sum(eqx.filter_vmap(lambda f, x: jax.vmap(f)(x))(layers, x) ** 2)  # noqa: E731
    (_, lars), _ = jlar.value_and_grad(loss)(layers, x)
    wanted = [reference.lar(W, X) for W, X in zip(layers.weight, x, strict=True)]
    np.testing.assert_allclose(lars["linear"].lar, wanted, rtol=1e-5)


def test_a_tied_embedding_is_measured_as_unembedding():
    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self, key):
            pair = (
                eqx.nn.Embedding(11, 8, key=key),
                eqx.nn.Linear(8, 11, use_bias=False, key=key),
            )
            self.shared = eqx.nn.Shared(
                pair, where=lambda pair: pair[1].weight, get=lambda pair: pair[0].weight
            )

        def __call__(self, tokens):
            embedding, head = self.shared()
            return jax.vmap(head)(jnp.tanh(jax.vmap(embedding)(tokens)))

    model, tokens = Tied(jax.random.key(0)), jnp.arange(7)
    call = lambda model: jnp.sum(model(tokens) ** 2)  # noqa: E731
    (_, lars), grads = jlar.value_and_grad(call)(model)
    W = model.shared()[0].weight
    wanted = reference.lar(W, np.tanh(W[tokens]))
    (e,) = lars.values()
    np.testing.assert_allclose(e.lar, wanted, rtol=1e-5)
    assert_bitwise(grads, eqx.filter_grad(call)(model))
    _, lars = jlar.nn.with_lar(model)(tokens)
    np.testing.assert_allclose(next(iter(lars.values())).lar, wanted, rtol=1e-5)


@pytest.mark.parametrize("cast", ["whole model", "per layer"])
def test_bf16_compute_on_float32_masters(cast):
    model, tokens = decoder(), batch()

    def narrow(a):
        return a.astype(jnp.bfloat16) if eqx.is_inexact_array(a) else a

    def loss(model, tokens):
        if cast == "per layer":  # all but what the statistics travel in
            is_leaf = lambda a: isinstance(a, jlar.Energies)  # noqa: E731
            model = jax.tree.map(narrow, model, is_leaf=is_leaf)
        else:
            model = jax.tree.map(narrow, model)
        return loss_fn(model, tokens).astype(jnp.float32)

    (_, lars), grads = eqx.filter_jit(jlar.value_and_grad(loss))(model, tokens)
    assert grads.head.weight.dtype == jnp.float32
    assert lars["head"].y.dtype == jnp.float32
    assert_lars(lars, model, tokens, tolerance=1e-2)


def test_cadence_has_one_trace_and_the_same_gradients():
    model, tokens = decoder(), batch()
    traced = chex.assert_max_traces(loss_fn, n=1)
    call = jlar.value_and_grad(traced, every=3)
    step = eqx.filter_jit(lambda model, step: call(model, tokens, step=step))
    plain_loss, plain_grads = eqx.filter_jit(eqx.filter_value_and_grad(loss_fn))(model, tokens)
    for i in range(4):
        (loss, lars), grads = step(model, jnp.asarray(i))
        chex.assert_trees_all_close(
            eqx.filter((loss, grads), eqx.is_array),
            eqx.filter((plain_loss, plain_grads), eqx.is_array),
            rtol=1e-5,
            atol=1e-7,
        )
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(lars))
        if i % 3 == 0:
            assert_lars(lars, model, tokens)
        else:
            assert all((np.asarray(e.count) == 0).all() for e in lars.values())


def test_further_differentiation():
    """A gradient through value_and_grad (meta-learning) is that without probes."""
    model = eqx.nn.MLP(3, "scalar", 5, 1, activation=jnp.tanh, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 3))
    inner = lambda model, x: jnp.sum(jax.vmap(model)(x) ** 2)  # noqa: E731

    def outer(x, gradient):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient(model, x)))

    probed = jax.grad(outer)(x, lambda m, x: jlar.value_and_grad(inner)(m, x)[1])
    plain = jax.grad(outer)(x, lambda m, x: eqx.filter(eqx.filter_grad(inner)(m, x), eqx.is_array))
    np.testing.assert_allclose(probed, plain, rtol=1e-4)


class LoRA(eqx.nn.Linear):
    def __call__(self, x, *, key=None):
        return 2 * super().__call__(x)


def test_nothing_is_dropped_silently(unchecked):
    mlp = eqx.nn.MLP(3, 2, 5, 1, key=jax.random.key(0))
    x = jnp.ones((4, 3))
    call = lambda loss, model, **options: jlar.value_and_grad(loss, **options)(model, x)  # noqa: E731
    total = lambda m, x: jnp.sum(jax.vmap(m)(x))  # noqa: E731

    with pytest.raises(ValueError, match=r"layer 'layers.1' cannot be measured"):
        call(lambda m, x: jnp.sum(jax.vmap(m.layers[0])(x)), mlp)
    with pytest.raises(ValueError, match=r"'layers.0' cannot .* stop_gradient"):
        call(lambda m, x: jnp.sum(m.layers[1](jax.lax.stop_gradient(m.layers[0](x[0])))), mlp)
    with pytest.raises(ValueError, match=r"its weight is used directly"):
        call(lambda m, x: jnp.sum(x @ m.weight.T), mlp.layers[0])
    with pytest.raises(ValueError, match=r"layer 'linear' is a LoRA"):
        call(total, LoRA(3, 2, key=jax.random.key(0)))
    with pytest.raises(ValueError, match=r"no eqx.nn.Linear .* a dict.*jlar.probes.tap"):
        call(lambda m, x: jnp.sum(m["w"]), {"w": x})
    with pytest.raises(ValueError, match="where= chose none"):
        call(total, mlp, where=lambda m: m.activation)
    with pytest.raises(ValueError, match=r"layer 'linear'.* one input"):
        call(total, eqx.nn.Linear(1, 2, key=jax.random.key(0)), where=lambda m: m)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        call(total, mlp, every=0)
    with pytest.raises(ValueError, match="keyword step="):
        call(total, mlp, every=2)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(("sizes", "batch"), [((8, "scalar", 32), 100), ((33, 7, 65), 257)])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_bit_for_bit(sizes, batch, bias):
    model = eqx.nn.MLP(*sizes, depth=2, use_bias=bias, use_final_bias=bias, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (batch, sizes[0]))

    def loss(model, x):
        """Layer by layer without biases: inside of one vmap that is to rounding only."""
        if bias:
            return jnp.mean(jax.vmap(model)(x) ** 2)
        for layer in model.layers:
            x = jnp.sin(jax.vmap(layer)(x))
        return jnp.mean(x**2)

    (value, lars), grads = eqx.filter_jit(jlar.value_and_grad(loss))(model, x)
    assert_bitwise((value, grads), eqx.filter_jit(eqx.filter_value_and_grad(loss))(model, x))
    np.testing.assert_allclose(
        lars["layers.0"].lar, reference.lar(model.layers[0].weight, x), rtol=1e-5
    )
