"""Lookups in a weight by an index that is not data: `W[i]` for a number or a loop counter i."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from ._origin import Origin, part

LOOKUPS = ("dynamic_slice", "gather")


def picked(
    known: dict[Any, list[Any]],
    given: Sequence[Origin],
    eqn: Any,
    before: Sequence[Any],
    read: Callable[[Any], Origin],
) -> Origin:
    """The part of a weight that is looked up; in a loop another one each time."""
    origin = given[0]._replace(same_as=None)
    loops = origin.loops.union(*(o.loops for o in given[1:]))
    split = origin.split.union(*(o.split for o in given[1:]))
    if (loops, split) != (origin.loops, origin.split):
        # Lookups by different values are different matrices, whatever these are.
        by = [a.val if isinstance(a, jex.Literal) else id(a) for a in eqn.invars[1:]]
        seen = known.setdefault((origin.leaves, origin.cut, eqn.invars[0].aval.shape), [])
        seen += [] if by in seen else [by]
        number = seen.index(by) + 1
        cut = origin.cut + (f"[lookup {number}]" if number > 1 else "")
        return origin._replace(loops=loops, split=split, cut=cut)
    index, shape = _numbers(eqn.invars[1:], before, read), eqn.invars[0].aval.shape
    name, params = eqn.primitive.name, eqn.params
    if index is not None and name == "dynamic_slice":
        sizes = params["slice_sizes"]
        bounds = []
        for i, whole, size in zip(index, shape, sizes, strict=True):
            start = int(np.clip(i, 0, whole - size))
            bounds.append((start, start + size, 1))
        return part(origin, shape, bounds)
    if index is not None and index[0].size == 1:
        (axis, *others), sizes = params["dimension_numbers"].start_index_map, params["slice_sizes"]
        if not others:
            bounds = [(0, size, 1) for size in shape]
            start = int(np.clip(index[0].item(), 0, shape[axis] - sizes[axis]))
            bounds[axis] = start, start + sizes[axis], 1
            return part(origin, shape, bounds)
    what = "?" if index is None else ", ".join(map(str, np.ravel(index[0])))
    return origin._replace(cut=f"{origin.cut}{origin.layout}[{what}]", layout="")


def _numbers(
    atoms: Sequence[Any], before: Sequence[Any], read: Callable[[Any], Origin]
) -> list[np.ndarray] | None:
    """The values of these atoms, if the equations before compute them from known numbers."""

    def is_open(a: Any) -> bool:
        return not isinstance(a, jex.Literal) and read(a).number is None

    needed = set(filter(is_open, atoms))
    eqns = []
    for eqn in reversed(before):
        if needed.intersection(eqn.outvars):
            eqns.append(eqn)
            needed.difference_update(eqn.outvars)
            needed.update(filter(is_open, eqn.invars))
    if needed or any(eqn.effects for eqn in eqns):
        return None
    used = [a for eqn in eqns for a in eqn.invars] + list(atoms)
    known = {a: None for a in used if not isinstance(a, jex.Literal) and not is_open(a)}
    values = [np.asarray(read(a).number, a.aval.dtype) for a in known]
    named = jex.DebugInfo("jlar.capture", "an index", ("",) * len(known), ("",) * len(atoms))
    jaxpr = jex.Jaxpr([], list(known), list(atoms), eqns[::-1], frozenset(), named)
    with jax.ensure_compile_time_eval():
        return list(map(np.asarray, jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, []))(*values)))
