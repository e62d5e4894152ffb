"""The decoder of the grokking experiments: it reads [x, op, y, =] and answers at the last position.

Attention is causal, so the first two positions, the `prompt`, depend on x alone and are carried
once per element. The last two, the `question`, differ for each pair only after the first attention,
whose queries, keys and values are rows of those of every token at its place. Of the last block no
more than keys and values is needed ahead of the last position. All this saves more than half of the
work and changes the numbers by rounding only. The positions of all pairs are rows of one matrix,
first position first: with an axis of positions the step takes some 1.6 times as long on a CPU.
"""

import itertools
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .config import Activation, GrokConfig


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


class Linear(eqx.Module):
    """A weight matrix, and a bias where the settings ask for biases."""

    weight: Float[Array, "m n"]
    bias: Float[Array, " m"] | None = None

    def __call__(self, x: Float[Array, "t n"], rows: slice = slice(None)) -> Float[Array, "t rows"]:
        """The outputs, or some of them."""
        y = x @ self.weight[rows].T
        return y if self.bias is None else y + self.bias[rows]


class Block(eqx.Module):
    """Causal attention and a feed-forward layer, each with its residual sum and its norm."""

    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    norms: tuple[Norm, Norm]
    heads: int = eqx.field(static=True)
    post: bool = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)

    def __init__(self, config: GrokConfig, key: PRNGKeyArray):
        n = config.width
        # One draw, because the code of each takes some .3 s to compile.
        drawn = jax.random.uniform(key, (12 * n, n), minval=-1)
        qkv, out, up, down = jnp.split(drawn, [3 * n, 4 * n, 8 * n])
        xavier = (6 / (n + 3 * n)) ** 0.5  # PyTorch initialises the three projections as one
        down = (4 * n) ** -0.5 * down.reshape(n, 4 * n)
        biases: list[Array | None] = [None] * 4
        if config.biases:  # those of the attention start at 0
            first, second = jnp.split(_uniform(jax.random.fold_in(key, 1), (5 * n,), 1), [4 * n])
            zeros = jnp.zeros(3 * n), jnp.zeros(n)
            biases = [*zeros, n**-0.5 * first, (4 * n) ** -0.5 * second]
        weights = xavier * qkv, n**-0.5 * out, n**-0.5 * up, down
        self.qkv, self.out, self.up, self.down = map(Linear, weights, biases)
        self.post, self.activation = config.norm == "post", config.activation
        self.norms = (Norm(n, layer=self.post), Norm(n, layer=self.post))
        self.heads = config.heads

    def queries(self, x: Float[Array, "tb n"]) -> Float[Array, "tb n"]:
        """What these positions ask of earlier ones."""
        return self.qkv(self._read(x), slice(x.shape[-1]))

    def keys_values(self, x: Float[Array, "tb n"]) -> Float[Array, "tb two_n"]:
        """What these positions offer to later ones."""
        return self.qkv(self._read(x), slice(x.shape[-1], None))

    def _read(self, x: Float[Array, "tb n"]) -> Float[Array, "tb n"]:
        return x if self.post else self.norms[0](x)

    def __call__(
        self,
        x: Float[Array, "tb n"],
        queries: Float[Array, "tb n"],
        keys: Float[Array, "sb n"],
        values: Float[Array, "sb n"],
        seen: int,
    ) -> Float[Array, "tb n"]:
        """The residual stream after this block, at the last t of s = `seen` positions."""
        first, second = self.norms
        x = x + self.out(_attention(queries, keys, values, seen, self.heads))
        if self.post:
            x = first(x)
            return second(x + self._fed_forward(x))
        return x + self._fed_forward(second(x))

    def _fed_forward(self, x: Float[Array, "tb n"]) -> Float[Array, "tb n"]:
        active = {"relu": jax.nn.relu, "gelu": partial(jax.nn.gelu, approximate=False)}
        return self.down(active[self.activation](self.up(x)))


