"""Products of a weight and data as JAX's primitives have them, and the statistics of one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from . import _checks as check
from . import _mesh as mesh
from ._energies import energy
from ._origin import Origin
from ._pool import counts, pair

Axes = tuple[int, ...]
Shape = tuple[int, ...]
Squares = tuple[Float[Array, "*stack"], Float[Array, "*stack"], Float[Array, "*stack"]]


@dataclass(frozen=True)
class Product:
    """Y = X W^T, once or for a stack of matrices."""

    n: int
    m: int
    tokens: Shape
    stack: Shape

    def facing(self, weight: Origin) -> str:
        """Which side of the leaf the inputs are on, as far as it is followed."""
        return weight.layout

    def counts(self, keep: Array | None, acc: Any, *_: Array) -> Float[Array, "*stack 3 2"]:
        """Its calls and tokens as in `Pool.sums`, once or for each matrix of a stack."""
        return counts(keep, math.prod(self.tokens), acc, mesh.Split())


@dataclass(frozen=True)
class Dot(Product):
    """A `dot_general`: contracted axes are inputs, free ones outputs (of W) or tokens (of X)."""

    W: tuple[Axes, Axes, Axes]  # The axes of W that are stacked, outputs and inputs
    X: tuple[Axes, Axes, Axes]  # The axes of X that are stacked, tokens and inputs
    Y: tuple[Axes, Axes, Axes]  # The axes of Y that are stacked, tokens and outputs

    def facing(self, weight: Origin) -> str:
        """The contracted axes; of a transposed matrix those that they were."""
        axes, layout, matrix = self.W[2], weight.layout, sum(map(len, self.W)) == 2
        if matrix and layout.endswith(".T"):
            return layout.removesuffix(".T") + str(tuple(1 - axis for axis in axes))
        return layout + str(axes)

    def squares(self, keep: Array | None, acc: Any, W: Array, X: Array, Y: Array) -> Squares:
        """Those of Y, X and W, over their axes as they lie: nothing is transposed or merged."""
        if keep is not None:
            X, Y = _masked(X, keep, self.X[1]), _masked(Y, keep, self.Y[1])
        return _over(Y, self.Y[0], acc), _over(X, self.X[0], acc), _over(W, self.W[0], acc)

    def matrices(self, keep: Array | None, W: Array, X: Array, Y: Array | None) -> Any:
        """W (stack, m, n), X (stack, *tokens, n), Y (stack, *tokens, m) and what is stacked."""
        W = jnp.transpose(W, sum(self.W, ())).reshape(*self.stack, self.m, self.n)
        X = jnp.transpose(X, sum(self.X, ())).reshape(*self.stack, *self.tokens, self.n)
        if Y is not None:
            Y = jnp.transpose(Y, sum(self.Y, ())).reshape(*self.stack, *self.tokens, self.m)
        return (W, X, Y, keep), (0, 0, 0, None)


def dot(params: dict[str, Any], shapes: list[Shape], left: bool) -> Dot:
    """The product of operands of these shapes, of which the left or the right one is the weight."""
    contracted, batch = params["dimension_numbers"]
    axes = []
    for shape, inner, stacked in zip(shapes, contracted, batch, strict=True):
        free = tuple(d for d in range(len(shape)) if d not in (*inner, *stacked))
        axes.append((tuple(stacked), free, tuple(inner)))
    # Y has the stacked axes first, then the free ones of the left and of the right operand.
    ends = (
        len(batch[0]),
        len(batch[0]) + len(axes[0][1]),
        sum(len(a) for a in (*axes[0][:2], axes[1][1])),
    )
    of_Y = [tuple(range(start, end)) for start, end in zip((0, *ends), ends, strict=False)]
    w, x = (0, 1) if left else (1, 0)
    stack, outputs, inputs = (tuple(shapes[w][d] for d in group) for group in axes[w])
    return Dot(
        n=math.prod(inputs),
        m=math.prod(outputs),
        tokens=tuple(shapes[x][d] for d in axes[x][1]),
        stack=stack,
        W=axes[w],
        X=axes[x],
        Y=(of_Y[0], of_Y[1 + x], of_Y[1 + w]),
    )


@dataclass(frozen=True)
class Conv(Product):
    """A convolution: the product of a kernel with the patches of X; groups are stacked."""

    geometry: tuple[tuple[str, Any], ...]
    groups: int

    def _kernel(self, W: Array) -> Array:
        """W as (groups, m, n)."""
        axes = dict(self.geometry)["dimension_numbers"].rhs_spec
        return jnp.transpose(W, axes).reshape(self.groups, self.m, self.n)

    def _results(self, Y: Array) -> Array:
        """Y as (groups, *tokens, m)."""
        axes = dict(self.geometry)["dimension_numbers"].out_spec
        return self._by_group(jnp.transpose(Y, axes), self.m)

    def _by_group(self, a: Array, features: int) -> Array:
        a = a.reshape(a.shape[0], self.groups, features, *a.shape[2:])
        return jnp.moveaxis(a, (1, 2), (0, -1))

    def squares(self, keep: Array | None, acc: Any, W: Array, X: Array, Y: Array) -> Squares:
        """The squares of all patches are a convolution of those of X with a kernel of ones."""
        numbers, shape = dict(self.geometry)["dimension_numbers"], list(W.shape)
        shape[numbers.rhs_spec[0]] = self.groups
        patches = jax.lax.conv_general_dilated(
            jnp.square(X.astype(acc)),
            jnp.ones(shape, acc),
            **dict(self.geometry),
            feature_group_count=self.groups,
            precision=jax.lax.Precision.HIGHEST,
        )
        patches = self._by_group(jnp.transpose(patches, numbers.out_spec), 1)[..., 0]
        W, Y = self._kernel(W), self._results(Y)
        if keep is not None:
            patches, Y = (jax.vmap(check.zero_masked, (0, None))(a, keep) for a in (patches, Y))
        x = jnp.sum(patches, axis=tuple(range(1, patches.ndim)))
        y, w = _over(Y, (0,), acc), _over(W, (0,), acc)
        return y.reshape(self.stack), x.reshape(self.stack), w.reshape(self.stack)

    def matrices(self, keep: Array | None, W: Array, X: Array, Y: Array | None) -> Any:
        """As of `Dot`, with X as patches."""
        numbers = dict(self.geometry)["dimension_numbers"]
        patches = jax.lax.conv_general_dilated_patches(
            X,
            [W.shape[d] for d in numbers.rhs_spec[2:]],
            **dict(self.geometry),
            precision=jax.lax.Precision.HIGHEST,
        )
        patches = self._by_group(jnp.transpose(patches, numbers.out_spec), self.n)
        W, Y = self._kernel(W), None if Y is None else self._results(Y)
        if not self.stack:
            W, patches, Y = W[0], patches[0], None if Y is None else Y[0]
        return (W, patches, Y, keep), (0, 0, 0, None)


def conv(params: dict[str, Any], shapes: list[Shape], left: bool) -> Conv | str:
    """The product with patches of the left operand, or why it is none."""
    if left:
        return "the input of a convolution, not its kernel"
    if params["batch_group_count"] != 1:
        return "a convolution whose batch is grouped (batch_group_count)"
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    geometry = tuple((name, params[name]) for name in names)
    convolve = partial(jax.lax.conv_general_dilated, **dict(geometry), feature_group_count=groups)
    result = jax.eval_shape(convolve, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    outputs, *inputs = (shapes[1][d] for d in numbers.rhs_spec)
    batch, _, *positions = (result.shape[d] for d in numbers.out_spec)
    stack = (groups,) if groups > 1 else ()
    tokens = (batch, *positions)
    return Conv(math.prod(inputs), outputs // groups, tokens, stack, geometry, groups)


@dataclass(frozen=True)
class Ragged(Product):
    """A `ragged_dot`: consecutive tokens belong to one of several stacked matrices (experts)."""

    transposed: bool  # Whether W is stored (groups, n, m)

    def _group(self, sizes: Array) -> Array:
        """The group of each token; one past the last for tokens of none."""
        ends = jnp.cumsum(sizes)
        token = jnp.arange(self.tokens[0], dtype=ends.dtype)
        return jnp.searchsorted(ends, token, side="right").astype(jnp.int32)

    def _per_group(self, per_token: Array, sizes: Array) -> Array:
        return jax.ops.segment_sum(per_token, self._group(sizes), self.stack[0])

    def counts(self, keep: Array | None, acc: Any, *sizes: Array) -> Float[Array, "*stack 3 2"]:
        """Each group has its own tokens."""
        one = jnp.ones(self.tokens, jnp.int32)
        tokens = (one if keep is None else keep.astype(jnp.int32)), one
        counted = (self._per_group(each, *sizes) for each in tokens)
        ones = jnp.ones(self.stack, jnp.int32)
        return pair(jnp.stack([ones, *counted], axis=-1), acc)

    def squares(
        self, keep: Array | None, acc: Any, W: Array, X: Array, Y: Array, sizes: Array
    ) -> Squares:
        """X and Y are read once: sums per token, then per group."""
        X, Y = (check.zero_masked(a, keep) for a in (X, Y))
        y, x = (jnp.sum(jnp.square(a.astype(acc)), axis=-1) for a in (Y, X))
        return self._per_group(y, sizes), self._per_group(x, sizes), _over(W, (0,), acc)

    def matrices(
        self, keep: Array | None, W: Array, X: Array, Y: Array | None, sizes: Array
    ) -> Any:
        """One W per group, all of X and Y, and the mask of the group's tokens."""
        group = jnp.arange(self.stack[0], dtype=jnp.int32)
        mine = self._group(sizes)[None, :] == group[:, None]
        W = jnp.swapaxes(W, 1, 2) if self.transposed else W
        return (W, X, Y, mine if keep is None else mine & keep[None, :]), (0, None, None, 0)


def ragged(params: dict[str, Any], shapes: list[Shape], left: bool) -> Ragged | str:
    """The grouped product of X (t, n) and W (groups, n, m), or why it is none."""
    numbers = params["ragged_dot_dimension_numbers"]
    (lhs, rhs), (batch, _) = numbers.dot_dimension_numbers
    plain = tuple(lhs) == (1,) and not batch and tuple(numbers.lhs_ragged_dimensions) == (0,)
    if left or not plain or tuple(numbers.rhs_group_dimensions) != (0,):
        return "a ragged product other than X (tokens, n) with W (groups, n, m)"
    transposed = tuple(rhs) == (1,)
    groups, *sides = shapes[1]
    n, m = sides if transposed else sides[::-1]
    return Ragged(n, m, shapes[0][:1], (groups,), transposed)


PRODUCTS: dict[str, Callable[[dict[str, Any], list[Shape], bool], Any]] = {
    "dot_general": dot,
    "conv_general_dilated": conv,
    "ragged_dot_general": ragged,
}


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
