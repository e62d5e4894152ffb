"""The decoder of the grokking experiments: it reads [x, op, y, =] and answers at the last position.

Attention is causal, so the first two positions, the `prompt`, depend on x alone and are carried
once per element. The last two, the `question`, differ for each pair only after the first attention,
whose keys, values and scores are looked up among those of every token at its place. Of the last
block no more than keys and values is needed ahead of the last position. All this saves more than
half of the work and changes the numbers by rounding only. The positions of all pairs are rows of
one matrix, first position first, so that products, slices and joins are of whole matrices.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .config import GrokConfig

Scores = Float[Array, "seen b heads"]
"""Of one position of b pairs, for each of the first positions up to itself."""


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

    def keys_values(self, x: Float[Array, "tb n"]) -> Float[Array, "tb two_n"]:
        """What these positions offer to later ones."""
        return self._read(x) @ self.qkv[x.shape[-1] :].T

    def scores(
        self, x: Float[Array, "tb n"], keys: Float[Array, "sb n"], t: int = 2
    ) -> list[Scores]:
        """How much each of these t positions, the last of s, asks of every position it sees.

        Heads of a few features at four positions would be thousands of tiny products. Multiplying
        features and summing them per head, by a product with the 0/1 matrix of heads, is faster.
        """
        s, members = t * len(keys) // len(x), _members(x.shape[1], self.heads)
        each, scores = jnp.split(keys, s), []
        for seen, query in enumerate(jnp.split(self._queries(x), t), s - t + 1):
            products = jnp.concatenate([query * key for key in each[:seen]])
            scores.append((products @ members).reshape(seen, -1, self.heads))
        return scores

    def first_scores(
        self,
        tokens: Float[Array, "a n"],
        keys: Float[Array, "a n"],
        x: Int[Array, " b"],
        y: Int[Array, " b"],
    ) -> tuple[list[Scores], list[Scores]]:
        """The scores of the prompts of all elements, and of these questions, from those of tokens.

        Of the seven scores of a question one needs both x and y: what y asks of x.
        """
        m, members = len(tokens) // 2 - 1, _members(tokens.shape[1], self.heads)
        queries = self._queries(tokens)
        of_itself, of_op, of_equals = (
            (asking * keys) @ members for asking in (queries, queries[m], queries[-1])
        )
        by_head = (-1, self.heads, tokens.shape[1] // self.heads)
        of_y = jnp.einsum(
            "qhd,khd->qkh", queries[m + 1 : -1].reshape(by_head), keys[: m + 1].reshape(by_head)
        )
        prompts = [of_itself[None, :m], jnp.stack([of_op[:m], jnp.full_like(of_op[:m], of_op[m])])]
        to_y = jnp.stack([of_y[y, x], of_y[y, m], of_itself[m + 1 + y]])
        return prompts, [to_y, of_equals[_places(m, x, y)]]

    def _queries(self, x: Float[Array, "tb n"]) -> Float[Array, "tb n"]:
        return self._read(x) @ self.qkv[: x.shape[-1]].T

    def _read(self, x: Float[Array, "tb n"]) -> Float[Array, "tb n"]:
        return x if self.post else self.norms[0](x)

    def __call__(
        self,
        x: Float[Array, "tb n"],
        scores: list[Scores],
        values: Float[Array, "sb n"],
    ) -> Float[Array, "tb n"]:
        """The residual stream after this block."""
        first, second = self.norms
        x = x + _attention(scores, values) @ self.out.T
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
        elements, op, equals = self.embedding[:-2], self.embedding[-2:-1], self.embedding[-1:]
        m, first, last = len(elements), self.blocks[0], self.blocks[-1]
        standing = zip((elements, op, elements, equals), self.positions, strict=True)
        tokens = jnp.concatenate([token + position for token, position in standing])
        keys, values = jnp.split(first.keys_values(tokens), 2, axis=1)
        told, asked = first.first_scores(tokens, keys, x, y)
        every = jnp.arange(m)
        of_prompt, of_pairs = _places(m, every, every)[:2], _places(m, x, y)
        prompt, question = _rows(tokens, of_prompt), _rows(tokens, of_pairs[2:])
        offered, seen = _rows(values, of_prompt), _rows(values, of_pairs)
        for block, following in itertools.pairwise(self.blocks):
            prompt, question = block(prompt, told, offered), block(question, asked, seen)
            known, new = map(following.keys_values, (prompt, question))
            keys, offered = jnp.split(known, 2, axis=1)
            told = following.scores(prompt, keys)
            known = jnp.concatenate([_rows(known, jnp.stack([x, m + x])), new])
            keys, seen = jnp.split(known, 2, axis=1)
            if following is last:
                question = question[-len(y) :]  # at `=`
            asked = following.scores(question, keys, t=len(question) // len(y))
        answer = last(question[-len(y) :], asked[-1:], seen)
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


def _places(m: int, x: Int[Array, " b"], y: Int[Array, " b"]) -> Int[Array, "4 b"]:
    """Where the tokens of these pairs are among all 2m + 2."""
    return jnp.stack([x, jnp.full_like(x, m), m + 1 + y, jnp.full_like(y, 2 * m + 1)])


def _rows(table: Float[Array, "a n"], at: Int[Array, "s b"]) -> Float[Array, "sb n"]:
    return table[at].reshape(-1, table.shape[1])


def _members(n: int, heads: int) -> Float[Array, "n heads"]:
    """1 where the feature belongs to the head."""
    return jnp.repeat(jnp.eye(heads), n // heads, axis=0)


def _attention(scores: list[Scores], values: Float[Array, "sb n"]) -> Float[Array, "tb n"]:
    """What each of t positions takes from those that it sees: as many of the first as it scores."""
    n, (_, b, heads) = values.shape[1], scores[0].shape
    each_of, members, answers = jnp.split(values, len(values) // b), _members(n, heads), []
    for score in scores:
        weights = jax.nn.softmax(score * jnp.float32((n // heads) ** -0.5), axis=0)
        spread = jnp.split(weights.reshape(-1, heads) @ members.T, len(score))
        answers.append(sum(map(jnp.multiply, spread, each_of)))
    return jnp.concatenate(answers)
