"""The library's functions for those who hold a mesh and PartitionSpecs: nothing is gathered.

Each is the function of the same name, jitted, on arrays that are sharded by `W_spec` and `X_spec`
over `mesh`; the result is that of the whole arrays, whole on every device. What moves between
devices is fixed: a few scalars (`lar`, `energies`), or sums of n x n numbers (`grams` and what
follows from them; where a spec splits the inputs n, each device also sends its part of W and X
once, at most n x n numbers at a time). The `eigh` of `spectra` and `alignment` runs on every device
alike, O(n^3): call it every so many steps (`jax.lax.cond`), or take `moments`.

Under plain `jax.jit` the functions of `jlar` itself take sharded arrays as well. Where the axes of
the mesh are explicit, Grams and what follows from them move the same; the rest, and all of it where
axes are automatic, is up to XLA in the end. Inside `jax.shard_map` they take `axes=`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Float, Shaped

from ._energies import Energies, measure
from ._mesh import Split, names
from ._moments import Moments
from ._spectra import Alignment, Grams, Spectra, second_moments


def lar(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t n"],
    *,
    mesh: Mesh,
    W_spec: P,
    X_spec: P,
    Y: Float[ArrayLike, "*t m"] | None = None,
    mask: Shaped[ArrayLike, "*t"] | None = None,
) -> Float[Array, ""]:
    """`jlar.lar` of sharded arrays; arguments as in `jlar.sharded.energies`.

    Example:
        >>> import jax, jlar
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> specs = dict(mesh=mesh, W_spec=P("model", None), X_spec=P("data", None))
        >>> print(f"{jlar.sharded.lar(W, X, **specs):.4f}")
        0.5024
    """
    return _call(_lar, W, X, Y, mask, mesh, W_spec, X_spec)


def energies(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t n"],
    *,
    mesh: Mesh,
    W_spec: P,
    X_spec: P,
    Y: Float[ArrayLike, "*t m"] | None = None,
    mask: Shaped[ArrayLike, "*t"] | None = None,
) -> Energies:
    """`jlar.energies` of sharded arrays.

    Args:
        W: weights (m, n), outputs x inputs.
        X: inputs (..., n), any number of leading token axes.
        mesh: the mesh whose devices hold them.
        W_spec: how W is sharded, such as P("model", None) for a vocabulary over "model".
        X_spec: how X is sharded, such as P("data", None, None), or shorter; its last entry is n's.
        Y: X W^T (..., m), sharded as X over tokens and as W over outputs. To be given where a spec
            splits n, or where the tokens and the outputs are split over one axis (FSDP).
        mask: (...,) of 0/1 or bool, sharded as the tokens of X.

    Raises:
        ValueError: a spec names an axis that is not on the mesh or splits a dimension it does not
            divide; an array lives elsewhere than mesh and spec say; and as `jlar.energies`.

    Example:
        >>> import jax, jlar
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> specs = dict(mesh=mesh, W_spec=P("model", None), X_spec=P("data", None))
        >>> print(jlar.sharded.energies(W, X, **specs).count)
        64
    """
    return _call(measure, W, X, Y, mask, mesh, W_spec, X_spec)


def grams(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t n"],
    *,
    mesh: Mesh,
    W_spec: P,
    X_spec: P,
    mask: Shaped[ArrayLike, "*t"] | None = None,
) -> Grams:
    """`jlar.grams` of sharded arrays; arguments as in `jlar.sharded.energies`.

    Example:
        >>> import jax, jlar
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> specs = dict(mesh=mesh, W_spec=P("model", "data"), X_spec=P("data", None))
        >>> print(jlar.sharded.grams(W, X, **specs).w.shape)
        (64, 64)
    """
    return _call(_grams, W, X, None, mask, mesh, W_spec, X_spec)


def spectra(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t n"],
    *,
    mesh: Mesh,
    W_spec: P,
    X_spec: P,
    mask: Shaped[ArrayLike, "*t"] | None = None,
) -> Spectra:
    """`jlar.spectra(method="gram")` of sharded arrays; arguments as in `jlar.sharded.energies`.

    Example:
        >>> import jax, jlar
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> specs = dict(mesh=mesh, W_spec=P("model", None), X_spec=P("data", None))
        >>> print(f"{jlar.sharded.spectra(W, X, **specs).corr:.2f}")
        0.15
    """
    return _call(_spectra, W, X, None, mask, mesh, W_spec, X_spec)


def alignment(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t n"],
    *,
    mesh: Mesh,
    W_spec: P,
    X_spec: P,
    mask: Shaped[ArrayLike, "*t"] | None = None,
) -> Alignment:
    """`jlar.alignment(method="gram")` of sharded arrays; arguments as in `jlar.sharded.energies`.

    Example:
        >>> import jax, jlar
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> specs = dict(mesh=mesh, W_spec=P("model", None), X_spec=P("data", None))
        >>> p, q, lar = jlar.sharded.alignment(W, X, **specs)
        >>> print(p.shape, q.shape, f"{lar:.4f}")
        (64,) (64,) 0.5024
    """
    s = spectra(W, X, mesh=mesh, W_spec=W_spec, X_spec=X_spec, mask=mask)
    return Alignment(s.p, s.q, s.lar)


def moments(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t n"],
    *,
    mesh: Mesh,
    W_spec: P,
    X_spec: P,
    mask: Shaped[ArrayLike, "*t"] | None = None,
) -> Moments:
    """`jlar.moments` of sharded arrays; arguments as in `jlar.sharded.energies`.

    Example:
        >>> import jax, jlar
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> specs = dict(mesh=mesh, W_spec=P("model", None), X_spec=P("data", None))
        >>> print(f"{jlar.sharded.moments(W, X, **specs).pp:.4f}")
        0.0312
    """
    return _call(_moments, W, X, None, mask, mesh, W_spec, X_spec)


def _lar(W: Array, X: Array, Y: Any, mask: Any, split: Split) -> Float[Array, ""]:
    return measure(W, X, Y, mask, split).lar


def _grams(W: Array, X: Array, Y: None, mask: Any, split: Split) -> Grams:
    return second_moments(W, X, mask, split)


def _spectra(W: Array, X: Array, Y: None, mask: Any, split: Split) -> Spectra:
    return second_moments(W, X, mask, split).spectra()


def _moments(W: Array, X: Array, Y: None, mask: Any, split: Split) -> Moments:
    return Moments(second_moments(W, X, mask, split))


def _call(
    f: Callable[..., Any],
    W: ArrayLike,
    X: ArrayLike,
    Y: ArrayLike | None,
    mask: ArrayLike | None,
    mesh: Mesh,
    W_spec: P,
    X_spec: P,
) -> Any:
    """`f(W, X, Y, mask, split)` inside shard_map, its operands split as the specs say."""
    X_spec = P(*X_spec, *(None,) * (jax.numpy.ndim(X) - len(X_spec)))
    W_spec = P(*W_spec, *(None,) * (jax.numpy.ndim(W) - len(W_spec)))
    split = Split(*_dimensions(W_spec, X_spec))
    tokens = X_spec[:-1]
    specs = W_spec, X_spec, P(*tokens, split.outputs), P(*tokens)
    for name, array, spec in zip(("W", "X", "Y", "mask"), (W, X, Y, mask), specs, strict=True):
        if array is not None:
            _check(name, array, spec, mesh)
    return _program(f, mesh, specs, split)(W, X, Y, mask)


@functools.lru_cache(maxsize=256)
def _program(
    f: Callable[..., Any], mesh: Mesh, specs: tuple[P, ...], split: Split
) -> Callable[..., Any]:
    local = functools.partial(f, split=split)
    program = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    held = tuple(NamedSharding(mesh, spec) for spec in specs)

    def placed(*operands: Array | None) -> Any:
        if mesh.abstract_mesh.explicit_axes:  # what lies nowhere yet has to be said to be split
            pairs = zip(operands, held, strict=True)
            operands = tuple(None if a is None else jax.reshard(a, to) for a, to in pairs)
        return program(*operands)

    return jax.jit(placed, in_shardings=held, out_shardings=NamedSharding(mesh, P()))


def _dimensions(W_spec: P, X_spec: P) -> tuple[tuple[str, ...], ...]:
    """The axes of tokens, outputs, inputs in W, and inputs in X."""
    *tokens, columns = map(names, X_spec)
    m, n = map(names, W_spec)
    return sum(tokens, ()), m, n, columns


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
    if len(spec) > len(shape):
        raise ValueError(f"{name}_spec {spec} has more entries than {name} of shape {shape}.")
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
