"""One walk over a program: where weights meet data.

Its plan is made without computing anything: each value gets an `Origin`, each product of a weight
with data becomes a `Site`.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from . import _devices as devices
from . import _mesh as mesh
from ._energies import energies
from ._grams import grams
from ._origin import DATA, Origin, made_by, why
from ._plan import Key, Plan, Site, Step, evaluate
from ._products import PRODUCTS, Product, statistics


@dataclass(frozen=True, eq=False)
class Walk:
    """What holds for a whole program: the weights, and what is asked of them."""

    paths: list[str]
    sizes: list[int]
    chosen: frozenset[int]
    measure: Callable[..., PyTree]
    mask: Array | None
    axes: mesh.Axes | None
    rules: Mapping[str, Callable[["Walk", Any, list[Origin]], Plan]]
    """How the primitives that hold programs of their own are walked."""
    told: mesh.Split | None = None
    """What splits every product, if capture was called where types do not tell: check_vma=False."""
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
        return replace(self, quiet=True)

    def number(self, *of: Any) -> int:
        """The same number for the same description."""
        return self.numbers.setdefault(of, len(self.numbers))

    def plan(self, program: jex.ClosedJaxpr, origins: Sequence[Origin]) -> Plan:
        """The plan of a program, whose inputs, or constants and then inputs, have these origins.

        Constants without one are data.
        """
        # No other program can have this id meanwhile: the plan keeps the program.
        key = self.quiet, id(program.jaxpr), tuple(origins)
        if key not in self.plans:
            variables = [*program.jaxpr.constvars, *program.jaxpr.invars]
            consts = [DATA] * (len(variables) - len(origins))
            env = dict(zip(variables, [*consts, *origins], strict=True))
            self.plans[key] = self._plan(program, env)
        return self.plans[key]

    def _plan(self, program: jex.ClosedJaxpr, env: dict[Any, Origin]) -> Plan:
        steps, beside, sites, notes = [], [], [], []
        eqns = program.jaxpr.eqns
        for i, eqn in enumerate(eqns):
            if self.quiet and not eqn.outvars:
                continue
            here = self._eqn_plan([self._read(atom, env) for atom in eqn.invars], eqns, i)
            env.update(zip(eqn.outvars, here.origins, strict=True))
            steps.append(Step(here.run, eqn, eqn.invars, eqn.outvars) if here.run else eqn)
            beside += [here.beside] if here.beside else []
            sites += here.sites
            notes += here.notes
        results = [self._read(atom, env) for atom in program.jaxpr.outvars]
        run = partial(evaluate, program, [*steps, *beside], self.traces)
        return Plan(results, sites, notes, run)

    def _read(self, atom: Any, env: dict[Any, Origin]) -> Origin:
        if not isinstance(atom, jex.Literal):
            return env[atom]
        # A number written in the program belongs to it; an array is what the function closes over.
        return DATA if jnp.ndim(atom.val) else Origin(number=self.number(atom.aval, str(atom.val)))

    def _eqn_plan(self, given: list[Origin], eqns: Sequence[Any], i: int) -> Plan:
        eqn, name = eqns[i], eqns[i].primitive.name
        if name in PRODUCTS and any(o.leaves for o in given[:2]) and any(o.data for o in given[:2]):
            return self._product(given, eqns, i)
        if name in self.rules:
            inside = self.rules[name](self, eqn, given)
            # A silent evaluation goes inside wherever something may be printed.
            stays = inside.sites or (self.quiet and eqn.effects)
            return inside if stays else inside._replace(run=None, beside=None)
        return self.plain(eqn, given)

    def plain(self, eqn: Any, given: list[Origin]) -> Plan:
        """An equation that is no product of a weight with data and has none inside."""
        name, notes = eqn.primitive.name, []
        if name in devices.ONE_TO_ONE:
            origins = [o._replace(number=None, joins=()) for o in given]
            return Plan(devices.split_after(eqn, origins))
        large = given
        if name in ("mul", "div") and any(o.leaves for o in given):
            # A weight times a scalar of the data is still that weight, since LAR does not depend on
            # the scale of W. Data times a scalar weight is data.
            operands, size = zip(given, eqn.invars, strict=True), eqn.outvars[0].aval.size
            large = [o for o, atom in operands if not o.data or atom.aval.size == size]
        joined = self.joined(large)
        if joined.data:
            origins = [joined] * len(eqn.outvars)
            notes = [(leaf, why(eqn, i)) for i, o in enumerate(given) for leaf in o.leaves]
        elif joined.leaves:
            origins = made_by(eqn, joined, given, self.lookups)
            if name in PRODUCTS and not all(o.leaves for o in given[:2]):
                notes = [(leaf, NUMBERS_ONLY) for leaf in joined.leaves]
        else:
            computed = name, str(eqn.params), *(o.number for o in given)
            origins = [
                joined._replace(number=self.number(i, *computed)) for i in range(len(eqn.outvars))
            ]
        return Plan(devices.split_after(eqn, origins), notes=notes)

    def _product(self, given: list[Origin], eqns: Sequence[Any], i: int) -> Plan:
        """A product of a weight with data: a site if it can be measured and is asked for."""
        eqn, (w, x) = eqns[i], (0, 1) if given[0].leaves else (1, 0)
        weight, origins = given[w], [self.joined(given[:2])]
        product: Any = PRODUCTS[eqn.primitive.name](eqn, w == 0)
        if unfit := _unfit(product, eqn, given):
            return Plan(origins, notes=[(each, unfit) for each in weight.leaves])
        leaf = self.main(weight.leaves)
        path = self.paths[leaf]
        notes = [(each, f"part of {path}") for each in weight.leaves - {leaf}]
        if leaf not in self.chosen:
            return Plan(origins, notes=[*notes, (leaf, "not chosen by where=")])
        if self.mask is not None and not _merges(self.mask.shape, product.tokens):
            raise ValueError(
                f"mask of shape {self.mask.shape} does not fit the product with {path!r}, whose "
                f"tokens have shape {product.tokens}: leave that one out with where=, or give it a "
                "capture of its own without the mask."
            )
        split, Y = self._split(path, weight.split, given[x].split, product), eqn.outvars[0]
        # Where devices split the inputs, each has one term of Y. Energies need the square of the
        # whole sum, which the psum or reduce_scatter that follows returns.
        if split.n and self.measure is energies:
            split, Y = devices.summed_output(split, path, eqns[i:])
        key = Key(
            leaf,
            weight.cut,
            product.facing(weight),
            n=product.n * self._device_count(split.n),
            m=product.m * self._device_count(split.m),
            stack=product.stack,
            split=split,
            varies=tuple(sorted(weight.loops)),
        )
        operands = [eqn.invars[w], eqn.invars[x], Y, *eqn.invars[2:]]
        run = partial(self._measured, product, split)
        step = Step(run, eqn, operands, key=key, same=(product, split))
        return Plan(origins, [Site(key, product.tokens)], notes, beside=step)

    def _measured(
        self, product: Product, split: mesh.Split, *operands: Array
    ) -> tuple[Sequence[Any], PyTree]:
        """The `run` of a site's `Step`: on W, X, Y and, of a ragged_dot, the groups' sizes."""
        keep = None if self.mask is None else self.mask.reshape(product.tokens)
        return [], statistics(self.measure, product, split, keep, *operands)

    def _device_count(self, axes: Iterable[str]) -> int:
        """Over how many devices these axes split."""
        return math.prod(self.mesh_axes.get(axis, 1) for axis in axes)

    def _split(
        self, path: str, W: frozenset[str], X: frozenset[str], product: Product
    ) -> mesh.Split:
        """The mesh axes that split a product of what is split over these axes."""
        if self.told is not None:
            return self.told
        split = devices.split(self.axes, path, W, X, bool(product.stack))
        if self.measure not in (energies, grams) and (split.m or split.n):
            raise ValueError(
                f"the weight of the product with {path!r} is split over devices, and a measure of "
                "your own is a sum over tokens: take jlar.energies or jlar.grams, or leave it out "
                "with where=."
            )
        return split

    def joined(self, given: Sequence[Origin]) -> Origin:
        """The origin of what is computed from all of these."""
        split = frozenset().union(*(o.split for o in given))
        if any(o.data for o in given):
            return DATA._replace(split=split)
        leaves = frozenset().union(*(o.leaves for o in given))
        loops = frozenset().union(*(o.loops for o in given))
        first = next((o for o in given if leaves and self.main(leaves) in o.leaves), Origin())
        return first._replace(leaves=leaves, loops=loops, split=split, number=None)

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
    # If devices split the inputs, n = 1 here is one device's part of several inputs.
    if product.n < 2 and not given[0].split & given[1].split:
        return f"a product over n = {product.n} inputs, which has no alignment"
    if 0 in (product.m, *product.tokens, *product.stack):
        return "an empty product"
    if any(jnp.issubdtype(atom.aval.dtype, jnp.complexfloating) for atom in eqn.invars[:2]):
        return "a complex product"
    return ""


def _merges(whole: tuple[int, ...], merged: tuple[int, ...]) -> bool:
    """Whether the second shape is the first with neighbouring axes merged; ones do not count."""
    ends = set(itertools.accumulate(whole, operator.mul, initial=1))
    return math.prod(whole) == math.prod(merged) and ends.issuperset(
        itertools.accumulate(merged, operator.mul)
    )
