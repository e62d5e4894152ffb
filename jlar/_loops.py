"""How the walk goes through scan and while: what differs between iterations, and what pools."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array

from ._evaluate import evaluate, pooled
from ._origin import Origin
from ._plan import EqnPlan, Key, Plan, Site, Statistics, Step
from ._walk import Walk

Values = Sequence[Any]


def scan(walk: Walk, eqn: Any, given: list[Origin]) -> EqnPlan:
    """One row per iteration for a weight that differs between iterations; else pooled."""
    p, closed, loop = eqn.params, eqn.params["jaxpr"], walk.number(object())
    k, c = p["num_consts"], p["num_carry"]
    plan, origins = _fixed_point(walk, closed.jaxpr, given, k, c, loop)
    rows = {site.key for site in plan.sites if loop in site.key.varies}

    def run(*args: Any) -> tuple[Values, Statistics]:
        def once(*inputs: Any) -> tuple[Values, Statistics, Statistics]:
            outs, seen = evaluate(plan, closed.consts, [*args[:k], *inputs])
            each = {key: seen.pop(key) for key in rows}
            return outs, seen, each

        def step(both: tuple[Statistics, Values], xs: Values) -> Any:
            outs, seen, each = once(*both[1], *xs)
            return (pooled(both[0], seen), outs[:c]), (outs[c:], each)

        zeros = {}
        if any(site.key not in rows for site in plan.sites):
            zeros = zeros_of(lambda *a: once(*a)[1], closed.jaxpr.invars[k:])
        (seen, carry), (ys, each) = jax.lax.scan(
            step,
            (zeros, list(args[k : k + c])),
            list(args[k + c :]),
            length=p["length"],
            reverse=p["reverse"],
            unroll=p["unroll"],
        )
        return [*carry, *ys], pooled(seen, {stacked(key): each[key] for key in each})

    def stacked(key: Key) -> Key:
        stack, varies = (p["length"], *key.stack), tuple(v for v in key.varies if v != loop)
        return key._replace(stack=stack, loops=key.loops + 1, varies=varies)

    def outside(site: Site) -> Site:
        if site.key not in rows:
            return site.inside(f"scan of {p['length']}, pooled")
        return site.inside(f"scan of {p['length']}", key=stacked(site.key))

    sites = list(map(outside, plan.sites))
    return EqnPlan(origins, sites, plan.notes, Step(run, eqn, eqn.invars, eqn.outvars))


def while_loop(walk: Walk, eqn: Any, given: list[Origin]) -> EqnPlan:
    """All iterations pool, for their number is not known."""
    p, loop = eqn.params, walk.number(object())
    k, c = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    body, condition = p["body_jaxpr"], p["cond_jaxpr"]
    plan, origins = _fixed_point(walk, body.jaxpr, given[k:], c - k, len(given) - c, loop)
    tested = walk.plan(condition.jaxpr, [*given[:k], *origins])
    notes = [(s.key.leaf, "in the condition of a while_loop") for s in tested.sites]

    def run(*args: Any) -> tuple[Values, Statistics]:
        def once(*carry: Any) -> tuple[Values, Statistics]:
            return evaluate(plan, body.consts, [*args[k:c], *carry])

        def step(both: tuple[Statistics, Values]) -> tuple[Statistics, Values]:
            outs, seen = once(*both[1])
            return pooled(both[0], seen), outs

        def go_on(both: tuple[Statistics, Values]) -> Any:
            return jex.jaxpr_as_fun(condition)(*args[:k], *both[1])[0]

        zeros = zeros_of(lambda *a: once(*a)[1], body.jaxpr.invars[c - k :])
        seen, outs = jax.lax.while_loop(go_on, step, (zeros, list(args[c:])))
        total: Statistics = {}
        for key, value in seen.items():
            total = pooled(total, {pooled_key(key): value})
        return outs, total

    def pooled_key(key: Key) -> Key:
        return key._replace(varies=tuple(v for v in key.varies if v != loop))

    sites = [s.inside("while, pooled", key=pooled_key(s.key)) for s in plan.sites]
    return EqnPlan(origins, sites, [*plan.notes, *notes], Step(run, eqn, eqn.invars, eqn.outvars))


def _fixed_point(
    walk: Walk, jaxpr: jex.Jaxpr, given: list[Origin], consts: int, carried: int, loop: int
) -> tuple[Plan, list[Origin]]:
    """The plan of a loop's body, and the origins of what the loop returns.

    What one iteration hands to the next joins what the first one was given, until that changes
    nothing any more. What is handed on as it came is the same weight in each iteration.
    """
    end = consts + carried
    carry, kept = list(given[consts:end]), [not o.data for o in given[consts:end]]
    names = [walk.number(loop, i) for i in range(carried)]

    def varying(o: Origin) -> Origin:
        return o if o.data else o._replace(loops=o.loops | {loop})

    while True:
        inside = [
            (o if same else varying(o))._replace(same=name)
            for o, same, name in zip(carry, kept, names, strict=True)
        ]
        plan = walk.plan(jaxpr, [*given[:consts], *inside, *map(varying, given[end:])])
        results = [o._replace(loops=o.loops - {loop}, same=None) for o in plan.origins]
        still = [
            same and o.same == name
            for same, o, name in zip(kept, plan.origins[:carried], names, strict=True)
        ]
        joined = [
            old if same else walk.joined([old, new])
            for same, old, new in zip(still, carry, results[:carried], strict=True)
        ]
        if (joined, still) == (carry, kept):
            return plan, [*carry, *results[carried:]]
        carry, kept = joined, still


def zeros_of(f: Callable[..., Statistics], inputs: Sequence[Any]) -> Statistics:
    """Zeros like what `f` would return for values of the types of these variables."""
    closed, like = jax.make_jaxpr(f, return_shape=True)(*(v.aval for v in inputs))

    def zeros(of: Any) -> Array:
        a, varying = jnp.zeros(of.shape, of.dtype), tuple(of.manual_axis_type.varying)
        return jax.lax.pcast(a, varying, to="varying") if varying else a

    return jax.tree.unflatten(jax.tree.structure(like), map(zeros, closed.out_avals))
