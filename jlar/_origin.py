"""What a value in a program is made of: weights, data, or numbers written in the program."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp


class Origin(NamedTuple):
    """What a value is made of: a weight has leaves and is not data."""

    leaves: frozenset[int] = frozenset()
    """The weights it comes from, by number; none for data."""
    data: bool = False
    """Whether it comes from anything else than weights and numbers written in the program."""
    cut: str = ""
    """The part of the leaf it is, as an index: `[0:64]`."""
    layout: str = ""
    """The transpositions since then, to be named if another cut follows."""
    loops: frozenset[int] = frozenset()
    """The scans in which it is another weight in each iteration."""
    same_as: tuple[int, int] | None = None
    """The loop and the place among its carried values that this is, unchanged since it came in."""
    split: frozenset[str] = frozenset()
    """The mesh axes along which the devices of a shard_map hold different parts of it."""
    number: int | None = None
    """Its value, where that is a whole number written in the program."""
    pieces: tuple[tuple[int, int, Any], ...] = ()
    """The start, end and origin of what a vector is put together from (ravel_pytree)."""


DATA = Origin(data=True)
NUMBER = Origin()


def of_literal(literal: Any) -> Origin:
    """A number written in the program belongs to it; an array is what the function closes over."""
    if jnp.ndim(literal.val):
        return DATA
    whole = jnp.issubdtype(literal.aval.dtype, jnp.integer)
    return Origin(number=int(literal.val)) if whole else NUMBER


def why(eqn: Any, i: int) -> str:
    """What becomes of a weight, operand i, that meets data in an equation that is no product."""
    name = eqn.primitive.name
    if i and name in ("gather", "dynamic_slice"):
        return "indexes data"
    return _REASONS.get(name, f"meets data in {name!r}, which is no product")


_REASONS = {
    **dict.fromkeys(("gather", "dynamic_slice"), "looked up by data (an embedding)"),
    **dict.fromkeys(("mul", "div"), "times data, entry by entry (a gain, a mask), is data"),
    **dict.fromkeys(("add", "sub", "add_any"), "added to data (a bias, noise), is data"),
    "pallas_call": "inside a Pallas kernel",
    **dict.fromkeys(("ffi_call", "custom_call"), "inside an FFI kernel"),
}


def made_by(eqn: Any, origin: Origin, given: Sequence[Origin]) -> list[Origin]:
    """The origins of the results of an equation on weights: what it cuts out of a leaf."""
    name, params = eqn.primitive.name, eqn.params
    pieces, origin = origin.pieces, origin._replace(same_as=None, pieces=())
    if name == "concatenate" and len(eqn.outvars[0].aval.shape) == 1:
        ends = list(itertools.accumulate((a.aval.size for a in eqn.invars), initial=0))
        return [origin._replace(pieces=tuple(zip(ends, ends[1:], given, strict=False)))]
    shape: tuple[int, ...] = eqn.invars[0].aval.shape if eqn.invars else ()
    if name == "transpose":
        layout = ".T" if len(shape) == 2 else f".transpose{tuple(params['permutation'])}"
        # Twice transposed is not transposed.
        layout = "" if origin.layout == ".T" == layout else origin.layout + layout
        return [origin._replace(layout=layout)]
    if name == "reshape":
        return [origin._replace(layout=f"{origin.layout}.reshape{tuple(params['new_sizes'])}")]
    bounds: list[Any]
    if name == "slice":
        strides = params["strides"] or (1,) * len(shape)
        both = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        bounds = [list(both)]
    elif name in ("split", "unstack"):
        axis: int = params["axis"]
        sizes = map(int, params.get("sizes", (1,) * shape[axis]))
        whole = [(0, size, 1) for size in shape]
        bounds = [
            [*whole[:axis], (start, end, 1), *whole[axis + 1 :]]
            for start, end in itertools.pairwise(itertools.accumulate(sizes, initial=0))
        ]
    else:
        return [origin] * len(eqn.outvars)
    return [_piece(pieces, *each[0]) or part(origin, shape, each) for each in bounds]


def _piece(pieces: Sequence[tuple[int, int, Origin]], start: int, end: int, stride: int) -> Any:
    """What lies between start and end, if it is of one piece."""
    for a, b, origin in pieces:
        if a <= start and end <= b and stride == 1 and origin.leaves:
            return part(origin, (b - a,), [(start - a, end - a, 1)])
    return None


def part(origin: Origin, shape: tuple[int, ...], bounds: list[tuple[int, int, int]]) -> Origin:
    """What these (start, end, stride) cut out of a weight of this shape."""
    index = [_index(*bound, size) for bound, size in zip(bounds, shape, strict=True)]
    while index and index[-1] == ":":
        index.pop()
    if not index:
        return origin
    return origin._replace(cut=f"{origin.cut}{origin.layout}[{', '.join(index)}]", layout="")


def _index(start: int, end: int, stride: int, size: int) -> str:
    if stride != 1:
        return f"{start or ''}:{'' if end == size else end}:{stride}"
    if (start, end) == (0, size):
        return ":"
    return str(start) if end == start + 1 else f"{start}:{end}"
