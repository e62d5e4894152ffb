"""The decoder against NumPy float64, its statistics, its optimisers, and any mesh."""

import dataclasses

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import reference
from jlar_experiments.pretraining import sharding, train
from jlar_experiments.pretraining.config import PretrainConfig
from jlar_experiments.pretraining.model import MATRICES, Decoder, attention, linear
from jlar_experiments.pretraining.optimisers import learning_rate, optimiser
from jlar_experiments.pretraining.presets import PRESETS

CONFIG = PretrainConfig(
    vocabulary=256, width=8, layers=3, heads=2, hidden=12, length=6, batch=8, warm_up=0, steps=5
)
BATCH = np.random.default_rng(0).integers(0, 256, (8, 7)).astype(np.int32)


def changed(**settings):
    return dataclasses.replace(CONFIG, **settings)


def model_of(config):
    """A model whose gains are not all one, as after training."""
    model = Decoder(config, jax.random.key(1))
    gains = 1 + 0.3 * jax.random.normal(jax.random.key(2), (config.layers + 1, 4, config.width))
    where = [lambda m: m.blocks.gains, lambda m: m.gain]
    return eqx.tree_at(lambda m: [w(m) for w in where], model, [gains[:-1], gains[-1, 0]])


def oracle(model, tokens, config):
    """Mean loss, and what every matrix multiplies, in float64."""
    inputs = {name: [] for name in MATRICES}
    n, d = config.width, config.width // config.heads

    def norm(x, gain):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gain

    def rope(x):  # (b, h, t, d) as complex numbers that turn
        speeds = 10_000.0 ** (-np.arange(d // 2) / (d // 2))
        turns = np.exp(1j * np.outer(np.arange(x.shape[2]), speeds))
        z = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * turns
        return np.concatenate([z.real, z.imag], -1)

    def cap(x, c):
        return c * np.tanh(x / c) if c else x

    def gelu(x):
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = reference.as_float64(model.embedding)[tokens[:, :-1]] * np.sqrt(n)
    t = x.shape[1]
    for layer in range(config.layers):
        gains = reference.as_float64(model.blocks.gains[layer])

        def product(name, x, layer=layer):
            inputs[name].append(x)
            return x @ reference.as_float64(getattr(model.blocks, name)[layer]).T

        h = norm(x, gains[0])
        q, k, v = (
            product(name, h).reshape(*h.shape[:2], config.heads, d).swapaxes(1, 2) for name in "qkv"
        )
        scores = cap(rope(q) @ rope(k).swapaxes(-1, -2) / np.sqrt(d), config.attention_cap)
        scores = np.where(np.tril(np.ones((t, t), bool)), np.exp(scores), 0)
        a = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + norm(product("o", a.swapaxes(1, 2).reshape(x.shape)), gains[1])
        h = norm(x, gains[2])
        x = x + norm(product("down", gelu(product("gate", h)) * product("up", h)), gains[3])
    X = norm(x, reference.as_float64(model.gain))
    head = model.embedding if config.tied else model.unembedding
    z = cap(X @ reference.as_float64(head).T, config.final_cap)
    log_sum = np.log(np.exp(z).sum(-1))
    labels = np.take_along_axis(z, tokens[:, 1:, None], -1)[..., 0]
    return np.mean(log_sum - labels), X, head, inputs


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"remat": "full", "loss": "fused", "tied": True},
        {"remat": "dots", "attention_cap": 2.0, "final_cap": 3.0, "unroll": 3},
    ],
    ids=["plain", "fused, tied, remat", "capped, unrolled"],
)
def test_against_float64(settings):
    config = changed(**settings)
    model, program = model_of(config), train.Program(config, sharding.mesh(1, jax.devices()[:1]))
    loss, X, head, inputs = oracle(model, BATCH, config)
    seen = program.inspection(model, BATCH)
    np.testing.assert_allclose(program.validation(model, BATCH[None]), loss, rtol=2e-6)
    np.testing.assert_allclose(seen.lars["unembedding"], reference.lar(head, X), rtol=1e-5)
    for name, rows in inputs.items():
        weights = getattr(model.blocks, name)
        wanted = [reference.lar(W, x) for W, x in zip(weights, rows, strict=True)]
        np.testing.assert_allclose(seen.lars[name], wanted, rtol=2e-5)
    s = np.linalg.svd(reference.as_float64(head), compute_uv=False)
    np.testing.assert_allclose(seen.statistics["stable_rank"], (s**2).sum() / s[0] ** 2, rtol=1e-4)
    s /= s.sum()
    np.testing.assert_allclose(
        seen.statistics["effective_rank"], np.exp(-(s * np.log(s)).sum()), rtol=1e-3
    )
    np.testing.assert_allclose(seen.statistics["rms_X"], np.sqrt((X**2).mean()), rtol=1e-5)
    L, D = seen.statistics["L3"], seen.statistics["D3"]
    np.testing.assert_allclose(L + D, seen.spectra.lar, rtol=1e-5)


