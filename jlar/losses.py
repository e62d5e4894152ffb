"""The fused unembedding loss: cross-entropy without the logits, and the energies of the logits."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Int, Integer

from . import _checks as check
from ._checks import Inputs, Mask, Weights
from ._energies import Energies, energy, sums
from ._mesh import Axes, Split, on_auto_axes, size, total, vary_as, varying

__all__ = ["cross_entropy"]


def __dir__() -> list[str]:
    return __all__


class _Rule(NamedTuple):
    """What is fixed at trace time."""

    soft_cap: float | None
    z_loss: float
    reduces: bool  # the sum over tokens, rather than one loss per token
    dtype: jnp.dtype  # of W and X, hence of their gradients
    vocabulary: tuple[str, ...]  # mesh axes that split it inside shard_map


def cross_entropy(
    W: Weights,
    X: Inputs,
    labels: Integer[ArrayLike, "*t"],
    *,
    mask: Mask | None = None,
    weights: Float[ArrayLike, "*t"] | None = None,
    chunk: int | None = None,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    ignore: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    axes: Axes | None = None,
) -> tuple[Float[Array, "..."], Energies]:
    r"""Cross-entropy of the labels under softmax(X W^T), and the energies of W, without gradient.

    $\ell_t = \log \sum_v e^{z_{tv}} - z_{t, label_t} + \zeta (\log \sum_v e^{z_{tv}})^2$ with
    $z = Y = XW^T$, or $c \tanh(Y / c)$ under a soft-cap c; the mean over the tokens kept, which are
    those in the mask whose label is not `ignore`. The (tokens, V) logits never exist: a scan goes
    over chunks of tokens, and the energies are sums over each chunk's Y while it is there.

    Time is about that of the plain loss: under "mean" and "sum" the gradients are computed chunk by
    chunk in the forward pass, if at all, and scaled by the cotangent in the backward pass; "none"
    computes the logits twice, 4/3 of the products. Memory: chunk x V logits and, when
    differentiated, the gradient of W twice, in float32; under `jax.vmap` that for each instance, so
    give X leading axes instead. Products of float32 operands are exact to float32 (no TF32); those
    of half precision are summed in float32, with the gradient of each logit rounded to it.
    Reverse mode only: `jax.jvp` raises TypeError. Second derivatives are right, but keep all logits
    as the plain loss does.

    Args:
        W: the unembedding (V, n). If W and X differ in dtype, or are narrower than half precision,
            both are cast to float32.
        labels: (...,) integers from 0 to V - 1, or `ignore`; X[t] predicts labels[t].
        weights: (...,) factors of the tokens' losses; "mean" divides by their sum. A token of
            weight 0 is dropped as by the mask; the energies count all others once.
        chunk: tokens at a time. By default n, for which the logits take the room of one float32
            gradient of W, or as many as 2^24 logits (64 MiB) allow if that is more.
        soft_cap: c, a positive Python number.
        z_loss: $\zeta$, a Python number: the weight of the squared log-partition function.
        ignore: the label of tokens that do not count.
        reduction: "mean" over the tokens kept, or their "sum" (to divide by a count pooled over
            micro-batches or devices), or "none": one loss per token, 0 where dropped.
        axes: may split the tokens "t" and the vocabulary "m" (with check_vma, the default of
            `jax.shard_map`); labels are those of the whole vocabulary, "mean" and "sum" over all
            devices, gradients those of the whole loss. No logits move, but three numbers per token.

    Returns:
        (loss, `Energies`): the loss float32 (float64 if an input is), () or for "none" (...,); nan,
        with nan gradients, for the mean of no tokens and for a kept token with a label outside
        0..V-1. The energies are those of `jlar.energies(W, X, mask=kept)`: Y before the soft-cap.

    Example:
        >>> import jax, jlar.losses
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64)) / 8
        >>> labels = jax.numpy.arange(64).at[0].set(-100)
        >>> step = jax.jit(jax.value_and_grad(jlar.losses.cross_entropy, (0, 1), has_aux=True))
        >>> (loss, energies), (dW, dX) = step(W, X, labels)
        >>> print(f"{loss:.3f} {energies.lar:.3f} {energies.count} {dW.shape}")
        4.180 0.503 63 (64, 64)
    """
    W, X, _, split = check.operands(W, X, None, axes)
    (V, n), tokens, acc = W.shape, X.shape[:-1], check.accumulator(W, X)
    chunk = max(n, 2**24 // V) if chunk is None else chunk
    _check_options(reduction, soft_cap, z_loss, chunk)
    _check_split(split, axes)
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        # What JAX would wrap to 32 bits stays outside the vocabulary.
        held = jnp.iinfo(jax.dtypes.canonicalize_dtype(labels.dtype))
        labels = np.clip(labels, held.min, held.max)
    labels = jnp.asarray(labels)
    check.need(
        jnp.issubdtype(labels.dtype, jnp.integer),
        f"labels must be integers, one class per token; got dtype {labels.dtype}. For one-hot "
        "labels pass jnp.argmax(labels, axis=-1).",
    )
    # The widest integers there are, because `ignore` need not fit the labels' own dtype.
    labels = check.per_token(labels, "labels", tokens).astype(int)
    keep = labels != ignore
    if mask is not None:
        keep &= check.per_token(mask, "mask", tokens).astype(bool)
    factors, exponent = jnp.ones(tokens, acc), None
    if weights is not None:
        factors = check.per_token(weights, "weights", tokens).astype(acc)
        keep &= factors != 0
        if reduction != "none":
            # Large weights overflow, small ones would flush gradients of half-precision logits.
            scaled = check.zero_masked(factors, keep)
            scaled, exponent = check.unit(scaled, acc, split, given=False)
            tiny = jnp.finfo(acc).tiny  # a factor of 0 would drop its token
            factors = scaled + jnp.where(keep & (scaled == 0), tiny, 0)
    X, factors, labels = (check.zero_masked(a, keep) for a in (X, factors, labels))
    divisor = jnp.sum(factors)
    # A label outside the vocabulary makes its token's loss nan; after the sum, so that the
    # gradient of the mean is nan for that token alone.
    factors = jnp.where((labels >= 0) & (labels < V * size(split.m)), factors, jnp.nan)

    dtype = W.dtype if W.dtype == X.dtype and W.dtype in check.MULTIPLIED else acc
    rule = _Rule(soft_cap, z_loss, reduction != "none", dtype, split.m)

    def all_losses(W: Array, X: Array, labels: Array, factors: Array) -> tuple[Array, Array]:
        # Where one operand is the same on devices that hold different parts of the other, its
        # gradient has to be summed over them. JAX does so if it is told that the operand varies.
        W, X = vary_as(W, X, labels, factors), vary_as(X, W, labels, factors)
        flat = X.reshape(-1, n), labels.ravel(), factors.ravel()
        loss, y = _losses(rule, W, *(_chunks(a, chunk) for a in flat))
        if not rule.reduces:
            # Undo `_chunks`, which deals tokens out in turn, and drop its padding.
            loss = loss.T.ravel()[: labels.size].reshape(tokens)
        return loss, y

    loss_spec = PartitionSpec() if rule.reduces else jax.typeof(labels).sharding.spec
    loss, y = on_auto_axes(all_losses, (loss_spec, PartitionSpec()))(
        W.astype(dtype), X.astype(dtype), labels, factors
    )
    if rule.reduces:
        loss = total(loss, split.t, split)
    if reduction == "mean":
        loss = loss / total(divisor, split.t, split)
    elif exponent is not None:
        loss *= jnp.ldexp(jnp.ones((), acc), exponent)
    return loss, jax.lax.stop_gradient(sums(W, X, y, keep, split))


def _check_options(reduction: str, soft_cap: float | None, z_loss: float, chunk: int) -> None:
    reductions = "mean", "sum", "none"
    check.need(reduction in reductions, f"reduction must be of {reductions}; got {reduction!r}.")
    capped = soft_cap is None or 0 < soft_cap < math.inf
    check.need(capped, f"soft_cap must be positive, or None for no cap; got {soft_cap}.")
    check.need(0 <= z_loss < math.inf, f"z_loss must be a finite weight, 0 for none; got {z_loss}.")
    check.need(chunk >= 1, f"chunk must be at least 1 token, or None to choose it; got {chunk}.")


def _check_split(split: Split, axes: Axes | None) -> None:
    check.need(
        not (split.n or split.gathered),
        'axes may split the tokens "t" and the vocabulary "m", over different mesh axes; got '
        f"{axes!r}. Gather W over {(*split.n, *split.gathered)} first, as its product would.",
    )
    check.need(
        all(axis in varying(jax.lax.axis_index(axis)) for axis in split.m),
        f"the vocabulary is split over {split.m}, and its gradients need to know what varies over "
        "them: leave check_vma of jax.shard_map at True.",
    )


def _chunks(a: Array, chunk: int) -> Array:
    """The tokens as equal chunks (steps, length), of at most `chunk` tokens, padded with zeros.

    A chunk is every steps-th token, so that each device that holds tokens has a share of it.
    """
    steps = max(1, -(-len(a) // chunk))
    length = -(-len(a) // steps)
    padded = jnp.pad(a, [(0, steps * length - len(a))] + [(0, 0)] * (a.ndim - 1))
    return padded.reshape(length, steps, *a.shape[1:]).swapaxes(0, 1)


def _token_losses(
    Y: Float[Array, "c V"], labels: Int[Array, "c"], factors: Float[Array, "c"], rule: _Rule
) -> Float[Array, "c"]:
    """Each token's loss before its factor, 0 where that is 0; sums over v go over the devices."""
    z = Y if rule.soft_cap is None else rule.soft_cap * jnp.tanh(Y / rule.soft_cap)
    first = jax.lax.axis_index(rule.vocabulary) * Y.shape[1] if rule.vocabulary else 0
    # A sum and not a gather: it fuses with the other, and its gradient is not a scatter.
    is_label = labels[:, None] - first == jnp.arange(Y.shape[1])[None]
    # Both are counted from the largest, so that large logits do not round their difference.
    top = jnp.max(jax.lax.stop_gradient(z), axis=-1)
    top = jax.lax.pmax(top, rule.vocabulary) if rule.vocabulary else top
    z -= jnp.where(jnp.isfinite(top), top, 0)[:, None]
    each = jnp.sum(jnp.exp(z), axis=-1), jnp.sum(jnp.where(is_label, z, 0), axis=-1)
    over_top, label_z = jax.lax.psum(each, rule.vocabulary) if rule.vocabulary else each
    loss = jnp.log(over_top) - label_z
    if rule.z_loss:  # 0 times the square would be nan where the square is infinite
        log_sum = top + jnp.log(over_top)
        loss += rule.z_loss * log_sum * log_sum
    return jnp.where(factors != 0, loss, 0)


