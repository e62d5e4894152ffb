"""The plan of a program: the sites that the walk over it finds, and how it is run."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from operator import add
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.extend.core.primitives import closed_call_p
from jaxtyping import PyTree

from ._devices import over_devices
from ._mesh import Split
from ._origin import Origin
from ._pool import Pool
from ._stage import height, stage

Values = Sequence[Any]
Statistics = dict["Key", PyTree]

STATISTICS = "statistics"
"""The name of programs that compute nothing else; a second capture does not look into them."""


class Key(NamedTuple):
    """Products with equal keys are products of the same matrix, and pool."""

    leaf: int
    cut: str
    facing: str  # Which axes are the inputs: W and W.T are two matrices
    n: int
    m: int
    stack: tuple[int, ...]
    """First the lengths of loops around the product, then what it stacks itself."""
    split: Split
    """The mesh axes that split the product. Until `summed` adds the devices up, the statistics are
    those of one device."""
    varies: tuple[int, ...]
    """The enclosing scans in which it is another matrix in each iteration."""
    loops: int = 0  # How many leading axes of `stack` come from loops

    def without(self, axes: Iterable[str]) -> "Key":
        """The key outside of a shard_map over these axes."""
        return self._replace(split=self.split.without(axes))


class Site(NamedTuple):
    """A product of a weight with data."""

    key: Key
    tokens: tuple[int, ...]
    through: tuple[str, ...] = ()  # The control flow around it, innermost first

    def inside(self, what: str, **changes: Any) -> "Site":
        """The same site, with one more construct around it in `through`."""
        return self._replace(through=(*self.through, what), **changes)


class Step(NamedTuple):
    """What takes the place of an equation, or is run beside it."""

    run: Callable[..., tuple[Values, Any]]
    """From the inputs to (the outputs, statistics by key); at a site to ([], its statistics)."""
    eqn: Any
    inputs: Sequence[Any]
    outputs: Sequence[Any] = ()
    key: Key | None = None  # Of a site
    same: Any = None  # Sites that have this in common are traced as one


class Plan(NamedTuple):
    """What there is to know of a program, or of one equation, for given origins of its inputs."""

    origins: Sequence[Origin]  # Of its results
    sites: Sequence[Site] = ()
    notes: Sequence[tuple[int, str]] = ()  # Why a leaf has no site here
    run: Any = None
    """From the inputs to (the results, statistics); None: an equation is left as it is."""
    beside: Step | None = None  # What is run as well

    def inside(self, what: str, **changes: Any) -> "Plan":
        """The plan of an equation of this kind, inside of which the program is."""
        return self._replace(sites=[site.inside(what) for site in self.sites], **changes)


class Traced(NamedTuple):
    """A step as a program that closes over nothing."""

    program: jex.ClosedJaxpr
    consts: list[Any]  # The values it closed over, now its first arguments
    structure: Any  # Of its statistics


def evaluate(
    program: jex.ClosedJaxpr, steps: Sequence[Any], traces: dict[Any, Traced], *args: Any
) -> tuple[Values, Statistics]:
    """What the program computes, and the statistics of its sites.

    The steps are its equations, which are not traced again, and calls between them.
    """
    jaxpr, values = program.jaxpr, [*program.consts, *args]
    inputs, results, eqns, found = [*jaxpr.constvars, *jaxpr.invars], [*jaxpr.outvars], [], []
    for step in steps:
        if not isinstance(step, Step):
            eqns.append(step)
            continue
        traced = _traced(step, traces)
        consts = [jex.Var(jax.typeof(value)) for value in traced.consts]
        made = [jex.Var(aval) for aval in traced.program.out_avals[len(step.outputs) :]]
        inputs += consts
        values += traced.consts
        results += made
        found.append((step.key, traced.structure))
        call = step.eqn.replace(
            primitive=closed_call_p,
            invars=[*consts, *step.inputs],
            outvars=[*step.outputs, *made],
            params={"call_jaxpr": traced.program},
            effects=traced.program.effects,
        )
        eqns.append(call)
    outs = stage(_closed(inputs, results, eqns, "a program"), *values)
    # What is written in a program is a NumPy number until something is computed with it.
    outs = iter([a if isinstance(a, jax.Array) else jnp.asarray(a) for a in outs])
    returned, seen = list(itertools.islice(outs, len(jaxpr.outvars))), {}
    for key, structure in found:
        more = jax.tree.unflatten(structure, itertools.islice(outs, structure.num_leaves))
        seen = pooled(seen, more if key is None else {key: more})
    return returned, seen


def _traced(step: Step, traces: dict[Any, Traced]) -> Traced:
    types = tuple(atom.aval for atom in step.inputs)
    key = step.same or step.run, types
    if key not in traces:
        closed, (_, like) = jax.make_jaxpr(step.run, return_shape=True)(*types)
        inner, name = closed.jaxpr, "a block" if step.outputs else STATISTICS
        program = _closed([*inner.constvars, *inner.invars], inner.outvars, inner.eqns, name)
        traces[key] = Traced(program, closed.consts, jax.tree.structure(like))
    return traces[key]


def _closed(inputs: list[Any], results: list[Any], eqns: list[Any], name: str) -> jex.ClosedJaxpr:
    effects = frozenset().union(*(eqn.effects for eqn in eqns if eqn.effects))
    named = jex.DebugInfo("jlar.capture", name, ("",) * len(inputs), ("",) * len(results))
    jaxpr = jex.Jaxpr([], inputs, results, eqns, effects, named, **height(eqns))
    return jex.ClosedJaxpr(jaxpr, [])


def pooled(a: Statistics, b: Statistics) -> Statistics:
    """The sums of both, key by key."""
    is_pool = lambda a: isinstance(a, Pool)  # which has an addition of its own  # noqa: E731
    return a | {k: jax.tree.map(add, a[k], b[k], is_leaf=is_pool) if k in a else b[k] for k in b}


def rekeyed(seen: Statistics, change: Callable[[Key], Key]) -> Statistics:
    """The statistics with their keys changed, as where a loop or a shard_map ends.

    Those that get the same key pool.
    """
    total: Statistics = {}
    for key, value in seen.items():
        total = pooled(total, {change(key): value})
    return total


def summed(seen: Statistics, axes: Iterable[str]) -> Statistics:
    """The statistics as a shard_map over these axes returns them: summed, stacks gathered."""
    whole = {key: over_devices(seen[key], key.split, key.loops, axes) for key in seen}
    return rekeyed(whole, lambda key: key.without(axes))
