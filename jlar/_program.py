"""The trace of one call of a function: which arrays are weights, and what they are called."""

import collections
import fnmatch
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, PyTree

from . import _devices as devices
from . import _mesh as mesh
from ._origin import DATA, UNKNOWN, Origin
from ._plan import Key, summed
from ._rules import RULES
from ._walk import Walk

Where = Callable[[str], bool] | str | Sequence[str] | None


class Program:
    """The jaxpr of `f(*args, **kwargs)`, and the plan of the walk over it."""

    def __init__(
        self,
        f: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        measure: Callable[..., PyTree],
        where: Where,
        mask: ArrayLike | None,
        axes: mesh.Axes | None,
    ):
        self.closed, self.structure, self.static = eqx.filter_make_jaxpr(_refusing_changes(f))(
            *args, **kwargs
        )
        self.inputs = jax.tree.leaves(eqx.filter((args, kwargs), _is_array))
        leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(args[0], _is_array))
        self.leaves = [leaf for _, leaf in leaves]
        self.paths = _names([path for path, _ in leaves])
        origins, jaxpr = [], self.closed.jaxpr
        # Constants have negative numbers; the others begin with the leaves of the first argument.
        for i, v in enumerate([*jaxpr.constvars, *jaxpr.invars], start=-len(jaxpr.constvars)):
            weight = 0 <= i < len(self.leaves) and is_weight(self.leaves[i])
            origin = Origin(leaves=frozenset({i})) if weight else DATA
            origins.append(origin._replace(split=v.aval.manual_axis_type.varying))
        walk = Walk(
            paths=self.paths,
            sizes=[leaf.size for leaf in self.leaves],
            chosen=_chosen(where, self.paths),
            measure=measure,
            mask=None if mask is None else jnp.asarray(mask).astype(bool),
            axes=axes,
            rules=RULES,
            told=devices.told(axes) if _vma_is_off() else None,
        )
        # Of the shard_maps around this call
        self.manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
        walk.mesh_axes.update({axis: jax.lax.axis_size(axis) for axis in self.manual})
        self.plan = walk.plan(self.closed, origins)
        devices.check_axes(axes, set(walk.mesh_axes))

    def run(self) -> tuple[Any, dict[str, PyTree]]:
        """What the function returns, and the statistics by name."""
        names = self.names()
        if not names:
            from ._sites import Sites

            raise ValueError(
                "nothing to measure: no array of the first argument multiplies data. What becomes "
                f"of each of them:\n{Sites.of(self)}"
            )
        outs, seen = self.plan.run(*self.inputs)
        seen = summed(seen, self.manual) if self.manual else seen
        result = jax.tree.unflatten(jax.tree.structure(self.structure), outs)
        return eqx.combine(result, self.static), {names[key]: seen[key] for key in names}

    def names(self) -> dict[Key, str]:
        """A name for each matrix: the path of its leaf, and which part of it.

        Where one leaf is several matrices (a tied one, of which the transposed multiplies as well),
        the one with the most outputs times tokens has the plain name.
        """
        work: collections.Counter[Key] = collections.Counter()
        for site in self.plan.sites:
            work[site.key.without(self.manual)] += site.key.m * math.prod(site.tokens)
        plain = {key: self.paths[key.leaf] + re.sub(UNKNOWN, "", key.cut) for key in work}
        names: dict[Key, str] = {}
        for key in sorted(work, key=lambda key: (key.leaf, plain[key], -work[key])):
            name, more = plain[key], 1
            while name in names.values():
                name = f"{plain[key]}#{(more := more + 1)}"
            names[key] = name
        return names


def _refusing_changes(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, or ValueError if it changes the weights in place.

    A trace gives it a copy of them, so the change would be lost.
    """

    def call(weights: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        before = jax.tree.leaves(weights)
        result = f(weights, *args, **kwargs)
        after = jax.tree.leaves(weights)
        if list(map(id, before)) != list(map(id, after)):
            raise ValueError(
                "the function changes its first argument in place (as a flax NNX module does "
                "with its random state and running means): that would be lost. Take it apart "
                "outside (`graph, params, rest = nnx.split(model, nnx.Param, ...)`), put it "
                "together inside (`nnx.merge`), and return what has changed beside the loss."
            )
        return result

    return call


def is_weight(leaf: Any) -> bool:
    """Whether an array holds numbers to multiply with: random keys are no weights."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return False
    # Keys of the old style are uint32, with a last axis of two.
    return not (leaf.dtype == jnp.uint32 and leaf.shape[-1:] == (2,))


def _vma_is_off() -> bool:
    """Whether this is inside a shard_map with check_vma=False, whose types do not tell a split."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    # The index differs between devices; where its type does not say so, none does.
    return any(axis not in mesh.varying(jax.lax.axis_index(axis)) for axis in manual)


def _is_array(a: Any) -> bool:
    return eqx.is_array(a) or isinstance(a, jax.ShapeDtypeStruct)


def _names(paths: list[tuple[Any, ...]]) -> list[str]:
    """Each path as text, with dots; those that would be equal are written as Python indexes."""
    arrays_under = collections.Counter(path[:-1] for path in paths)
    names = [_dotted(path, arrays_under) for path in paths]
    return [
        jax.tree_util.keystr(path) if names.count(name) > 1 else name
        for name, path in zip(names, paths, strict=True)
    ]


def _dotted(path: tuple[Any, ...], arrays_under: collections.Counter[Any]) -> str:
    # The boxes that flax puts around arrays have one attribute, and do not count.
    if (
        len(path) > 1
        and path[-1] == jax.tree_util.GetAttrKey("value")
        and arrays_under[path[:-1]] == 1
    ):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".") or "weights"


def _chosen(where: Where, paths: list[str]) -> frozenset[int]:
    """The leaves whose paths `where` accepts."""
    if where is None:
        return frozenset(range(len(paths)))
    if callable(where):
        chosen = [i for i, path in enumerate(paths) if where(path)]
    else:
        patterns = [where] if isinstance(where, str) else list(where)
        chosen = [i for i, p in enumerate(paths) if any(fnmatch.fnmatch(p, a) for a in patterns)]
    if not chosen:
        shown = ", ".join(map(repr, paths[:8])) + (", ..." if len(paths) > 8 else "")
        raise ValueError(
            f"where={where!r} accepts none of the {len(paths)} paths of the first argument: "
            f"{shown}. It takes a predicate on a path, or patterns such as '*.kernel'."
        )
    return frozenset(chosen)
