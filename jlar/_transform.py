"""value_and_grad and evaluate: a probe on every linear layer of an equinox model for one call."""

from collections.abc import Callable
from itertools import compress
from typing import Any

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jaxtyping import Array, Float, PyTree

from . import _checks as check
from . import _mesh as mesh
from ._energies import Energies
from .probes import tap

Where = Callable[[PyTree], PyTree] | None


class Tapped(eqx.nn.Linear):
    """An `eqx.nn.Linear` whose product is tapped; it stands in for the layer during one call."""

    probe: Energies
    axes: mesh.Axes | None = eqx.field(static=True)

    def __init__(self, linear: eqx.nn.Linear, probe: Energies, axes: mesh.Axes | None):
        for name in ("weight", "bias", "in_features", "out_features", "use_bias"):
            setattr(self, name, getattr(linear, name))
        self.probe, self.axes = probe, axes

    def __call__(self, x: Float[Array, "n"], *, key: Any = None) -> Float[Array, "..."]:
        """As `eqx.nn.Linear`."""
        y = self.weight @ x
        # The identity. Under jax.vmap it puts the batch axis first, as adding a bias or leaving the
        # vmap will: with one reader of the transposed product XLA compiles it as without a probe.
        y = jax.lax.broadcast_in_dim(y, y.shape, range(y.ndim))
        y = tap(self.probe, self.weight, x, y, axes=self.axes)
        if self.bias is not None:
            y = y + self.bias
        return jnp.squeeze(y) if self.out_features == "scalar" else y


def _is_linear(node: Any) -> bool:
    return isinstance(node, eqx.nn.Linear)


def _linears(model: PyTree) -> dict[str, eqx.nn.Linear]:
    """Every Linear by its dotted path."""
    nodes = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_linear)
    return {_dotted(path): node for path, node in nodes if _is_linear(node)}


