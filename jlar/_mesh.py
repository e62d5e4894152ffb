"""Meshes: what splits W and X over devices, and sums that are whole on every device."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

Axes = Mapping[str, str | tuple[str, ...]]
"""Mesh axes that split the tokens "t", outputs "m" and inputs "n" of (W, X) inside shard_map."""


class Split(NamedTuple):
    """The mesh axes that split each dimension of what one device holds."""

    t: tuple[str, ...] = ()  # Tokens, of X, Y and the mask
    m: tuple[str, ...] = ()  # Outputs: the rows of W
    n: tuple[str, ...] = ()  # Inputs: the columns of W
    columns: tuple[str, ...] = ()  # Inputs: the columns of X
    stack: tuple[str, ...] = ()  # Stacked matrices
    scattered: tuple[str, ...] = ()  # These split Y too, after a reduce_scatter

    def without(self, axes: Iterable[str]) -> "Split":
        """What is left outside of a shard_map over these axes."""
        return Split(*(tuple(name for name in names if name not in axes) for names in self))

    @property
    def outputs(self) -> tuple[str, ...]:
        """What splits the outputs of Y."""
        return tuple(a for a in self.m if a not in self.t)

    @property
    def gathered(self) -> tuple[str, ...]:
        """What splits W's rows in storage alone (FSDP), because it splits the tokens of Y."""
        return tuple(a for a in self.m if a in self.t)


def names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec, or of `axes`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def entries(axes: Axes | None, keys: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The mesh axes by what they split, or ValueError where `axes` has other keys."""
    if not isinstance(axes, Mapping | None) or not set(axes or ()) <= set(keys):
        raise ValueError(
            'axes must map "t" (tokens), "m" (outputs), "n" (inputs), or "stack" in a capture, to '
            'the names of the mesh axes that split them, as {"t": "data", "m": "model"}, and here '
            f"no other than {keys}; got {axes!r}."
        )
    return {key: names((axes or {}).get(key)) for key in keys}


def as_split(axes: Axes | Split | None) -> Split:
    """The axes as tuples, or ValueError. X is taken to be split as W, but not over axes of "t"."""
    if isinstance(axes, Split):
        return axes
    t, m, n = entries(axes, ("t", "m", "n")).values()
    try:
        size(t + m + n)
    except NameError as error:
        raise ValueError(
            f"axes names what is not a mesh axis here ({error}): axes= is for calls inside "
            "jax.shard_map, over its own axis names. Under jit leave it out."
        ) from None
    if set(m) & set(n):
        raise ValueError(f'axes must not split "m" and "n" over the same axis; got {axes!r}.')
    return Split(t, m, n, tuple(a for a in n if a not in t))


def size(axes: tuple[str, ...]) -> int:
    """Over how many devices these axes split."""
    return math.prod(jax.lax.axis_size(a) for a in axes)


def varying(a: Array) -> frozenset[str]:
    """The mesh axes along which the devices' values may differ (none are known without vma)."""
    return jax.typeof(a).manual_axis_type.varying


def check_varies(a: Array, name: str, axes: tuple[str, ...]) -> None:
    """ValueError where `a` is the same along an axis that is said to split it."""
    for axis in axes:
        # With check_vma=False not even the type of the index says that it varies.
        if axis in varying(jax.lax.axis_index(axis)) and axis not in varying(a):
            raise ValueError(
                f"{name} is the same on every device along {axis!r}, so that axis does not split "
                f"it; leave it out of axes=, or split {name} in the in_specs of shard_map."
            )


def whole(a: Array, axes: Iterable[str]) -> Array:
    """`a`, which is equal on the devices along these axes; their mean tells JAX so."""
    unknown = tuple(sorted(varying(a).intersection(axes)))
    return jax.lax.pmean(a, unknown) if unknown else a


def total(a: Array, axes: tuple[str, ...], split: Split) -> Array:
    """The sum over the devices along these axes, the same on each of them.

    Along the other axes of the split the devices hold equal values, which JAX need not know: of a
    W gathered for use, for instance.
    """
    return whole(jax.lax.psum(a, axes), frozenset().union(*split).difference(axes))


def vary_as(a: Array, *others: Array) -> Array:
    """`a`, said to vary along every axis along which one of the others does."""
    missing = frozenset().union(*map(varying, others)) - varying(a)
    return jax.lax.pcast(a, tuple(sorted(missing)), to="varying")


def on_auto_axes(f: Callable[..., Any], out: Any = PartitionSpec()) -> Callable[..., Any]:  # noqa: B008
    """`f` with results that are whole on every device, or sharded as the specs `out` say.

    Where arguments carry explicit mesh axes, JAX refuses a product over a sharded axis, a split
    of it, an eigh or an SVD without this. Elsewhere it changes nothing.
    """

    def call(*args: Array) -> Any:
        meshes = [jax.typeof(a).sharding.mesh for a in args]
        mesh = next((each for each in meshes if each.explicit_axes), None)
        if mesh is None or mesh.manual_axes:
            return f(*args)
        # NamedSharding and not the spec alone, because no jax.set_mesh may be in force.
        is_spec = lambda a: isinstance(a, PartitionSpec)  # noqa: E731
        places = jax.tree.map(partial(NamedSharding, mesh), out, is_leaf=is_spec)
        return jax.sharding.auto_axes(f, out_sharding=places)(*args)

    return call
