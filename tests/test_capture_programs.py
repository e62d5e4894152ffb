"""capture of random programs against their evaluation by hand in NumPy float64.

A program is a list of steps on an activation (tokens, width), some of which hold programs of their
own. Each step has two readings: `jax`, the function to capture, and `numpy`, which keeps tokens
merged, computes in float64 and records each product of a weight with data. They share no code.
"""

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jaxtyping import Array, Float
from numpy import ndarray

import jlar
from jlar._stage import scanned

PROGRAMS = 500
T = 6  # tokens
SHAPES = [(2, 3), (6,), (2, 1, 3)]  # theirs: (2, 3), which is that of a mask, and axes of it merged
MORE_SHAPES = [*SHAPES, (3, 2), (1, 6)]
WIDTHS = [2, 3, 4]
VOCABULARY = 5

Shape = tuple[int, ...]


# The reading by hand: what it knows of a weight, and what it keeps of each product.


class Matrix(NamedTuple):
    """A weight, or an array of them."""

    array: ndarray
    leaves: frozenset[int]
    cut: str = ""
    layout: str = ""
    loops: frozenset[int] = frozenset()
    data: bool = False

    def to(self, array: ndarray) -> "Matrix":
        return self._replace(array=array)

    def slice(self, axis: int, start: int, stop: int) -> "Matrix":
        part = f"{start}" if stop == start + 1 else f"{start}:{stop}"
        cut = f"{self.cut}{self.layout}[{', '.join([':'] * axis + [part])}]"
        array = np.take(self.array, range(start, stop), axis)
        return self._replace(array=array, cut=cut, layout="")


class Key(NamedTuple):
    leaf: int
    cut: str
    facing: str
    n: int
    m: int
    stack: Shape


class Piece(NamedTuple):
    """One matrix of a product, its inputs, and which of them count."""

    W: Float[ndarray, "m n"]
    X: Float[ndarray, "t n"]
    keep: ndarray


