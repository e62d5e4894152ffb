"""Capture inside shard_map: which mesh axes split each value, and sums over the devices.

The statistics of a product are those of one device until the shard_map ends: a sum over devices in
a loop would be one for each iteration, and in a branch that only some of them take it would hang.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from . import _mesh as mesh
from ._energies import Energies
from ._grams import Grams
from ._pool import sum_counts

KEYS = ("t", "m", "n", "stack")
"""What `axes` may say is split: tokens, outputs, inputs or stacked matrices."""
REPLICATING = ("psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant")
"""After these every device along the axes holds the same."""
ONE_TO_ONE = ("optimization_barrier", *REPLICATING)
"""Each result of these is made of one operand."""
SPLITTING = ("reduce_scatter", "all_to_all", "ppermute", "axis_index")
"""After these each device along the axes holds something of its own."""


def split_after(eqn: Any, origins: list[Any]) -> list[Any]:
    """The origins of a collective's results, with the mesh axes that still split them.

    Other equations change nothing.
    """
    name = eqn.primitive.name
    if name not in (*REPLICATING, *SPLITTING):
        return origins
    # A psum within groups of devices does not make all of them equal.
    equal = name in REPLICATING and eqn.params.get("axis_index_groups") is None
    change = frozenset.difference if equal else frozenset.union
    return [o._replace(split=change(o.split, frozenset(_axes(eqn)))) for o in origins]


def _axes(eqn: Any) -> tuple[str, ...]:
    return mesh.names(eqn.params.get("axes", eqn.params.get("axis_name")))


def split(
    axes: mesh.Axes | None, path: str, W: frozenset[str], X: frozenset[str], stacked: bool
) -> mesh.Split:
    """What splits a product of W and X that are split over these axes.

    An axis that splits W alone splits its outputs, one that splits X alone its tokens. Of one that
    splits both only `axes` can tell whether it splits the inputs of both or a stack of matrices.
    """
    found: dict[str, tuple[str, ...]] = dict.fromkeys(KEYS, ())
    for axis in sorted(W | X):
        told = {key for key, each in mesh.entries(axes, KEYS).items() if axis in each}
        if axis not in W or told == {"t"}:
            what = "t"
        elif "stack" in told and stacked:
            what = "stack"
        elif axis not in X and (not stacked or "m" in told):
            what = "m"
        elif axis in X and told == {"n"}:
            what = "n"
        else:
            both = "splits both operands" if axis in X else "splits the weight"
            raise ValueError(
                f"the mesh axis {axis!r} {both} of the product with {path!r}, and nothing tells "
                f'how: write axes={{"n": {axis!r}}} if it splits the inputs, {{"m": {axis!r}}} '
                f'the outputs, or {{"stack": {axis!r}}} a stack of matrices (experts; this product '
                f"has {'one' if stacked else 'none'}); or leave it out with where=."
            )
        found[what] += (axis,)
    return mesh.Split(**found, columns=found["n"])


def check_axes(axes: mesh.Axes | None, known: set[str]) -> None:
    """ValueError if `axes` has other keys than `KEYS`, or names what is not in `known`.

    Those are the axes of the shard_maps inside of the call or around it.
    """
    if unknown := set(sum(mesh.entries(axes, KEYS).values(), ())) - known:
        raise ValueError(
            f"axes names {sorted(unknown)}, over which no jax.shard_map splits anything here: "
            "axes= is for what contains one or is called in one. Under jit leave it out."
        )


def told(axes: mesh.Axes | None) -> mesh.Split:
    """What `axes` says splits every product, where the types say nothing."""
    t, m, *others = mesh.entries(axes, KEYS).values()
    if axes is None or any(others) or set(t) & set(m):
        raise ValueError(
            "inside jax.shard_map(check_vma=False) the types do not tell what is split: pass "
            'axes={"t": ...} with the mesh axes that split the tokens of every product, and "m" '
            f"with others that split its outputs, or leave check_vma at its default; got {axes!r}."
        )
    return mesh.Split(t, m)


def summed_output(split: mesh.Split, path: str, eqns: Sequence[Any]) -> tuple[mesh.Split, Any]:
    """The split of the first equation's result, and the result, once summed over the inputs."""
    Y = eqns[0].outvars[0]
    for eqn in eqns[1:]:
        places = [j for j, atom in enumerate(eqn.invars) if atom is Y]
        if places and set(_axes(eqn)) == set(split.n):
            if eqn.primitive.name in ("psum", "psum_invariant"):
                return split, eqn.outvars[places[0]]
            if eqn.primitive.name == "reduce_scatter":
                return split._replace(scattered=split.n), eqn.outvars[0]
    raise ValueError(
        f"the inputs of the product with {path!r} are split over {sorted(split.n)}, and its result "
        "is not summed over them as it is (by jax.lax.psum or psum_scatter): sum it "
        "first, take measure=jlar.grams, which needs no result, or leave it out with where=."
    )


def over_devices(statistic: PyTree, split: mesh.Split, loops: int, axes: Iterable[str]) -> PyTree:
    """The sums of one device's statistics over all devices along these axes.

    `loops` is how many axes of its stack are those of loops, before those of the product.
    """
    axes = frozenset(axes)
    t, m, n, _, stack, scattered = split.without(frozenset().union(*split) - axes)

    def counted(sums: Array) -> Array:
        calls, tokens = sums[..., -3:-2, :], sums[..., -2:, :]
        return jnp.concatenate([calls, sum_counts(tokens, t)], axis=-2)

    if isinstance(statistic, Energies):
        e, by = statistic, (t + m + scattered, t + n, m + n)
        squares = [jax.lax.psum(a, names) for a, names in zip((e.y, e.x, e.w), by, strict=True)]
        statistic = Energies.of(squares, counted(e.sums), e.n)
    elif isinstance(statistic, Grams):
        w, x = jax.lax.psum(statistic.w, m), jax.lax.psum(statistic.x, t)
        statistic = Grams(w, x, counted(statistic.sums))
    else:
        statistic = jax.lax.psum(statistic, t)

    def whole(a: Array) -> Array:
        return mesh.whole(jax.lax.all_gather(a, stack, axis=loops, tiled=True), axes)

    return jax.tree.map(whole, statistic)
