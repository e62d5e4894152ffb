"""One walk over a jaxpr: where weights meet data, and how to evaluate it with its statistics.

The plan of a jaxpr is made without computing anything: each value gets an `Origin`, each product of
a weight with data becomes a `Site`. `evaluate` then runs the plan: the equations as they are, and
after each site its statistics.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from . import _devices as devices
from . import _mesh as mesh
from ._products import PRODUCTS, Product, statistics

Statistics = dict["Key", PyTree]
Run = Callable[..., tuple[Sequence[Array], Statistics]]


class Origin(NamedTuple):
    """What a value is made of."""

    leaves: frozenset[int] = frozenset()
    """The weights it comes from; of data none is kept."""
    data: bool = False
    """Whether it comes from anything else than weights and numbers written in the program."""
    cut: str = ""
    """The part of the leaf it is, as an index: `[0:64]`."""
    layout: str = ""
    """The transpositions since then, to be named if another cut follows."""
    loops: frozenset[int] = frozenset()
    """The scans in which it is another weight in each iteration."""
    split: frozenset[str] = frozenset()
    """The mesh axes along which the devices of a shard_map hold different parts of it."""

    @property
    def weight(self) -> bool:
        """Whether it is a weight: made of leaves and of nothing but leaves."""
        return bool(self.leaves)


DATA = Origin(data=True)


class Key(NamedTuple):
    """Products with equal keys are products of the same matrix, and pool."""

    leaf: int
    cut: str
    n: int
    m: int
    stack: tuple[int, ...]


class Site(NamedTuple):
    """A product of a weight with data."""

    key: Key
    tokens: tuple[int, ...]
    loops: frozenset[int]
    through: tuple[str, ...] = ()
    """The control flow around it, innermost first."""

    def inside(self, what: str, **changes: Any) -> "Site":
        """The same site seen from outside of one construct."""
        return self._replace(through=(*self.through, what), **changes)


class Step(NamedTuple):
    """Some equations, or the statistics of a site."""

    run: Run
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    last: frozenset[Any] = frozenset()
    """What nothing needs after it."""


Piece = Step | list[Any]
"""What a plan is made of first: steps, and between them equations in which nothing is measured."""


class Plan(NamedTuple):
    """What there is to know of a jaxpr for given origins of its inputs."""

    steps: list[Step]
    origins: list[Origin]
    sites: list[Site]
    notes: list[tuple[int, str]]
    """Why a leaf has no site here."""


class Part(NamedTuple):
    """What one equation adds to a plan."""

    origins: list[Origin]
    """Of its results."""
    sites: Sequence[Site] = ()
    notes: Sequence[tuple[int, str]] = ()
    step: Step | None = None
    """What is run in its place or, with `after`, beside it; None: the equation as it is."""
    after: Any = None
    """The value that has to be there first."""


@dataclass(frozen=True)
class Walk:
    """What holds for a whole program: the weights, and what is asked of them."""

    paths: list[str]
    sizes: list[int]
    chosen: frozenset[int]
    measure: Callable[..., PyTree]
    mask: Array | None
    axes: mesh.Axes | None
    rules: Mapping[str, Callable[["Walk", Any, list[Origin]], Part]]
    """How the primitives that hold programs of their own are walked."""
    blind: bool = False
    """Whether this is inside a shard_map that does not tell what it splits (check_vma=False)."""
    quiet: bool = False
    """Whether equations that compute nothing are left out: what they print is printed already."""
    number: Iterable[int] = field(default_factory=itertools.count)
    plans: dict[Any, Any] = field(default_factory=dict)

    def silent(self) -> "Walk":
        """The walk of a second evaluation."""
        return replace(self, quiet=True, plans={})

    def plan(
        self, jaxpr: jex.Jaxpr, origins: Sequence[Origin], consts: Sequence[Origin] | None = None
    ) -> Plan:
        """The plan of a jaxpr whose inputs and constants (by default data) have these origins."""
        key = id(jaxpr), tuple(origins)
        if key not in self.plans:
            # The jaxpr is kept beside its plan so that its id stays its own.
            consts = [DATA] * len(jaxpr.constvars) if consts is None else consts
            env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *origins], strict=True))
            self.plans[key] = jaxpr, self._plan(jaxpr, env)
        return self.plans[key][1]

    def _plan(self, jaxpr: jex.Jaxpr, env: dict[Any, Origin]) -> Plan:
        read = lambda atom: _of_literal(atom) if isinstance(atom, jex.Literal) else env[atom]  # noqa: E731
        sites: list[Site] = []
        notes: list[tuple[int, str]] = []
        pieces: list[Piece] = [[]]
        waiting: dict[Any, Step] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            if self.quiet and not eqn.outvars:
                continue
            part = self._part(list(map(read, eqn.invars)), jaxpr.eqns, i)
            env.update(zip(eqn.outvars, part.origins, strict=True))
            sites += part.sites
            notes += part.notes
            if part.after is not None:
                waiting[part.after] = part.step
            if part.step is None or part.after is not None:
                pieces[-1].append(eqn)
            else:
                pieces += [part.step, []]
            for value in eqn.outvars:
                if value in waiting:
                    pieces += [waiting.pop(value), []]
        steps = _linked([piece for piece in pieces if piece], jaxpr.outvars)
        return Plan(steps, [read(a) for a in jaxpr.outvars], sites, notes)

    def _part(self, given: list[Origin], eqns: Sequence[Any], i: int) -> Part:
        eqn, name = eqns[i], eqns[i].primitive.name
        if name in PRODUCTS and sum(origin.weight for origin in given[:2]) == 1:
            return self._product(given, eqns, i)
        if name in self.rules:
            part = self.rules[name](self, eqn, given)
            return part if part.sites else part._replace(step=None)
        return self.plain(eqn, given)

    def plain(self, eqn: Any, given: list[Origin]) -> Part:
        """An equation that is no product of a weight with data and has none inside."""
        name = eqn.primitive.name
        joined = self.joined(given)
        notes = [(leaf, _why(name)) for o in given for leaf in o.leaves if joined.data]
        origins = [joined] * len(eqn.outvars)
        if joined.weight:
            origins = _shaped(eqn, joined)
        return Part(devices.after(eqn, origins), notes=notes)

    def _product(self, given: list[Origin], eqns: Sequence[Any], i: int) -> Part:
        """A product of a weight with data: a site if it can be measured and is asked for."""
        eqn, (w, x) = eqns[i], (0, 1) if given[0].weight else (1, 0)
        weight, split = given[w], given[w].split | given[x].split
        origins = [Origin(data=True, split=split)] * len(eqn.outvars)
        shapes = [atom.aval.shape for atom in eqn.invars[:2]]
        product = PRODUCTS[eqn.primitive.name](eqn.params, shapes, w == 0)
        why = product if isinstance(product, str) else _unfit(product, eqn)
        if why:
            return Part(origins, notes=[(each, why) for each in weight.leaves])
        leaf = self.main(weight.leaves)
        notes = [(each, f"part of {self.paths[leaf]}") for each in weight.leaves - {leaf}]
        if leaf not in self.chosen:
            return Part(origins, notes=[*notes, (leaf, "not chosen by where=")])
        key = Key(leaf, weight.cut, product.n, product.m, product.stack)
        site = Site(key, product.tokens, weight.loops)
        if self.blind:
            parts, Y = devices.told(self.axes), eqn.outvars[0]
        else:
            parts, Y = devices.parts(
                self.axes,
                self.paths[leaf],
                weight.split,
                given[x].split,
                bool(product.stack),
                eqn,
                eqns[i + 1 :],
            )

        def run(*operands: Array) -> tuple[list[Array], Statistics]:
            keep = None if self.mask is None else self._keep(product.tokens, leaf)
            return [], {key: statistics(self.measure, product, parts, keep, *operands)}

        step = Step(run, [eqn.invars[w], eqn.invars[x], Y, *eqn.invars[2:]], [])
        return Part(origins, [site], notes, step, after=Y)

    def _keep(self, tokens: tuple[int, ...], leaf: int) -> Array:
        keep = self.mask != jnp.zeros((), self.mask.dtype)
        if not _merges(keep.shape, tokens):
            raise ValueError(
                f"mask of shape {keep.shape} does not fit the product with "
                f"{self.paths[leaf]!r}, whose tokens have shape {tokens}: leave that one out with "
                "where=, or give it a capture of its own without the mask."
            )
        return keep.reshape(tokens)

    def joined(self, given: Sequence[Origin]) -> Origin:
        """The origin of what is computed from all of these."""
        split = frozenset().union(*(o.split for o in given))
        if any(o.data for o in given):
            return Origin(data=True, split=split)
        leaves = frozenset().union(*(o.leaves for o in given))
        loops = frozenset().union(*(o.loops for o in given))
        first = next((o for o in given if leaves and self.main(leaves) in o.leaves), Origin())
        return Origin(leaves, False, first.cut, first.layout, loops, split)

    def main(self, leaves: Iterable[int]) -> int:
        """The largest of these leaves, which names what is made of all of them."""
        return max(sorted(leaves), key=lambda leaf: self.sizes[leaf])


def evaluate(
    plan: Plan, jaxpr: jex.Jaxpr, consts: Sequence[Array], args: Sequence[Array]
) -> tuple[list[Array], Statistics]:
    """What the jaxpr computes, and the statistics of its sites."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, jex.Literal) else env[atom]  # noqa: E731
    seen: Statistics = {}
    for run, inputs, outputs, last in plan.steps:
        results, more = run(*map(read, inputs))
        env.update(zip(outputs, results, strict=True))
        for value in last:  # as JAX does, so that no value outlives its last use
            del env[value]
        seen = pooled(seen, more)
    return [read(atom) for atom in jaxpr.outvars], seen


