"""How the walk goes through each primitive that holds a program of its own, one rule each."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from . import _mesh as mesh
from ._evaluate import STATISTICS, evaluate, pooled, summed
from ._origin import DATA, Origin
from ._walk import Key, Part, Plan, Site, Statistics, Step, Walk

Values = Sequence[Any]


def _inlined(walk: Walk, eqn: Any, given: list[Origin]) -> Part:
    """jit and its like: the program inside, in place of the call."""
    closed = _closed(eqn)
    if closed.jaxpr.debug_info.func_src_info == STATISTICS:  # of a capture inside of this one
        return walk.plain(eqn, [DATA])  # what it computes depends on data, and ends here
    plan = walk.plan(closed.jaxpr, given)
    placed = partial(map, _placed)

    def run(*args: Any) -> tuple[Values, Statistics]:
        given = placed(args, eqn.params.get("in_shardings", [None] * len(args)))
        outs, seen = evaluate(plan, closed.consts, list(given))
        return list(placed(outs, eqn.params.get("out_shardings", [None] * len(outs)))), seen

    return _part(eqn, plan, run)


def _placed(a: Any, place: Any) -> Any:
    asked = isinstance(place, jax.sharding.Sharding)
    return jax.lax.with_sharding_constraint(a, place) if asked else a


def _remat(walk: Walk, eqn: Any, given: list[Origin]) -> Part:
    """A block recomputed in the backward pass; its statistics are returned, not recomputed."""
    closed = _closed(eqn)
    plan = walk.plan(closed.jaxpr, given)
    block = jax.checkpoint(
        lambda *args: evaluate(plan, closed.consts, args),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    return _part(eqn, plan, block, "remat")


def _custom_derivative(walk: Walk, eqn: Any, given: list[Origin]) -> Part:
    """A function with a derivative of its own, left as it is.

    The statistics come from a second, silent evaluation without derivative, which XLA merges with
    the first unless the rule for the derivative computes something else.
    """
    if walk.quiet:  # this is that evaluation
        return _inlined(walk, eqn, given)
    if not eqn.outvars:
        return walk.plain(eqn, given)
    closed, walk = _closed(eqn), walk.silent()
    plan = walk.plan(closed.jaxpr, given)

    def run(*args: Any) -> tuple[Values, Statistics]:
        return [], evaluate(plan, closed.consts, jax.lax.stop_gradient(args))[1]

    part = _part(eqn, plan, run, eqn.primitive.name.removesuffix("_call"))
    return part._replace(step=Step(run, eqn, eqn.invars, []), after=eqn.outvars[0])


def _scan(walk: Walk, eqn: Any, given: list[Origin]) -> Part:
    """One row per iteration for a weight that differs between iterations; else pooled."""
    p, closed, loop = eqn.params, eqn.params["jaxpr"], next(walk.number)
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
            zeros = _zeros(lambda *a: once(*a)[1], closed.jaxpr.invars[k:])
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
    return Part(origins, sites, plan.notes, Step(run, eqn, eqn.invars, eqn.outvars))


def _while(walk: Walk, eqn: Any, given: list[Origin]) -> Part:
    """All iterations pool, for their number is not known."""
    p, loop = eqn.params, next(walk.number)
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

        zeros = _zeros(lambda *a: once(*a)[1], body.jaxpr.invars[c - k :])
        seen, outs = jax.lax.while_loop(go_on, step, (zeros, list(args[c:])))
        total: Statistics = {}
        for key, value in seen.items():
            total = pooled(total, {pooled_key(key): value})
        return outs, total

    def pooled_key(key: Key) -> Key:
        return key._replace(varies=tuple(v for v in key.varies if v != loop))

    sites = [s.inside("while, pooled", key=pooled_key(s.key)) for s in plan.sites]
    return Part(origins, sites, [*plan.notes, *notes], Step(run, eqn, eqn.invars, eqn.outvars))


def _fixed_point(
    walk: Walk, jaxpr: jex.Jaxpr, given: list[Origin], consts: int, carried: int, loop: int
) -> tuple[Plan, list[Origin]]:
    """The plan of a loop's body, and the origins of what the loop returns.

    What one iteration hands to the next joins what the first one was given, until that changes
    nothing any more. What is handed on as it came is the same weight in each iteration.
    """
    end = consts + carried

    def varying(o: Origin) -> Origin:
        return o if o.data else o._replace(loops=o.loops | {loop})

    def settled(o: Origin) -> Origin:
        return o._replace(loops=o.loops - {loop}) if loop in o.loops else o

    carry, kept = list(given[consts:end]), [bool(o.leaves) for o in given[consts:end]]
    while True:
        inside = [
            o._replace(same_as=(loop, i)) if same else varying(o)
            for i, (o, same) in enumerate(zip(carry, kept, strict=True))
        ]
        plan = walk.plan(jaxpr, [*given[:consts], *inside, *map(varying, given[end:])])
        still = [
            same and o.same_as == (loop, i)
            for i, (same, o) in enumerate(zip(kept, plan.origins[:carried], strict=True))
        ]
        results = list(map(settled, plan.origins))
        joined = [
            old if same else walk.joined([old, new])
            for same, old, new in zip(still, carry, results[:carried], strict=True)
        ]
        if (joined, still) == (carry, kept):
            return plan, [*carry, *results[carried:]]
        carry, kept = joined, still


def _cond(walk: Walk, eqn: Any, given: list[Origin]) -> Part:
    """The statistics of the branch that runs; zeros, which count 0 tokens, for the others."""
    branches = eqn.params["branches"]
    plans = [walk.plan(branch.jaxpr, given[1:]) for branch in branches]
    # What a number written in the program chooses between is still a weight.
    chosen_by = given[:1] if given[0].data else []
    results = zip(*(plan.origins for plan in plans), strict=True)
    origins = [walk.joined([*chosen_by, *each]) for each in results]
    sites = [s.inside(f"branch {i}") for i, plan in enumerate(plans) for s in plan.sites]
    notes = [note for plan in plans for note in plan.notes]
    if given[0].data:
        lost = "chosen between by data (cond)"
        notes += [(leaf, lost) for p in plans for o in p.origins for leaf in o.leaves]
    if eqn.params.get("branches_platforms") is not None:
        notes += [(s.key.leaf, "inside jax.lax.platform_dependent") for s in sites]
        sites = []

    def run(index: Any, *args: Any) -> tuple[Values, Statistics]:
        def branch(i: int, *args: Any) -> tuple[Values, Statistics]:
            return evaluate(plans[i], branches[i].consts, args)

        zeros: Statistics = {}
        for i, each in enumerate(branches):
            zeros |= _zeros(lambda *a, i=i: branch(i, *a)[1], each.jaxpr.invars)

        def full(i: int, *args: Any) -> tuple[Values, Statistics]:
            outs, seen = branch(i, *args)
            return outs, {**zeros, **seen}

        return jax.lax.switch(index, [partial(full, i) for i in range(len(branches))], *args)

    return Part(origins, sites, notes, Step(run, eqn, eqn.invars, eqn.outvars))


def _shard_map(walk: Walk, eqn: Any, given: list[Origin]) -> Part:
    """The program of one device; its statistics are those of all of them."""
    p, closed = eqn.params, _closed(eqn)
    axes = next(p[name] for name in ("newly_manual_axes", "manual_axes") if name in p)
    inside = [
        o._replace(split=o.split | set(sum(map(mesh.names, spec), ())))
        for o, spec in zip(given, p["in_specs"], strict=True)
    ]
    walk.mesh_axes.update({axis: p["mesh"].shape[axis] for axis in axes})
    plan = walk.plan(closed.jaxpr, inside)

    def local(*args: Any) -> tuple[Values, Statistics]:
        outs, seen = evaluate(plan, closed.consts, args)
        return outs, summed(seen, axes)

    run = jax.shard_map(
        local,
        mesh=p["mesh"],
        in_specs=tuple(p["in_specs"]),
        out_specs=(list(p["out_specs"]), PartitionSpec()),
        check_vma=p["check_vma"],
        axis_names=set(axes),
    )
    part = _part(eqn, plan, run, "shard_map")
    return part._replace(
        origins=[o._replace(split=o.split - axes) for o in part.origins],
        sites=[site._replace(key=site.key.beyond(axes)) for site in part.sites],
    )


def _part(eqn: Any, plan: Plan, run: Any, what: str = "") -> Part:
    sites = [site.inside(what) for site in plan.sites] if what else plan.sites
    return Part(plan.origins, sites, plan.notes, Step(run, eqn, eqn.invars, eqn.outvars))


def _closed(eqn: Any) -> jex.ClosedJaxpr:
    """The program inside, by whichever name the primitive has it."""
    inner = next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "call") if name in eqn.params)
    return inner if isinstance(inner, jex.ClosedJaxpr) else jex.ClosedJaxpr(inner, [])


def _zeros(f: Callable[..., Statistics], inputs: Sequence[Any]) -> Statistics:
    """Zeros like what `f` would return for values of the types of these variables."""
    closed, like = jax.make_jaxpr(f, return_shape=True)(*(v.aval for v in inputs))

    def zeros(of: Any) -> Array:
        a, varying = jnp.zeros(of.shape, of.dtype), tuple(of.manual_axis_type.varying)
        return jax.lax.pcast(a, varying, to="varying") if varying else a

    return jax.tree.unflatten(jax.tree.structure(like), map(zeros, closed.out_avals))


RULES: dict[str, Callable[[Walk, Any, list[Origin]], Part]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _inlined),
    **dict.fromkeys(("remat2", "remat", "checkpoint"), _remat),
    **dict.fromkeys(
        ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"),
        _custom_derivative,
    ),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
