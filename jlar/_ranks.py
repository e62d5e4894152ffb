"""The principal dimension of activations, which the effective dimension is compared with."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from . import _checks as check
from . import _mesh as mesh
from ._gram import gram


def principal_dimension(
    X: Float[ArrayLike, "*t n"],
    fraction: float = 0.95,
    *,
    mask: Shaped[ArrayLike, "*t"] | None = None,
) -> Float[Array, ""]:
    """The number of principal components that hold a fraction of the variance of X (k95).

    Centred PCA over the tokens, as the paper compares with $k = n^{2(1-LAR)}$ (section 4 of arXiv
    2605.28975). O(t n^2 + n^3), from the n x n covariance. Gradients stop here.

    Args:
        X: activations (..., n), any number of leading token axes, at least two tokens.
        fraction: share of the variance to hold, in (0, 1].
        mask: (...,) of 0/1 or bool, one per token; tokens with 0 do not count, even if nan.

    Returns:
        A whole number in [1, n] as a floating-point scalar, so that nan can say that X is not
        finite, constant, or all masked.

    Raises:
        ValueError: X is a scalar, the mask does not fit, or fraction is outside (0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> import jlar
        >>> X = jnp.array([[3.0, 0.0, 1.0], [-3.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, -1.0, 1.0]])
        >>> print(jlar.principal_dimension(X), jlar.principal_dimension(X, fraction=0.9))
        2.0 1.0
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is a share of the variance, in (0, 1]; got {fraction}.")
    X = check.real_array(X, "X")
    if X.ndim < 2:
        raise ValueError(f"X must have shape (..., n) with at least one token axis; got {X.shape}.")
    tokens = X.shape[:-1]
    keep = None if mask is None else check.check_mask(mask, tokens)
    X = check.zero_masked(jax.lax.stop_gradient(X.astype(check.accumulator(X))), keep)
    count = math.prod(tokens) if keep is None else jnp.sum(keep, dtype=jnp.int32)
    mean = jnp.sum(X, axis=tuple(range(X.ndim - 1))) / jnp.asarray(count, X.dtype)
    centred = check.zero_masked(X - mean, keep)
    covariance, poison = check.finite_part(gram(centred, X.dtype, mesh.Split()))
    variances = jnp.linalg.eigvalsh(covariance)[::-1]
    held = jnp.cumsum(jnp.maximum(variances, 0)) + poison
    # Compared at the last entry with itself, not with a separately rounded total.
    enough = jnp.argmax(held >= jnp.asarray(fraction, X.dtype) * held[-1]) + 1
    return jnp.where(held[-1] > 0, enough.astype(X.dtype), jnp.nan)