def pooled(a: Statistics, b: Statistics) -> Statistics:
    """The sums of both, key by key."""
    both = {key: jax.tree.map(jnp.add, a[key], b[key]) for key in a if key in b}
    return {**a, **b, **both}


def _of_literal(literal: Any) -> Origin:
    # A number written in the program belongs to it; an array is data that the function closes over.
    return DATA if jnp.ndim(literal.val) else Origin()


def _linked(pieces: list[Piece], results: Sequence[Any]) -> list[Step]:
    """The pieces as steps, each of which returns only what is used after it."""
    needed = {a for a in results if not isinstance(a, jex.Literal)}
    steps = []
    for piece in reversed(pieces):
        step = _segment(piece, needed) if isinstance(piece, list) else piece
        used = {a for a in step.inputs if not isinstance(a, jex.Literal)}
        steps.append(step._replace(last=frozenset((used | set(step.outputs)) - needed)))
        needed |= used
    return steps[::-1]


def _segment(equations: list[Any], needed: set[Any]) -> Step:
    """Equations in which nothing is measured, run as JAX runs them."""
    made = {v: None for eqn in equations for v in eqn.outvars}
    used = {a: None for eqn in equations for a in eqn.invars if not isinstance(a, jex.Literal)}
    inputs, outputs = [v for v in used if v not in made], [v for v in made if v in needed]
    effects = frozenset().union(*(eqn.effects for eqn in equations))
    named = jex.DebugInfo("jlar.capture", "", ("",) * len(inputs), ("",) * len(outputs))
    jaxpr = jex.Jaxpr([], inputs, outputs, equations, effects, named)
    call = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, []))
    return Step(lambda *args: (call(*args), {}), inputs, outputs)