def _dotted(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "linear"


def probes_for(model: PyTree, where: Where) -> dict[str, Energies]:
    """A probe for each chosen layer, by dotted path; ValueError where a layer cannot be tapped."""
    layers = _linears(model)
    if where is None:
        layers = {p: layer for p, layer in layers.items() if _inputs(layer) > 1}
    else:
        chosen = [n for n in jax.tree.leaves(where(model), is_leaf=_is_linear) if _is_linear(n)]
        layers = {p: layer for p, layer in layers.items() if any(layer is c for c in chosen)}
    if not layers:
        raise ValueError(
            f"no eqx.nn.Linear to measure in the first argument, a {type(model).__name__}"
            f"{'' if where is None else ' (where= chose none)'}: where must return layers of the "
            "model it is given; in a model without them call jlar.probes.tap at each product."
        )
    for path, layer in layers.items():
        if type(layer).__call__ is not eqx.nn.Linear.__call__:
            raise ValueError(
                f"layer {path!r} is a {type(layer).__name__}, with a __call__ of its own that a "
                "probe would replace: call jlar.probes.tap in it and leave it out with where=."
            )
        check.check_width(_inputs(layer), f"layer {path!r}")
    return {p: Energies.zeros(_inputs(layer), _stack(layer)) for p, layer in layers.items()}


def _inputs(linear: eqx.nn.Linear) -> int:
    return 1 if linear.in_features == "scalar" else linear.in_features


def _stack(linear: eqx.nn.Linear) -> tuple[int, ...]:
    # A weight tied with eqx.nn.Shared is not an array until the model puts it in place.
    return linear.weight.shape[:-2] if eqx.is_array(linear.weight) else ()


def insert(model: PyTree, probes: dict[str, Energies], axes: mesh.Axes | None = None) -> PyTree:
    """The model with each probed layer tapped."""

    def replace(path: tuple, node: Any) -> Any:
        probe = probes.get(_dotted(path)) if _is_linear(node) else None
        return node if probe is None else Tapped(node, probe, axes)

    return jax.tree_util.tree_map_with_path(replace, model, is_leaf=_is_linear)


class Traced:
    """One trace of a function `f(*args) -> (lars, rest)`, to be run with or without its lars."""

    def __init__(self, f: Callable[..., tuple[dict[str, Energies], PyTree]], *args: PyTree):
        dynamic, static = eqx.partition(args, eqx.is_array)
        self.inputs, structure = jax.tree.flatten(dynamic)
        not_arrays = []

        def flat(*leaves: Array) -> tuple[dict[str, Energies], PyTree]:
            lars, rest = f(*eqx.combine(jax.tree.unflatten(structure, leaves), static))
            arrays, others = eqx.partition(rest, eqx.is_array)
            not_arrays.append(others)
            return lars, arrays

        self.closed, (self.lars, self.arrays) = jax.make_jaxpr(flat, return_shape=True)(
            *self.inputs
        )
        self.not_arrays = not_arrays[-1]
        self.lar_leaves = len(jax.tree.leaves(self.lars))
        self._check_reached()

    def _only(self, wanted: list[bool]) -> tuple[Any, list[bool], list[bool]]:
        """The program behind the wanted outputs, and which constants and inputs it uses."""
        return partial_eval.dce_jaxpr_consts(self.closed.jaxpr, wanted)

    def _check_reached(self) -> None:
        """ValueError for a layer whose statistics depend on nothing: its cotangent is a zero."""
        outputs = range(len(self.closed.jaxpr.outvars))
        for i, path in enumerate(self.lars):
            first = i * self.lar_leaves // len(self.lars)
            _, constants, inputs = self._only([j == first for j in outputs])
            if not any(constants) and not any(inputs):
                raise ValueError(
                    f"layer {path!r} cannot be measured: nothing it computes reaches the result "
                    "differentiably. Either it is not called through its own __call__ (its weight "
                    "is used directly), or its output is unused, made an integer, or behind "
                    "stop_gradient. Leave it out with where=, or use jlar.energies on its weight "
                    "and inputs."
                )

    def run(self, *, lars: bool = True) -> tuple[dict[str, Energies], PyTree]:
        """(lars, arrays of the rest); with lars=False they are zeros and cost nothing."""
        rest = len(self.closed.jaxpr.outvars) - self.lar_leaves
        jaxpr, constants, inputs = self._only([lars] * self.lar_leaves + [True] * rest)
        leaves = jax.extend.core.jaxpr_as_fun(
            jax.extend.core.ClosedJaxpr(jaxpr, list(compress(self.closed.consts, constants)))
        )(*compress(self.inputs, inputs))
        if not lars:
            zeros = [jnp.zeros(s.shape, s.dtype) for s in jax.tree.leaves(self.lars)]
            leaves = [*zeros, *leaves]
        return jax.tree.unflatten(jax.tree.structure((self.lars, self.arrays)), leaves)

    def restore(self, arrays: PyTree) -> PyTree:
        """The rest with what was not an array put back."""
        return eqx.combine(arrays, self.not_arrays)


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    where: Where = None,
    every: int | None = None,
    has_aux: bool = False,
    axes: mesh.Axes | None = None,
) -> Callable[..., Any]:
    """`eqx.filter_value_and_grad` that also returns the energies of the model's linear layers.

    Loss and gradients are those of `eqx.filter_value_and_grad`, on CPUs in float32 bit for bit (to
    rounding where one vmap spans several layers without bias, whose products XLA may transpose);
    the gradients have the model's own structure. Works under jit, vmap, scan, remat and shard_map,
    and with anything of these inside the loss. Cost: two or three reductions per layer. Under
    `jax.checkpoint` give the block `policy=jlar.probes.save_statistics(your_policy)`.

    Args:
        loss_fn: `loss_fn(model, *args, **kwargs)` -> loss, or (loss, aux) with `has_aux`.
        where: `where(model)` -> the `eqx.nn.Linear` layers to measure: one, a list of them, or a
            part of the model that contains them. Default: every one with two inputs or more.
        every: measure only on steps divisible by this number. The returned function then takes a
            keyword `step`, which may be traced; on other steps the energies are zeros (count 0,
            `lar` nan), which cost and pool to nothing. One trace serves both. Default: every call.
        has_aux: as in `jax.value_and_grad`.
        axes: inside `jax.shard_map`, the mesh axes that split the tokens of all measured layers,
            as `{"t": "data"}`. Layers split in another way take `jlar.probes.tap` by hand. The
            loss is yours to sum over the axes, as without jlar.

    Returns:
        A function of the same arguments that returns `((loss, lars), grads)`, or
        `((loss, aux, lars), grads)`; `lars` maps the dotted path of each layer to its `Energies`,
        with one row per layer where weights are stacked (scan over layers).

    Raises:
        ValueError: at trace time, naming the layer, where one cannot be measured: its output does
            not reach the loss, its class has a `__call__` of its own; or there is none.

    Example:
        >>> import equinox as eqx, jax, jlar
        >>> model = eqx.nn.MLP(8, "scalar", 32, depth=1, key=jax.random.key(0))
        >>> x = jax.random.normal(jax.random.key(1), (100, 8))
        >>> @eqx.filter_jit
        ... def step(model, x):
        ...     loss_fn = lambda model, x: (jax.vmap(model)(x) ** 2).mean()
        ...     return jlar.value_and_grad(loss_fn)(model, x)
        >>> (loss, lars), grads = step(model, x)
        >>> print({path: f"{e.lar:.2f} of {e.count} tokens" for path, e in lars.items()})
        {'layers.0': '0.51 of 100 tokens', 'layers.1': '0.60 of 100 tokens'}
    """
    if every is not None and every < 1:
        raise ValueError(f"every must be a number of steps, at least 1; got {every}.")

    def with_probes(both: tuple[PyTree, dict[str, Energies]], args: tuple, kwargs: dict) -> Any:
        return loss_fn(insert(*both, axes), *args, **kwargs)

    def differentiate(
        model: PyTree, probes: dict[str, Energies], args: tuple, kwargs: dict
    ) -> tuple[dict[str, Energies], PyTree]:
        gradient = eqx.filter_value_and_grad(with_probes, has_aux=has_aux)
        value, (grads, lars) = gradient((model, probes), args, kwargs)
        return lars, (value, grads)

    def wrapped(model: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        if every is not None and "step" not in kwargs:
            raise ValueError(f"every={every} needs to know the step: call it with a keyword step=.")
        step = kwargs.pop("step") if every is not None else None
        traced = Traced(differentiate, model, probes_for(model, where), args, kwargs)
        if every is None:
            lars, arrays = traced.run()
        else:
            measure = jnp.asarray(step) % every == 0
            lars, arrays = jax.lax.cond(measure, traced.run, lambda: traced.run(lars=False))
        value, grads = traced.restore(arrays)
        return (((*value, lars) if has_aux else (value, lars)), grads)

    return wrapped


def evaluate(
    fn: Callable[..., Any], *, where: Where = None, axes: mesh.Axes | None = None
) -> Callable[..., Any]:
    """The energies of a model's linear layers from a forward pass, without gradients.

    Args:
        fn: `fn(model, *args, **kwargs)` -> any output with at least one floating-point array that
            the measured layers feed (a loss, logits, hidden states).
        where: which layers, as in `jlar.value_and_grad`.
        axes: what splits the tokens inside `jax.shard_map`, as in `jlar.value_and_grad`.

    Returns:
        A function of the same arguments that returns `(output, lars)`.

    Raises:
        ValueError: at trace time, naming the layer, as in `jlar.value_and_grad`.

    Example:
        >>> import equinox as eqx, jax, jlar
        >>> model = eqx.nn.MLP(8, 4, 32, depth=1, key=jax.random.key(0))
        >>> x = jax.random.normal(jax.random.key(1), (100, 8))
        >>> out, lars = jlar.evaluate(lambda model, x: jax.vmap(model)(x))(model, x)
        >>> print(out.shape, list(lars))
        (100, 4) ['layers.0', 'layers.1']
    """

    def forward(
        model: PyTree, probes: dict[str, Energies], args: tuple, kwargs: dict
    ) -> tuple[dict[str, Energies], PyTree]:
        others = None

        def split(probes: dict[str, Energies]) -> PyTree:
            nonlocal others
            out = fn(insert(model, probes, axes), *args, **kwargs)
            floats, others = eqx.partition(out, eqx.is_inexact_array)
            return floats

        # The statistics do not depend on the cotangent: what would propagate it is dead code.
        floats, pull_back = jax.vjp(split, probes)
        (lars,) = pull_back(jax.tree.map(jnp.zeros_like, floats))
        return lars, eqx.combine(floats, others)

    def wrapped(model: PyTree, /, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Energies]]:
        traced = Traced(forward, model, probes_for(model, where), args, kwargs)
        lars, arrays = traced.run()
        return traced.restore(arrays), lars

    return wrapped
