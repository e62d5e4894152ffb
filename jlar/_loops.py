"""How the walk goes through scan and while: what differs between iterations, and what pools."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array

from ._origin import Origin
from ._plan import Key, Plan, Site, Statistics, Values, pooled, rekeyed
from ._stage import scanned
from ._walk import Walk


def scan(walk: Walk, eqn: Any, given: list[Origin]) -> Plan:
    """One row per iteration for a weight that differs between iterations; else pooled."""
    params, body, loop = eqn.params, eqn.params["jaxpr"], walk.number(object())
    length, (consts, carried) = params["length"], scanned(params)
    end = consts + carried
    plan, origins = _fixed_point(walk, body, given, consts, end, loop)
    rows = {site.key for site in plan.sites if loop in site.key.varies}

    def once(*inputs: Any) -> tuple[Values, Statistics, Statistics]:
        outs, pool = plan.run(*inputs)
        row = {key: pool.pop(key) for key in rows}
        return outs, pool, row

    def run(*args: Any) -> tuple[Values, Statistics]:
        def step(so_far: tuple[Values, Statistics], xs: Values) -> Any:
            carry, pools = so_far
            outs, pool, row = once(*args[:consts], *carry, *xs)
            return (outs[: end - consts], pooled(pools, pool)), (outs[end - consts :], row)

        anything_pools = any(site.key not in rows for site in plan.sites)
        zeros = zeros_of(once, body.jaxpr.invars) if anything_pools else {}
        first, xs = (list(args[consts:end]), zeros), list(args[end:])
        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        (carry, pools), (ys, stack) = jax.lax.scan(step, first, xs, **options)
        return [*carry, *ys], pooled(pools, rekeyed(stack, stacked))

    def stacked(key: Key) -> Key:
        return _ended(key, loop)._replace(stack=(length, *key.stack), loops=key.loops + 1)

    def after_loop(site: Site) -> Site:
        """The site of the body as it is listed for the whole scan."""
        if site.key not in rows:
            return site.inside(f"scan of {length}, pooled")
        return site.inside(f"scan of {length}", key=stacked(site.key))

    return Plan(origins, list(map(after_loop, plan.sites)), plan.notes, run)


def while_loop(walk: Walk, eqn: Any, given: list[Origin]) -> Plan:
    """All iterations pool, for their number is not known."""
    params, loop = eqn.params, walk.number(object())
    body, condition = params["body_jaxpr"], params["cond_jaxpr"]
    # First come the constants of the condition, then those of the body, then what is carried.
    of_body, carried = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    consts, end = params["body_nconsts"], len(given) - of_body
    plan, origins = _fixed_point(walk, body, given[of_body:], consts, end, loop)
    in_condition = walk.plan(condition, [*given[:of_body], *origins]).sites
    notes = [(site.key.leaf, "in the condition of a while_loop") for site in in_condition]

    def run(*args: Any) -> tuple[Values, Statistics]:
        def step(so_far: tuple[Values, Statistics]) -> tuple[Values, Statistics]:
            carry, pools = so_far
            carry, seen = plan.run(*args[of_body:carried], *carry)
            return carry, pooled(pools, seen)

        def go_on(so_far: tuple[Values, Statistics]) -> Any:
            return jex.jaxpr_as_fun(condition)(*args[:of_body], *so_far[0])[0]

        first = list(args[carried:]), zeros_of(plan.run, body.jaxpr.invars)
        outs, seen = jax.lax.while_loop(go_on, step, first)
        return outs, rekeyed(seen, lambda key: _ended(key, loop))

    sites = [s.inside("while, pooled", key=_ended(s.key, loop)) for s in plan.sites]
    return Plan(origins, sites, [*plan.notes, *notes], run)


def _ended(key: Key, loop: int) -> Key:
    """The key where this loop has ended."""
    return key._replace(varies=tuple(each for each in key.varies if each != loop))


def _fixed_point(
    walk: Walk, body: jex.ClosedJaxpr, given: list[Origin], consts: int, end: int, loop: int
) -> tuple[Plan, list[Origin]]:
    """The plan of a loop's body, and the origins of what the loop returns.

    Its inputs are constants, carried values up to `end`, and slices of the scanned arrays.
    A carried value that the body hands on as it came, known by its number, is the same weight in
    each iteration. What one iteration hands to the next otherwise joins what the first one was
    given, until that changes nothing any more.
    """

    def varying(o: Origin) -> Origin:
        return o if o.data else o._replace(loops=o.loops | {loop})

    def outside(o: Origin) -> Origin:
        return o._replace(loops=o.loops - {loop}, number=None)

    def joined(old: Origin, new: Origin) -> Origin:
        if new.number == old.number:
            return old
        return varying(walk.joined([old, new]))._replace(number=old.number)

    carry = [o._replace(number=walk.number(loop, i)) for i, o in enumerate(given[consts:end])]
    while True:
        plan = walk.plan(body, [*given[:consts], *carry, *map(varying, given[end:])])
        handed_on, others = plan.origins[: end - consts], plan.origins[end - consts :]
        after = list(map(joined, carry, handed_on))
        if after == carry:
            break
        carry = after
    returned = [
        first if new.number == old.number else outside(old)
        for first, old, new in zip(given[consts:end], carry, handed_on, strict=True)
    ]
    return plan, [*returned, *map(outside, others)]


def zeros_of(run: Callable[..., Any], inputs: Sequence[Any]) -> Statistics:
    """Zeros like the statistics of `run`, its second result, for inputs like these variables."""
    seen = lambda *args: run(*args)[1]  # noqa: E731
    closed, like = jax.make_jaxpr(seen, return_shape=True)(*(v.aval for v in inputs))

    def zeros(of: Any) -> Array:
        a, varying = jnp.zeros(of.shape, of.dtype), tuple(of.manual_axis_type.varying)
        return jax.lax.pcast(a, varying, to="varying") if varying else a

    return jax.tree.unflatten(jax.tree.structure(like), map(zeros, closed.out_avals))