def _by_chunks(
    rule: _Rule,
    W: Float[Array, "V n"],
    X: Float[Array, "steps c n"],
    labels: Int[Array, "steps c"],
    factors: Float[Array, "steps c"],
    cotangents: Float[Array, "steps c"] | None = None,
) -> tuple[Float[Array, "steps c"], Float[Array, ""], Any, Any]:
    """Losses before their factors, the sum of squares of Y and, given cotangents, dW and dX.

    The gradients have the dtype of sums; without cotangents they are None.
    """
    acc = check.accumulator(W, X)

    def body(dW, tokens):
        x, label, factor, cotangent = tokens
        Y = check.product(x, W, acc)
        losses, pull = jax.vjp(lambda Y: _token_losses(Y, label, factor, rule), Y)
        y = energy(Y, acc)  # Y = 0 where X was zeroed: only kept tokens count
        if cotangent is None:
            return None, (losses, y, None)
        G = pull(vary_as(cotangent, losses))[0].astype(rule.dtype)
        return dW + check.product(G.T, x.T, acc), (losses, y, check.product(G, W.T, acc))

    dW = None if cotangents is None else vary_as(jnp.zeros_like(W, acc), W)
    dW, (losses, y, dX) = jax.lax.scan(body, dW, (X, labels, factors, cotangents))
    return losses, jnp.sum(y), dW, dX


