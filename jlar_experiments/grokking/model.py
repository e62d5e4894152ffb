"""The decoder of the grokking experiments: it reads [x, op, y, =] and answers at the last position.

Attention is causal, so the first two positions, the `prompt`, depend on x alone and are carried
once per element. The last two, the `question`, differ for each pair only after the first attention.
Of the last block no more than keys and values is needed ahead of the last position. All this saves
more than half of the work and changes the numbers by rounding only. The positions of all pairs are
rows of one matrix, first position first, so that products, slices and joins are of whole matrices.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..config import GrokConfig


class Norm(eqx.Module):
    """LayerNorm with gain and bias, or, without a bias, RMSNorm."""

    gain: Float[Array, " n"]
    bias: Float[Array, " n"] | None

    def __init__(self, width: int, *, layer: bool):
        self.gain = jnp.ones(width)
        self.bias = jnp.zeros(width) if layer else None

    def __call__(self, x: Float[Array, "*t n"]) -> Float[Array, "*t n"]:
        """Normalise the last axis."""
        if self.bias is not None:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5) * self.gain
        return x if self.bias is None else x + self.bias


class Block(eqx.Module):
    """Causal attention and a ReLU MLP, each with its residual sum and its norm, without biases."""

    qkv: Float[Array, "three_n n"]
    out: Float[Array, "n n"]
    up: Float[Array, "n four_n"]  # transposed: so its gradient is the faster product
    down: Float[Array, "n four_n"]
    norms: tuple[Norm, Norm]
    heads: int = eqx.field(static=True)
    post: bool = eqx.field(static=True)

    def __init__(self, config: GrokConfig, key: PRNGKeyArray):
        n, keys = config.width, jax.random.split(key, 4)
        xavier = (6 / (n + 3 * n)) ** 0.5  # PyTorch initialises the three projections as one
        self.qkv = _uniform(keys[0], (3 * n, n), xavier)
        self.out = _uniform(keys[1], (n, n), n**-0.5)
        self.up = _uniform(keys[2], (4 * n, n), n**-0.5).T
        self.down = _uniform(keys[3], (n, 4 * n), (4 * n) ** -0.5)
        self.post = config.norm == "post"
        self.norms = (Norm(n, layer=self.post), Norm(n, layer=self.post))
        self.heads = config.heads

    def queries(self, x: Float[Array, "tb n"]) -> Float[Array, "tb n"]:
        """What these positions look for."""
        return self._read(x) @ self.qkv[: x.shape[-1]].T

    def keys_values(self, x: Float[Array, "tb n"]) -> Float[Array, "tb two_n"]:
        """What these positions offer to later ones."""
        return self._read(x) @ self.qkv[x.shape[-1] :].T

    def _read(self, x: Float[Array, "tb n"]) -> Float[Array, "tb n"]:
        return x if self.post else self.norms[0](x)

    def __call__(
        self,
        x: Float[Array, "tb n"],
        queries: Float[Array, "tb n"],
        keys_values: Float[Array, "sb two_n"],
        t: int = 2,
    ) -> Float[Array, "tb n"]:
        """The residual stream after this block, at the last t of s positions."""
        first, second = self.norms
        x = x + _attention(queries, keys_values, t, self.heads) @ self.out.T
        if self.post:
            x = first(x)
            return second(x + jax.nn.relu(x @ self.up) @ self.down.T)
        return x + jax.nn.relu(second(x) @ self.up) @ self.down.T


class Transformer(eqx.Module):
    """Embeddings, blocks and an unembedding over the elements, `op` and `=`."""

    embedding: Float[Array, "m n"]
    positions: Float[Array, "4 n"]
    blocks: tuple[Block, ...]
    final: Norm | None
    head: Float[Array, "m n"] | None

    def __init__(self, config: GrokConfig, key: PRNGKeyArray):
        n, tokens = config.width, config.elements + 2
        keys = jax.random.split(key, 3 + config.layers)
        scale = jnp.float32(config.embedding_scale)
        self.embedding = scale * jax.random.normal(keys[0], (tokens, n))
        self.positions = scale * jax.random.normal(keys[1], (4, n))
        self.head = None if config.tied else _uniform(keys[2], (tokens, n), n**-0.5)
        self.blocks = tuple(Block(config, each) for each in keys[3:])
        self.final = Norm(n, layer=False) if config.norm == "pre" else None

    @property
    def unembedding(self) -> Float[Array, "*members m n"]:
        """The weights of which LAR is measured: the embedding, if they are tied."""
        return self.embedding if self.head is None else self.head

    def activations(self, x: Int[Array, " b"], y: Int[Array, " b"]) -> Float[Array, "b n"]:
        """The inputs X of the unembedding, one row per pair."""
        elements, op, equals = self.embedding[:-2], self.embedding[-2], self.embedding[-1]
        prompt = _positions(elements + self.positions[0], op + self.positions[1])
        asked = _positions(elements + self.positions[2], equals + self.positions[3])
        first, last = self.blocks[0], self.blocks[-1]
        question, sought, offered = (
            _of(y, rows) for rows in (asked, first.queries(asked), first.keys_values(asked))
        )
        for block, following in itertools.pairwise(self.blocks):
            before = block.keys_values(prompt)
            question = block(question, sought, jnp.concatenate([_of(x, before), offered]))
            prompt = block(prompt, block.queries(prompt), before)
            offered = following.keys_values(question)
            if following is last:
                question = question[-len(y) :]  # at `=`
            sought = following.queries(question)
        seen = jnp.concatenate([_of(x, last.keys_values(prompt)), offered])
        answer = last(question[-len(y) :], sought[-len(y) :], seen, t=1)
        return answer if self.final is None else self.final(answer)

    def __call__(self, x: Int[Array, " b"], y: Int[Array, " b"]) -> Float[Array, "b m"]:
        """The logits of the answer to each pair."""
        return self.activations(x, y) @ self.unembedding.T


class OneHotMLP(eqx.Module):
    """One hidden layer of ReLUs on one-hot x and y: the counterexample without a bottleneck."""

    left: Float[Array, "m n"]
    right: Float[Array, "m n"]
    unembedding: Float[Array, "m n"]

    def __init__(self, config: GrokConfig, key: PRNGKeyArray):
        n, tokens, keys = config.width, config.elements, jax.random.split(key, 3)
        bound = (2 * tokens) ** -0.5
        self.left = _uniform(keys[0], (tokens, n), bound)
        self.right = _uniform(keys[1], (tokens, n), bound)
        self.unembedding = _uniform(keys[2], (tokens, n), n**-0.5)

    def activations(self, x: Int[Array, " b"], y: Int[Array, " b"]) -> Float[Array, "b n"]:
        """The inputs X of the unembedding, one row per pair."""
        return jax.nn.relu(self.left[x] + self.right[y])

    def __call__(self, x: Int[Array, " b"], y: Int[Array, " b"]) -> Float[Array, "b m"]:
        """The logits of the answer to each pair."""
        return self.activations(x, y) @ self.unembedding.T


MODELS = {"transformer": Transformer, "mlp": OneHotMLP}


def _uniform(key: PRNGKeyArray, shape: tuple[int, int], bound: float) -> Float[Array, "a b"]:
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _positions(a: Float[Array, "b n"], b: Float[Array, " n"]) -> Float[Array, "2b n"]:
    return jnp.concatenate([a, jnp.broadcast_to(b, a.shape)])


def _of(elements: Int[Array, " b"], rows: Float[Array, "2m n"]) -> Float[Array, "2b n"]:
    """Both positions of these elements, out of those of all."""
    n = rows.shape[1]
    return rows.reshape(2, -1, n)[:, elements].reshape(-1, n)


def _attention(
    queries: Float[Array, "tb n"], keys_values: Float[Array, "sb two_n"], t: int, heads: int
) -> Float[Array, "tb n"]:
    """Causal attention of the last t of s positions to all that are not later.

    Heads of a few features at four positions would be thousands of tiny products. Multiplying
    features and summing them per head, by a product with the 0/1 matrix of heads, is faster.
    """
    n, s = queries.shape[1], t * keys_values.shape[0] // queries.shape[0]
    member = jnp.repeat(jnp.eye(heads), n // heads, axis=0)
    keys, values = (jnp.split(each, s) for each in jnp.split(keys_values, 2, axis=-1))
    answers = []
    for query, seen in zip(jnp.split(queries, t), range(s - t + 1, s + 1), strict=True):
        scores = jnp.concatenate([query * key for key in keys[:seen]]) @ member
        scores = scores.reshape(seen, -1, heads)
        weights = jax.nn.softmax(scores * jnp.float32((n // heads) ** -0.5), axis=0)
        spread = jnp.split(weights.reshape(-1, heads) @ member.T, seen)
        answers.append(sum(map(jnp.multiply, spread, values)))
    return jnp.concatenate(answers)