def test_half_precision_is_near():
    config = changed(dtype="bfloat16")
    model, program = model_of(config), train.Program(config, sharding.mesh(1, jax.devices()[:1]))
    loss, *_ = oracle(model, BATCH, config)
    assert model.embedding.dtype == jnp.float32 and model.hidden(BATCH).dtype == jnp.bfloat16
    np.testing.assert_allclose(program.validation(model, BATCH[None]), loss, rtol=1e-2)


def test_causal():
    model = model_of(CONFIG)
    X = model.hidden(jnp.asarray(BATCH))
    later = model.hidden(jnp.asarray(BATCH).at[:, 4:].set(7))
    np.testing.assert_array_equal(X[:, :4], later[:, :4])
    assert np.abs(X[:, 4:] - later[:, 4:]).max() > 0.1


def test_eight_devices_do_what_one_does():
    """FSDP over four, two for each matrix; Muon, and every matrix measured."""
    config = changed(tensor=2, optimiser="muon", lar="every", loss="fused", layers=2)
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = sharding.mesh(min(2, len(devices)), devices)
        program = train.Program(config, mesh)
        state, metrics = program.step(program.initial(), jax.device_put(BATCH, program.batch_place))
        results.append(jax.device_get((state.model, metrics)))
    assert state.model.blocks.q.sharding.spec == sharding.TABLE["q"]
    gate = jax.tree_util.GetAttrKey("gate")
    leaves = jax.tree_util.tree_leaves_with_path(state.optimiser)
    moments = [a.sharding.spec for path, a in leaves if path[-1] == gate]
    assert moments == [sharding.TABLE["gate"]]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=2e-5)


def stacked_and_single(config):
    """The update of the stacked model, and of one whose layers are arrays of their own."""
    model = model_of(config)
    gradient = jax.tree.map(lambda a: jnp.sin(37 * a + 1), model)
    rule = optimiser(config)
    with jax.numpy_dtype_promotion("standard"):
        stacked, _ = jax.jit(rule.update)(gradient, rule.init(model), model)
    return model, gradient, stacked


def test_muon_orthogonalises_each_layer_of_the_stack():
    """The stacked update equals optax's own Muon on each layer's plain two-dimensional matrices."""
    config = changed(optimiser="muon", clip=1e9, lr=0.1)
    model, gradient, stacked = stacked_and_single(config)
    plain = optax.contrib.muon(0.1, beta=0.95, weight_decay=0.1)
    single = jax.jit(lambda W, G: plain.update({"w": G}, plain.init({"w": W}), {"w": W})[0])
    for name in ("q", "gate", "down"):  # square, tall and wide
        for layer in range(config.layers):
            W, G = (getattr(a.blocks, name)[layer].T for a in (model, gradient))  # inputs x outputs
            with jax.numpy_dtype_promotion("standard"):
                update = single(W, G)
            got = getattr(stacked.blocks, name)[layer]
            np.testing.assert_allclose(got.T, update["w"], rtol=1e-4, atol=1e-5)
            s = np.linalg.svd(np.asarray(got + 0.01 * W.T), compute_uv=False)
            scale = 0.1 * max(1, got.shape[0] / got.shape[1]) ** 0.5
            assert (s > 0.5 * scale).all() and (s < 1.3 * scale).all()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_embeddings_and_gains_are_adams_and_only_matrices_decay(name):
    model, gradient, update = stacked_and_single(changed(optimiser=name, clip=1e9, lr=0.1))
    for matrix in ("embedding", "unembedding"):
        W, G = (reference.as_float64(getattr(a, matrix)) for a in (model, gradient))
        wanted = -0.1 * (G / (np.abs(G) + 1e-8) + 0.1 * W)  # Adam's first step is the sign
        np.testing.assert_allclose(getattr(update, matrix), wanted, rtol=1e-4, atol=1e-6)
    G = reference.as_float64(gradient.gain)
    np.testing.assert_allclose(update.gain, -0.1 * G / (np.abs(G) + 1e-8), rtol=1e-4)


