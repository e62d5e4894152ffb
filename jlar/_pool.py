"""What Energies and Grams share: they pool over tokens, and count them exactly."""

import dataclasses
from functools import partial
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._checks import need
from ._mesh import Split, on_auto_axes, size, total

STEP = 4096


def pair(count: int | Int[Array, "*stack"], dtype: jnp.dtype) -> Float[Array, "*stack 2"]:
    """A count as two floats whose sum it is.

    The first is a multiple of 4,096, so that sums over devices are exact up to 2^36 in float32.
    """
    high, low = map(jnp.asarray, divmod(count, STEP))
    return jnp.stack([high.astype(dtype) * STEP, low.astype(dtype)], axis=-1)


def add_pairs(a: Float[Array, "*pairs 2"], b: Float[Array, "*pairs 2"]) -> Float[Array, "*pairs 2"]:
    """The sums of numbers held as two floats each, exact to twice the bits of one float.

    Knuth's sum of two floats with what rounding took from it, then Dekker's normalisation (Shewchuk
    1997, theorems 7 and 6).
    """
    high = a[..., 0] + b[..., 0]
    of_b = high - a[..., 0]
    lost = (a[..., 0] - (high - of_b)) + (b[..., 0] - of_b) + (a[..., 1] + b[..., 1])
    whole = high + lost
    return jnp.stack([whole, lost - (whole - high)], axis=-1)


def sum_pairs(pairs: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """The sums over some axes of numbers held as two floats each.

    The first half is added to the second: in a `jax.lax.reduce` XLA would change the order of the
    additions, and lose what rounding took.
    """
    pairs = jnp.moveaxis(pairs, axes, range(len(axes)))
    pairs = pairs.reshape(-1, *pairs.shape[len(axes) :])
    while (half := len(pairs) // 2) > 0:
        first, second, odd = jnp.split(pairs, [half, 2 * half])
        pairs = jnp.concatenate([add_pairs(first, second), odd])
    return jnp.sum(pairs, axis=0)  # of one, or of none


def sum_counts(counts: Float[Array, "*pairs 2"], axes: tuple[str, ...]) -> Float[Array, "*pairs 2"]:
    """The sums of counts over the devices along mesh axes, exact up to 2^36 in float32."""
    high = jnp.floor(counts[..., 0] / STEP) * STEP
    low = (counts[..., 0] - high) + counts[..., 1]
    return jax.lax.psum(jnp.stack([high, low], axis=-1), axes)


def counts(
    keep: Bool[Array, "*t"] | None, tokens: int, dtype: jnp.dtype, split: Split
) -> Float[Array, "3 2"]:
    """One call, and its tokens on all devices, kept and all: the last pairs of `Pool.sums`."""
    whole = pair(tokens * size(split.t), dtype)
    some = whole
    if keep is not None:
        some = total(_kept(keep, dtype), split.t, split)
    return jnp.stack([pair(1, dtype), some, whole])


def _kept(keep: Bool[Array, "*t"], dtype: jnp.dtype) -> Float[Array, "2"]:
    """How many are kept, by parts if they are more than an int32 can count."""
    if keep.size < 2**31:
        return pair(jnp.sum(keep, dtype=jnp.int32), dtype)
    longest = max(range(keep.ndim), key=lambda axis: keep.shape[axis])
    parts = jnp.array_split(keep, 2 + keep.size // 2**31, longest)
    return sum_pairs(jnp.stack([_kept(part, dtype) for part in parts]), (0,))


P = TypeVar("P", bound="Pool")  # typing.Self has no meaning to run-time checkers outside the class


class Pool(eqx.Module):
    """Statistics that add over tokens, of one matrix or, with leading axes, of a stack.

    `jax.lax.psum` of them is right too, with pooled counts beyond 2^24 rounded to float32.
    """

    sums: eqx.AbstractVar[Float[Array, "*stack k 2"]]
    """Numbers held as two floats each; the last three are calls, kept tokens and all tokens."""

    def _number(self, i: int) -> Float[Array, "*stack"]:
        return jnp.sum(jnp.asarray(self.sums)[..., i, :], axis=-1)

    @property
    def calls(self) -> Float[Array, "*stack"]:
        """How many calls were pooled."""
        return self._number(-3)

    @property
    def count(self) -> Int[Array, "*stack"]:
        """Tokens kept by the mask: an int32, exact below 2^31 - 64, else -1.

        Under x64 an int64, exact below 2^48 of float32 statistics and below 2^63 of float64.
        """
        high, low = jnp.moveaxis(jnp.asarray(self.sums)[..., -2, :], -1, 0)
        # Two floats of 24 bits hold any whole number of 48; under x64 that is less than an int64.
        bits = 2 * jnp.finfo(high.dtype).nmant + 2
        limit = float(min(jnp.iinfo(high.astype(int).dtype).max, 2**bits))
        return jnp.where(high < limit, high.astype(int) + low.astype(int), -1)

    @property
    def keep_rate(self) -> Float[Array, "*stack"]:
        """Kept tokens over all tokens, in [0, 1]; nan where nothing was seen."""
        return self._number(-2) / self._number(-1)

    def __add__(self: P, other: P) -> P:
        need(
            jax.tree.structure(self) == jax.tree.structure(other),
            "only statistics of one kind and of the same weight matrix pool: keep one per layer.",
        )
        added = jax.tree.map(jnp.add, self, other)
        return dataclasses.replace(added, sums=add_pairs(self.sums, other.sums))

    def __radd__(self: P, other: int) -> P:
        if other != 0:  # with which the built-in sum begins
            raise TypeError(f"cannot add {other!r} to {type(self).__name__}.")
        return self

    def sum(self: P, axis: int | tuple[int, ...] = 0) -> P:
        """Pool over the leading axes that vmap or scan stacked (axis counts from the front)."""
        axes, stacked = (axis,) if isinstance(axis, int) else tuple(axis), self.sums.ndim - 2
        need(
            all(0 <= a < stacked for a in axes),
            f"axis must name stacked axes, of which these statistics have {stacked}; got {axis}.",
        )
        added = jax.tree.map(lambda leaf: jnp.sum(leaf, axes), self)
        # JAX refuses to split a stack that is sharded over explicit mesh axes.
        sums = on_auto_axes(partial(sum_pairs, axes=axes))(jnp.asarray(self.sums))
        return dataclasses.replace(added, sums=sums)
