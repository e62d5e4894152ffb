"""What Energies and Grams share: sums over tokens pool exactly, and counts do not saturate."""

import math
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from . import _mesh as mesh

# A count is held as two floats, high * BASE + low, because statistics have to be floating point to
# travel as cotangents (jlar.probes) and one float32 stops counting at 2^24. Plain addition, which
# is what JAX does to cotangents, stays exact for 2^24 / BASE = 16,384 pooled calls and 2^34 tokens.
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
) -> tuple[Float[Array, "2"], Float[Array, "2"]]:
    """(kept, total) tokens of one call on all devices as limbs."""
    total = jnp.array(divmod(math.prod(tokens) * mesh.size(split.t), BASE), dtype)
    if keep is None:
        return total, total
    kept = to_limbs(jnp.sum(keep, dtype=jnp.int32), dtype)
    return mesh.total(kept, split.t, split), total


P = TypeVar("P", bound="Pool")  # typing.Self has no meaning to run-time checkers outside the class


class Pool(eqx.Module):
    """Statistics that add over tokens.

    Every leaf is a float and adds: `a + b` pools two batches, a scan may carry one, `jax.lax.psum`
    pools over a mesh, and zeros are the neutral element.
    """

    calls: eqx.AbstractVar[Float[Array, "*stack"]]
    kept: eqx.AbstractVar[Float[Array, "*stack 2"]]
    total: eqx.AbstractVar[Float[Array, "*stack 2"]]

    @property
    def count(self) -> Int[Array, "*stack"]:
        """Tokens kept by the mask, int32: exact up to 2^31 - 1."""
        return from_limbs(self.kept)

    @property
    def keep_rate(self) -> Float[Array, "*stack"]:
        """Kept tokens over all tokens, in [0, 1]; nan where nothing was seen."""
        scale = jnp.array([BASE, 1], self.kept.dtype)
        return jnp.sum(self.kept * scale, -1) / jnp.sum(self.total * scale, -1)

    def __add__(self: P, other: P) -> P:
        if jax.tree.structure(self) != jax.tree.structure(other):
            raise ValueError(
                f"only statistics of the same weight matrix pool; got {type(self).__name__} and "
                f"{type(other).__name__} of different kind or width: keep one per layer."
            )
        return jax.tree.map(jnp.add, self, other)

    def __radd__(self: P, other: int) -> P:
        # 0 + self, so that the built-in sum pools a list.
        if other != 0:
            raise TypeError(f"cannot add {other!r} to {type(self).__name__}.")
        return self

    def sum(self: P, axis: int | tuple[int, ...] = 0) -> P:
        """Pool over the leading axes that vmap or scan stacked (axis counts from the front)."""
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        if not all(0 <= a < self.calls.ndim for a in axes):
            raise ValueError(
                f"axis must name stacked axes, from 0 to {self.calls.ndim - 1} here; got {axis}."
                if self.calls.ndim
                else "nothing to sum: these statistics have no stacked axis (one call, one matrix)."
            )
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axes), self)
