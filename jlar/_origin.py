"""What a value in a program is made of: weights, data, or numbers written in the program."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import jax.extend.core as jex


class Origin(NamedTuple):
    """What a value is made of: a weight has leaves and is not data."""

    leaves: frozenset[int] = frozenset()  # The weights it comes from, by number; none for data
    data: bool = False
    """Whether it comes from anything else than weights and numbers written in the program."""
    cut: str = ""  # The part of the leaf it is, as an index: `[0:64]`
    layout: str = ""  # The transpositions and reshapes since then; part of `cut` if another follows
    loops: frozenset[int] = frozenset()
    """The scans in which it is another weight in each iteration."""
    split: frozenset[str] = frozenset()
    """The mesh axes along which the devices of a shard_map hold different parts of it."""
    number: int | None = None
    """Values with the same number are equal. Numbers written in the program and values carried by a
    loop have one; None: nothing is known."""
    joins: tuple[tuple[int, int, Any], ...] = ()
    """The start, end and origin of each value that a vector concatenates (ravel_pytree)."""


DATA = Origin(data=True)
Bounds = tuple[int, int, int]
"""Start, end and stride along one axis."""

LOOKUPS = ("dynamic_slice", "gather")
UNKNOWN = r"\[\?\d+\]"
"""Matches `[?1]` in a cut, an index that the program computes: known is only which are equal."""


def why(eqn: Any, i: int) -> str:
    """What becomes of a weight, operand i, that meets data in an equation that is no product."""
    name = eqn.primitive.name
    if i and name in LOOKUPS:
        return "indexes data"
    return _REASONS.get(name, f"meets data in {name!r}, which is no product")


_REASONS = {
    **dict.fromkeys(LOOKUPS, "looked up by data (an embedding)"),
    **dict.fromkeys(("mul", "div"), "times data, entry by entry (a gain, a mask), is data"),
    **dict.fromkeys(("add", "sub", "add_any"), "added to data (a bias, noise), is data"),
    "pallas_call": "inside a Pallas kernel",
    **dict.fromkeys(("ffi_call", "custom_call"), "inside an FFI kernel"),
}


def made_by(
    eqn: Any, origin: Origin, given: Sequence[Origin], lookups: dict[Any, list[Any]]
) -> list[Origin]:
    """The origins of the results of an equation on weights: what it cuts out of a leaf.

    `lookups` holds, for each weight, the indices it was looked up by so far.
    """
    name, params = eqn.primitive.name, eqn.params
    joins, origin = origin.joins, origin._replace(number=None, joins=())
    shape: tuple[int, ...] = eqn.invars[0].aval.shape if eqn.invars else ()
    if name == "concatenate" and len(shape) == 1:
        ends = pairwise(accumulate((a.aval.size for a in eqn.invars), initial=0))
        joined = tuple((*bounds, each) for bounds, each in zip(ends, given, strict=True))
        return [origin._replace(joins=joined)]
    if name == "transpose":
        layout = ".T" if len(shape) == 2 else f".transpose{tuple(params['permutation'])}"
        # Twice transposed is not transposed.
        layout = "" if origin.layout == ".T" == layout else origin.layout + layout
        return [origin._replace(layout=layout)]
    if name == "reshape":
        return [origin._replace(layout=f"{origin.layout}.reshape{tuple(params['new_sizes'])}")]
    if cuts := _cuts(eqn, shape):
        return [_of_one(joins, *cut[0]) or cut_out(origin, shape, cut) for cut in cuts]
    if name in LOOKUPS:
        # Each different index is another matrix, whatever its value; the first keeps the name of
        # the leaf.
        seen = lookups.setdefault((origin.leaves, origin.cut, origin.layout, shape), [])
        by = zip(given[1:], eqn.invars[1:], strict=True)
        index = [id(atom) if o.number is None else o.number for o, atom in by]
        seen += [] if index in seen else [index]
        return [origin if index == seen[0] else _named(origin, f"?{seen.index(index)}")]
    return [origin] * len(eqn.outvars)


def _cuts(eqn: Any, shape: tuple[int, ...]) -> list[list[Bounds]]:
    """For each result, what it takes along each axis of the first operand.

    Empty if this is no cut, or if its bounds are not written in the program.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "slice":
        strides = params["strides"] or (1,) * len(shape)
        return [[*zip(params["start_indices"], params["limit_indices"], strides, strict=True)]]
    if name in ("split", "unstack"):
        axis, whole = params["axis"], [(0, size, 1) for size in shape]
        sizes = map(int, params.get("sizes", (1,) * shape[axis]))
        ends = pairwise(accumulate(sizes, initial=0))
        return [[*whole[:axis], (*each, 1), *whole[axis + 1 :]] for each in ends]
    if name == "dynamic_slice" and all(isinstance(a, jex.Literal) for a in eqn.invars[1:]):
        each = zip(eqn.invars[1:], shape, params["slice_sizes"], strict=True)
        starts = [(min(max(int(a.val), 0), size - length), length) for a, size, length in each]
        return [[(start, start + length, 1) for start, length in starts]]
    return []


def _of_one(joins: Sequence[Any], start: int, end: int, stride: int) -> Origin | None:
    """The origin of a slice of a concatenated vector if it lies inside one of the weights joined.

    Otherwise None. So what unravels a model (ravel_pytree) gives each weight back.
    """
    for first, last, origin in joins:
        if first <= start and end <= last and stride == 1 and origin.leaves:
            return cut_out(origin, (last - first,), [(start - first, end - first, 1)])
    return None


def cut_out(origin: Origin, shape: tuple[int, ...], bounds: Sequence[Bounds]) -> Origin:
    """What these (start, end, stride) cut out of a weight of this shape."""
    index = [_index(*bound, size=size) for bound, size in zip(bounds, shape, strict=True)]
    while index and index[-1] == ":":
        index.pop()
    return _named(origin, ", ".join(index)) if index else origin


def _named(origin: Origin, index: str) -> Origin:
    return origin._replace(cut=f"{origin.cut}{origin.layout}[{index}]", layout="")


def _index(start: int, end: int, stride: int, *, size: int) -> str:
    """As one writes an index: `:`, `0:64`, `::2`; one row is `3`, though its axis stays."""
    if stride != 1:
        return f"{start or ''}:{'' if end == size else end}:{stride}"
    if (start, end) == (0, size):
        return ":"
    return str(start) if end == start + 1 else f"{start}:{end}"
