"""A scanned pre-norm decoder in equinox, and the same in NumPy float64 with every layer's input."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpy import ndarray

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH, BATCH = 11, 8, 2, 3, 6, 4


class Block(eqx.Module):
    """Causal attention and a ReLU MLP, each behind an RMS norm."""

    q: eqx.nn.Linear
    k: eqx.nn.Linear
    v: eqx.nn.Linear
    o: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key: PRNGKeyArray):
        d, keys = WIDTH, jax.random.split(key, 6)
        self.q, self.k, self.v, self.o = (eqx.nn.Linear(d, d, False, key=k) for k in keys[:4])
        self.up = eqx.nn.Linear(d, 4 * d, key=keys[4])
        self.down = eqx.nn.Linear(4 * d, d, key=keys[5])

    def __call__(self, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
        h = rms_norm(x)
        q, k, v = (jax.vmap(f)(h).reshape(len(x), HEADS, -1) for f in (self.q, self.k, self.v))
        scores = jnp.einsum("qhd,khd->hqk", q / jnp.asarray(q.shape[-1] ** 0.5, q.dtype), k)
        causal = jnp.tril(jnp.ones((len(x), len(x)), bool))
        a = jax.nn.softmax(jnp.where(causal, scores, jnp.asarray(-1e9, x.dtype)))
        x = x + jax.vmap(self.o)(jnp.einsum("hqk,khd->qhd", a, v).reshape(x.shape))
        return x + jax.vmap(lambda h: self.down(jax.nn.relu(self.up(h))))(rms_norm(x))


def rms_norm(x: Float[Array, "t d"]) -> Float[Array, "t d"]:
    return x * jax.lax.rsqrt(
        jnp.mean(jnp.square(x), -1, keepdims=True) + jnp.asarray(1e-6, x.dtype)
    )


class Decoder(eqx.Module):
    """Token embedding, scanned blocks, untied unembedding."""

    embedding: Float[Array, "v d"]
    blocks: Block
    head: eqx.nn.Linear
    remat: Callable[..., Any] = eqx.field(static=True)

    def __init__(self, key: PRNGKeyArray, remat: Callable[..., Any] = lambda block: block):
        keys = jax.random.split(key, 3)
        self.embedding = jax.random.normal(keys[0], (VOCABULARY, WIDTH))
        self.blocks = eqx.filter_vmap(Block)(jax.random.split(keys[1], LAYERS))
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, False, key=keys[2])
        self.remat = remat

    def __call__(self, tokens: Int[Array, "t"]) -> Float[Array, "t v"]:
        rows, static = eqx.partition(self.blocks, eqx.is_array)

        def layer(x: Array, row: Any) -> tuple[Array, None]:
            return eqx.combine(row, static)(x), None

        x, _ = jax.lax.scan(self.remat(layer), self.embedding[tokens], rows)
        return jax.vmap(self.head)(rms_norm(x))


def batch() -> Int[Array, "b t"]:
    return jax.random.randint(jax.random.key(7), (BATCH, LENGTH), 0, VOCABULARY)


def loss_fn(model: Decoder, tokens: Int[Array, "b t"]) -> Float[Array, ""]:
    logits = jax.vmap(model)(tokens)[:, :-1]
    labels = jax.nn.one_hot(tokens[:, 1:], VOCABULARY, dtype=logits.dtype)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * labels, -1))


def layer_inputs(model: Decoder, tokens: Int[Array, "b t"]) -> dict[str, list[ndarray]]:
    """What every matrix multiplies, by path, one array (b, t, n) per layer: NumPy float64."""
    inputs: dict[str, list[ndarray]] = {}

    def at(path: str, x: ndarray) -> ndarray:
        layer, rows = model, inputs.setdefault(path, [])
        for name in path.split("."):
            layer = getattr(layer, name)
        weight = np.asarray(layer.weight, np.float64)
        bias = np.asarray(0 if layer.bias is None else layer.bias, np.float64)
        if weight.ndim == 3:
            weight, bias = weight[len(rows)], bias[len(rows)] if bias.ndim else bias
        rows.append(x)
        return x @ weight.T + bias

    def norm(x: ndarray) -> ndarray:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)

    def heads(x: ndarray) -> ndarray:
        return x.reshape(*x.shape[:-1], HEADS, -1).swapaxes(1, 2)

    x = np.asarray(model.embedding, np.float64)[np.asarray(tokens)]
    causal = np.tril(np.ones((x.shape[1], x.shape[1]), bool))
    for _ in range(LAYERS):
        h = norm(x)
        q, k, v = (heads(at(f"blocks.{name}", h)) for name in "qkv")
        scores = np.where(causal, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        a = scores / scores.sum(-1, keepdims=True) @ v
        x = x + at("blocks.o", a.swapaxes(1, 2).reshape(x.shape))
        x = x + at("blocks.down", np.maximum(at("blocks.up", norm(x)), 0))
    at("head", norm(x))
    return inputs
