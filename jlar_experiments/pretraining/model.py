"""A Gemma-2 style decoder: scanned blocks, half-precision products of float32 masters.

Weights are outputs x inputs and the blocks' are stacked over layers, (layers, m, n). Norms stand
before and after each sub-block.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .config import PretrainConfig

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
ROPE_BASE = 10_000.0


class Block(eqx.Module):
    """Causal attention and a gated-GeLU MLP, each between two RMS norms, in a residual stream."""

    q: Float[Array, "n n"]
    k: Float[Array, "n n"]
    v: Float[Array, "n n"]
    o: Float[Array, "n n"]
    gate: Float[Array, "h n"]
    up: Float[Array, "h n"]
    down: Float[Array, "n h"]
    gains: Float[Array, "4 n"]
    heads: int = eqx.field(static=True)
    cap: float = eqx.field(static=True)

    def __init__(self, config: PretrainConfig, key: PRNGKeyArray):
        n, h = config.width, config.hidden
        shapes = [(n, n)] * 4 + [(h, n)] * 2 + [(n, h)]
        for name, each, shape in zip(MATRICES, jax.random.split(key, 7), shapes, strict=True):
            setattr(self, name, _normal(each, shape))
        self.gains = jnp.ones((4, n))
        self.heads, self.cap = config.heads, config.attention_cap

    def __call__(self, x: Float[Array, "b t n"], platform: str) -> Float[Array, "b t n"]:
        """The residual stream after this block."""

        def product(name: str, x: Array) -> Array:
            return linear(getattr(self, name).astype(x.dtype), x, platform)

        h = rms_norm(x, self.gains[0])
        q, k, v = (self._heads(product(name, h)) for name in "qkv")
        a = attention(rotated(q), rotated(k), v, self.cap, platform)
        x = x + rms_norm(product("o", a.reshape(x.shape)), self.gains[1])
        h = rms_norm(x, self.gains[2])
        h = jax.nn.gelu(product("gate", h)) * product("up", h)
        return x + rms_norm(product("down", h), self.gains[3])

    def _heads(self, x: Float[Array, "b t n"]) -> Float[Array, "b t heads d"]:
        return x.reshape(*x.shape[:2], self.heads, -1)


class Decoder(eqx.Module):
    """Embedding scaled by sqrt(n), blocks, a final norm, an untied or tied unembedding."""

    embedding: Float[Array, "v n"]
    blocks: Block
    gain: Float[Array, " n"]
    unembedding: Float[Array, "v n"] | None
    dtype: str = eqx.field(static=True)
    remat: str = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __init__(self, config: PretrainConfig, key: PRNGKeyArray):
        shape, keys = (config.vocabulary, config.width), jax.random.split(key, 3)
        self.embedding = _normal(keys[0], shape)
        self.blocks = eqx.filter_vmap(lambda key: Block(config, key))(
            jax.random.split(keys[1], config.layers)
        )
        self.gain = jnp.ones(config.width)
        self.unembedding = None if config.tied else _normal(keys[2], shape)
        self.dtype, self.remat, self.unroll = config.dtype, config.remat, config.unroll

    @property
    def head(self) -> Float[Array, "v n"]:
        """W, what the logits are products with, in the dtype of the computation."""
        W = self.embedding if self.unembedding is None else self.unembedding
        return W.astype(self.dtype)

    def hidden(
        self, tokens: Int[Array, "b t"], place: NamedSharding | None = None
    ) -> Float[Array, "b t n"]:
        """X, what the unembedding multiplies; `place` is where its parts live on a mesh."""
        n = self.gain.size
        platform = jax.default_backend() if place is None else next(iter(place.device_set)).platform
        x = self.embedding[tokens].astype(self.dtype) * jnp.asarray(n**0.5, self.dtype)
        rows, static = eqx.partition(self.blocks, eqx.is_array)

        def layer(x: Array, row: Any) -> tuple[Array, None]:
            # Else XLA may take the layout of the weights, whose width is split over "data".
            x = x if place is None else jax.lax.with_sharding_constraint(x, place)
            return eqx.combine(row, static)(x, platform), None

        x, _ = jax.lax.scan(_remat(layer, self.remat), x, rows, unroll=self.unroll)
        x = x if place is None else jax.lax.with_sharding_constraint(x, place)
        return rms_norm(x, self.gain)


def linear(
    W: Float[Array, "m n"], x: Float[Array, "b t n"], platform: str
) -> Float[Array, "b t m"]:
    """x W^T."""
    if platform != "cpu":
        return x @ W.T
    # Of two axes of tokens XLA's CPU compiler makes one for the gradient of W, by a copy in which
    # it computes, in transposed order, all that went before: a seventh of a step of `bytes-tiny`.
    return (x.reshape(-1, x.shape[-1]) @ W.T).reshape(*x.shape[:-1], W.shape[0])


def rms_norm(x: Float[Array, "*t n"], gain: Float[Array, " n"]) -> Float[Array, "*t n"]:
    """x over its root mean square along the last axis, in float32 inside."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide * scale * gain).astype(x.dtype)


def rotated(x: Float[Array, "b t heads d"]) -> Float[Array, "b t heads d"]:
    """Rotary positions: features i and i + d/2 turn by position / 10000^(2i/d)."""
    t, d = x.shape[1], x.shape[3]
    speed = ROPE_BASE ** -(jnp.arange(d // 2, dtype=jnp.float32) * (2 / d))
    angle = (jnp.arange(t, dtype=jnp.float32)[:, None] * speed)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attention(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b t heads d"],
    v: Float[Array, "b t heads d"],
    cap: float,
    platform: str,
) -> Float[Array, "b t heads d"]:
    """Causal attention, scores over sqrt(d) and soft-capped at `cap` unless that is 0."""
    if not cap and platform != "cpu":
        fast = q.dtype == jnp.bfloat16 and platform == "gpu"
        with jax.numpy_dtype_promotion("standard"):  # it promotes bfloat16 by itself
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, implementation="cudnn" if fast else "xla"
            )
    # On CPUs a third of the time of dot_product_attention: it divides features, not weights.
    t, d = q.shape[1], q.shape[3]
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    scores = jnp.matmul(q, jnp.swapaxes(k, 2, 3), preferred_element_type=jnp.float32) * d**-0.5
    scores = cap * jnp.tanh(scores / cap) if cap else scores
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True)))
    total = jnp.sum(weights, -1, keepdims=True)
    features = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return jnp.swapaxes(features, 1, 2).astype(v.dtype)


def _remat(layer: Any, remat: str) -> Any:
    if remat == "none":
        return layer
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # Inside a scan nothing can be merged across the recomputation: no barrier is needed.
    return jax.checkpoint(layer, policy=dots if remat == "dots" else None, prevent_cse=False)


def _normal(key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "m n"]:
    """Standard deviation 1 / sqrt(inputs): each output starts with the variance of the inputs."""
    return jax.random.normal(key, shape) * jnp.float32(shape[1] ** -0.5)
