"""One walk over a jaxpr: where weights meet data.

The plan of a jaxpr is made without computing anything: each value gets an `Origin`, each product of
a weight with data becomes a `Site`. What is run by it stands in `_evaluate`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from . import _devices as devices
from . import _mesh as mesh
from ._energies import energies
from ._lookup import LOOKUPS, picked
from ._origin import DATA, NUMBER, Origin, made_by, of_literal, why
from ._products import PRODUCTS, Product, statistics
from ._spectra import grams

Statistics = dict["Key", PyTree]


# Primitives of several operands whose results are these operands, one by one.
ONE_TO_ONE = ("optimization_barrier", *devices.EQUAL)


class Key(NamedTuple):
    """Products with equal keys are products of the same matrix, and pool."""

    leaf: int
    cut: str
    facing: str
    """Which axes are the inputs: W and W.T are two matrices."""
    n: int
    m: int
    stack: tuple[int, ...]
    """First the lengths of loops around the product, then what it stacks itself."""
    loops: int = 0
    """How many leading axes of `stack` come from loops."""
    parts: devices.Parts = devices.NOT_SPLIT
    """What splits the product over devices; one device's share is summed in the end."""
    varies: tuple[int, ...] = ()
    """The enclosing scans in which it is another matrix in each iteration."""

    def beyond(self, axes: Iterable[str]) -> "Key":
        """The key where these mesh axes have ended."""
        return self._replace(parts=self.parts.beyond(axes))


class Site(NamedTuple):
    """A product of a weight with data."""

    key: Key
    tokens: tuple[int, ...]
    through: tuple[str, ...] = ()
    """The control flow around it, innermost first."""

    def inside(self, what: str, **changes: Any) -> "Site":
        """The same site seen from outside of one construct."""
        return self._replace(through=(*self.through, what), **changes)


class Step(NamedTuple):
    """What takes the place of an equation, or is run beside it."""

    run: Callable[..., tuple[Sequence[Any], Any]]
    """From the inputs to (the outputs, statistics by key); at a site just its statistics."""
    eqn: Any
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    key: Key | None = None
    """Of a site."""
    same: Any = None
    """Sites that have this in common, if it is not None, are traced once."""


class Plan(NamedTuple):
    """What there is to know of a jaxpr for given origins of its inputs."""

    walk: "Walk"
    jaxpr: jex.Jaxpr
    pieces: list[Any]
    """Its equations, or steps."""
    origins: list[Origin]
    """Of its results."""
    sites: list[Site]
    notes: list[tuple[int, str]]
    """Why a leaf has no site here."""


class Part(NamedTuple):
    """What one equation adds to a plan."""

    origins: Sequence[Origin]
    """Of its results."""
    sites: Sequence[Site] = ()
    notes: Sequence[tuple[int, str]] = ()
    step: Step | None = None
    """What is run in its place or, with `after`, beside it; None: the equation as it is."""
    after: Any = None
    """The value that has to be there first."""


