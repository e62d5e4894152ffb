"""Products of a weight and data as JAX's primitives have them, and the statistics of one."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from . import _checks as check
from . import _mesh as mesh
from ._devices import Parts
from ._energies import Energies, energies, energy
from ._pool import counts, to_limbs
from ._spectra import grams, second_moments

Axes = tuple[int, ...]


class Squares(NamedTuple):
    """Sums of squares and counts of one call, one entry per stacked matrix."""

    y: Float[Array, "*stack"]
    x: Float[Array, "*stack"]
    w: Float[Array, "*stack"]
    kept: Float[Array, "*stack 2"]
    total: Float[Array, "*stack 2"]


class Matrices(NamedTuple):
    """What `measure` sees, and which of the operands have an axis for the stacked matrices."""

    W: Float[Array, "..."]
    X: Float[Array, "..."]
    Y: Float[Array, "..."]
    keep: Bool[Array, "..."] | None
    stacked: tuple[bool, bool, bool, bool]


class Dot(NamedTuple):
    """A `dot_general`: contracted axes are inputs, free ones outputs (of W) or tokens (of X)."""

    W: tuple[Axes, Axes, Axes]
    """The axes of W that are stacked, outputs and inputs."""
    X: tuple[Axes, Axes, Axes]
    """The axes of X that are stacked, tokens and inputs."""
    Y: tuple[Axes, Axes, Axes]
    """The axes of Y that are stacked, tokens and outputs."""
    n: int
    m: int
    tokens: tuple[int, ...]
    stack: tuple[int, ...]

    def squares(self, keep: Array | None, acc: Any, W: Array, X: Array, Y: Array) -> Squares:
        """Sums over the axes where they are: nothing is transposed or merged."""
        if keep is not None:
            X = _masked(X, keep, self.X[1])
            Y = _masked(Y, keep, self.Y[1])
        sums = (_over(a, axes[0], acc) for a, axes in ((Y, self.Y), (X, self.X), (W, self.W)))
        kept, total = counts(keep, self.tokens, acc, mesh.Split())
        limbs = (jnp.broadcast_to(a, (*self.stack, 2)) for a in (kept, total))
        return Squares(*sums, *limbs)

    def matrices(self, keep: Array | None, W: Array, X: Array, Y: Array) -> Matrices:
        """W (stack, m, n), X (stack, *tokens, n) and Y (stack, *tokens, m)."""
        W = jnp.transpose(W, sum(self.W, ())).reshape(*self.stack, self.m, self.n)
        X = jnp.transpose(X, sum(self.X, ())).reshape(*self.stack, *self.tokens, self.n)
        Y = jnp.transpose(Y, sum(self.Y, ())).reshape(*self.stack, *self.tokens, self.m)
        return Matrices(W, X, Y, keep, (True, True, True, False))


def dot(params: dict[str, Any], shapes: list[tuple[int, ...]], left: bool) -> Dot:
    """The product of operands of these shapes, of which the left or the right one is the weight."""
    contracted, batch = params["dimension_numbers"]
    free = [
        tuple(d for d in range(len(shapes[i])) if d not in (*contracted[i], *batch[i]))
        for i in (0, 1)
    ]
    axes = [(tuple(batch[i]), free[i], tuple(contracted[i])) for i in (0, 1)]
    # Y has the stacked axes first, then the free ones of the left and of the right operand.
    ends = len(batch[0]), len(batch[0]) + len(free[0]), sum(map(len, (batch[0], *free)))
    of_Y = [tuple(range(a, b)) for a, b in zip((0, *ends), ends, strict=False)]
    w, x = (0, 1) if left else (1, 0)
    size = [[shapes[i][d] for d in axes[i][k]] for i, k in ((w, 0), (w, 1), (w, 2), (x, 1))]
    return Dot(
        W=axes[w],
        X=axes[x],
        Y=(of_Y[0], of_Y[1 + x], of_Y[1 + w]),
        n=math.prod(size[2]),
        m=math.prod(size[1]),
        tokens=tuple(size[3]),
        stack=tuple(size[0]),
    )


class Conv(NamedTuple):
    """A convolution: the product of a kernel with the patches of X; groups are stacked."""

    params: dict[str, Any]
    n: int
    m: int
    tokens: tuple[int, ...]
    stack: tuple[int, ...]

    def _parts(self, W: Array, Y: Array) -> tuple[Array, Array]:
        """W as (groups, m, channels, *kernel) and Y as (groups, *tokens, m)."""
        numbers = self.params["dimension_numbers"]
        W, Y = jnp.transpose(W, numbers.rhs_spec), jnp.transpose(Y, numbers.out_spec)
        groups = self.params["feature_group_count"]
        Y = jnp.moveaxis(Y.reshape(Y.shape[0], groups, self.m, *Y.shape[2:]), (1, 2), (0, -1))
        return W.reshape(groups, self.m, *W.shape[1:]), Y

    def squares(self, keep: Array | None, acc: Any, W: Array, X: Array, Y: Array) -> Squares:
        """The squares of all patches: a convolution of the squares of X with a kernel of ones."""
        numbers, groups = self.params["dimension_numbers"], self.params["feature_group_count"]
        shape = list(W.shape)
        shape[numbers.rhs_spec[0]] = groups
        patches = jax.lax.conv_general_dilated(
            jnp.square(X.astype(acc)),
            jnp.ones(shape, acc),
            **_geometry(self.params),
            feature_group_count=groups,
            precision=jax.lax.Precision.HIGHEST,
        )
        W, Y = self._parts(W, Y)
        patches = jnp.moveaxis(jnp.transpose(patches, numbers.out_spec), 1, 0)
        if keep is not None:
            patches, Y = (jax.vmap(check.zero_masked, (0, None))(a, keep) for a in (patches, Y))
        kept, total = counts(keep, self.tokens, acc, mesh.Split())
        limbs = [jnp.broadcast_to(a, (*self.stack, 2)) for a in (kept, total)]
        x = jnp.sum(patches, axis=tuple(range(1, patches.ndim)))
        y, w = (_over(a, (0,), acc) for a in (Y, W))
        return Squares(*(a.reshape(self.stack) for a in (y, x, w)), *limbs)

    def matrices(self, keep: Array | None, W: Array, X: Array, Y: Array) -> Matrices:
        """X as patches (groups, *tokens, channels x kernel)."""
        numbers, groups = self.params["dimension_numbers"], self.params["feature_group_count"]
        patches = jax.lax.conv_general_dilated_patches(
            X,
            [W.shape[d] for d in numbers.rhs_spec[2:]],
            **_geometry(self.params),
            precision=jax.lax.Precision.HIGHEST,
        )
        W, Y = self._parts(W, Y)
        patches = jnp.transpose(patches, numbers.out_spec)
        patches = patches.reshape(patches.shape[0], groups, self.n, *patches.shape[2:])
        patches = jnp.moveaxis(patches, (1, 2), (0, -1))
        W = W.reshape(groups, self.m, self.n)
        if not self.stack:
            W, patches, Y = W[0], patches[0], Y[0]
        return Matrices(W, patches, Y, keep, (True, True, True, False))


def conv(params: dict[str, Any], shapes: list[tuple[int, ...]], left: bool) -> Conv | str:
    """The product with patches of the left operand, or why it is none."""
    if left:
        return "the input of a convolution, not its kernel"
    if params["batch_group_count"] != 1:
        return "a convolution whose batch is grouped (batch_group_count)"
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    kernel = [shapes[1][d] for d in numbers.rhs_spec]
    convolve = partial(
        jax.lax.conv_general_dilated, **_geometry(params), feature_group_count=groups
    )
    operands = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    tokens = jax.eval_shape(convolve, *operands).shape
    tokens = tuple(tokens[d] for d in numbers.out_spec)
    return Conv(
        params=params,
        n=math.prod(kernel[1:]),
        m=kernel[0] // groups,
        tokens=(tokens[0], *tokens[2:]),
        stack=(groups,) if groups > 1 else (),
    )


def _geometry(params: dict[str, Any]) -> dict[str, Any]:
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    return {name: params[name] for name in names}


class Ragged(NamedTuple):
    """A `ragged_dot`: consecutive tokens belong to one of several stacked matrices (experts)."""

    transposed: bool
    """Whether W is stored (groups, n, m)."""
    n: int
    m: int
    tokens: tuple[int, ...]
    stack: tuple[int, ...]

    def _group(self, sizes: Array) -> Array:
        """The group of each token; one past the last for tokens of none."""
        ends = jnp.cumsum(sizes)
        token = jnp.arange(self.tokens[0], dtype=ends.dtype)
        return jnp.searchsorted(ends, token, side="right").astype(jnp.int32)

    def squares(
        self, keep: Array | None, acc: Any, W: Array, X: Array, Y: Array, sizes: Array
    ) -> Squares:
        """X and Y are read once: sums per token, then per group."""
        group = self._group(sizes)
        add = lambda a: jax.ops.segment_sum(a, group, self.stack[0])  # noqa: E731
        X, Y = (check.zero_masked(a, keep) for a in (X, Y))
        y, x = (add(jnp.sum(jnp.square(a.astype(acc)), axis=-1)) for a in (Y, X))
        one = jnp.ones(self.tokens, jnp.int32)
        kept, total = (to_limbs(add(a), acc) for a in (one if keep is None else keep * one, one))
        return Squares(y, x, _over(W, (0,), acc), kept, total)

    def matrices(self, keep: Array | None, W: Array, X: Array, Y: Array, sizes: Array) -> Matrices:
        """One W per group, all of X and Y, and the mask of the group's tokens."""
        mine = self._group(sizes) == jnp.arange(self.stack[0])[:, None]
        keep = mine if keep is None else mine & keep
        W = jnp.swapaxes(W, 1, 2) if self.transposed else W
        return Matrices(W, X, Y, keep, (True, False, False, True))


