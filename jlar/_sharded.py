"""The functions of (W, X) for those who hold a mesh and PartitionSpecs."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike

from ._checks import need
from ._mesh import Split, names


def sharded(
    function: Callable[..., Any], *, mesh: Mesh, W_spec: P, X_spec: P
) -> Callable[..., Any]:
    """A function of (W, X) of this library, for arrays that are sharded like this; jitted.

    The result is that of the whole arrays, on every device. There are three ways to it:

    - Plain `jax.jit` on sharded arrays is the default, with nothing to be said: `jlar.energies` and
      `jlar.lar` move a few scalars, `jlar.grams` and `jlar.spectra` sums of n x n numbers. With
      explicit mesh axes that is so however W and X are split. With automatic axes XLA decides, and
      gathers W or X for a product, and so for the Grams, where their columns (the inputs n) are
      split: use one of the other ways there. W is also multiplied on every device that holds it.
    - `sharded`, when nothing may be gathered whatever XLA thinks, and you know the specs.
    - `axes=` of the functions, when you write the code of one device, inside `jax.shard_map`.

    By the last two a few scalars move for `lar` and `energies`; sums of n x n numbers for `grams`,
    `spectra` and `alignment` and, where n is split, each device's part of W and X once, at most
    n x n numbers at a time. In all three the `eigh` of a spectrum runs on every device, O(n^3).

    Args:
        function: `jlar.lar`, `jlar.energies`, `jlar.grams`, `jlar.spectra` or `jlar.alignment`; or
            one of your own, `function(W, X, *, axes, ...)`, that calls them.
        mesh: the mesh whose devices hold the arrays.
        W_spec: how W (m, n) is sharded, such as P("model") for a vocabulary over "model".
        X_spec: how X (..., n) is sharded, such as P("data"), or longer; its last entry is n's.

    Returns:
        A function of (W, X), and of Y and mask by keyword: Y sharded as X over tokens and as W over
        outputs, to be given where a spec splits n or tokens and outputs lie over one axis (FSDP);
        the mask as the tokens of X.

    Raises:
        ValueError: in the call, at trace time: a spec names an axis that is not on the mesh or
            splits a dimension it does not divide; an array lives elsewhere than mesh and spec say;
            and whatever the function raises.

    Example:
        >>> import jax, jlar
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> lar = jlar.sharded(jlar.lar, mesh=mesh, W_spec=P("model"), X_spec=P("data"))
        >>> print(f"{lar(W, X):.4f}")
        0.5024
    """

    def layout(operands: dict[str, Array]) -> tuple[dict[str, P], Split]:
        W, X = _filled("W", operands["W"], W_spec), _filled("X", operands["X"], X_spec)
        *tokens, columns = map(names, X)
        rows, inputs = map(names, W)
        split = Split(sum(tokens, ()), rows, inputs, columns)
        specs = {"W": W, "X": X, "Y": P(*X[:-1], split.outputs), "mask": P(*X[:-1])}
        return {name: specs[name] for name in operands}, split

    @jax.jit
    def program(operands: dict[str, Array]) -> Any:
        specs, split = layout(operands)
        if mesh.abstract_mesh.explicit_axes:  # what lies nowhere yet has to be said to be split
            places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
            operands = {name: jax.reshard(a, places[name]) for name, a in operands.items()}

        def local(operands: dict[str, Array]) -> Any:
            W, X = operands.pop("W"), operands.pop("X")
            return function(W, X, **operands, axes=split)

        return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P())(operands)

    def call(
        W: ArrayLike, X: ArrayLike, *, Y: ArrayLike | None = None, mask: ArrayLike | None = None
    ) -> Any:
        given = {"W": W, "X": X, "Y": Y, "mask": mask}
        operands = {name: jax.numpy.asarray(a) for name, a in given.items() if a is not None}
        for name, spec in layout(operands)[0].items():
            _check(name, operands[name], spec, mesh)
        return program(operands)

    return call


def _filled(name: str, array: Array, spec: P) -> P:
    """The spec with an entry for each dimension."""
    need(
        array.ndim == 2 if name == "W" else array.ndim > 0,
        f"{name} must have shape {'(m, n), outputs x inputs' if name == 'W' else '(..., n)'}; "
        f"got shape {array.shape}. For a stack use jax.vmap of the function without specs.",
    )
    need(
        len(spec) <= array.ndim,
        f"{name}_spec {spec} has more entries than {name} of shape {array.shape}.",
    )
    return P(*spec, *(None,) * (array.ndim - len(spec)))


def _check(name: str, array: Array, spec: P, mesh: Mesh) -> None:
    for size, entry in zip(array.shape, spec, strict=False):
        for axis in names(entry):
            need(
                axis in mesh.shape,
                f"{name}_spec names the axis {axis!r}; the mesh has {tuple(mesh.shape)}.",
            )
        devices = math.prod(mesh.shape[axis] for axis in names(entry))
        need(
            size % devices == 0,
            f"{name} of shape {array.shape} does not divide by {name}_spec {spec}: {size} over "
            f"{entry!r} of {devices} devices. Pad it (and mask the padding), or split another "
            "dimension.",
        )
    # Where the array lies, if that is settled: not if uncommitted or under automatic axes.
    if isinstance(array, Tracer):
        place, here = jax.typeof(array).sharding, mesh.abstract_mesh
        settled = bool(place.mesh.explicit_axes)
    else:
        place, here, settled = array.sharding, mesh, array.committed
    need(
        not settled or place.is_equivalent_to(NamedSharding(here, spec), array.ndim),
        f"{name} is held as {place}, not as {spec} on a mesh of {mesh.size} devices "
        f"{dict(mesh.shape)}: pass the spec it has, or jax.device_put({name}, "
        f"NamedSharding(mesh, {spec})) first.",
    )
