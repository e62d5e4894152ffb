"""The map (W, X) -> (p, q, LAR), by SVD of W or from the Gram matrices, and PCA of X."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import _checks as check
from ._checks import Inputs, Mask, Weights
from ._energies import energy
from ._grams import gram, grams
from ._mesh import Axes, Split, on_auto_axes, total
from ._spectra import Spectra


def spectra(
    W: Weights,
    X: Inputs,
    *,
    mask: Mask | None = None,
    method: Literal["gram", "svd"] = "gram",
    axes: Axes | Split | None = None,
) -> Spectra:
    """The weight spectrum p and the activation spectrum q of inputs X on W's singular directions.

    Equation (2) of arXiv 2605.28975. Gradients stop here (the derivative of a basis of singular
    vectors does not exist where values coincide); differentiate `jlar.lar`.

    Args:
        method: "gram" is an `eigh` of W^T W, O((m + t) n^2 + n^3), far faster for tall W and made
            for meshes; p_i has an absolute error of order eps p_1. "svd" decomposes W, accurate
            over the whole spectrum, O(m n min(m, n)), and gathers a sharded W (`axes` may name no
            more than "t"): take it where the tail of p matters, as for the effective rank of a
            rank-deficient W.

    Returns:
        `Spectra` of p and q, (n,) each, float32 (float64 if an input is), non-negative, whatever
        the magnitude of W and X; p is nan if W is zero, q if the kept X is, both if W is not
        finite.

    Example:
        >>> import jax.numpy as jnp, jlar
        >>> W = jnp.array([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
        >>> s = jlar.spectra(W, jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> print(s.p, s.q)  # the third direction is W's null space
        [0.8 0.2 0. ] [0.5  0.25 0.25]
    """
    W, X, keep, split = check.operands(W, X, mask, axes)
    acc = check.accumulator(W, X)
    W, X = jax.lax.stop_gradient((W, X))
    (W, _), (X, _) = check.unit(W, acc, split), check.unit(X, acc, split)
    if method == "gram":
        return grams(W, X, mask=keep, axes=split).spectra()
    check.need(method == "svd", f'method must be "gram" or "svd"; got {method!r}.')
    check.need(
        not split.m + split.n,
        f'method "svd" needs W whole on each device, and axes split it over {split.m + split.n}; '
        'write method="gram".',
    )
    p, q, x = on_auto_axes(_by_svd)(W.astype(acc), X.astype(acc))
    q, x = (total(a, split.t, split) for a in (q, x))
    return Spectra(p=p, q=q / x)


def _by_svd(
    W: Float[Array, "m n"], X: Float[Array, "*t n"]
) -> tuple[Float[Array, "n"], Float[Array, "n"], Float[Array, ""]]:
    """p, and the sums of squares of X along each direction and in all; nan if W is not finite."""
    m, n = W.shape
    W, missing = check.finite_part(W)
    # full_matrices only where W is wide: there it completes v_1..v_m to a basis of R^n.
    _, s, Vt = jnp.linalg.svd(W, full_matrices=m < n)
    p = jnp.pad(jnp.square(s / s[0]), (0, n - s.shape[0]))
    q = jnp.sum(jnp.square(check.product(X, Vt, W.dtype)), axis=tuple(range(X.ndim - 1)))
    return p / jnp.sum(p) + missing, q + missing, energy(X, W.dtype)


class Alignment(NamedTuple):
    """Weight spectrum, activation spectrum, log-alignment ratio."""

    p: Float[Array, "n"]
    q: Float[Array, "n"]
    lar: Float[Array, ""]


def alignment(
    W: Weights,
    X: Inputs,
    *,
    mask: Mask | None = None,
    method: Literal["gram", "svd"] = "gram",
    axes: Axes | Split | None = None,
) -> Alignment:
    r"""The map (W, X) -> (p, q, LAR): `jlar.spectra` and the logarithm of their overlap.

    LAR is that of equation (3), $1 + \frac12 \log_n \sum_i p_i q_i$; `jlar.lar` has it alone at a
    fraction of the cost.

    Example:
        >>> import jax, jlar
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> p, q, lar = jax.jit(jlar.alignment)(W, X)
        >>> print(p.shape, q.shape, f"{lar:.4f}")
        (64,) (64,) 0.5024
    """
    s = spectra(W, X, mask=mask, method=method, axes=axes)
    return Alignment(s.p, s.q, s.lar)


def principal_dimension(
    X: Inputs, fraction: float = 0.95, *, mask: Mask | None = None
) -> Float[Array, ""]:
    """The number of principal components that hold a fraction of the variance of X (k95).

    Centred PCA over the tokens, as the paper compares with $k = n^{2(1-LAR)}$ (section 4 of arXiv
    2605.28975). O(t n^2 + n^3), from the n x n covariance. A whole number has no gradient.

    Args:
        fraction: share of the variance to hold, in (0, 1].

    Returns:
        A whole number in [1, n] as a floating-point scalar, so that nan can say that X is not
        finite, all masked, or constant: to 1e-13 of its largest entry (float32).

    Example:
        >>> import jax.numpy as jnp, jlar
        >>> X = jnp.array([[3.0, 0.0, 1.0], [-3.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, -1.0, 1.0]])
        >>> print(jlar.principal_dimension(X), jlar.principal_dimension(X, fraction=0.9))
        2.0 1.0
    """
    X = check.real_array(X, "X")
    check.need(0 < fraction <= 1, f"fraction is a share of the variance, in (0, 1]; got {fraction}")
    check.need(X.ndim >= 2, f"X must have shape (..., n), at least one token axis; got {X.shape}.")
    tokens, acc = X.shape[:-1], check.accumulator(X)
    mask = jnp.ones(tokens, bool) if mask is None else check.per_token(mask, "mask", tokens)
    keep = mask.astype(bool)
    X = check.zero_masked(jax.lax.stop_gradient(X.astype(acc)), keep)
    X, _ = check.unit(X, acc, Split())
    centred = X
    for _ in range(2):  # of the first mean a rounding error is left, which the second takes away
        mean = jnp.mean(centred, tuple(range(len(tokens))), keepdims=True, where=keep[..., None])
        centred = check.zero_masked(centred - mean, keep)
    covariance, missing = check.finite_part(gram(centred, acc, (), ()))
    variances = jnp.maximum(jnp.linalg.eigvalsh(covariance)[::-1], 0)
    variance = jnp.cumsum(variances) + missing
    # Compared at the last entry with itself, not with a separately rounded total.
    enough = jnp.argmax(variance >= jnp.asarray(fraction, acc) * variance[-1]) + 1
    # The largest entry is near 1: a constant X has deviations below the square of its rounding.
    entries = jnp.sum(keep) * X.shape[-1]
    rounding = entries.astype(acc) * (8 * float(jnp.finfo(acc).eps) ** 2) ** 2
    return jnp.where(variance[-1] > rounding, enough.astype(acc), jnp.nan)