def ragged(params: dict[str, Any], shapes: list[tuple[int, ...]], left: bool) -> Ragged | str:
    """The grouped product of X (t, n) and W (groups, n, m), or why it is none."""
    numbers = params["ragged_dot_dimension_numbers"]
    (lhs, rhs), (lhs_batch, _) = numbers.dot_dimension_numbers
    plain = tuple(lhs) == (1,) and not lhs_batch and tuple(numbers.lhs_ragged_dimensions) == (0,)
    if left or not plain or tuple(numbers.rhs_group_dimensions) != (0,):
        return "a ragged product other than X (tokens, n) with W (groups, n, m)"
    transposed = tuple(rhs) == (1,)
    groups, a, b = shapes[1]
    n, m = (a, b) if transposed else (b, a)
    return Ragged(transposed, n, m, (shapes[0][0],), (groups,))


Product = Dot | Conv | Ragged
PRODUCTS: dict[str, Callable[[dict[str, Any], list[tuple[int, ...]], bool], Product | str]] = {
    "dot_general": dot,
    "conv_general_dilated": conv,
    "ragged_dot_general": ragged,
}


def statistics(
    measure: Callable[..., PyTree],
    product: Product,
    parts: Parts,
    keep: Array | None,
    *operands: Array,
) -> PyTree:
    """`measure` of this product's W, X, Y (and group sizes); no gradient, sums over all devices."""
    W, X, Y, *sizes = jax.lax.stop_gradient(operands)
    split = parts.split
    if measure is energies:
        acc = check.accumulator(W, X, Y)
        s = product.squares(keep, acc, W, X, Y, *sizes)
        limbs = (mesh.total(a, split.t, split) for a in (s.kept, s.total))
        return Energies(
            y=mesh.total(s.y, parts.y, split),
            x=mesh.total(s.x, split.t + split.columns, split),
            w=mesh.total(s.w, split.m + split.n, split),
            calls=jnp.ones(product.stack, acc),
            kept=next(limbs),
            total=next(limbs),
            n=product.n * mesh.size(split.n),
        )
    seen = product.matrices(keep, W, X, Y, *sizes)

    def one(W: Array, X: Array, Y: Array, keep: Array | None) -> PyTree:
        if measure is grams:
            return second_moments(W, X, keep, split)
        X, Y = X.reshape(-1, X.shape[-1]), Y.reshape(-1, Y.shape[-1])
        return measure(W, X, Y, None if keep is None else keep.reshape(-1))

    for _ in product.stack:
        axes = tuple(
            0 if s and a is not None else None for a, s in zip(seen[:4], seen.stacked, strict=True)
        )
        one = jax.vmap(one, axes)
    result = one(*seen[:4])
    if measure is grams:
        return result
    return jax.tree.map(lambda a: mesh.total(jnp.asarray(a), split.t, split), result)


def _over(a: Array, stacked: Axes, acc: Any) -> Float[Array, "*stack"]:
    """Sums of squares over all axes but the stacked ones, those in their given order."""
    if not stacked:
        return energy(a, acc)
    others = tuple(d for d in range(a.ndim) if d not in stacked)
    order = [sorted(stacked).index(d) for d in stacked]
    return jnp.transpose(jnp.sum(jnp.square(a.astype(acc)), axis=others), order)


def _masked(a: Array, keep: Bool[Array, "..."], tokens: Axes) -> Array:
    """`a` with zeros where its tokens, which lie along these axes in this order, do not count."""
    keep = jax.lax.broadcast_in_dim(keep, a.shape, tokens)
    return jnp.where(keep, a, jnp.zeros((), a.dtype))
