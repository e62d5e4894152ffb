"""Meshes: which axes split W and X inside shard_map, and sums that end whole on every device."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

WHOLE = PartitionSpec()


class Split(NamedTuple):
    """The mesh axes that split each dimension of what one device holds."""

    t: tuple[str, ...] = ()
    """Tokens, of X, Y and the mask."""
    m: tuple[str, ...] = ()
    """Outputs: the rows of W."""
    n: tuple[str, ...] = ()
    """Inputs: the columns of W."""
    columns: tuple[str, ...] = ()
    """Inputs: the columns of X."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """What splits the outputs of Y."""
        return tuple(a for a in self.m if a not in self.t)

    @property
    def gathered(self) -> tuple[str, ...]:
        """What splits the rows of W in storage, but not those that multiply."""
        return tuple(a for a in self.m if a in self.t)

    @property
    def named(self) -> frozenset[str]:
        """All of them."""
        return frozenset().union(*self)


Axes = Mapping[str, str | tuple[str, ...]]
"""Mesh axes that split the tokens "t", outputs "m" and inputs "n" of (W, X) inside shard_map."""


def names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def split(axes: Axes | Split | None) -> Split:
    """The axes as tuples, or ValueError. X is taken to be split as W, but not over axes of "t"."""
    if axes is None or isinstance(axes, Split):
        return axes or Split()
    if not isinstance(axes, Mapping) or not set(axes) <= {"t", "m", "n"}:
        raise ValueError(
            'axes must map "t" (tokens), "m" (outputs) and "n" (inputs) to the names of the mesh '
            f'axes that split them, as {{"t": "data", "m": "model"}}; got {axes!r}.'
        )
    t, m, n = ((a,) if isinstance(a := axes.get(key, ()), str) else tuple(a) for key in "tmn")
    for name in (*t, *m, *n):
        try:
            jax.lax.axis_size(name)
        except NameError:
            raise ValueError(
                f"axes names {name!r}, which is not a mesh axis here: axes= is for calls inside "
                "jax.shard_map, over its own axis names. Under jit leave it out."
            ) from None
    if set(m) & set(n):
        raise ValueError(f'axes must not split "m" and "n" over the same axis; got {axes!r}.')
    return Split(t, m, n, tuple(a for a in n if a not in t))


def size(axes: tuple[str, ...]) -> int:
    """How many parts they make."""
    return math.prod(jax.lax.axis_size(a) for a in axes)


def varying(a: Array) -> frozenset[str]:
    """The mesh axes along which the devices' values may differ (none are known without vma)."""
    return jax.typeof(a).manual_axis_type.varying


def check_varies(a: Array, name: str, axes: tuple[str, ...]) -> None:
    """ValueError where `a` is the same along an axis that is said to split it."""
    for axis in axes:
        if axis in varying(jax.lax.axis_index(axis)) and axis not in varying(a):
            raise ValueError(
                f"{name} is the same on every device along {axis!r}, so that axis does not split "
                f"it; leave it out of axes=, or split {name} in the in_specs of shard_map."
            )


def total(a: Array, axes: tuple[str, ...], split: Split) -> Array:
    """The sum over the devices along these axes, the same on each of them.

    Along the other axes of the split the devices hold equal values, which JAX need not know (W
    gathered for use, for instance): their mean tells it.
    """
    if axes:
        a = jax.lax.psum(a, axes)
    equal = tuple((varying(a) & split.named).difference(axes)) if split.named else ()
    return jax.lax.pmean(a, equal) if equal else a


def vary_as(a: Array, *others: Array) -> Array:
    """`a`, said to vary along every axis along which one of the others does."""
    missing = frozenset().union(*map(varying, others)) - varying(a)
    return jax.lax.pcast(a, tuple(missing), to="varying") if missing else a


def unsharded(f: Callable[..., Any], out: Any = WHOLE) -> Callable[..., Any]:
    """`f` with a result that is whole on every device, whatever the sharding of its arguments.

    Or, by `out`, one that is sharded in another way. Where arguments carry explicit mesh axes, a
    sum over a sharded axis, an eigh or an SVD is refused without it; elsewhere it changes nothing.
    """

    def call(*args: Array) -> Any:
        meshes = [jax.typeof(a).sharding.mesh for a in args]
        mesh = next((m for m in meshes if m.explicit_axes), None)
        if mesh is None or mesh.manual_axes:
            return f(*args)
        named = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            out,
            is_leaf=lambda spec: isinstance(spec, PartitionSpec),
        )
        # With its mesh, because no jax.set_mesh may be in force.
        return jax.sharding.auto_axes(f, out_sharding=named)(*args)

    return call
