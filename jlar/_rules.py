"""How the walk goes through each primitive that holds a program of its own, one rule each."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.extend.core as jex
from jax.sharding import PartitionSpec

from . import _mesh as mesh
from ._evaluate import STATISTICS, evaluate, summed
from ._loops import scan, while_loop, zeros_of
from ._origin import DATA, Origin
from ._plan import EqnPlan, Plan, Statistics, Step
from ._walk import Walk

Values = Sequence[Any]


def _inlined(walk: Walk, eqn: Any, given: list[Origin]) -> EqnPlan:
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

    return _around(eqn, plan, run)


def _placed(a: Any, place: Any) -> Any:
    asked = isinstance(place, jax.sharding.Sharding)
    return jax.lax.with_sharding_constraint(a, place) if asked else a


def _remat(walk: Walk, eqn: Any, given: list[Origin]) -> EqnPlan:
    """A block recomputed in the backward pass; its statistics are returned, not recomputed."""
    closed = _closed(eqn)
    plan = walk.plan(closed.jaxpr, given)
    block = jax.checkpoint(
        lambda *args: evaluate(plan, closed.consts, args),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    return _around(eqn, plan, block, "remat")


def _custom_derivative(walk: Walk, eqn: Any, given: list[Origin]) -> EqnPlan:
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

    inside = _around(eqn, plan, run, eqn.primitive.name.removesuffix("_call"))
    return inside._replace(step=Step(run, eqn, eqn.invars, []), after=eqn.outvars[0])


def _cond(walk: Walk, eqn: Any, given: list[Origin]) -> EqnPlan:
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
            zeros |= zeros_of(lambda *a, i=i: branch(i, *a)[1], each.jaxpr.invars)

        def full(i: int, *args: Any) -> tuple[Values, Statistics]:
            outs, seen = branch(i, *args)
            return outs, {**zeros, **seen}

        return jax.lax.switch(index, [partial(full, i) for i in range(len(branches))], *args)

    return EqnPlan(origins, sites, notes, Step(run, eqn, eqn.invars, eqn.outvars))


def _shard_map(walk: Walk, eqn: Any, given: list[Origin]) -> EqnPlan:
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
    inside = _around(eqn, plan, run, "shard_map")
    return inside._replace(
        origins=[o._replace(split=o.split - axes) for o in inside.origins],
        sites=[site._replace(key=site.key.beyond(axes)) for site in inside.sites],
    )


def _around(eqn: Any, plan: Plan, run: Any, what: str = "") -> EqnPlan:
    sites = [site.inside(what) for site in plan.sites] if what else plan.sites
    return EqnPlan(plan.origins, sites, plan.notes, Step(run, eqn, eqn.invars, eqn.outvars))


def _closed(eqn: Any) -> jex.ClosedJaxpr:
    """The program inside, by whichever name the primitive has it."""
    inner = next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "call") if name in eqn.params)
    return inner if isinstance(inner, jex.ClosedJaxpr) else jex.ClosedJaxpr(inner, [])


RULES: dict[str, Callable[[Walk, Any, list[Origin]], EqnPlan]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _inlined),
    **dict.fromkeys(("remat2", "remat", "checkpoint"), _remat),
    **dict.fromkeys(
        ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"),
        _custom_derivative,
    ),
    "scan": scan,
    "while": while_loop,
    "cond": _cond,
    "shard_map": _shard_map,
}