def test_clipping_is_global():
    _, _, small = stacked_and_single(changed(optimiser="adam", weight_decay=0.0, clip=1e-7))
    norm = optax.tree.norm(small)
    _, _, large = stacked_and_single(changed(optimiser="adam", weight_decay=0.0, clip=1e9))
    assert norm < 0.9 * optax.tree.norm(large)  # eps of Adam is not small beside such gradients


def test_learning_rates():
    rate = learning_rate(changed(lr=1.0, warm_up=4, steps=14, schedule="cosine"))
    got = [float(rate(step)) for step in range(15)]
    np.testing.assert_allclose(got[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(11) / 10))
    np.testing.assert_allclose(got[4:], cosine, atol=1e-6)
    constant = learning_rate(changed(lr=1.0, warm_up=0))
    assert float(constant(0)) == float(constant(1000)) == 1


def test_loss_falls_whatever_is_measured():
    """Fifty steps on one batch; the numbers do not depend on what is measured beside them."""
    losses = {}
    for lar in ("off", "every"):
        config = changed(lar=lar, lr=0.01, steps=50)
        program = train.Program(config, sharding.mesh(1, jax.devices()[:1]))
        state = program.initial()
        curve, metrics = [], None
        for _ in range(10):
            state, metrics = program.step(state, BATCH)
            curve.append(float(metrics.loss))
        losses[lar] = curve
        assert set(metrics.lars) == (set() if lar == "off" else {"unembedding", *MATRICES})
    assert losses["off"][-1] < losses["off"][0] - 0.3
    np.testing.assert_allclose(losses["off"], losses["every"], rtol=1e-5)


def test_the_papers_model():
    config = PRESETS["3b"].config()
    assert 3.1e9 < config.parameters < 3.3e9 and config.tokens_per_step == 196_608
    epochs = [round(196_608 * 10_000 / size, 1) for size in PRESETS["3b"].sizes]
    assert epochs == [0.0, 1.4, 2.7, 5.5, 10.9]
    assert PRESETS["3b"].config(optimiser="muon").weight_decay == 0.1
    arms = [(arm.optimiser, arm.unique_tokens) for arm in PRESETS["3b"].arms()]
    assert len(arms) == 10 and arms[0] == ("adam", 90_000_000_000)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_is_that_of_jax(dtype):
    """What CPUs run against `jax.nn.dot_product_attention`, which the others do; gradients too."""
    q, k, v, g = jax.random.normal(jax.random.key(0), (4, 2, 9, 3, 4), dtype)
    results = []
    for platform in ("cpu", "tpu"):
        with jax.numpy_dtype_promotion("strict" if platform == "cpu" else "standard"):
            out, pull = jax.vjp(lambda q, k, v, p=platform: attention(q, k, v, 0.0, p), q, k, v)
            results.append((out, pull(g)))
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    chex.assert_trees_all_close(*results, rtol=tolerance, atol=tolerance)


def test_products_are_the_same_on_every_platform():
    """With the tokens in one axis, as on CPUs, and in two; gradients too."""
    W, x, g = (
        jax.random.normal(jax.random.key(i), s)
        for i, s in enumerate([(5, 4), (2, 9, 4), (2, 9, 5)])
    )
    results = []
    for platform in ("cpu", "tpu"):
        Y, pull = jax.vjp(lambda W, x, p=platform: linear(W, x, p), W, x)
        results.append((Y, pull(g)))
    assert results[0][0].shape == g.shape
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)
