"""How the walk goes through each primitive that holds a program of its own, one rule each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.extend.core as jex
from jax.sharding import PartitionSpec

from . import _mesh as mesh
from ._loops import scan, while_loop, zeros_of
from ._origin import DATA, Origin
from ._plan import STATISTICS, Plan, Statistics, Step, Values, summed
from ._walk import Walk


def _inlined(walk: Walk, eqn: Any, given: list[Origin]) -> Plan:
    """jit and its like: the program inside, in place of the call."""
    closed = _closed(eqn)
    if closed.jaxpr.debug_info.func_src_info == STATISTICS:  # of a capture inside of this one
        return walk.plain(eqn, [DATA])  # what it computes depends on data, and ends here
    plan = walk.plan(closed, given)

    def run(*args: Any) -> tuple[Values, Statistics]:
        outs, seen = plan.run(*_placed(args, eqn.params.get("in_shardings")))
        return _placed(outs, eqn.params.get("out_shardings")), seen

    return plan._replace(run=run)


def _placed(values: Values, places: Values | None) -> Values:
    """The values with a jit's shardings, which inlining it would lose; without any, as they are."""
    return [
        jax.lax.with_sharding_constraint(a, place)
        if isinstance(place, jax.sharding.Sharding)
        else a
        for a, place in zip(values, places or [None] * len(values), strict=True)
    ]


def _remat(walk: Walk, eqn: Any, given: list[Origin]) -> Plan:
    """A block recomputed in the backward pass; its statistics are returned, not recomputed."""
    plan = walk.plan(_closed(eqn), given)
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return plan.inside("remat", run=jax.checkpoint(plan.run, **options))


def _custom_derivative(walk: Walk, eqn: Any, given: list[Origin]) -> Plan:
    """A function with a derivative of its own, left as it is.

    The statistics come from a second evaluation, which prints nothing and has no derivative. XLA
    merges both unless the rule for the derivative computes something else.
    """
    if walk.quiet:  # this is that evaluation
        return _inlined(walk, eqn, given)
    if not eqn.outvars:  # it has effects alone, which a second evaluation would have again
        return walk.plain(eqn, given)
    plan = walk.silent().plan(_closed(eqn), given)

    def run(*args: Any) -> tuple[Values, Statistics]:
        return [], plan.run(*jax.lax.stop_gradient(args))[1]

    what = eqn.primitive.name.removesuffix("_call")
    # run=None leaves the call as it is, and beside it goes the second evaluation.
    return plan.inside(what, run=None, beside=Step(run, eqn, eqn.invars))


def _cond(walk: Walk, eqn: Any, given: list[Origin]) -> Plan:
    """The statistics of the branch that runs; zeros, which count 0 tokens, for the others."""
    branches = eqn.params["branches"]
    plans = [walk.plan(branch, given[1:]) for branch in branches]
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
        zeros: Statistics = {}
        for plan, branch in zip(plans, branches, strict=True):
            zeros |= zeros_of(plan.run, branch.jaxpr.invars)

        def full(plan: Plan, *args: Any) -> tuple[Values, Statistics]:
            outs, seen = plan.run(*args)
            return outs, {**zeros, **seen}

        return jax.lax.switch(index, [partial(full, plan) for plan in plans], *args)

    return Plan(origins, sites, notes, run)


def _shard_map(walk: Walk, eqn: Any, given: list[Origin]) -> Plan:
    """The program of one device; its statistics are those of all of them."""
    p = eqn.params
    axes = p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"]
    inside = [
        o._replace(split=o.split | set(sum(map(mesh.names, spec), ())))
        for o, spec in zip(given, p["in_specs"], strict=True)
    ]
    walk.mesh_axes.update({axis: p["mesh"].shape[axis] for axis in axes})
    plan = walk.plan(_closed(eqn), inside)

    def local(*args: Any) -> tuple[Values, Statistics]:
        outs, seen = plan.run(*args)
        return outs, summed(seen, axes)

    run = jax.shard_map(
        local,
        mesh=p["mesh"],
        in_specs=tuple(p["in_specs"]),
        out_specs=(list(p["out_specs"]), PartitionSpec()),
        check_vma=p["check_vma"],
        axis_names=set(axes),
    )
    return Plan(
        origins=[o._replace(split=o.split - axes) for o in plan.origins],
        sites=[site.inside("shard_map", key=site.key.without(axes)) for site in plan.sites],
        notes=plan.notes,
        run=run,
    )


def _closed(eqn: Any) -> jex.ClosedJaxpr:
    """The program inside, by whichever name the primitive has it."""
    inner = next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "call") if name in eqn.params)
    return inner if isinstance(inner, jex.ClosedJaxpr) else jex.ClosedJaxpr(inner, [])


RULES: dict[str, Callable[[Walk, Any, list[Origin]], Plan]] = {
    "jit": _inlined,
    "closed_call": _inlined,
    "eval_jaxpr": _inlined,  # of a capture within this one
    "remat2": _remat,
    "custom_jvp_call": _custom_derivative,
    "custom_vjp_call": _custom_derivative,
    "custom_vmap_call": _custom_derivative,
    "scan": scan,
    "while": while_loop,
    "cond": _cond,
    "shard_map": _shard_map,
}