class Sums:
    """Sums of squares and counts, one entry per stacked matrix."""

    def __init__(self, stack: Shape):
        sums = (np.zeros(stack) for _ in range(6))
        self.y, self.x, self.w, self.calls, self.kept, self.total = sums

    def add(self, at: Shape, W: ndarray, X: ndarray, keep: ndarray) -> None:
        self.y[at] += np.sum((X[keep] @ W.T) ** 2)
        self.x[at] += np.sum(X[keep] ** 2)
        self.w[at] += np.sum(W**2)
        self.calls[at] += 1
        self.kept[at] += keep.sum()
        self.total[at] += keep.size

    def lar(self, n: int) -> ndarray:
        """log_n of rms(Y) / (rms(W) rms(X)), of the mean squares of all pooled products."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(self.y * n**2 / (self.w / self.calls * self.x)) / (2 * math.log(n))


class Record:
    """What the reading by hand has seen so far, and where it is."""

    def __init__(self, sizes: list[int], chosen: frozenset[int], keep: ndarray, choice: ndarray):
        self.sizes, self.chosen, self.keep, self.choice = sizes, chosen, keep, choice
        self.seen: dict[Key, Sums] = {}
        self.work: dict[Key, dict[int, int]] = {}
        self.loops: list[tuple[int, int, int]] = []
        self.active = True

    def main(self, leaves: Iterable[int]) -> int:
        return min(leaves, key=lambda leaf: (-self.sizes[leaf], leaf))

    def joined(self, array: ndarray, *given: Matrix) -> Matrix:
        """What is computed from several weights: it is called as the largest of them."""
        leaves = frozenset().union(*(a.leaves for a in given))
        loops = frozenset().union(*(a.loops for a in given))
        first = next(a for a in given if self.main(leaves) in a.leaves)
        data = any(a.data for a in given)
        return Matrix(array, leaves, first.cut, first.layout, loops, data)

    def product(
        self, site: int, F: Matrix, pieces: dict[Shape, Piece], facing: str = "", tokens: int = T
    ) -> None:
        """A product of the weight F with data: one piece for each of its stacked matrices."""
        m, n = next(iter(pieces.values())).W.shape
        leaf = self.main(F.leaves)
        if F.data or n < 2 or leaf not in self.chosen:
            return
        rows = [(length, i) for loop, length, i in self.loops if loop in F.loops]
        stack = (*(length for length, _ in rows), *(max(i) + 1 for i in zip(*pieces, strict=True)))
        key = Key(leaf, F.cut, facing, n, m, stack)
        self.work.setdefault(key, {})[site] = m * tokens
        sums = self.seen.setdefault(key, Sums(stack))
        for index, piece in pieces.items():
            if self.active:
                sums.add((*(i for _, i in rows), *index), *piece)

    def names(self) -> dict[str, Key]:
        """Of several matrices of one leaf the one with the largest products has the plain name."""
        names: dict[str, Key] = {}
        for key in sorted(self.work, key=lambda k: (k.leaf, k.cut, -sum(self.work[k].values()))):
            plain = name = f"w.{key.leaf}{key.cut}"
            more = 1
            while name in names:
                name = f"{plain}#{(more := more + 1)}"
            names[name] = key
        return names


Env = dict[int, Matrix]


class At(NamedTuple):
    """What the JAX reading sees beside the activation."""

    env: dict[int, Array]
    choice: Array


class Step(NamedTuple):
    """A step, or an operation on a weight, in both readings."""

    text: str
    jax: Callable[[At, Array], Array]
    numpy: Callable[[Env, Any, Record], Any]

    def __repr__(self) -> str:
        return self.text


Block = tuple[Step, ...]


def run(block: Block, at: At, x: Array) -> Array:
    for step in block:
        x = step.jax(at, x)
    return x


def by_hand(block: Block, env: Env, X: Any, record: Record) -> Any:
    for step in block:
        X = step.numpy(env, X, record)
    return X


# Functions of one array.


@jax.custom_jvp
def cubed(W: Array) -> Array:
    return W**3


cubed.defjvp(lambda primals, tangents: (cubed(*primals), 3 * primals[0] ** 2 * tangents[0]))


def softmax(a: ndarray) -> ndarray:
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rounded(a: ndarray) -> ndarray:
    return a.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def of_weight(name: str, f: Callable[[Array], Array], g: Callable[[ndarray], ndarray]) -> Step:
    return Step(name, lambda at, W: f(W), lambda env, W, record: W.to(g(W.array)))


Both = tuple[Callable[[Array], Array], Callable[[ndarray], ndarray]]
EITHER: dict[str, Both] = {
    "half": (lambda a: 0.5 * a, lambda a: 0.5 * a),
    "tanh": (jnp.tanh, np.tanh),
    "silu": (jax.nn.silu, lambda a: a / (1 + np.exp(-a))),
    "softmax": (jax.nn.softmax, softmax),
    "rms": (
        lambda a: a * jax.lax.rsqrt(jnp.mean(a**2, -1, keepdims=True) + 1e-3),
        lambda a: a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-3),
    ),
}
OF_WEIGHTS = EITHER | {"cubed": (cubed, lambda a: a**3)}  # of data it would explode in loops
OF_DATA = EITHER | {"relu": (jax.nn.relu, lambda a: np.maximum(a, 0))}  # rows of W it may empty
AROUND: dict[str, Callable[[Callable[[Array], Array]], Callable[[Array], Array]]] = {
    "nothing": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "vmap": jax.vmap,
    "scan": lambda f: lambda W: jax.lax.scan(lambda _, row: (None, f(row)), None, W)[1],
    "fori_loop": lambda f: lambda W: jax.lax.fori_loop(0, 1, lambda _, W: f(W), W),
    "cond": lambda f: lambda W: jax.lax.cond(True, f, lambda W: W, W),
}


# How a weight meets data. In the reading by hand a form returns the pieces and makes Y of them.


class Form(NamedTuple):
    shape: Callable[[int, int], Shape]
    """Of the weight, by n and m."""
    jax: Callable[[Array, Array, int], Array]
    pieces: Callable[[ndarray, ndarray, ndarray, int], dict[Shape, Piece]]
    """Of the weight, the merged inputs, which of them count, and a number that was drawn."""
    whole: Callable[..., ndarray] = lambda y: y
    """Y, from those of the pieces."""
    fits: Callable[[int, int, Shape], bool] = lambda n, m, tokens: True
    local: bool = True
    """Whether each token goes by itself, so that it may be under vmap."""


def pieces_nm(F, X, keep, _):
    return {(): Piece(F.T, X, keep)}


def pieces_mn(F, X, keep, _):
    return {(): Piece(F, X, keep)}


def joined_tokens(a, b):
    return np.concatenate([a, b])


def vmap_tokens(x: Array, F: Array, _: int) -> Array:
    f = lambda v: F @ v  # noqa: E731
    for _ in x.shape[:-1]:
        f = jax.vmap(f)
    return f(x)


def weight_first(x: Array, F: Array, _: int) -> Array:
    return jnp.moveaxis(jax.lax.dot_general(F, x, (((1,), (x.ndim - 1,)), ((), ()))), 0, -1)


def features_first(x: Array, F: Array, _: int) -> Array:
    return jax.lax.dot_general(jnp.moveaxis(x, -1, 0), F, (((0,), (0,)), ((), ())))


def narrow(x: Array, F: Array, _: int) -> Array:
    x, F = x.astype(jnp.bfloat16), F.astype(jnp.bfloat16)
    return jnp.einsum("...n,nm->...m", x, F, preferred_element_type=jnp.float32)


def heads(x: Array) -> Array:
    return x.reshape(*x.shape[:-1], 2, -1)


def like(x: Array, y: Array) -> Array:
    """y with the token axes of x."""
    return y.reshape(*x.shape[:-1], -1)


def experts(x: Array, F: Array, size: int) -> Array:
    sizes = jnp.array([size, T - size], jnp.int32)
    return like(x, jax.lax.ragged_dot(x.reshape(T, -1), F, sizes))


def convolution(x: Array, F: Array, _: int) -> Array:
    numbers = ("NWC", "WIO", "NWC")
    x1 = x.reshape(1, T, -1)
    return like(x, jax.lax.conv_general_dilated(x1, F, (1,), "SAME", dimension_numbers=numbers))


def patches(F, X, keep, _):
    # Each token and the next one; past the last there are zeros.
    after = np.concatenate([X[1:], np.zeros_like(X[:1])])
    return {(): Piece(np.concatenate([*F]).T, np.concatenate([X, after], 1), keep)}


nm, mn = lambda n, m: (n, m), lambda n, m: (m, n)
HALVES = "a matrix for each half of the tokens"
FORMS: dict[str, Form] = {
    "x @ W": Form(nm, lambda x, F, _: x @ F, pieces_nm),
    "x @ W.T": Form(mn, lambda x, F, _: x @ F.T, pieces_mn),
    "einsum": Form(mn, lambda x, F, _: jnp.einsum("...n,mn->...m", x, F), pieces_mn),
    "einsum of weight and data": Form(
        nm, lambda x, F, _: jnp.einsum("nm,...n->...m", F, x), pieces_nm
    ),
    "dot_general of weight and data": Form(mn, weight_first, pieces_mn),
    "dot_general over the first axis": Form(nm, features_first, pieces_nm),
    "vmap over tokens": Form(mn, vmap_tokens, pieces_mn),
    "bfloat16 operands": Form(
        nm, narrow, lambda F, X, keep, _: pieces_nm(rounded(F), rounded(X), keep, _)
    ),
    "heads out": Form(
        lambda n, m: (n, 2, m // 2),
        lambda x, F, _: like(x, jnp.einsum("...n,nhd->...hd", x, F)),
        lambda F, X, keep, _: pieces_nm(F.reshape(len(F), -1), X, keep, _),
        fits=lambda n, m, tokens: m % 2 == 0,
    ),
    "heads in": Form(
        lambda n, m: (2, n // 2, m),
        lambda x, F, _: jnp.einsum("...hd,hdm->...m", heads(x), F),
        lambda F, X, keep, _: pieces_nm(np.concatenate([*F]), X, keep, _),
        fits=lambda n, m, tokens: n % 2 == 0,
    ),
    "a matrix for each head": Form(
        lambda n, m: (2, n // 2, m // 2),
        lambda x, F, _: like(x, jnp.einsum("...hd,hde->...he", heads(x), F)),
        lambda F, X, keep, _: {(i,): Piece(F[i].T, np.split(X, 2, 1)[i], keep) for i in (0, 1)},
        lambda a, b: np.concatenate([a, b], 1),
        fits=lambda n, m, tokens: n % 2 == 0 and m % 2 == 0,
    ),
    "ensemble": Form(
        lambda n, m: (2, n, m),
        lambda x, F, _: jax.vmap(jnp.matmul)(jnp.stack([x, jnp.tanh(x)]), F).sum(0),
        lambda F, X, keep, _: {(i,): Piece(F[i].T, (X, np.tanh(X))[i], keep) for i in (0, 1)},
        lambda a, b: a + b,
    ),
    "ensemble of the same inputs": Form(
        lambda n, m: (2, m, n),
        lambda x, F, _: jax.vmap(lambda W: x @ W.T)(F).sum(0),
        lambda F, X, keep, _: pieces_mn(np.concatenate([*F]), X, keep, _),
        lambda y: sum(np.split(y, 2, 1)),
    ),
    HALVES: Form(
        lambda n, m: (2, n, m),
        lambda x, F, _: jnp.einsum("e...n,enm->e...m", x, F),
        lambda F, X, keep, _: {
            (i,): Piece(F[i].T, np.split(X, 2)[i], np.split(keep, 2)[i]) for i in (0, 1)
        },
        joined_tokens,
        fits=lambda n, m, tokens: tokens[0] == 2 and len(tokens) > 1,
        local=False,
    ),
    "experts": Form(
        lambda n, m: (2, n, m),
        experts,
        lambda F, X, keep, size: {
            (0,): Piece(F[0].T, X[:size], keep[:size]),
            (1,): Piece(F[1].T, X[size:], keep[size:]),
        },
        joined_tokens,
        local=False,
    ),
    "convolution": Form(lambda n, m: (2, n, m), convolution, patches, local=False),
}


# Steps.


class Weight(NamedTuple):
    """A leaf and what happens to it before it meets data."""

    leaf: int
    operations: Block
    leaves: frozenset[int]

    def jax(self, at: At) -> Array:
        return run(self.operations, at, at.env[self.leaf])

    def numpy(self, env: Env, record: Record) -> Matrix:
        return by_hand(self.operations, env, env[self.leaf], record)

    def __repr__(self) -> str:
        return f"{self.leaf}{list(self.operations) or ''}"


def dense(name: str, weight: Weight, site: int, extra: int) -> Step:
    form = FORMS[name]

    def numpy(env: Env, X: ndarray, record: Record) -> ndarray:
        F = weight.numpy(env, record)
        pieces = form.pieces(F.array, X, record.keep, extra)
        facing = {nm: "nm", mn: "mn"}.get(form.shape, "")
        record.product(site, F, pieces, facing, T // 2 if name == HALVES else T)
        return form.whole(*(X @ W.T for W, X, _ in pieces.values()))

    text = f"{name}({weight}{f', {extra}' if name == 'experts' else ''})"
    return Step(text, lambda at, x: form.jax(x, weight.jax(at), extra), numpy)


def attention(weight: Weight, sites: list[int]) -> Step:
    """Queries, keys and values by three slices of one fused weight (3 d, n)."""

    def of_jax(at: At, x: Array) -> Array:
        W = weight.jax(at)
        d = len(W) // 3
        q, k, v = ((x @ W[i : i + d].T).reshape(T, d) for i in (0, d, 2 * d))
        return like(x, jax.nn.softmax(q @ k.T) @ v)

    def numpy(env: Env, X: ndarray, record: Record) -> ndarray:
        W = weight.numpy(env, record)
        d = len(W.array) // 3
        slices = [W.slice(0, i, i + d) for i in (0, d, 2 * d)]
        for site, F in zip(sites, slices, strict=True):
            record.product(site, F, {(): Piece(F.array, X, record.keep)})
        q, k, v = (X @ F.array.T for F in slices)
        return softmax(q @ k.T) @ v

    return Step(f"attention({weight})", of_jax, numpy)


def with_backward_rule(f: Callable[..., Array]) -> Callable[..., Array]:
    g = jax.custom_vjp(f)
    g.defvjp(lambda *args: (f(*args), args), lambda args, ct: jax.vjp(f, *args)[1](ct))
    return g


def with_forward_rule(f: Callable[..., Array]) -> Callable[..., Array]:
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g


dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
WRAPPERS: dict[str, Callable[[Callable[..., Array]], Callable[..., Array]]] = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "checkpoint but for dots": partial(jax.checkpoint, policy=dots),
    "custom_vjp": with_backward_rule,
    "custom_jvp": with_forward_rule,
}


def wrapped(name: str, block: Block) -> Step:
    f = lambda at, x: WRAPPERS[name](partial(run, block))(at, x)  # noqa: E731
    return Step(f"{name}{block}", f, partial(by_hand, block))


def mapped(axis: int, block: Block) -> Step:
    """vmap over one of the token axes of a block in which each token goes by itself."""
    f = lambda at, x: jax.vmap(lambda x: run(block, at, x), axis, axis)(x)  # noqa: E731
    return Step(f"vmap over {axis}{block}", f, partial(by_hand, block))


def branches(by: str, i: int, blocks: list[Block]) -> Step:
    """cond or switch, by a number in the program, a number in the data, or the activation."""

    def of_jax(at: At, x: Array) -> Array:
        fs = [partial(run, block, at) for block in blocks]
        if by == "activation":
            return jax.lax.cond(jnp.sum(x) > 0.0123, fs[1], fs[0], x)
        return jax.lax.switch(i if by == "constant" else at.choice[0], fs, x)

    def numpy(env: Env, X: ndarray, record: Record) -> ndarray:
        index = {"activation": X.sum() > 0.0123, "constant": i, "data": record.choice[0]}[by]
        index, active, outs = min(max(int(index), 0), len(blocks) - 1), record.active, []
        for j, block in enumerate(blocks):
            record.active = active and j == index
            outs.append(by_hand(block, env, X, record))
        record.active = active
        return outs[index]

    return Step(f"branches by {i if by == 'constant' else by}{blocks}", of_jax, numpy)


@dataclass
class Loop:
    """A block several times, with some weights that differ between iterations."""

    kind: str
    loop: int
    length: int
    block: Block = ()
    sliced: set[int] = field(default_factory=set)
    """Stacks, one of which belongs to each iteration."""
    kept: set[int] = field(default_factory=set)
    """Carried as they are."""
    halved: set[int] = field(default_factory=set)
    """Carried, and halved after each iteration."""
    reverse: bool = False
    unroll: int = 1
    checkpoint: bool = False

    def jax(self, at: At, x: Array) -> Array:
        carry = x, {leaf: at.env[leaf] for leaf in self.kept | self.halved}
        stacks = {leaf: at.env[leaf] for leaf in self.sliced}

        def body(carry: Any, mine: dict[int, Array]) -> Any:
            x, carried = carry
            x = run(self.block, At({**at.env, **carried, **mine}, at.choice), x)
            return x, {k: 0.5 * a if k in self.halved else a for k, a in carried.items()}

        body = jax.checkpoint(body) if self.checkpoint else body
        at_index = lambda i, carry: body(carry, {k: a[i] for k, a in stacks.items()})  # noqa: E731
        if self.kind in ("fori_loop", "while_loop"):
            last = self.length if self.kind == "fori_loop" else at.choice[1]
            return jax.lax.fori_loop(0, last, at_index, carry)[0]
        if self.kind == "scan":
            xs, step = stacks, body
        else:
            xs, step = jnp.arange(self.length), lambda carry, i: at_index(i, carry)
        scan = partial(jax.lax.scan, length=self.length, reverse=self.reverse, unroll=self.unroll)
        return scan(lambda carry, mine: (step(carry, mine), None), carry, xs)[0][0]

    def numpy(self, env: Env, X: ndarray, record: Record) -> ndarray:
        pools, active = self.kind == "while_loop", record.active
        order = list(range(record.choice[1] if pools else self.length))
        carried, out = {leaf: env[leaf].array for leaf in self.halved}, X
        # Where there is no iteration, one is gone through to see what would be measured.
        for i in order[::-1] if self.reverse else order or [0]:
            record.active = active and bool(order)
            mine = {leaf: env[leaf].array[i] for leaf in self.sliced} | carried
            loops = {leaf: env[leaf].loops | {self.loop} for leaf in mine}
            mine = {k: env[k]._replace(array=a, loops=loops[k]) for k, a in mine.items()}
            if not pools:
                record.loops.append((self.loop, self.length, i))
            X = by_hand(self.block, {**env, **mine}, X, record)
            if not pools:
                record.loops.pop()
            carried = {k: 0.5 * a for k, a in carried.items()}
        record.active = active
        return X if order else out


# Programs.


@dataclass
class Program:
    block: Block
    leaves: list[Shape]
    width: int
    embedding: int | None
    tied: int | None
    """The site where the embedding multiplies as well."""
    mask: ndarray | None
    left_out: set[int]
    choice: list[int]
    seed: int
    differentiable: bool
    narrow: bool

    def arguments(self) -> tuple[dict[str, list[Array]], Array, Array]:
        rng = np.random.default_rng(self.seed)
        weights = [jnp.asarray(0.8 * rng.normal(size=s), jnp.float32) for s in self.leaves]
        x = jnp.asarray(rng.normal(size=(2, 3, self.width)), jnp.float32)
        if self.embedding is not None:
            x = jnp.asarray(rng.integers(VOCABULARY, size=(2, 3)), jnp.int32)
        return {"w": weights}, x, jnp.asarray(self.choice, jnp.int32)

    def __call__(self, weights: dict[str, list[Array]], x: Array, choice: Array) -> Array:
        at = At(dict(enumerate(weights["w"])), choice)
        x = x if self.embedding is None else at.env[self.embedding][x]
        x = run(self.block, at, x)
        x = x if self.tied is None else x @ at.env[self.embedding].T
        return jnp.mean(x**2)

    def by_hand(self, weights, x, choice) -> tuple[float, Record]:
        keep = np.ones(T, bool) if self.mask is None else self.mask.reshape(-1)
        arrays = [np.asarray(a).astype(np.float64) for a in weights["w"]]
        chosen = frozenset(range(len(arrays))) - self.left_out
        record = Record([a.size for a in arrays], chosen, keep, np.asarray(choice))
        env = {i: Matrix(a, frozenset({i})) for i, a in enumerate(arrays)}
        X = np.asarray(x)
        X = X.reshape(T, -1) if self.embedding is None else arrays[self.embedding][X.reshape(-1)]
        with np.errstate(over="ignore"):  # in silu, where it is right
            X = by_hand(self.block, env, X.astype(np.float64), record)
        if self.tied is not None:
            W = env[self.embedding]
            record.product(self.tied, W, {(): Piece(W.array, X, keep)})
            X = X @ W.array.T
        return float(np.mean(X**2)), record

    def chosen(self, path: str) -> bool:
        return int(path.split(".")[1]) not in self.left_out

    def captured(self, f: Callable[..., Any] | None = None) -> Callable[..., Any]:
        return jlar.capture(f or self, where=self.chosen, mask=self.mask)


@dataclass
class Draft:
    """A program while it is drawn."""

    draw: Callable[..., Any]
    masked: bool
    leaves: list[Shape] = field(default_factory=list)
    lead: list[int] = field(default_factory=list)
    """How many leading axes of each leaf belong to loops."""
    loops: list[Loop] = field(default_factory=list)
    """Those around what is drawn now."""
    used: list[tuple[Weight, str, int, int]] = field(default_factory=list)
    """Weights, the forms in which they have met data, n and m."""
    sites: int = 0
    budget: int = 5
    local: bool = False
    """Whether this is under vmap over tokens."""
    differentiable: bool = True
    narrow: bool = False

    def one_of(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def site(self) -> int:
        self.sites += 1
        return self.sites

    def leaf(self, shape: Shape) -> int:
        """A new leaf, which is the same or another one in each iteration of the loops around."""
        i, mine = len(self.leaves), [loop for loop in self.loops if self.one_of(True, False)]
        for loop in mine:
            loop.sliced.add(i)
        if self.loops and self.loops[-1] not in mine:
            how = self.one_of("closed over", "closed over", "kept", "halved")
            getattr(self.loops[-1], how, set()).add(i)
        self.leaves.append((*(loop.length for loop in mine), *shape))
        self.lead.append(len(mine))
        return i

    def unsliced(self, leaf: int) -> int:
        """How many of these axes the leaf still has here."""
        return self.lead[leaf] - sum(leaf in loop.sliced for loop in self.loops)

    def weight(self, shape: Shape) -> Weight:
        operations, first = [], len(self.leaves)
        for _ in range(self.one_of(0, 0, 1, 1, 2, 3)):
            operation, shape = self.operation(shape)
            operations.append(operation)
        leaf = self.leaf(shape)
        return Weight(leaf, tuple(operations[::-1]), frozenset(range(first, len(self.leaves))))

    def operation(self, shape: Shape) -> tuple[Step, Shape]:
        """An operation that returns this shape, and the shape that it wants."""
        kinds = {
            self.rounded: 1,
            self.transposed: len(shape) in (2, 3),
            self.reshaped: 1,
            self.sliced: 2,
            self.indexed: 1,
            self.elementwise: 2 * (len(shape) > 1),
            self.adapted: 2 * (len(shape) == 2),
            self.normalised: 1,
            self.summed: 1,
            self.scaled: 1,
            self.spoiled: self.sites > 1,
        }
        return self.one_of(*(kind for kind, n in kinds.items() for _ in range(n)))(shape)

    def rounded(self, shape: Shape) -> tuple[Step, Shape]:
        self.narrow = True
        f = lambda W: W.astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731
        return of_weight("bfloat16", f, rounded), shape

    def transposed(self, shape: Shape) -> tuple[Step, Shape]:
        axes = (1, 0) if len(shape) == 2 else self.one_of((0, 2, 1), (2, 0, 1))

        def numpy(env: Env, W: Matrix, record: Record) -> Matrix:
            more = ".T" if len(axes) == 2 else f".transpose{axes}"
            layout = "" if W.layout == more == ".T" else W.layout + more
            return W.to(W.array.transpose(axes))._replace(layout=layout)

        f = lambda at, W: jnp.transpose(W, axes)  # noqa: E731
        return Step(f"transpose{axes}", f, numpy), tuple(shape[i] for i in np.argsort(axes))

    def reshaped(self, shape: Shape) -> tuple[Step, Shape]:
        whole = self.one_of((math.prod(shape),), (1, *shape))

        def numpy(env: Env, W: Matrix, record: Record) -> Matrix:
            layout = W.layout if whole == shape else f"{W.layout}.reshape{shape}"
            return W.to(W.array.reshape(shape))._replace(layout=layout)

        return Step(f"reshape{shape}", lambda at, W: W.reshape(shape), numpy), whole

    def sliced(self, shape: Shape) -> tuple[Step, Shape]:
        """A part of a fused weight."""
        axis, (start, after) = self.one_of(*range(len(shape))), self.one_of((0, 1), (2, 0), (1, 1))
        stop = start + shape[axis]
        how, f = self.one_of(
            ("slice", lambda at, W: W[(*[slice(None)] * axis, slice(start, stop))]),
            ("split", lambda at, W: jnp.split(W, [start, stop], axis)[1]),
            ("lax.slice", lambda at, W: jax.lax.slice_in_dim(W, start, stop, axis=axis)),
        )
        whole = (*shape[:axis], stop + after, *shape[axis + 1 :])
        numpy = lambda env, W, record: W.slice(axis, start, stop)  # noqa: E731
        return Step(f"{how}({axis}, {start}, {stop})", f, numpy), whole

    def indexed(self, shape: Shape) -> tuple[Step, Shape]:
        i = self.one_of(0, 1)
        numpy = lambda env, W, record: W.slice(0, i, i + 1).to(W.array[i])  # noqa: E731
        return Step(f"[{i}]", lambda at, W: W[i], numpy), (2, *shape)

    def elementwise(self, shape: Shape) -> tuple[Step, Shape]:
        """A function of the weight alone, inside of some construct."""
        name, around = self.one_of(*OF_WEIGHTS), self.one_of(*AROUND)
        f, g = OF_WEIGHTS[name]
        return of_weight(f"{name} in {around}", AROUND[around](f), g), shape

    def adapted(self, shape: Shape) -> tuple[Step, Shape]:
        """W + B A."""
        A, B = self.leaf((1, shape[1])), self.leaf((shape[0], 1))

        def numpy(env: Env, W: Matrix, record: Record) -> Matrix:
            BA = record.joined(env[B].array @ env[A].array, env[B], env[A])
            return record.joined(W.array + BA.array, W, BA)

        f = lambda at, W: W + at.env[B] @ at.env[A]  # noqa: E731
        return Step(f"+ {B} @ {A}", f, numpy), shape

    def normalised(self, shape: Shape) -> tuple[Step, Shape]:
        """Weight norm: each row has a length of its own."""
        g = self.leaf(shape[:-1])

        def f(at: At, W: Array) -> Array:
            return at.env[g][..., None] * W / jnp.linalg.norm(W, axis=-1, keepdims=True)

        def numpy(env: Env, W: Matrix, record: Record) -> Matrix:
            lengths = np.sqrt((W.array**2).sum(-1, keepdims=True))
            return record.joined(env[g].array[..., None] * W.array / lengths, env[g], W)

        return Step(f"weight norm {g}", f, numpy), shape

    def summed(self, shape: Shape) -> tuple[Step, Shape]:
        i = self.leaf(shape)
        numpy = lambda env, W, record: record.joined(env[i].array - W.array, env[i], W)  # noqa: E731
        return Step(f"{i} -", lambda at, W: at.env[i] - W, numpy), shape

    def scaled(self, shape: Shape) -> tuple[Step, Shape]:
        """Times a number of the data, which leaves it a weight: it cancels."""
        how, f = self.one_of(
            ("W * s", lambda W, s: W * s),
            ("s * W", lambda W, s: s * W),
            ("W / s", lambda W, s: W / s),
        )
        number = lambda choice: choice[0] + 1.5  # noqa: E731
        numpy = lambda env, W, record: W.to(f(W.array, number(record.choice)))  # noqa: E731
        return Step(how, lambda at, W: f(W, number(at.choice.astype(jnp.float32))), numpy), shape

    def spoiled(self, shape: Shape) -> tuple[Step, Shape]:
        """Times data, entry by entry: no weight any more."""

        def numpy(env: Env, W: Matrix, record: Record) -> Matrix:
            return W.to(W.array * (record.choice[0] + 0.5))._replace(data=True)

        def of_jax(at: At, W: Array) -> Array:
            return W * jnp.broadcast_to(at.choice[0].astype(jnp.float32) + 0.5, W.shape)

        return Step("times data", of_jax, numpy), shape

    def dense(self, tokens: Shape, n: int, m: int | None) -> tuple[Step, int]:
        """A product, at times with a weight that has been used before."""
        self.budget -= 1
        again = [
            (weight, form, to)
            for weight, name, a, b in self.used
            if not any(map(self.unsliced, weight.leaves))
            for form, to in self.again(name, a, b, n)
            if m in (None, to) and self.fits(form, n, to, tokens)
        ]
        if again and self.one_of(False, False, True):
            weight, form, m = self.one_of(*again)
        else:
            m = m or self.one_of(*WIDTHS)
            form = self.one_of(*(form for form in FORMS if self.fits(form, n, m, tokens)))
            weight = self.weight(FORMS[form].shape(n, m))
        assert m is not None
        self.used.append((weight, form, n, m))
        self.narrow |= form == "bfloat16 operands"
        return dense(form, weight, self.site(), self.one_of(0, 2, 3)), m

    def again(self, name: str, a: int, b: int, n: int) -> list[tuple[str, int]]:
        """Forms in which a weight (n, m) = (a, b) can be used again: also transposed."""
        shape = FORMS[name].shape
        if shape not in (nm, mn):
            return [(name, b)] if n == a else []
        same = [(form, b) for form in FORMS if FORMS[form].shape is shape and n == a]
        other = mn if shape is nm else nm
        return same + [(f, a) for f in FORMS if FORMS[f].shape is other and n == b]

    def fits(self, name: str, n: int, m: int, tokens: Shape) -> bool:
        form = FORMS[name]
        if (self.local and not form.local) or (self.masked and name == HALVES):
            return False
        return form.fits(n, m, tokens)

    def block(self, tokens: Shape, n: int, m: int | None, size: int, depth: int) -> tuple:
        """Some steps from width n to width m (or any), which leave the token axes as they were."""
        steps, here, width = [], tokens, n
        for _ in range(self.one_of(*range(1, size + 1))):
            if self.budget <= 0:
                break
            step, here, width = self.step(here, width, depth)
            steps.append(step)
        if here != tokens:
            steps.append(self.tokens(tokens))
        if width != (m or width):
            step, width = self.dense(tokens, width, m)
            steps.append(step)
        return tuple(steps), width

    def step(self, tokens: Shape, n: int, depth: int) -> tuple[Step, Shape, int]:
        kinds = ["dense"] * 4 + ["activation"] * 2 + ["bias", "gain"]
        kinds += ["tokens", "attention"] * (not self.local)
        if depth:
            kinds += ["loop"] * 3 + ["wrapped"] * 2 + ["residual"]
            if not self.local:
                kinds += ["branches"] * 2 + ["mapped"] * (len(tokens) > 1)
        kind, m = self.one_of(*kinds), n
        if kind == "dense":
            step, m = self.dense(tokens, n, None)
        elif kind == "activation":
            name = self.one_of(*OF_DATA)
            f, g = OF_DATA[name]
            step = Step(name, lambda at, x: f(x), lambda env, X, record: g(X))
        elif kind == "bias":
            i = self.leaf((n,))
            numpy = lambda env, X, record: X + env[i].array  # noqa: E731
            step = Step(f"+ {i}", lambda at, x: x + at.env[i], numpy)
        elif kind == "gain":
            i = self.leaf((n,))
            numpy = lambda env, X, record: X * env[i].array  # noqa: E731
            step = Step(f"* {i}", lambda at, x: x * at.env[i], numpy)
        elif kind == "tokens":
            tokens = self.one_of(*(SHAPES if self.masked else MORE_SHAPES))
            step = self.tokens(tokens)
        elif kind == "attention":
            self.budget -= 2
            m = self.one_of(*WIDTHS)
            step = attention(self.weight((3 * m, n)), [self.site() for _ in range(3)])
        elif kind == "wrapped":
            block, m = self.block(tokens, n, None, 2, depth - 1)
            step = wrapped(self.one_of(*WRAPPERS), block)
        elif kind == "residual":
            step = self.residual(self.block(tokens, n, n, 2, depth - 1)[0])
        elif kind == "branches":
            step, m = self.branches(tokens, n, depth)
        elif kind == "mapped":
            # Under vmap over a later axis some products have their tokens in another order.
            axis = 0 if self.masked else self.one_of(*range(len(tokens)))
            self.local = True
            block, m = self.block(tokens[:axis] + tokens[axis + 1 :], n, None, 3, depth - 1)
            self.local = False
            step = mapped(axis, block)
        else:
            step = self.loop(tokens, n, depth)
        return step, tokens, m

    def tokens(self, tokens: Shape) -> Step:
        """Other axes for the same tokens."""
        f = lambda at, x: x.reshape(*tokens, x.shape[-1])  # noqa: E731
        return Step(f"tokens{tokens}", f, lambda env, X, record: X)

    def residual(self, block: Block) -> Step:
        numpy = lambda env, X, record: X + by_hand(block, env, X, record)  # noqa: E731
        return Step(f"residual{block}", lambda at, x: x + run(block, at, x), numpy)

    def branches(self, tokens: Shape, n: int, depth: int) -> tuple[Step, int]:
        by = self.one_of("constant", "data", "activation")
        number = 2 if by == "activation" else self.one_of(1, 2, 3)
        first, m = self.block(tokens, n, None, 2, depth - 1)
        more = [self.block(tokens, n, m, 2, depth - 1)[0] for _ in range(number - 1)]
        return branches(by, self.one_of(0, 1, 2), [first, *more]), m

    def loop(self, tokens: Shape, n: int, depth: int) -> Step:
        kinds = ["scan", "scan", "scan of indices", "fori_loop", *["while_loop"] * (not self.local)]
        kind = self.one_of(*kinds)
        self.differentiable &= kind != "while_loop"
        loop = Loop(kind, self.site(), 3 if kind == "while_loop" else self.one_of(1, 2, 3))
        # A stack that another loop has gone through already may be gone through once more.
        for leaf, shape in enumerate(self.leaves):
            if self.lead[leaf] == self.unsliced(leaf) == 1 and shape[0] == loop.length:
                if self.one_of(True, False):
                    loop.sliced.add(leaf)
        self.loops.append(loop)
        loop.block, _ = self.block(tokens, n, n, 3, depth - 1)
        self.loops.pop()
        if "scan" in kind:
            loop.reverse, loop.unroll = self.one_of(False, True), self.one_of(1, 2)
        loop.checkpoint = self.one_of(False, True)
        return Step(repr(loop), loop.jax, loop.numpy)


@st.composite
def programs(draw: Callable[..., Any]) -> Program:
    mask = draw(st.none() | st.lists(st.booleans(), min_size=T, max_size=T))
    draft = Draft(draw, mask is not None)
    width = draft.one_of(*WIDTHS)
    embedding = draft.leaf((VOCABULARY, width)) if draft.one_of(False, False, True) else None
    block, m = draft.block((2, 3), width, None, 5, draft.one_of(1, 2, 2, 3))
    last, _ = draft.dense((2, 3), m, width)
    return Program(
        (*block, last),
        draft.leaves,
        width,
        embedding,
        tied=None if embedding is None or draft.one_of(True, False) else draft.site(),
        mask=None if mask is None else np.array(mask).reshape(2, 3),
        left_out=draw(st.sets(st.sampled_from(range(len(draft.leaves))), max_size=1)),
        choice=[draft.one_of(0, 1, 2, -1, 5), draft.one_of(0, 1, 2, 3)],
        seed=draw(st.integers(0, 10**6)),
        differentiable=draft.differentiable,
        narrow=draft.narrow,
    )


# Jaxprs in NumPy, one operation at a time, which saves compiling thousands of them.


def of_product(p: dict, a: ndarray, b: ndarray) -> ndarray:
    (ca, cb), (ba, bb) = p["dimension_numbers"]
    of_a = list(range(a.ndim))
    of_b = [a.ndim + j for j in range(b.ndim)]
    for i, j in zip((*ca, *ba), (*cb, *bb), strict=True):
        of_b[j] = i
    free = [k for k in (*of_a, *of_b) if k not in (*ca, *ba)]
    wide = (x.astype(np.float32) for x in (a, b))
    out = np.einsum(next(wide), of_a, next(wide), of_b, [*ba, *free])
    return out.astype(p["preferred_element_type"] or a.dtype)


def of_broadcast(p: dict, a: ndarray) -> ndarray:
    shape = np.ones(len(p["shape"]), int)
    shape[list(p["broadcast_dimensions"])] = a.shape
    return np.broadcast_to(a.reshape(shape), p["shape"])


def of_dynamic_slice(p: dict, a: ndarray, *starts: ndarray) -> ndarray:
    ends = np.subtract(a.shape, p["slice_sizes"])
    first = np.clip([int(start) for start in starts], 0, ends)
    return a[tuple(map(slice, first, np.add(first, p["slice_sizes"])))]


def of_pad(p: dict, a: ndarray, value: ndarray) -> ndarray | None:
    low, high, between = np.transpose(p["padding_config"])
    return (
        None
        if between.any() or min(*low, *high) < 0
        else np.pad(a, [*zip(low, high, strict=True)], constant_values=value)
    )


OPERATIONS: dict[str, Callable[..., ndarray | None]] = {
    **dict.fromkeys(("add", "add_any"), lambda p, a, b: a + b),
    "sub": lambda p, a, b: a - b,
    "mul": lambda p, a, b: a * b,
    "div": lambda p, a, b: a / b if a.dtype.kind == "f" else None,
    "neg": lambda p, a: -a,
    "max": lambda p, a, b: np.maximum(a, b),
    "exp": lambda p, a: np.exp(a),
    "log": lambda p, a: np.log(a),
    "tanh": lambda p, a: np.tanh(a),
    "sqrt": lambda p, a: np.sqrt(a),
    "rsqrt": lambda p, a: 1 / np.sqrt(a),
    "logistic": lambda p, a: 1 / (1 + np.exp(-a)),
    "square": lambda p, a: a * a,
    "integer_pow": lambda p, a: a ** p["y"],
    "gt": lambda p, a, b: a > b,
    "lt": lambda p, a, b: a < b,
    "eq": lambda p, a, b: a == b,
    "ne": lambda p, a, b: a != b,
    "and": lambda p, a, b: a & b,
    "select_n": lambda p, i, *a: np.where(i, a[1], a[0]) if len(a) == 2 else None,
    "convert_element_type": lambda p, a: a.astype(p["new_dtype"]),
    "broadcast_in_dim": of_broadcast,
    "reshape": lambda p, a: a.transpose(p["dimensions"] or range(a.ndim)).reshape(p["new_sizes"]),
    "transpose": lambda p, a: a.transpose(p["permutation"]),
    "squeeze": lambda p, a: np.squeeze(a, p["dimensions"]),
    "reduce_sum": lambda p, a: a.sum(p["axes"], dtype=a.dtype),
    "reduce_max": lambda p, a: a.max(p["axes"]),
    "concatenate": lambda p, *a: np.concatenate(a, p["dimension"]),
    "stack": lambda p, *a: np.stack(a, p["axis"]),
    "pad": of_pad,
    "slice": lambda p, a: a[
        tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or [1] * a.ndim))
    ],
    "dynamic_slice": of_dynamic_slice,
    "dot_general": of_product,
}


def stepwise(closed: jex.ClosedJaxpr, *args: Any) -> list[ndarray]:
    """What a jaxpr computes: `jax.disable_jit` would hide loops and branches from the trace."""
    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env |= zip(closed.jaxpr.invars, args, strict=True)
    read = lambda a: np.asarray(a.val if isinstance(a, jex.Literal) else env[a])  # noqa: E731
    for eqn in closed.jaxpr.eqns:
        env |= zip(eqn.outvars, operation(eqn, list(map(read, eqn.invars))), strict=True)
    return list(map(read, closed.jaxpr.outvars))


def operation(eqn: Any, given: list[ndarray]) -> list[Any]:
    p, name = eqn.params, eqn.primitive.name
    if name == "scan":
        constant, carried = scanned(p)
        k, c = constant, constant + carried
        carry, rows, order = given[k:c], [], range(p["length"])
        for i in reversed(order) if p["reverse"] else order:
            outs = stepwise(p["jaxpr"], *given[:k], *carry, *(a[i] for a in given[c:]))
            carry, rows = outs[: c - k], [*rows, outs[c - k :]]
        rows = rows[::-1] if p["reverse"] else rows
        return [*carry, *(np.stack(ys) for ys in zip(*rows, strict=True))]
    if name == "while":
        k, c, carry = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"], given
        while (go_on := stepwise(p["cond_jaxpr"], *given[:k], *carry[c:])[0]).any():
            outs = stepwise(p["body_jaxpr"], *given[k:c], *carry[c:])
            # Under vmap each loop has an end of its own.
            ends = [go_on.reshape(go_on.shape + (1,) * (a.ndim - go_on.ndim)) for a in outs]
            carry = [*given[:c], *map(np.where, ends, outs, carry[c:])]
        return carry[c:]
    if name == "cond":
        last = len(p["branches"]) - 1
        return stepwise(p["branches"][min(max(int(given[0]), 0), last)], *given[1:])
    inner = p.get("jaxpr", p.get("call_jaxpr"))
    if inner is not None:
        closed = inner if isinstance(inner, jex.ClosedJaxpr) else jex.ClosedJaxpr(inner, [])
        return stepwise(closed, *given)
    out = OPERATIONS[name](p, *given) if name in OPERATIONS else None
    if out is None:
        out = eqn.primitive.bind(*map(jnp.asarray, given), **p)
    return list(out) if eqn.primitive.multiple_results else [out]


def evaluated(f: Callable[..., Any], *args: Any) -> Any:
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    with np.errstate(all="ignore"):
        outs = stepwise(closed, *map(np.asarray, jax.tree.leaves(args)))
    return jax.tree.unflatten(jax.tree.structure(shape), outs)


# Checks.


def check_statistics(program: Program, record: Record, lars: dict[str, jlar.Energies]) -> None:
    names = record.names()
    assert set(lars) == set(names)
    tolerance = 1e-3 if program.narrow else 1e-5
    for name, key in names.items():
        energies, sums = jax.tree.map(jnp.asarray, lars[name]), record.seen[key]
        lar, calls = np.asarray(energies.lar), np.asarray(energies.calls)
        assert energies.n == key.n and lar.dtype == np.float32
        assert lar.shape == key.stack, (name, lar.shape, key.stack)
        np.testing.assert_array_equal(np.asarray(energies.count), sums.kept, name)
        np.testing.assert_array_equal(calls, sums.calls, name)
        with np.errstate(invalid="ignore"):
            kept = sums.kept / sums.total
        np.testing.assert_allclose(np.asarray(energies.keep_rate), kept, 1e-6, err_msg=name)
        np.testing.assert_allclose(lar, sums.lar(key.n), 0, tolerance, err_msg=name)


def check_same(result: Any, expected: Any, tolerance: float = 0) -> None:
    """Equal up to this part of the largest entry of all."""
    result, expected = ([np.asarray(a) for a in jax.tree.leaves(b)] for b in (result, expected))
    largest = max(np.max(np.abs(a), initial=1e-30, where=np.isfinite(a)) for a in expected)
    for a, b in zip(result, expected, strict=True):
        np.testing.assert_allclose(a, b, 0, tolerance * largest)


def check(program: Program) -> None:
    args, text = program.arguments(), repr(program)
    value, record = program.by_hand(*args)
    captured = program.captured()
    if not record.names():
        with pytest.raises(ValueError, match=r"nothing to measure|accepts none"):
            jax.eval_shape(captured, *args)
        return
    # Most of the time goes into traces, so only some programs are checked in further ways.
    draw = zlib.crc32(text.encode())
    near, compiled = (1e-2, 1e-2) if program.narrow else (1e-4, 1e-5)
    if program.differentiable:
        expected = evaluated(jax.value_and_grad(program), *args)
        (same, lars), grads = evaluated(jax.value_and_grad(captured, has_aux=True), *args)
        check_same(same, expected[0])
        # What flows back through a loop may be summed in another order.
        check_same(grads, expected[1], compiled / 10 if "Loop" in text else 0)
        check_same(same, value, near)
        check_statistics(program, record, lars)
        if draw % 40 == 1:
            (same, lars), grads = jax.jit(jax.value_and_grad(captured, has_aux=True))(*args)
            check_same((same, grads), expected, compiled)
            check_statistics(program, record, lars)
    if draw % 10 == 0 or not program.differentiable:
        same, lars = evaluated(captured, *args)
        check_same(same, evaluated(program, *args))
        check_same(same, value, near)
        check_statistics(program, record, lars)
    if draw % 40 == 2:
        same, lars = captured(*args)
        check_same(same, program(*args), compiled)
        check_statistics(program, record, lars)
    if draw % 20 == 3:
        (_, inner), outer = evaluated(program.captured(captured), *args)
        check_statistics(program, record, inner)
        check_statistics(program, record, outer)
    if draw % 20 == 5:
        rows = jlar.sites(program, where=program.chosen)(*args)
        assert {row.path for row in rows} == {f"w.{i}" for i in range(len(program.leaves))}
        assert {row.name for row in rows if not row.why} == set(record.names())
    if draw % 20 == 4 and "experts" not in text:  # ragged_dot has no vmap yet
        check_batch(program, captured, *args)


def check_batch(program: Program, captured: Any, weights: Any, x: Array, choice: Array) -> None:
    """vmap keeps the statistics of each batch apart, also where each takes branches of its own."""
    xs = jnp.stack([x, jnp.flip(x, 0), x[:, ::-1]])
    choices = jnp.stack([choice, jnp.int32([0, 3]), jnp.int32([1, 0])])
    _, lars = evaluated(jax.vmap(captured, (None, 0, 0)), weights, xs, choices)
    for i in range(3):
        _, record = program.by_hand(weights, xs[i], choices[i])
        check_statistics(program, record, jax.tree.map(lambda a, i=i: a[i], lars))


passed: set[str] = set()


@settings(
    max_examples=PROGRAMS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(programs())
def test_random_programs(program):
    # Hypothesis likes to repeat itself; 500 programs are to be different ones.
    text = repr(program.block)
    assume(text not in passed)
    check(program)
    passed.add(text)


# What random programs have shown, and what they leave out.


def weights(*shapes: Shape) -> list[Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def test_a_square_weight_used_transposed():
    """As a transposed use of any other shape it is a matrix of its own."""
    W, x = weights((4, 4), (6, 4))
    _, lars = jlar.capture(lambda p, x: (x @ p["W"], x @ p["W"].T))({"W": W}, x)
    assert {name: int(e.count) for name, e in lars.items()} == {"W": 6, "W#2": 6}


PARTS = {
    "dynamic_slice": lambda W, i: jax.lax.dynamic_slice_in_dim(W, 4 * i, 4),
    "dynamic_index": lambda W, i: jax.lax.dynamic_index_in_dim(W.reshape(2, 4, 3), i, 0, False),
    "take": lambda W, i: jnp.take(W.reshape(2, 4, 3), i, axis=0),
    "stride": lambda W, i: W[0 : 4 : 2 + i],
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_by_numbers_in_the_program_are_matrices_of_their_own(part):
    W, x = weights((8, 3), (6, 3))
    f = jlar.capture(lambda p, x: [x @ PARTS[part](p["W"], i).T for i in (0, 1)])
    _, lars = f({"W": W}, x)
    assert [int(e.count) for e in lars.values()] == [6, 6], list(lars)


def test_a_part_with_a_stride_is_not_called_as_the_whole():
    W, x = weights((8, 3), (6, 3))
    _, lars = jlar.capture(lambda p, x: x @ p["W"][::2].T)({"W": W}, x)
    assert set(lars) != {"W"}


def test_experts_with_a_mask():
    """Under strict promotion, as all of the library works."""
    W, x = weights((2, 3, 4), (6, 3))
    mask, sizes = np.arange(6) % 2 == 0, jnp.array([2, 4], jnp.int32)
    f = jlar.capture(lambda p, x: jax.lax.ragged_dot(x, p["W"], sizes), mask=mask)
    assert f({"W": W}, x)[1]["W"].count.tolist() == [1, 2]


@pytest.mark.parametrize("around", ["nothing", "jit", "checkpoint"])
def test_a_weight_carried_as_it_is_pools_whatever_is_around_the_body(around):
    W, x = weights((4, 4), (6, 4))
    body = AROUND[around](lambda carry: (jnp.tanh(carry[0] @ carry[1]), carry[1]))

    def f(p: dict[str, Array], x: Array) -> Array:
        return jax.lax.scan(lambda c, _: (body(c), None), (x, p["W"]), None, length=3)[0][0]

    assert jlar.capture(f)({"W": W}, x)[1]["W"].count.shape == ()


def test_a_reshaped_weight_used_in_two_ways():
    """Whether W or its transposed is contracted, written in one way or another."""
    w, x = weights((12,), (6, 3))

    def f(p: dict[str, Array], x: Array) -> list[Array]:
        W = p["w"].reshape(4, 3)
        return [x @ W.T, jnp.einsum("tn,mn->tm", x, W)]

    _, lars = jlar.capture(f)({"w": w}, x)
    assert {name: int(e.count) for name, e in lars.items()} == {"w": 12}


@pytest.mark.parametrize("f", [lambda W, s: W * s, lambda W, s: s * W, lambda W, s: W / s])
def test_a_weight_times_a_number_of_the_data(f):
    """It cancels, on whichever side it stands."""
    W, x = weights((4, 3), (6, 3))
    _, lars = jlar.capture(lambda p, x, s: x @ f(p["W"], s).T)({"W": W}, x, jnp.float32(2))
    np.testing.assert_allclose(lars["W"].lar, jlar.lar(W, x), rtol=1e-5)


def test_scanned_in_one_loop_and_looked_up_in_another():
    """Both go through the rows of the same stack: one row per matrix, of both uses."""
    (W,) = weights((3, 4, 4))

    def f(w, x):
        x, _ = jax.lax.scan(lambda x, row: (jnp.tanh(x @ row), None), x, w["w"])
        return jax.lax.scan(lambda x, i: (jnp.tanh(x @ w["w"][i]), None), x, jnp.arange(3))[0]

    _, lars = jlar.capture(f)({"w": W}, jnp.ones((5, 4)))
    assert {name: e.count.tolist() for name, e in lars.items()} == {"w": [10, 10, 10]}
