"""What splits the operands of a product inside shard_map, as far as the program tells."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from . import _mesh as mesh
from ._mesh import Split

# Afterwards every device along the axes holds the same.
EQUAL = ("psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant")
# Afterwards each device along the axes holds a part of its own.
SPLITTING = ("reduce_scatter", "all_to_all", "ppermute", "axis_index")


class Parts(NamedTuple):
    """What splits one product."""

    split: Split
    y: tuple[str, ...]
    """The axes over which the squares of Y are summed."""
    rows: tuple[str, ...] = ()
    """The axes that split the stacked matrices."""


NOT_SPLIT = Parts(Split(), ())


def after(eqn: Any, origins: list[Any]) -> list[Any]:
    """The origins of the results of an equation, with the mesh axes that split them."""
    name = eqn.primitive.name
    if name not in (*EQUAL, *SPLITTING):
        return origins
    axes = frozenset(_axes(eqn))
    change = frozenset.difference if name in EQUAL else frozenset.union
    return [origin._replace(split=change(origin.split, axes)) for origin in origins]


def _axes(eqn: Any) -> tuple[str, ...]:
    return mesh.names(eqn.params.get("axes", eqn.params.get("axis_name")))


def parts(
    axes: mesh.Axes | None,
    path: str,
    W: frozenset[str],
    X: frozenset[str],
    product: Any,
    eqns: Sequence[Any],
    i: int,
) -> tuple[Parts, Any]:
    """What splits a product of W and X that are split over these axes, and the value that is Y.

    An axis that splits W alone splits its outputs, one that splits X alone its tokens. Of one that
    splits both only `axes` can tell whether it splits the inputs of both or a stack of matrices.
    """
    if not (W or X):
        return NOT_SPLIT, eqns[i].outvars[0]
    said = {key: set(mesh.names(entry)) for key, entry in (axes or {}).items()}
    both = W & X
    n, rows = both & said.get("n", set()), both & said.get("stack", set())
    if unclear := both - n - rows:
        raise ValueError(
            f"the mesh axes {sorted(unclear)} split both operands of the product with {path!r}: "
            f'write axes={{"n": ...}} if they split its inputs, or axes={{"stack": ...}} if they '
            "split a stack of matrices (experts), or leave it out with where=."
        )
    if rows and not product.stack:
        raise ValueError(
            f"axes says that {sorted(rows)} split a stack of matrices, but the product with "
            f'{path!r} has none: write {{"n": ...}}, or leave it out with where=.'
        )
    order = lambda names: tuple(sorted(names))  # noqa: E731
    split = Split(t=order(X - W), m=order(W - X), n=order(n), columns=order(n))
    eqn = eqns[i]
    Y, summed = _whole(eqn, eqns[i + 1 :], n, path) if n else (eqn.outvars[0], frozenset())
    return Parts(split, (*split.t, *split.m, *order(summed)), order(rows)), Y


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


def told(axes: mesh.Axes | None) -> Parts:
    """What `axes` says splits every product, where the types say nothing."""
    if axes is None:
        raise ValueError(
            "inside jax.shard_map(check_vma=False) the types do not tell what is split: pass "
            'axes={"t": ...} with the mesh axes that split the tokens (and "m" those that split '
            "outputs), or leave check_vma at its default."
        )
    split = mesh.split(axes)
    if split.n or split.gathered:
        raise ValueError(
            'inside jax.shard_map(check_vma=False) axes may name what splits the tokens "t" and '
            f'the outputs "m" of every product; got {axes!r}. With check_vma=True, its default, '
            "the rest is seen from the types."
        )
    return Parts(split, split.t + split.outputs)


def _whole(
    eqn: Any, later: Sequence[Any], n: frozenset[str] | set[str], path: str
) -> tuple[Any, frozenset[str]]:
    """Y after its sum over the axes that split the inputs, and which of them split it then."""
    for each in later:
        name = each.primitive.name
        if eqn.outvars[0] in [a for a in each.invars if not isinstance(a, jax.extend.core.Literal)]:
            if name in ("psum", "psum_invariant") and set(_axes(each)) == set(n):
                return each.outvars[each.invars.index(eqn.outvars[0])], frozenset()
            if name == "reduce_scatter" and set(_axes(each)) == set(n):
                return each.outvars[0], frozenset(n)
    raise ValueError(
        f"the inputs of the product with {path!r} are split over {sorted(n)}, and its result is "
        "not summed over them by the next operation (jax.lax.psum or psum_scatter): sum it first, "
        "or leave it out with where=."
    )


def whole(a: Array) -> Array:
    """`a`, which is the same on every device, with a type that says so."""
    varying = tuple(mesh.varying(a))
    return jax.lax.pmean(a, varying) if varying else a