class Transformer(eqx.Module):
    """Embeddings of the elements, `op` and `=`, blocks, and an unembedding over the elements."""

    embedding: Float[Array, "m n"]
    positions: Float[Array, "4 n"]
    blocks: tuple[Block, ...]
    final: Norm | None
    head: Float[Array, "m n"] | None

    def __init__(self, config: GrokConfig, key: PRNGKeyArray):
        n, tokens = config.width, config.elements + 2
        keys = jax.random.split(key, 2 + config.layers)
        scale = jnp.float32(config.embedding_scale)
        drawn = scale * jax.random.normal(keys[0], (tokens + 4, n))
        self.embedding, self.positions = drawn[:-4], drawn[-4:]
        self.head = None if config.tied else _uniform(keys[1], (config.elements, n), n**-0.5)
        self.blocks = tuple(Block(config, each) for each in keys[2:])
        self.final = Norm(n, layer=False) if config.norm == "pre" else None

    @property
    def unembedding(self) -> Float[Array, "*members m n"]:
        """The weights of which LAR is measured: the elements' embeddings, if they are tied."""
        return self.embedding[..., :-2, :] if self.head is None else self.head

    def activations(self, x: Int[Array, " b"], y: Int[Array, " b"]) -> Float[Array, "b n"]:
        """The inputs X of the unembedding, one row per pair."""
        elements, op, equals = self.embedding[:-2], self.embedding[-2:-1], self.embedding[-1:]
        m, first, last = len(elements), self.blocks[0], self.blocks[-1]
        standing = zip((elements, op, elements, equals), self.positions, strict=True)
        tokens = jnp.concatenate([token + position for token, position in standing])
        every = jnp.arange(m)
        of_prompt, of_pairs = _places(m, every, every)[:2], _places(m, x, y)
        prompt, question = _rows(tokens, of_prompt), _rows(tokens, of_pairs[2:])
        queries, known = first.queries(tokens), first.keys_values(tokens)
        told, asked = _rows(queries, of_prompt), _rows(queries, of_pairs[2:])
        offered, known = _rows(known, of_prompt), _rows(known, of_pairs)
        for block, following in itertools.pairwise(self.blocks):
            question = block(question, asked, *jnp.split(known, 2, axis=1), seen=4)
            prompt = block(prompt, told, *jnp.split(offered, 2, axis=1), seen=2)
            offered, new = following.keys_values(prompt), following.keys_values(question)
            known = jnp.concatenate([_rows(offered, jnp.stack([x, m + x])), new])
            if following is last:
                question = question[-len(y) :]  # at `=`
            told, asked = following.queries(prompt), following.queries(question)
        at_equals = (each[-len(y) :] for each in (question, asked))
        answer = last(*at_equals, *jnp.split(known, 2, axis=1), seen=4)
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


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...], bound: float) -> Float[Array, "..."]:
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _places(m: int, x: Int[Array, " b"], y: Int[Array, " b"]) -> Int[Array, "4 b"]:
    """Where the tokens of these pairs are among all 2m + 2."""
    return jnp.stack([x, jnp.full_like(x, m), m + 1 + y, jnp.full_like(y, 2 * m + 1)])


def _rows(table: Float[Array, "a n"], at: Int[Array, "s b"]) -> Float[Array, "sb n"]:
    return table[at].reshape(-1, table.shape[1])


def _attention(
    queries: Float[Array, "tb n"],
    keys: Float[Array, "sb n"],
    values: Float[Array, "sb n"],
    s: int,
    heads: int,
) -> Float[Array, "tb n"]:
    """What each of the last t of s positions takes from those up to itself."""
    n, t = keys.shape[1], s * len(queries) // len(keys)
    queries_of = jnp.split(queries.reshape(len(queries), heads, -1), t)
    keys_of, values_of = (jnp.split(a.reshape(len(a), heads, -1), s) for a in (keys, values))
    answers = []
    for seen, query in enumerate(queries_of, s - t + 1):
        scores = jnp.stack([jnp.einsum("bhd,bhd->bh", query, key) for key in keys_of[:seen]])
        weights = jax.nn.softmax(scores * jnp.float32((n // heads) ** -0.5), axis=0)[..., None]
        answers.append(sum(map(jnp.multiply, weights, values_of)))
    return jnp.concatenate(answers).reshape(-1, n)