@dataclass(frozen=True, eq=False)
class Walk:
    """What holds for a whole program: the weights, and what is asked of them."""

    paths: list[str]
    sizes: list[int]
    chosen: frozenset[int]
    measure: Callable[..., PyTree]
    mask: Array | None
    axes: mesh.Axes | None
    rules: Mapping[str, Callable[["Walk", Any, list[Origin]], Part]]
    """How the primitives that hold programs of their own are walked."""
    blind: bool = False
    """Whether capture was called in a shard_map that tells nothing (check_vma=False)."""
    quiet: bool = False
    """Whether this is a second evaluation, which leaves out what computes nothing but prints."""
    number: Any = field(default_factory=itertools.count)
    plans: dict[Any, Any] = field(default_factory=dict)
    traces: dict[Any, Any] = field(default_factory=dict)
    mesh_axes: dict[str, int] = field(default_factory=dict)
    """The sizes of those over which a shard_map splits something, here or inside."""
    lookups: dict[Any, list[Any]] = field(default_factory=dict)
    """By what each weight is looked up in loops."""

    def silent(self) -> "Walk":
        """The walk of a second evaluation."""
        return replace(self, quiet=True, plans={}, traces={})

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
        def read(atom: Any) -> Origin:
            return of_literal(atom) if isinstance(atom, jex.Literal) else env[atom]

        pieces, sites, notes = [], [], []
        waiting: dict[Any, Step | None] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            if self.quiet and not eqn.outvars:
                continue
            part = self._part([read(atom) for atom in eqn.invars], jaxpr.eqns, i, read)
            env.update(zip(eqn.outvars, part.origins, strict=True))
            sites += part.sites
            notes += part.notes
            pieces.append(eqn if part.step is None or part.after is not None else part.step)
            if part.after is not None:
                waiting[part.after] = part.step
            pieces += [waiting.pop(v) for v in eqn.outvars if v in waiting] if waiting else []
        return Plan(self, jaxpr, pieces, [read(a) for a in jaxpr.outvars], sites, notes)

    def _part(
        self, given: list[Origin], eqns: Sequence[Any], i: int, read: Callable[[Any], Origin]
    ) -> Part:
        eqn, name = eqns[i], eqns[i].primitive.name
        if name in PRODUCTS and any(o.leaves for o in given[:2]) and any(o.data for o in given[:2]):
            return self._product(given, eqns, i)
        if name in self.rules:
            part = self.rules[name](self, eqn, given)
            # A silent evaluation goes inside wherever something may be printed.
            stays = part.sites or (self.quiet and eqn.effects)
            return part if stays else part._replace(step=None, after=None)
        if name in LOOKUPS and given[0].leaves and not self.joined(given[1:]).data:
            return Part([picked(self.lookups, given, eqn, eqns[:i], read)])
        return self.plain(eqn, given)

    def plain(self, eqn: Any, given: list[Origin]) -> Part:
        """An equation that is no product of a weight with data and has none inside."""
        if eqn.primitive.name in ONE_TO_ONE and len(given) == len(eqn.outvars):
            plain = [o._replace(same_as=None, number=None, pieces=()) for o in given]
            return Part(devices.after(eqn, plain))
        large = given
        if eqn.primitive.name in ("mul", "div") and any(o.leaves for o in given):
            # A scalar of the data cancels on a weight, but data times a scalar weight is data.
            sizes = [atom.aval.size for atom in eqn.invars]
            scalar = [
                o.data and size == 1 < max(sizes) for o, size in zip(given, sizes, strict=True)
            ]
            large = [o for o, left_out in zip(given, scalar, strict=True) if not left_out]
        joined = self.joined(large)
        if joined.leaves:
            origins = made_by(eqn, joined, given)
            alone = eqn.primitive.name in PRODUCTS and not all(o.leaves for o in given[:2])
            notes = [(leaf, NUMBERS_ONLY) for leaf in joined.leaves if alone]
        else:
            origins = [joined] * len(eqn.outvars)
            notes = [(leaf, why(eqn, i)) for i, o in enumerate(given) for leaf in o.leaves]
        return Part(devices.after(eqn, origins), notes=notes)

    def _product(self, given: list[Origin], eqns: Sequence[Any], i: int) -> Part:
        """A product of a weight with data: a site if it can be measured and is asked for."""
        eqn, (w, x) = eqns[i], (0, 1) if given[0].leaves else (1, 0)
        weight, split = given[w], given[w].split | given[x].split
        origins = [DATA._replace(split=split) if split else DATA]
        shapes = [atom.aval.shape for atom in eqn.invars[:2]]
        product: Any = PRODUCTS[eqn.primitive.name](eqn.params, shapes, w == 0)
        if isinstance(product, str):
            return Part(origins, notes=[(each, product) for each in weight.leaves])
        if unfit := _unfit(product, eqn, bool(given[w].split & given[x].split)):
            return Part(origins, notes=[(each, unfit) for each in weight.leaves])
        leaf = self.main(weight.leaves)
        notes = [(each, f"part of {self.paths[leaf]}") for each in weight.leaves - {leaf}]
        if leaf not in self.chosen:
            return Part(origins, notes=[*notes, (leaf, "not chosen by where=")])
        self._check_mask(product.tokens, self.paths[leaf])
        parts, Y = self._parts(leaf, weight.split, given[x].split, product, eqns, i)

        def run(*operands: Any) -> tuple[Sequence[Any], PyTree]:
            keep = None if self.mask is None else self.mask.reshape(product.tokens)
            return [], statistics(self.measure, product, parts, keep, *operands)

        n, m = (
            size * math.prod(self.mesh_axes[axis] for axis in axes)
            for size, axes in ((product.n, parts.n), (product.m, parts.m))
        )
        varies, facing = tuple(sorted(weight.loops)), product.facing(weight)
        key = Key(leaf, weight.cut, facing, n, m, product.stack, parts=parts, varies=varies)
        inputs = [eqn.invars[w], eqn.invars[x], Y, *eqn.invars[2:]]
        step = Step(run, eqn, inputs, [], key, (product, parts))
        return Part(origins, [Site(key, product.tokens)], notes, step, after=Y)

    def _check_mask(self, tokens: tuple[int, ...], path: str) -> None:
        if self.mask is not None and not _merges(self.mask.shape, tokens):
            raise ValueError(
                f"mask of shape {self.mask.shape} does not fit the product with {path!r}, whose "
                f"tokens have shape {tokens}: leave that one out with where=, or give it a capture "
                "of its own without the mask."
            )

    def _parts(
        self,
        leaf: int,
        W: frozenset[str],
        X: frozenset[str],
        product: Any,
        eqns: Sequence[Any],
        i: int,
    ) -> tuple[devices.Parts, Any]:
        """What splits a product, and the value that is its Y."""
        path = self.paths[leaf]
        if self.blind:
            devices.check(self.axes, set(self.mesh_axes))
            return devices.told(self.axes), eqns[i].outvars[0]
        stacked, needs_Y = bool(product.stack), self.measure is not grams
        parts = devices.parts(self.axes, path, W, X, stacked)
        if self.measure not in (energies, grams) and (parts.m or parts.n):
            raise ValueError(
                f"the weight of the product with {path!r} is split over devices, and a measure of "
                "your own is a sum over tokens: take jlar.energies or jlar.grams, or leave it out "
                "with where=."
            )
        return devices.outputs(parts, path, eqns, i) if needs_Y else (parts, eqns[i].outvars[0])

    def joined(self, given: Sequence[Origin]) -> Origin:
        """The origin of what is computed from all of these."""
        data, simple = False, True
        for origin in given:
            if origin is DATA:
                data = True
            elif origin is not NUMBER and any(origin[:-1]):
                simple = False
        if simple:
            return DATA if data else NUMBER
        split = frozenset().union(*(o.split for o in given))
        if any(o.data for o in given):
            return DATA._replace(split=split) if split else DATA
        leaves = frozenset().union(*(o.leaves for o in given))
        loops = frozenset().union(*(o.loops for o in given))
        first = next((o for o in given if leaves and self.main(leaves) in o.leaves), NUMBER)
        return first._replace(leaves=leaves, loops=loops, split=split, same_as=None, number=None)

    def main(self, leaves: Iterable[int]) -> int:
        """The largest of these leaves, which names what is made of all of them."""
        return max(sorted(leaves), key=lambda leaf: self.sizes[leaf])


NUMBERS_ONLY = (
    "multiplies numbers written in the program, which makes another weight of it: pass them as an "
    "argument if they are data"
)


def _unfit(product: Product, eqn: Any, shared: bool) -> str:
    """Why this product has no log-alignment ratio; empty if it has one."""
    if product.n < 2 and not shared:  # shared between devices, one input is a part of several
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