def _value(
    rule: _Rule, W: Array, X: Array, labels: Array, factors: Array
) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """The losses times their factors, or the sum of these, and the sum of squares of Y."""
    losses, y, _, _ = _by_chunks(rule, W, X, labels, factors)
    losses = losses * factors
    return (jnp.sum(losses) if rule.reduces else losses), y


def _forward(rule: _Rule, W: Array, X: Array, labels: Array, factors: Array):
    if not rule.reduces:
        return _value(rule, W, X, labels, factors), (W, X, labels, factors)
    # Cotangents of order 1: small ones, 1/tokens say, would underflow fp16 in the products.
    losses, y, dW, dX = _by_chunks(rule, W, X, labels, factors, factors)
    return (jnp.sum(losses * factors), y), (losses, dW, dX)


def _backward(rule: _Rule, residuals: Sequence[Array], cotangents: tuple[Array, Array]):
    g, _ = cotangents  # y is a statistic
    if rule.reduces:
        dfactors, dW, dX = (g * a for a in residuals)
    else:
        W, X, labels, factors = residuals
        losses, _, dW, dX = _by_chunks(rule, W, X, labels, factors, g * factors)
        dfactors = g * losses
    return dW.astype(rule.dtype), dX.astype(rule.dtype), None, dfactors


_losses = jax.custom_vjp(_value, nondiff_argnums=(0,))
_losses.defvjp(_forward, _backward)