def _unfit(product: Product, eqn: Any) -> str:
    """Why this product has no log-alignment ratio; empty if it has one."""
    if product.n < 2:
        return f"a product over n = {product.n} inputs, which has no alignment"
    if 0 in (product.m, *product.tokens, *product.stack):
        return "an empty product"
    if any(jnp.issubdtype(atom.aval.dtype, jnp.complexfloating) for atom in eqn.invars[:2]):
        return "a complex product"
    return ""


def _why(primitive: str) -> str:
    return REASONS.get(primitive, f"meets data in {primitive!r}, which is no product")


REASONS = {
    **dict.fromkeys(("gather", "dynamic_slice"), "looked up by data (an embedding)"),
    **dict.fromkeys(("mul", "div"), "multiplies data entry by entry (a gain)"),
    **dict.fromkeys(("add", "sub", "add_any"), "added to data (a bias)"),
    "pallas_call": "inside a Pallas kernel",
    **dict.fromkeys(("ffi_call", "custom_call"), "inside an FFI kernel"),
}


def _shaped(eqn: Any, origin: Origin) -> list[Origin]:
    """The origins of the results of an equation on weights: what has been cut out of a leaf."""
    name, params = eqn.primitive.name, eqn.params
    shape = eqn.invars[0].aval.shape if eqn.invars else ()
    if name == "transpose":
        layout = ".T" if len(shape) == 2 else f".transpose{tuple(params['permutation'])}"
        # Twice transposed is not transposed.
        layout = "" if origin.layout == ".T" == layout else origin.layout + layout
        return [origin._replace(layout=layout)]
    if name == "reshape":
        return [origin._replace(layout=f"{origin.layout}.reshape{tuple(params['new_sizes'])}")]
    if name == "slice":
        bounds = [list(zip(params["start_indices"], params["limit_indices"], strict=True))]
    elif name == "split":
        ends = list(itertools.accumulate(params["sizes"], initial=0))
        axis = params["axis"]
        bounds = [
            [(a, b) if d == axis else (0, size) for d, size in enumerate(shape)]
            for a, b in itertools.pairwise(ends)
        ]
    else:
        return [origin] * len(eqn.outvars)
    return [_cut(origin, shape, each) for each in bounds]


def _cut(origin: Origin, shape: tuple[int, ...], bounds: list[tuple[int, int]]) -> Origin:
    if all(bound == (0, size) for bound, size in zip(bounds, shape, strict=True)):
        return origin
    index = [
        ":" if (a, b) == (0, size) else str(a) if b == a + 1 else f"{a}:{b}"
        for (a, b), size in zip(bounds, shape, strict=True)
    ]
    while index[-1] == ":":
        index.pop()
    return origin._replace(cut=f"{origin.cut}{origin.layout}[{', '.join(index)}]", layout="")


def _merges(whole: tuple[int, ...], merged: tuple[int, ...]) -> bool:
    """Whether the second shape is the first with neighbouring axes merged; ones do not count."""
    axes = [size for size in whole if size != 1]
    for size in merged:
        product = 1
        while product < size and axes:
            product *= axes.pop(0)
        if product != size:
            return False
    return not axes
