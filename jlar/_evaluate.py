"""The same program with its statistics, by a plan of it."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from operator import add
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.extend.core.primitives import closed_call_p

from ._plan import Plan, Statistics, Step
from ._pool import Pool
from ._stage import stage
from ._statistics import over_devices
from ._walk import Walk

STATISTICS = "statistics"
"""The name of programs that compute nothing else; a second capture does not look into them."""


class Traced(NamedTuple):
    """A function as a program that closes over nothing."""

    program: jex.ClosedJaxpr
    held: list[Any]  # The values it closed over, now its first arguments
    types: list[Any]  # Of its results
    structure: Any  # Of what the function returns


def _of_step(walk: Walk, step: Step) -> "Traced":
    """The program of a step."""
    types = tuple(atom.aval for atom in step.inputs)
    if step.same is None:
        return _traced(step.run, types, "a block" if step.outputs else STATISTICS)
    key = step.same, types
    if key not in walk.traces:
        walk.traces[key] = _traced(step.run, types, STATISTICS)
    return walk.traces[key]


def _traced(run: Callable[..., Any], types: Sequence[Any], name: str) -> Traced:
    closed, like = jax.make_jaxpr(run, return_shape=True)(*types)
    inner = closed.jaxpr
    inputs = [*inner.constvars, *inner.invars]
    program = _closed(inputs, inner.outvars, inner.eqns, name)
    return Traced(program, closed.consts, closed.out_avals, jax.tree.structure(like))


def _closed(inputs: list[Any], results: list[Any], eqns: list[Any], name: str) -> jex.ClosedJaxpr:
    effects = frozenset().union(*(eqn.effects for eqn in eqns if eqn.effects))
    named = jex.DebugInfo("jlar.capture", name, ("",) * len(inputs), ("",) * len(results))
    return jex.ClosedJaxpr(jex.Jaxpr([], inputs, results, eqns, effects, named), [])


def evaluate(
    plan: Plan, consts: Sequence[Any], args: Sequence[Any]
) -> tuple[list[Any], Statistics]:
    """What the jaxpr computes, and the statistics of its sites.

    The equations are not traced again: the statistics are put between them.
    """
    jaxpr, values = plan.jaxpr, [*consts, *args]
    inputs, results, eqns, found = [*jaxpr.constvars, *jaxpr.invars], [*jaxpr.outvars], [], []
    for piece in plan.steps:
        if not isinstance(piece, Step):
            eqns.append(piece)
            continue
        traced = _of_step(plan.walk, piece)
        held = [jex.Var(jax.typeof(value)) for value in traced.held]
        made = [jex.Var(each) for each in traced.types[len(piece.outputs) :]]
        inputs += held
        values += traced.held
        results += made
        found.append((piece, traced.structure, len(made)))
        call = piece.eqn.replace(
            primitive=closed_call_p,
            invars=[*held, *piece.inputs],
            outvars=[*piece.outputs, *made],
            params={"call_jaxpr": traced.program},
            effects=traced.program.effects,
        )
        eqns.append(call)
    outs = stage(_closed(inputs, results, eqns, "a program"), *values)
    # What is written in a program is a NumPy number until something is computed with it.
    outs = [a if isinstance(a, jax.Array) else jnp.asarray(a) for a in outs]
    count = len(jaxpr.outvars)
    seen: Statistics = {}
    rest = iter(outs[count:])
    for step, structure, leaves in found:
        _, more = jax.tree.unflatten(structure, [*step.outputs, *itertools.islice(rest, leaves)])
        seen = pooled(seen, more if step.key is None else {step.key: more})
    return outs[:count], seen


def pooled(a: Statistics, b: Statistics) -> Statistics:
    """The sums of both, key by key."""
    return a | {k: jax.tree.map(add, a[k], b[k], is_leaf=is_pool) if k in a else b[k] for k in b}


def summed(seen: Statistics, axes: Iterable[str]) -> Statistics:
    """The sums over all devices along these axes."""
    total: Statistics = {}
    for key, value in seen.items():
        whole = over_devices(value, key.split, key.loops, axes)
        total = pooled(total, {key.beyond(axes): whole})
    return total


def is_pool(a: Any) -> bool:
    """Whether it has an addition of its own, which does not let counts saturate."""
    return isinstance(a, Pool)
