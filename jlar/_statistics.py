"""What is computed of one product, on one device and summed over all of them."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from . import _checks as check
from . import _mesh as mesh
from ._devices import MeshSplit
from ._energies import Energies, energies
from ._grams import Grams, grams
from ._pool import sum_counts


def statistics(
    measure: Callable[..., PyTree],
    product: Any,
    split: MeshSplit,
    keep: Array | None,
    *operands: Any,
) -> PyTree:
    """`measure` of a product's W, X, Y (and group sizes) on one device, without gradient."""
    W, X, Y, *sizes = jax.lax.stop_gradient(tuple(map(jnp.asarray, operands)))
    acc = check.accumulator(W, X, Y)
    if measure is energies:
        squares = product.squares(keep, acc, W, X, Y, *sizes)
        n = product.n * mesh.size(split.n)
        return Energies.of(squares, product.counts(keep, acc, *sizes), n)
    by_inputs = mesh.Split(n=split.n, columns=split.n)
    matrices, stacked = product.matrices(keep, W, X, None if measure is grams else Y, *sizes)

    def one(W: Array, X: Array, Y: Array | None, keep: Array | None) -> PyTree:
        if Y is None:
            return grams(W, X, mask=keep, axes=by_inputs)
        X, Y = X.reshape(-1, X.shape[-1]), Y.reshape(-1, Y.shape[-1])
        sums = measure(W, X, Y, None if keep is None else keep.reshape(-1))
        return jax.tree.map(jnp.asarray, sums)

    for _ in product.stack:
        one = jax.vmap(one, stacked)
    return one(*matrices)


def over_devices(statistic: PyTree, split: MeshSplit, loops: int, axes: Iterable[str]) -> PyTree:
    """The sums of one device's statistics over all devices along these axes.

    `loops` is how many axes of its stack are those of loops, before those of the product.
    """
    axes = frozenset(axes)
    split = MeshSplit(*(tuple(name for name in names if name in axes) for names in split))

    def counted(sums: Array) -> Array:
        calls, tokens = sums[..., -3:-2, :], sums[..., -2:, :]
        return jnp.concatenate([calls, sum_counts(tokens, split.t)], axis=-2)

    if isinstance(statistic, Energies):
        e, by = statistic, (split.y, split.t + split.n, split.m + split.n)
        squares = [jax.lax.psum(a, names) for a, names in zip((e.y, e.x, e.w), by, strict=True)]
        statistic = Energies.of(squares, counted(e.sums), e.n)
    elif isinstance(statistic, Grams):
        w, x = jax.lax.psum(statistic.w, split.m), jax.lax.psum(statistic.x, split.t)
        statistic = Grams(w, x, counted(statistic.sums))
    else:
        statistic = jax.lax.psum(statistic, split.t)

    def whole(a: Array) -> Array:
        return mesh.whole(jax.lax.all_gather(a, split.stack, axis=loops, tiled=True), axes)

    return jax.tree.map(whole, statistic)
