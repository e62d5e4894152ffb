"""Products of a weight and data as JAX's primitives have them, and the statistics of one."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from . import _checks as check
from . import _mesh as mesh
from ._energies import Energies, energies, unless_rounded
from ._grams import grams
from ._origin import Origin
from ._pool import counts, pair

Axes = tuple[int, ...]
Shape = tuple[int, ...]
Squares = tuple[Float[Array, "*stack"], Float[Array, "*stack"], Float[Array, "*stack"]]


@dataclass(frozen=True)
class Product:
    """Y = X W^T, once or for a stack of matrices.

    Each kind has `squares`: of Y, X and W, in this order, the sums over the kept tokens, one for
    each matrix of the stack, in the dtype `acc`; and `matrices`: W, X, Y and mask as such.
    """

    n: int
    m: int
    tokens: Shape
    stack: Shape
    stacked: ClassVar[tuple[int | None, ...]] = (0, 0, 0, None)
    """Of W, X, Y and mask as `matrices` returns them, those whose leading axes are the stack."""

    def facing(self, weight: Origin) -> str:
        """Which side of the leaf the inputs are on, as far as it is followed."""
        return weight.layout

    def counts(self, keep: Array | None, acc: Any, *_: Array) -> Float[Array, "*stack 3 2"]:
        """Its calls and tokens as in `Pool.sums`, once or for each matrix of a stack."""
        return counts(keep, math.prod(self.tokens), acc, mesh.Split())


@dataclass(frozen=True)
class Dot(Product):
    """A `dot_general`: contracted axes are inputs, free ones outputs (of W) or tokens (of X)."""

    W_axes: tuple[Axes, Axes, Axes]  # Those that are stacked, outputs and inputs
    X_axes: tuple[Axes, Axes, Axes]  # Those that are stacked, tokens and inputs
    Y_axes: tuple[Axes, Axes, Axes]  # Those that are stacked, tokens and outputs

    def facing(self, weight: Origin) -> str:
        """The contracted axes; of a transposed matrix those that they were."""
        axes, layout, matrix = self.W_axes[2], weight.layout, sum(map(len, self.W_axes)) == 2
        if matrix and layout.endswith(".T"):
            return layout.removesuffix(".T") + str(tuple(1 - axis for axis in axes))
        return layout + str(axes)

    def squares(self, keep: Array | None, acc: Any, W: Array, X: Array, Y: Array) -> Squares:
        """Each operand is summed as it lies: nothing large is transposed or merged."""
        stacked_W, stacked_X, stacked_Y = self.W_axes[0], self.X_axes[0], self.Y_axes[0]
        X, Y = _masked(X, keep, self.X_axes[1]), _masked(Y, keep, self.Y_axes[1])
        return _over(Y, stacked_Y, acc), _over(X, stacked_X, acc), _over(W, stacked_W, acc)

    def matrices(self, keep: Array | None, W: Array, X: Array, Y: Array) -> Any:
        """W (*stack, m, n), X (*stack, *tokens, n), Y (*stack, *tokens, m) and the mask."""
        operands = (W, self.W_axes), (X, self.X_axes), (Y, self.Y_axes)
        W, X, Y = (jnp.transpose(a, sum(axes, ())) for a, axes in operands)
        W = W.reshape(*self.stack, self.m, self.n)
        tokens = *self.stack, *self.tokens
        return W, X.reshape(*tokens, self.n), Y.reshape(*tokens, self.m), keep


def dot(eqn: Any, weight_is_left: bool) -> Dot:
    """The product, of which the left or the right operand is the weight."""
    contracted, batch = eqn.params["dimension_numbers"]
    shapes, axes = [atom.aval.shape for atom in eqn.invars], []
    for shape, inner, stacked in zip(shapes, contracted, batch, strict=True):
        free = tuple(d for d in range(len(shape)) if d not in (*inner, *stacked))
        axes.append((tuple(stacked), free, tuple(inner)))
    # Y has the stacked axes first, then the free ones of the left and of the right operand.
    numbers = itertools.count()
    in_order = (axes[0][0], axes[0][1], axes[1][1])
    stacked, *free = (tuple(itertools.islice(numbers, len(each))) for each in in_order)
    w, x = (0, 1) if weight_is_left else (1, 0)
    stack, outputs, inputs = (tuple(shapes[w][d] for d in group) for group in axes[w])
    return Dot(
        n=math.prod(inputs),
        m=math.prod(outputs),
        tokens=tuple(shapes[x][d] for d in axes[x][1]),
        stack=stack,
        W_axes=axes[w],
        X_axes=axes[x],
        Y_axes=(stacked, free[x], free[w]),
    )


@dataclass(frozen=True)
class Conv(Product):
    """A convolution: the product of a kernel with the patches of X; groups are stacked."""

    numbers: jax.lax.ConvDimensionNumbers
    geometry: tuple[tuple[str, Any], ...]  # Strides, padding and dilations

    def _kernel(self, W: Array) -> Array:
        W = jnp.transpose(W, self.numbers.rhs_spec)
        return W.reshape(*self.stack, self.m, self.n)

    def _by_group(self, a: Array, features: int) -> Array:
        """What lies as Y does, with so many features of each group: (*stack, *tokens, features)."""
        a = jnp.transpose(a, self.numbers.out_spec)
        a = a.reshape(a.shape[0], math.prod(self.stack), features, *a.shape[2:])
        return jnp.moveaxis(a, (1, 2), (0, -1)).reshape(*self.stack, *self.tokens, features)

    def squares(self, keep: Array | None, acc: Any, W: Array, X: Array, Y: Array) -> Squares:
        """The squares of all patches are a convolution of those of X with a kernel of ones."""
        shape = list(W.shape)
        shape[self.numbers.rhs_spec[0]] = math.prod(self.stack)
        patch_squares = jax.lax.conv_general_dilated(
            jnp.square(X.astype(acc)),
            jnp.ones(shape, acc),
            **dict(self.geometry),
            dimension_numbers=self.numbers,
            feature_group_count=math.prod(self.stack),
            precision=jax.lax.Precision.HIGHEST,
        )
        stack = tuple(range(len(self.stack)))
        tokens = tuple(range(len(stack), len(stack) + len(self.tokens)))
        patch_squares = _masked(self._by_group(patch_squares, 1), keep, tokens)
        Y = _masked(self._by_group(Y, self.m), keep, tokens)
        x = jnp.sum(patch_squares, axis=(*tokens, -1))
        return _over(Y, stack, acc), x, _over(self._kernel(W), stack, acc)

    def matrices(self, keep: Array | None, W: Array, X: Array, Y: Array) -> Any:
        """As of `Dot`, with patches for X."""
        patches = jax.lax.conv_general_dilated_patches(
            X,
            [W.shape[d] for d in self.numbers.rhs_spec[2:]],
            **dict(self.geometry),
            dimension_numbers=self.numbers,
            precision=jax.lax.Precision.HIGHEST,
        )
        X, Y = self._by_group(patches, self.n), self._by_group(Y, self.m)
        return self._kernel(W), X, Y, keep


def conv(eqn: Any, weight_is_left: bool) -> Conv | str:
    """The product of kernel and patches, or as text why it is not measured."""
    params = eqn.params
    if weight_is_left:
        return "the input of a convolution, not its kernel"
    if params["batch_group_count"] != 1:
        return "a convolution whose batch is grouped (batch_group_count)"
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    outputs, *inputs = (eqn.invars[1].aval.shape[d] for d in numbers.rhs_spec)
    batch, _, *positions = (eqn.outvars[0].aval.shape[d] for d in numbers.out_spec)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    return Conv(
        n=math.prod(inputs),
        m=outputs // groups,
        tokens=(batch, *positions),
        stack=(groups,) if groups > 1 else (),
        numbers=numbers,
        geometry=tuple((name, params[name]) for name in names),
    )


@dataclass(frozen=True)
class Ragged(Product):
    """A `ragged_dot`: consecutive tokens belong to one of several stacked matrices (experts)."""

    inputs_first: bool  # Whether W is stored (groups, n, m), as JAX does by default
    stacked = (0, None, None, 0)

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
        kept = one if keep is None else keep.astype(jnp.int32)
        tokens = [self._per_group(each, *sizes) for each in (kept, one)]
        return pair(jnp.stack([jnp.ones(self.stack, jnp.int32), *tokens], axis=-1), acc)

    def squares(
        self, keep: Array | None, acc: Any, W: Array, X: Array, Y: Array, sizes: Array
    ) -> Squares:
        """X and Y are read once: sums per token, then per group."""
        X, Y = _masked(X, keep, (0,)), _masked(Y, keep, (0,))
        y, x = (self._per_group(_over(a, (0,), acc), sizes) for a in (Y, X))
        return y, x, _over(W, (0,), acc)

    def matrices(self, keep: Array | None, W: Array, X: Array, Y: Array, sizes: Array) -> Any:
        """One W per group, all of X and Y, and the mask of the group's tokens."""
        group = jnp.arange(self.stack[0], dtype=jnp.int32)
        mine = self._group(sizes)[None, :] == group[:, None]
        W = jnp.swapaxes(W, 1, 2) if self.inputs_first else W
        return W, X, Y, mine if keep is None else mine & keep[None, :]


