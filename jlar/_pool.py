"""What Energies and Grams share: sums over tokens pool exactly, and counts do not saturate."""

import abc
import math
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from . import _mesh as mesh

# A count is held as two floats, high * BASE + low: it is one of several sums in an array of floats,
# and a single float32 stops counting at 2^24. Exact up to 2^34 tokens, and 2^24 calls.
BASE = 1024


def to_limbs(count: Int[Array, "*stack"], dtype: jnp.dtype) -> Float[Array, "*stack 2"]:
    """An integer count as (high, low) floats."""
    return jnp.stack([count // BASE, count % BASE], axis=-1).astype(dtype)


def from_limbs(limbs: Float[ArrayLike, "*stack 2"]) -> Int[Array, "*stack"]:
    """The integer count that (high, low) stand for."""
    whole = jnp.asarray(limbs).astype(jnp.int32)
    return whole[..., 0] * BASE + whole[..., 1]


def counts(
    keep: Bool[Array, "*t"] | None, tokens: tuple[int, ...], dtype: jnp.dtype, split: mesh.Split
) -> Float[Array, "5"]:
    """What `Pool.limbs` returns of one call: the call, and its tokens on all devices."""
    total = divmod(math.prod(tokens) * mesh.size(split.t), BASE)
    if keep is None:
        return jnp.array((1, *total, *total), dtype)
    kept = mesh.total(to_limbs(jnp.sum(keep, dtype=jnp.int32), dtype), split.t, split)
    return jnp.concatenate([jnp.ones(1, dtype), kept, jnp.array(total, dtype)])


P = TypeVar("P", bound="Pool")  # typing.Self has no meaning to run-time checkers outside the class


class Pool(eqx.Module):
    """Statistics that add over tokens.

    Every leaf is a float and adds: `a + b` pools two batches, a scan may carry one, `jax.lax.psum`
    pools over a mesh, and zeros are the neutral element.
    """

    @abc.abstractmethod
    def limbs(self) -> Float[Array, "*stack 5"]:
        """Calls, then kept and all tokens as limbs."""

    @property
    def calls(self) -> Float[Array, "*stack"]:
        """How many calls were pooled."""
        return self.limbs()[..., 0]

    @property
    def count(self) -> Int[Array, "*stack"]:
        """Tokens kept by the mask, int32: exact up to 2^31 - 1."""
        return from_limbs(self.limbs()[..., 1:3])

    @property
    def keep_rate(self) -> Float[Array, "*stack"]:
        """Kept tokens over all tokens, in [0, 1]; nan where nothing was seen."""
        kept_high, kept_low, high, low = jnp.moveaxis(self.limbs()[..., 1:], -1, 0)
        return (kept_high * BASE + kept_low) / (high * BASE + low)

    def __add__(self: P, other: P) -> P:
        if jax.tree.structure(self) != jax.tree.structure(other):
            raise ValueError(
                f"only statistics of the same weight matrix pool; got {type(self).__name__} and "
                f"{type(other).__name__} of different kind or width: keep one per layer."
            )
        return jax.tree.map(jnp.add, self, other)._carried()

    def __radd__(self: P, other: int) -> P:
        # 0 + self, so that the built-in sum pools a list.
        if other != 0:
            raise TypeError(f"cannot add {other!r} to {type(self).__name__}.")
        return self

    def sum(self: P, axis: int | tuple[int, ...] = 0) -> P:
        """Pool over the leading axes that vmap or scan stacked (axis counts from the front)."""
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        stacked = self.calls.ndim
        if not all(0 <= a < stacked for a in axes):
            raise ValueError(
                f"axis must name stacked axes, from 0 to {stacked - 1} here; got {axis}."
                if stacked
                else "nothing to sum: these statistics have no stacked axis (one call, one matrix)."
            )
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axes), self)._carried()

    @abc.abstractmethod
    def _with(self: P, counts: Float[Array, "*stack 5"]) -> P:
        """The same statistics with these counts."""

    def _carried(self: P) -> P:
        # The same number with a low limb below BASE, so that it never saturates.
        calls, *limbs = jnp.moveaxis(self.limbs(), -1, 0)
        for i in (0, 2):
            carry = jnp.floor(limbs[i + 1] / BASE)
            limbs[i : i + 2] = limbs[i] + carry, limbs[i + 1] - carry * BASE
        return self._with(jnp.stack([calls, *limbs], axis=-1))
