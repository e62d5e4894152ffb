"""How the walk goes through scan and while: what differs between iterations, and what pools."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array

from ._origin import Origin
from ._plan import Key, Plan, Site, Statistics, Values, pooled, rekeyed
from ._walk import Walk


def scan(walk: Walk, eqn: Any, given: list[Origin]) -> Plan:
    """One row per iteration for a weight that differs between iterations; else pooled."""
    p, loop = eqn.params, walk.number(object())
    k, c = p["num_consts"], p["num_carry"]
    plan, origins = _fixed_point(walk, p["jaxpr"], given, k, c, loop)
    rows = {site.key for site in plan.sites if loop in site.key.varies}

    def run(*args: Any) -> tuple[Values, Statistics]:
        def once(*inputs: Any) -> tuple[Values, Statistics, Statistics]:
            outs, seen = plan.run(*args[:k], *inputs)
            each = {key: seen.pop(key) for key in rows}
            return outs, seen, each

        def step(both: tuple[Statistics, Values], xs: Values) -> Any:
            outs, seen, each = once(*both[1], *xs)
            return (pooled(both[0], seen), outs[:c]), (outs[c:], each)

        zeros = {}
        if any(site.key not in rows for site in plan.sites):
            zeros = zeros_of(once, p["jaxpr"].jaxpr.invars[k:])
        (seen, carry), (ys, each) = jax.lax.scan(
            step,
            (zeros, list(args[k : k + c])),
            list(args[k + c :]),
            length=p["length"],
            reverse=p["reverse"],
            unroll=p["unroll"],
        )
        return [*carry, *ys], pooled(seen, rekeyed(each, stacked))

    def stacked(key: Key) -> Key:
        return _ended(key, loop)._replace(stack=(p["length"], *key.stack), loops=key.loops + 1)

    def outside(site: Site) -> Site:
        if site.key not in rows:
            return site.inside(f"scan of {p['length']}, pooled")
        return site.inside(f"scan of {p['length']}", key=stacked(site.key))

    sites = list(map(outside, plan.sites))
    return Plan(origins, sites, plan.notes, run)


def while_loop(walk: Walk, eqn: Any, given: list[Origin]) -> Plan:
    """All iterations pool, for their number is not known."""
    p, loop = eqn.params, walk.number(object())
    k, c = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    body, condition = p["body_jaxpr"], p["cond_jaxpr"]
    plan, origins = _fixed_point(walk, body, given[k:], c - k, len(given) - c, loop)
    tested = walk.plan(condition, [*given[:k], *origins])
    notes = [(s.key.leaf, "in the condition of a while_loop") for s in tested.sites]

    def run(*args: Any) -> tuple[Values, Statistics]:
        def once(*carry: Any) -> tuple[Values, Statistics]:
            return plan.run(*args[k:c], *carry)

        def step(both: tuple[Statistics, Values]) -> tuple[Statistics, Values]:
            outs, seen = once(*both[1])
            return pooled(both[0], seen), outs

        def go_on(both: tuple[Statistics, Values]) -> Any:
            return jex.jaxpr_as_fun(condition)(*args[:k], *both[1])[0]

        zeros = zeros_of(once, body.jaxpr.invars[c - k :])
        seen, outs = jax.lax.while_loop(go_on, step, (zeros, list(args[c:])))
        return outs, rekeyed(seen, lambda key: _ended(key, loop))

    sites = [s.inside("while, pooled", key=_ended(s.key, loop)) for s in plan.sites]
    return Plan(origins, sites, [*plan.notes, *notes], run)


def _ended(key: Key, loop: int) -> Key:
    """The key where this loop has ended."""
    return key._replace(varies=tuple(each for each in key.varies if each != loop))


def _fixed_point(
    walk: Walk, body: jex.ClosedJaxpr, given: list[Origin], consts: int, carried: int, loop: int
) -> tuple[Plan, list[Origin]]:
    """The plan of a loop's body, and the origins of what the loop returns.

    A carried value that the body hands on as it came, known by its number, is the same weight in
    each iteration. What one iteration hands to the next otherwise joins what the first one was
    given, until that changes nothing any more.
    """
    end = consts + carried

    def varying(o: Origin) -> Origin:
        return o if o.data else o._replace(loops=o.loops | {loop})

    def outside(o: Origin) -> Origin:
        return o._replace(loops=o.loops - {loop}, number=None)

    carry = [o._replace(number=walk.number(loop, i)) for i, o in enumerate(given[consts:end])]
    while True:
        plan = walk.plan(body, [*given[:consts], *carry, *map(varying, given[end:])])
        pairs = list(zip(carry, plan.origins[:carried], strict=True))
        joined = [
            old
            if new.number == old.number
            else varying(walk.joined([old, new]))._replace(number=old.number)
            for old, new in pairs
        ]
        if joined == carry:
            break
        carry = joined
    kept = [
        first if new.number == old.number else outside(old)
        for first, (old, new) in zip(given[consts:end], pairs, strict=True)
    ]
    return plan, [*kept, *map(outside, plan.origins[carried:])]


def zeros_of(run: Callable[..., Any], inputs: Sequence[Any]) -> Statistics:
    """Zeros like the statistics of `run`, its second result, for inputs like these variables."""
    seen = lambda *args: run(*args)[1]  # noqa: E731
    closed, like = jax.make_jaxpr(seen, return_shape=True)(*(v.aval for v in inputs))

    def zeros(of: Any) -> Array:
        a, varying = jnp.zeros(of.shape, of.dtype), tuple(of.manual_axis_type.varying)
        return jax.lax.pcast(a, varying, to="varying") if varying else a

    return jax.tree.unflatten(jax.tree.structure(like), map(zeros, closed.out_avals))