def ragged(eqn: Any, weight_is_left: bool) -> Ragged | str:
    """The product of X (t, n) and W (groups, n, m) or (groups, m, n), or as text why it is none."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lhs, rhs), (batch, _) = numbers.dot_dimension_numbers
    plain = tuple(lhs) == (1,) and not batch and tuple(numbers.lhs_ragged_dimensions) == (0,)
    if weight_is_left or not plain or tuple(numbers.rhs_group_dimensions) != (0,):
        return "a ragged product other than X (tokens, n) with W (groups, n, m)"
    inputs_first = tuple(rhs) == (1,)
    tokens, (groups, *sides) = (atom.aval.shape for atom in eqn.invars[:2])
    n, m = sides if inputs_first else sides[::-1]
    return Ragged(n=n, m=m, tokens=tokens[:1], stack=(groups,), inputs_first=inputs_first)


PRODUCTS: dict[str, Callable[[Any, bool], Any]] = {
    "dot_general": dot,
    "conv_general_dilated": conv,
    "ragged_dot_general": ragged,
}
"""The product of an equation whose left or right operand is the weight, or why not, as text."""


def _over(a: Array, stacked: Axes, acc: Any) -> Float[Array, "*stack"]:
    """Sums of squares over all axes but the stacked ones, those in their given order."""
    others = tuple(d for d in range(a.ndim) if d not in stacked)
    order = [sorted(stacked).index(d) for d in stacked]
    return jnp.transpose(jnp.sum(jnp.square(a.astype(acc)), axis=others), order)


def _masked(a: Array, keep: Bool[Array, "..."] | None, tokens: Axes) -> Array:
    """`a` with zeros where its tokens, which lie along these axes in this order, do not count."""
    if keep is None:
        return a
    keep = jax.lax.broadcast_in_dim(keep, a.shape, tokens)
    return jnp.where(keep, a, jnp.zeros((), a.dtype))


def statistics(
    measure: Callable[..., PyTree],
    product: Any,
    split: mesh.Split,
    keep: Array | None,
    *operands: Any,
) -> PyTree:
    """`measure` of a product's W, X, Y (and group sizes) on one device, without gradient.

    `summed` adds the devices later; only the Grams of split columns need the others at once.
    """
    W, X, Y, *sizes = jax.lax.stop_gradient(tuple(map(jnp.asarray, operands)))
    acc = check.accumulator(W, X, Y)
    if measure is energies:
        y, x, w = product.squares(keep, acc, W, X, Y, *sizes)
        counted = product.counts(keep, acc, *sizes)
        entries = jnp.sum(counted[..., 1, :], axis=-1) * product.m
        squares = unless_rounded(y, Y.dtype, entries), x, w
        return Energies.of(squares, counted, product.n * mesh.size(split.n))

    def one(W: Array, X: Array, Y: Array, keep: Array | None) -> PyTree:
        if measure is grams:
            return grams(W, X, mask=keep, axes=mesh.Split(n=split.n, columns=split.n))
        X, Y = X.reshape(-1, X.shape[-1]), Y.reshape(-1, Y.shape[-1])
        sums = measure(W, X, Y, None if keep is None else keep.reshape(-1))
        return jax.tree.map(jnp.asarray, sums)

    for _ in product.stack:
        one = jax.vmap(one, product.stacked)
    return one(*product.matrices(keep, W, X, Y, *sizes))
