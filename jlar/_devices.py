"""What splits the operands of a product inside shard_map, as far as the program tells.

The statistics of a product are those of one device until the shard_map ends: a sum over devices in
a loop would be one for each iteration, and in a branch that only some of them take it would hang.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from . import _mesh as mesh

# Afterwards every device along the axes holds the same.
EQUAL = ("psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant")
# Primitives of several operands whose results are these operands, one by one.
ONE_TO_ONE = ("optimization_barrier", *EQUAL)
# Afterwards each device along the axes holds a part of its own.
SPLITTING = ("reduce_scatter", "all_to_all", "ppermute", "axis_index")


class MeshSplit(NamedTuple):
    """The mesh axes that split one product."""

    t: tuple[str, ...] = ()  # Its tokens
    m: tuple[str, ...] = ()  # Its outputs
    n: tuple[str, ...] = ()  # Its inputs, of W and of X
    y: tuple[str, ...] = ()
    """Y: what splits tokens or outputs, and inputs if a reduce_scatter sums over them."""
    stack: tuple[str, ...] = ()  # The stacked matrices

    def beyond(self, axes: Iterable[str]) -> "MeshSplit":
        """What is left of them where these axes have ended."""
        return MeshSplit(*(tuple(name for name in names if name not in axes) for names in self))


NOT_SPLIT = MeshSplit()


def after(eqn: Any, origins: list[Any]) -> list[Any]:
    """The origins of the results of an equation, with the mesh axes that split them."""
    name = eqn.primitive.name
    if name not in (*EQUAL, *SPLITTING):
        return origins
    axes = frozenset(_axes(eqn))
    equal = name in EQUAL and eqn.params.get("axis_index_groups") is None
    change = frozenset.difference if equal else frozenset.union
    return [origin._replace(split=change(origin.split, axes)) for origin in origins]


def _axes(eqn: Any) -> tuple[str, ...]:
    return mesh.names(eqn.params.get("axes", eqn.params.get("axis_name")))


def split(
    axes: mesh.Axes | None, path: str, W: frozenset[str], X: frozenset[str], stacked: bool
) -> MeshSplit:
    """What splits a product of W and X that are split over these axes.

    An axis that splits W alone splits its outputs, one that splits X alone its tokens. Of one that
    splits both only `axes` can tell whether it splits the inputs of both or a stack of matrices.
    """
    if not (W or X):
        return NOT_SPLIT
    found: dict[str, set[str]] = {"t": set(), "m": set(), "n": set(), "stack": set()}
    said = {key: set(mesh.names(entry)) for key, entry in (axes or {}).items()}
    for axis in W | X:
        words = {key for key, names in said.items() if axis in names}
        if axis not in W or words == {"t"}:
            found["t"].add(axis)
        elif "stack" in words and stacked:
            found["stack"].add(axis)
        elif axis not in X and (not stacked or "m" in words):
            found["m"].add(axis)
        elif axis in X and words == {"n"}:
            found["n"].add(axis)
        else:
            both = "splits both operands" if axis in X else "splits the weight"
            raise ValueError(
                f"the mesh axis {axis!r} {both} of the product with {path!r}, and nothing tells "
                f'how: write axes={{"n": {axis!r}}} if it splits the inputs, {{"m": {axis!r}}} '
                f'the outputs, or {{"stack": {axis!r}}} a stack of matrices (experts; this product '
                f"has {'one' if stacked else 'none'}); or leave it out with where=."
            )
    names = {key: tuple(sorted(each)) for key, each in found.items()}
    return MeshSplit(**names, y=(*names["t"], *names["m"]))


def check(axes: mesh.Axes | None, known: set[str]) -> None:
    """ValueError unless `axes` maps what can be split to axes of a shard_map."""
    for key, entry in (axes or {}).items():
        if key not in ("t", "m", "n", "stack"):
            raise ValueError(
                'axes maps "t" (tokens), "m" (outputs), "n" (inputs) or "stack" to the mesh axes '
                f"that split them; got {axes!r}."
            )
        if unknown := set(mesh.names(entry)) - known:
            raise ValueError(
                f"axes names {sorted(unknown)}, over which no jax.shard_map splits anything here: "
                "axes= is for functions that contain one or are called in one. Under jit leave it "
                "out."
            )


def told(axes: mesh.Axes | None) -> MeshSplit:
    """What `axes` says splits every product, where the types say nothing."""
    if axes is None:
        raise ValueError(
            "inside jax.shard_map(check_vma=False) the types do not tell what is split: pass "
            'axes={"t": ...} with the mesh axes that split the tokens (and "m" those that split '
            "outputs), or leave check_vma at its default."
        )
    names = {key: mesh.names(entry) for key, entry in axes.items()}
    t, m = names.get("t", ()), names.get("m", ())
    if set(names) - {"t", "m"} or set(t) & set(m):
        raise ValueError(
            'inside jax.shard_map(check_vma=False) axes may name what splits the tokens "t" and '
            f'the outputs "m" of every product, over different axes; got {axes!r}. With '
            "check_vma=True, its default, the rest is seen from the types."
        )
    return MeshSplit(t=t, m=m, y=(*t, *m))


def outputs(split: MeshSplit, path: str, eqns: Sequence[Any], i: int) -> tuple[MeshSplit, Any]:
    """Y: the result of the i-th equation, or of the sum over the axes that split the inputs."""
    Y = eqns[i].outvars[0]
    if not split.n:
        return split, Y
    for eqn in eqns[i + 1 :]:
        places = [j for j, atom in enumerate(eqn.invars) if atom is Y]
        if places and set(_axes(eqn)) == set(split.n):
            if eqn.primitive.name in ("psum", "psum_invariant"):
                return split, eqn.outvars[places[0]]
            if eqn.primitive.name == "reduce_scatter":
                return split._replace(y=(*split.y, *split.n)), eqn.outvars[0]
    raise ValueError(
        f"the inputs of the product with {path!r} are split over {sorted(split.n)}, and its result "
        "is not summed over them as it is (by jax.lax.psum or psum_scatter): sum it "
        "first, take measure=jlar.grams, which needs no result, or leave it out with where=."
    )


def whole(a: Array, axes: Iterable[str]) -> Array:
    """`a`, which is equal along these axes; their mean tells JAX so."""
    varying = tuple(mesh.varying(a).intersection(axes))
    return jax.lax.pmean(a, varying) if varying else a
