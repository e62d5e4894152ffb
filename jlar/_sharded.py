"""The functions of (W, X) for those who hold a mesh and PartitionSpecs."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike

from ._mesh import Split, names


def sharded(
    function: Callable[..., Any], *, mesh: Mesh, W_spec: P, X_spec: P
) -> Callable[..., Any]:
    """A function of (W, X) of this library, for arrays that are sharded like this; jitted.

    The result is that of the whole arrays, on every device. What moves between devices is fixed: a
    few scalars for `lar` and `energies`; sums of n x n numbers for `grams`, `spectra` and
    `alignment` and, where a spec splits the inputs n, each device's part of W and X once, at most
    n x n numbers at a time. The `eigh` of a spectrum runs on every device alike, O(n^3).

    Three ways to the same numbers, and when to use which:

    - Plain `jax.jit` on sharded arrays: the default, nothing to be said. On meshes with explicit
      axes nothing is gathered; with automatic axes XLA decides in the end.
    - `sharded`: when W must not be gathered whatever XLA thinks, and you know the specs.
    - `axes=` of the functions: when you write the code of one device, inside `jax.shard_map`.

    Args:
        function: `jlar.lar`, `jlar.energies`, `jlar.grams`, or `jlar.spectra`, `jlar.alignment`;
            or one of your own, `function(W, X, *, axes, ...)`, that calls them.
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

    def laid_out(W: ArrayLike, X: ArrayLike) -> tuple[dict[str, P], Split]:
        W_whole, X_whole = _filled("W", W, W_spec), _filled("X", X, X_spec)
        *tokens, columns = map(names, X_whole)
        m, n = map(names, W_whole)
        split = Split(sum(tokens, ()), m, n, columns)
        token_spec = X_whole[:-1]
        of_Y, of_mask = P(*token_spec, split.outputs), P(*token_spec)
        return {"W": W_whole, "X": X_whole, "Y": of_Y, "mask": of_mask}, split

    @jax.jit
    def program(operands: dict[str, Array]) -> Any:
        specs, split = laid_out(operands["W"], operands["X"])
        specs = {name: specs[name] for name in operands}
        if mesh.abstract_mesh.explicit_axes:  # what lies nowhere yet has to be said to be split
            places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
            operands = {name: jax.reshard(a, places[name]) for name, a in operands.items()}

        def local(operands: dict[str, Array]) -> Any:
            others = {k: a for k, a in operands.items() if k not in ("W", "X")}
            return function(operands["W"], operands["X"], **others, axes=split)

        return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P())(operands)

    def call(W: ArrayLike, X: ArrayLike, **others: ArrayLike | None) -> Any:
        specs, _ = laid_out(W, X)
        operands = {"W": W, "X": X} | {k: a for k, a in others.items() if a is not None}
        for name, array in operands.items():
            if name not in specs:
                raise ValueError(f"a sharded function takes W, X, Y= and mask=; got {name}=.")
            _check(name, array, specs[name], mesh)
        return program(operands)

    return call


def _filled(name: str, array: ArrayLike, spec: P) -> P:
    """The spec with an entry for each dimension."""
    rank = jax.numpy.ndim(array)
    if name == "W" and rank != 2:
        raise ValueError(
            f"W must have shape (m, n), outputs x inputs; got shape {jax.numpy.shape(array)}. For "
            "a stack of weights use jax.vmap of the function without specs."
        )
    if len(spec) > rank:
        raise ValueError(
            f"{name}_spec {spec} has more entries than {name} of shape {jax.numpy.shape(array)}."
        )
    return P(*spec, *(None,) * (rank - len(spec)))


def _check(name: str, array: ArrayLike, spec: P, mesh: Mesh) -> None:
    shape = jax.numpy.shape(array)
    for size, entry in zip(shape, spec, strict=False):
        for axis in names(entry):
            if axis not in mesh.shape:
                raise ValueError(
                    f"{name}_spec names the axis {axis!r}; the mesh has {tuple(mesh.shape)}."
                )
        parts = math.prod(mesh.shape[axis] for axis in names(entry))
        if size % parts:
            raise ValueError(
                f"{name} of shape {shape} does not divide by {name}_spec {spec}: {size} over "
                f"{entry!r} of {parts} devices. Pad it (and mask the padding), or split another "
                "dimension."
            )
    held = _held(array)
    where = mesh.abstract_mesh if isinstance(array, Tracer) else mesh
    if held is not None and not held.is_equivalent_to(NamedSharding(where, spec), len(shape)):
        raise ValueError(
            f"{name} is held as {held}, not as {spec} on a mesh of {mesh.size} devices "
            f"{dict(mesh.shape)}: pass the spec it has, or jax.device_put({name}, "
            f"NamedSharding(mesh, {spec})) first."
        )


def _held(array: ArrayLike) -> Any:
    """Where the array is, if that is settled: not if uncommitted or under automatic axes."""
    if isinstance(array, Tracer):
        sharding = jax.typeof(array).sharding
        return sharding if sharding.mesh.explicit_axes else None
    return array.sharding if isinstance(array, Array) and array.committed else None
