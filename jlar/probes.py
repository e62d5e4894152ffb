"""Statistics out of the backward pass: any layer, through jit, vmap, scan, remat, cond, custom_vjp.

A probe is an `Energies` of zeros that goes into a step beside the parameters. `tap` ties it to a
layer: the layer's output passes unchanged, and the layer's energies come back as the *cotangent*
of the probe, beside the gradients. Cotangents are what JAX itself sums over vmap and over repeated
use, stacks over scan and saves or recomputes under remat, so the statistics pool as they should.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Shaped

from . import _checks as check
from . import _mesh as mesh
from ._energies import Energies, energy, sums

NAME = "jlar_energies"
"""What `jax.ad_checkpoint.checkpoint_name` calls the statistics; see `save_statistics`."""


def tap(
    probe: Energies,
    W: Float[Array, "..."],
    X: Float[Array, "..."],
    Y: Float[Array, "..."],
    *,
    mask: Shaped[Array, "..."] | None = None,
    axes: mesh.Axes | None = None,
) -> Float[Array, "..."]:
    """Return Y unchanged and give `probe` the energies of W, X and Y as its cotangent.

    The primitive below `jlar.value_and_grad`, for a model of any framework: differentiate the loss
    with respect to the probe as well, and its gradient is an `Energies`. Loss and other gradients
    are untouched. Inside scan over layers pass one row of a stacked probe to each layer; for a
    stack of weights (experts) use `jax.vmap(tap)`. A probe used several times pools. Reverse mode
    only. A few reductions, fused with the layer; nothing at all where nobody differentiates.

    A layer whose Y does not reach the loss differentiably leaves its probe's gradient at zero,
    `calls` = 0 and `lar` nan. A probe cast to a narrower dtype returns statistics in that dtype.

    Args:
        probe: `jlar.Energies.zeros(n)`, n the input width of the layer.
        W: the weights in any layout, several input or output axes included, such as a Flax
            `DenseGeneral` kernel (d, heads, head_dim): only their sum of squares is read.
        X: inputs (..., *inputs), token axes first; the sizes of the input axes multiply to n.
        Y: the product of W and X (..., *outputs), before bias, soft-cap and temperature.
        mask: (...,) of 0/1 or bool, one per token.
        axes: inside `jax.shard_map`, the mesh axes that split tokens "t", outputs "m" and inputs
            "n" of what multiplies here, as in `jlar.energies`; n above is then that of the whole
            layer. If "n" is split, Y is the product after the sum over those axes.

    Returns:
        Y.

    Raises:
        ValueError: at trace time, where the shapes of W, X, Y and the mask do not fit.

    Example:
        >>> import jax, jlar
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> def loss(W, probe):
        ...     return (jlar.probes.tap(probe, W, X, X @ W.T) ** 2).mean()
        >>> gradient, e = jax.grad(loss, argnums=(0, 1))(W, jlar.Energies.zeros(64))
        >>> print(f"{e.lar:.4f}")
        0.5024
    """
    split = mesh.split(axes)
    mesh.check_varies(W, "W", split.m + split.n)
    mesh.check_varies(X, "X", split.t + split.columns)
    tokens = _token_axes(probe.n // mesh.size(split.n), W, X, Y)
    keep = None if mask is None else check.check_mask(mask, tokens)
    w, x, y = jax.lax.stop_gradient((W, X, Y))
    x, y = (check.zero_masked(a, keep) for a in (x, y))
    seen = sums(w, x, energy(y, check.accumulator(w, x, y)), keep, tokens, probe.n, split)
    # JAX sums a cotangent over a vmapped axis only if it varies along it, and a count of tokens
    # does not: all statistics are made to depend on Y (by adding 0, also if it is nan).
    tie = 0 * jnp.isnan(seen.y).astype(seen.y.dtype)
    seen = jax.tree.map(lambda s, p: (s + tie).astype(p.dtype), seen, probe)
    return _attach(probe, checkpoint_name(seen, NAME), Y)


@jax.custom_vjp
def _attach(probe: Energies, seen: Energies, Y: Array) -> Array:
    return Y


def _attach_forward(probe: Energies, seen: Energies, Y: Array) -> tuple[Array, Energies]:
    return Y, seen


def _attach_backward(seen: Energies, dY: Array) -> tuple[Energies, None, Array]:
    return seen, None, dY


_attach.defvjp(_attach_forward, _attach_backward)


def _token_axes(n: int, W: Array, X: Array, Y: Array) -> tuple[int, ...]:
    """The leading axes that X and Y share when n inputs and W.size / n outputs follow."""
    m = W.size // n
    for axes in range(min(X.ndim, Y.ndim) - 1, -1, -1):
        widths = math.prod(X.shape[axes:]), math.prod(Y.shape[axes:])
        if X.shape[:axes] == Y.shape[:axes] and widths == (n, m) and n * m == W.size:
            return X.shape[:axes]
    raise ValueError(
        f"a probe of width n = {n} expects X of shape (tokens, n), W of n x m entries in any "
        f"layout and Y = W X of shape (tokens, m); got X {X.shape}, W {W.shape}, Y {Y.shape}. "
        "Several input or output axes may stand for n and m; for stacked weights jax.vmap(tap)."
    )


def save_statistics(policy: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A policy for `jax.checkpoint` that also saves the statistics of tapped layers.

    Without it, a rematerialised block computes them in its recomputation, which keeps the block's
    last product alive only for that. They are a few numbers per layer.

    Args:
        policy: your own policy from `jax.checkpoint_policies`; None saves nothing else, as
            `jax.checkpoint` does by default.

    Example:
        >>> import jax, jlar
        >>> dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        >>> block = jax.checkpoint(lambda x: x, policy=jlar.probes.save_statistics(dots))
    """
    ours = jax.checkpoint_policies.save_only_these_names(NAME)
    return ours if policy is None else jax.checkpoint_policies.save_from_both_policies(policy, ours)
