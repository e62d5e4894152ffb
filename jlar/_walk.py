"""One walk over a jaxpr: where weights meet data.

The plan of a jaxpr is made without computing anything: each value gets an `Origin`, each product of
a weight with data becomes a `Site`. What is run by it stands in `_evaluate`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from . import _devices as devices
from . import _mesh as mesh
from ._energies import energies
from ._grams import grams
from ._origin import DATA, Origin, made_by, why
from ._plan import EqnPlan, Key, Plan, Site, Step
from ._products import PRODUCTS, Product
from ._statistics import statistics


@dataclass(frozen=True, eq=False)
class Walk:
    """What holds for a whole program: the weights, and what is asked of them."""

    paths: list[str]
    sizes: list[int]
    chosen: frozenset[int]
    measure: Callable[..., PyTree]
    mask: Array | None
    axes: mesh.Axes | None
    rules: Mapping[str, Callable[["Walk", Any, list[Origin]], EqnPlan]]
    """How the primitives that hold programs of their own are walked."""
    blind: bool = False
    """Whether capture was called in a shard_map that tells nothing (check_vma=False)."""
    quiet: bool = False
    """Whether this is a second evaluation, which leaves out what computes nothing but prints."""
    numbers: dict[Any, int] = field(default_factory=dict)
    plans: dict[Any, Plan] = field(default_factory=dict)
    traces: dict[Any, Any] = field(default_factory=dict)
    lookups: dict[Any, list[Any]] = field(default_factory=dict)
    mesh_axes: dict[str, int] = field(default_factory=dict)
    """The sizes of those over which a shard_map splits something, here or inside."""

    def silent(self) -> "Walk":
        """The walk of a second evaluation."""
        return replace(self, quiet=True, plans={}, traces={})

    def number(self, *of: Any) -> int:
        """The same number for the same description."""
        return self.numbers.setdefault(of, len(self.numbers))

    def plan(
        self, jaxpr: jex.Jaxpr, origins: Sequence[Origin], consts: Sequence[Origin] | None = None
    ) -> Plan:
        """The plan of a jaxpr whose inputs and constants (by default data) have these origins."""
        key = id(jaxpr), tuple(origins)
        if key not in self.plans:
            consts = [DATA] * len(jaxpr.constvars) if consts is None else consts
            env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *origins], strict=True))
            self.plans[key] = self._plan(jaxpr, env)
        return self.plans[key]

    def _plan(self, jaxpr: jex.Jaxpr, env: dict[Any, Origin]) -> Plan:
        steps, sites, notes = [], [], []
        waiting: dict[Any, Step | None] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            if self.quiet and not eqn.outvars:
                continue
            here = self._eqn_plan([self._read(atom, env) for atom in eqn.invars], jaxpr.eqns, i)
            env.update(zip(eqn.outvars, here.origins, strict=True))
            sites += here.sites
            notes += here.notes
            steps.append(eqn if here.step is None or here.after is not None else here.step)
            if here.after is not None:
                waiting[here.after] = here.step
            steps += [waiting.pop(v) for v in eqn.outvars if v in waiting] if waiting else []
        results = [self._read(atom, env) for atom in jaxpr.outvars]
        return Plan(self, jaxpr, steps, results, sites, notes)

    def _read(self, atom: Any, env: dict[Any, Origin]) -> Origin:
        if not isinstance(atom, jex.Literal):
            return env[atom]
        # A number written in the program belongs to it; an array is what the function closes over.
        return DATA if jnp.ndim(atom.val) else Origin(same=self.number(atom.aval, str(atom.val)))

    def _eqn_plan(self, given: list[Origin], eqns: Sequence[Any], i: int) -> EqnPlan:
        eqn, name = eqns[i], eqns[i].primitive.name
        if name in PRODUCTS and any(o.leaves for o in given[:2]) and any(o.data for o in given[:2]):
            return self._product(given, eqns, i)
        if name in self.rules:
            inside = self.rules[name](self, eqn, given)
            # A silent evaluation goes inside wherever something may be printed.
            stays = inside.sites or (self.quiet and eqn.effects)
            return inside if stays else inside._replace(step=None, after=None)
        return self.plain(eqn, given)

    def plain(self, eqn: Any, given: list[Origin]) -> EqnPlan:
        """An equation that is no product of a weight with data and has none inside."""
        name, notes = eqn.primitive.name, []
        if name in devices.ONE_TO_ONE and len(given) == len(eqn.outvars):
            origins = [o._replace(same=None, joins=()) for o in given]
            return EqnPlan(devices.after(eqn, origins))
        large = given
        if name in ("mul", "div") and any(o.leaves for o in given):
            # A scalar of the data cancels on a weight, but data times a scalar weight is data.
            sizes = [atom.aval.size for atom in eqn.invars]
            cancels = [
                o.data and size == 1 < max(sizes) for o, size in zip(given, sizes, strict=True)
            ]
            large = [o for o, left_out in zip(given, cancels, strict=True) if not left_out]
        joined = self.joined(large)
        if joined.data:
            origins = [joined] * len(eqn.outvars)
            notes = [(leaf, why(eqn, i)) for i, o in enumerate(given) for leaf in o.leaves]
        elif joined.leaves:
            origins = made_by(eqn, joined, given, self.lookups)
            if name in PRODUCTS and not all(o.leaves for o in given[:2]):
                notes = [(leaf, NUMBERS_ONLY) for leaf in joined.leaves]
        else:
            computed = name, str(eqn.params), *(o.same for o in given)
            origins = [
                joined._replace(same=self.number(i, *computed)) for i in range(len(eqn.outvars))
            ]
        return EqnPlan(devices.after(eqn, origins), notes=notes)

    def _product(self, given: list[Origin], eqns: Sequence[Any], i: int) -> EqnPlan:
        """A product of a weight with data: a site if it can be measured and is asked for."""
        eqn, (w, x) = eqns[i], (0, 1) if given[0].leaves else (1, 0)
        weight, origins = given[w], [self.joined(given[:2])]
        shapes = [atom.aval.shape for atom in eqn.invars[:2]]
        product: Any = PRODUCTS[eqn.primitive.name](eqn.params, shapes, w == 0)
        if unfit := _unfit(product, eqn, given):
            return EqnPlan(origins, notes=[(each, unfit) for each in weight.leaves])
        leaf = self.main(weight.leaves)
        path = self.paths[leaf]
        notes = [(each, f"part of {path}") for each in weight.leaves - {leaf}]
        if leaf not in self.chosen:
            return EqnPlan(origins, notes=[*notes, (leaf, "not chosen by where=")])
        if self.mask is not None and not _merges(self.mask.shape, product.tokens):
            raise ValueError(
                f"mask of shape {self.mask.shape} does not fit the product with {path!r}, whose "
                f"tokens have shape {product.tokens}: leave that one out with where=, or give it a "
                "capture of its own without the mask."
            )
        split, Y = self._split(path, weight.split, given[x].split, product, eqns, i)

        def run(*operands: Any) -> tuple[Sequence[Any], PyTree]:
            keep = None if self.mask is None else self.mask.reshape(product.tokens)
            return [], statistics(self.measure, product, split, keep, *operands)

        n, m = (
            size * math.prod(self.mesh_axes[axis] for axis in axes)
            for size, axes in ((product.n, split.n), (product.m, split.m))
        )
        varies, facing = tuple(sorted(weight.loops)), product.facing(weight)
        key = Key(leaf, weight.cut, facing, n, m, product.stack, split=split, varies=varies)
        step = Step(run, eqn, [eqn.invars[w], eqn.invars[x], Y, *eqn.invars[2:]], [], key)
        step = step._replace(same=(product, split))
        return EqnPlan(origins, [Site(key, product.tokens)], notes, step, after=Y)

    def _split(
        self,
        path: str,
        W: frozenset[str],
        X: frozenset[str],
        product: Any,
        eqns: Sequence[Any],
        i: int,
    ) -> tuple[devices.MeshSplit, Any]:
        """The mesh axes that split a product, and the value that is its Y."""
        Y = eqns[i].outvars[0]
        if self.blind:
            devices.check(self.axes, set(self.mesh_axes))
            return devices.told(self.axes), Y
        split = devices.split(self.axes, path, W, X, bool(product.stack))
        if self.measure not in (energies, grams) and (split.m or split.n):
            raise ValueError(
                f"the weight of the product with {path!r} is split over devices, and a measure of "
                "your own is a sum over tokens: take jlar.energies or jlar.grams, or leave it out "
                "with where=."
            )
        needs_sum = split.n and self.measure is not grams
        return devices.outputs(split, path, eqns, i) if needs_sum else (split, Y)

    def joined(self, given: Sequence[Origin]) -> Origin:
        """The origin of what is computed from all of these."""
        split = frozenset().union(*(o.split for o in given))
        if any(o.data for o in given):
            return DATA._replace(split=split) if split else DATA
        leaves = frozenset().union(*(o.leaves for o in given))
        loops = frozenset().union(*(o.loops for o in given))
        first = next((o for o in given if leaves and self.main(leaves) in o.leaves), Origin())
        return first._replace(leaves=leaves, loops=loops, split=split, same=None)

    def main(self, leaves: Iterable[int]) -> int:
        """The largest of these leaves, which names what is made of all of them."""
        return max(sorted(leaves), key=lambda leaf: self.sizes[leaf])


NUMBERS_ONLY = (
    "multiplies numbers written in the program, which makes another weight of it: pass them as an "
    "argument if they are data"
)


def _unfit(product: Product | str, eqn: Any, given: list[Origin]) -> str:
    """Why this product has no log-alignment ratio; empty if it has one."""
    if isinstance(product, str):
        return product
    # Shared between devices, one input is a part of several.
    if product.n < 2 and not given[0].split & given[1].split:
        return f"a product over n = {product.n} inputs, which has no alignment"
    if 0 in (product.m, *product.tokens, *product.stack):
        return "an empty product"
    if any(jnp.issubdtype(atom.aval.dtype, jnp.complexfloating) for atom in eqn.invars[:2]):
        return "a complex product"
    return ""


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
