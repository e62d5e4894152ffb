"""The model against a NumPy computation of all four positions in every block, and its start."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlar_experiments.grokking.config import GrokConfig
from jlar_experiments.grokking.model import Transformer

CASES = [
    ("post", 2, 2, {}),
    ("post", 1, 1, {}),
    ("post", 3, 4, {}),
    ("pre", 2, 2, {}),
    ("pre-no-final", 2, 1, {}),
    ("post", 2, 2, {"biases": True, "activation": "gelu"}),
    ("pre", 2, 2, {"biases": True}),
]


def small(**settings) -> GrokConfig:
    return GrokConfig(**{"p": 7, "width": 16, "heads": 2, "layers": 2, **settings})


def normalised(norm, x):
    if norm.bias is None:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * norm.gain
    centred = x - np.mean(x, -1, keepdims=True)
    return centred / np.sqrt(np.var(x, -1, keepdims=True) + 1e-5) * norm.gain + norm.bias


def linear(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def fed_forward(block, x):
    h = linear(block.up, x)
    normal = np.vectorize(lambda z: (1 + math.erf(z / math.sqrt(2))) / 2)
    active = h * normal(h) if block.activation == "gelu" else np.maximum(h, 0)
    return linear(block.down, active)


def attended(block, x):
    d = len(x[0]) // block.heads
    q, k, v = np.split(linear(block.qkv, x), 3, axis=1)
    out = np.zeros_like(x)
    for t in range(4):
        for head in range(block.heads):
            own = slice(head * d, (head + 1) * d)
            score = np.exp(k[: t + 1, own] @ q[t, own] / np.sqrt(d))
            out[t, own] = score / score.sum() @ v[: t + 1, own]
    return linear(block.out, out)


def reference(model, x, y):
    """The answer position's activations for one pair, from all positions of all blocks."""
    m = jax.tree.map(lambda a: np.asarray(a, np.float64), model)
    h = m.embedding[[x, -2, y, -1]] + m.positions
    for block in m.blocks:
        first, second = block.norms
        if block.post:
            h = normalised(first, h + attended(block, h))
            h = normalised(second, h + fed_forward(block, h))
        else:
            h = h + attended(block, normalised(first, h))
            h = h + fed_forward(block, normalised(second, h))
    return h[-1] if m.final is None else normalised(m.final, h[-1])


@pytest.mark.parametrize(("norm", "layers", "heads", "others"), CASES)
def test_equals_all_positions_in_numpy(norm, layers, heads, others):
    config = small(norm=norm, layers=layers, heads=heads, **others)
    model = Transformer(config, jax.random.key(3))
    key = jax.random.key(4)  # gains and biases off their starting values
    model = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(key, a.shape), model)
    x, y = jnp.arange(7), jnp.array([3, 0, 6, 6, 1, 2, 3])
    expected = np.stack([reference(model, int(a), int(b)) for a, b in zip(x, y, strict=True)])
    np.testing.assert_allclose(model.activations(x, y), expected, atol=2e-5)
    np.testing.assert_allclose(model(x, y), expected @ model.unembedding.T, atol=2e-5)


def test_starts_as_pytorch_does():
    model = Transformer(small(p=97, width=64, embedding_scale=0.5), jax.random.key(0))
    block = model.blocks[1]
    bounds = [
        (block.qkv.weight, (6 / (4 * 64)) ** 0.5),
        (block.out.weight, 64**-0.5),
        (block.up.weight, 64**-0.5),
        (block.down.weight, 256**-0.5),
        (model.unembedding, 64**-0.5),
    ]
    for W, bound in bounds:
        assert 0.98 * bound < jnp.max(jnp.abs(W)) <= bound
        np.testing.assert_allclose(jnp.std(W), bound / 3**0.5, rtol=0.03)
    np.testing.assert_allclose(jnp.std(model.embedding), 0.5, rtol=0.03)
    np.testing.assert_allclose(jnp.std(model.positions), 0.5, rtol=0.15)
    assert model.embedding.shape == (99, 64) and model.unembedding.shape == (97, 64)
    assert all(jnp.all(norm.gain == 1) for norm in block.norms)
    assert block.qkv.bias is block.up.bias is None
    block = Transformer(small(width=64, biases=True), jax.random.key(0)).blocks[0]
    assert not jnp.any(block.qkv.bias) and not jnp.any(block.out.bias)
    for layer, bound in ((block.up, 64**-0.5), (block.down, 256**-0.5)):
        np.testing.assert_allclose(jnp.std(layer.bias), bound / 3**0.5, rtol=0.15)


def test_norms():
    assert Transformer(small(), jax.random.key(0)).final is None
    assert Transformer(small(norm="pre"), jax.random.key(0)).final is not None
    assert Transformer(small(norm="pre-no-final"), jax.random.key(0)).final is None
