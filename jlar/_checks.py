"""The contract of (W, X, Y, mask), checked at trace time; errors say what to write instead."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from . import _mesh as mesh

NATIVE = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)


def accumulator(*arrays: Array) -> jnp.dtype:
    """The dtype sums are held in: float64 if any operand is float64, else float32."""
    wide = any(a.dtype == jnp.float64 for a in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def real_array(a: ArrayLike, name: str) -> Array:
    """`a` as an array of real numbers."""
    a = jnp.asarray(a)
    if jnp.iscomplexobj(a):
        raise ValueError(
            f"{name} must be real; got dtype {a.dtype}. The ratio is defined for real matrices: "
            f"stack {name}.real and {name}.imag if that is what you mean."
        )
    return a


def operands(
    W: ArrayLike,
    X: ArrayLike,
    mask: ArrayLike | None,
    split: mesh.Split,
) -> tuple[Array, Array, Bool[Array, "..."] | None, mesh.Split]:
    """W, X with its masked tokens zero, the boolean mask and what splits them; or ValueError."""
    W = check_weights(W, mesh.size(split.n))
    m, n = W.shape[0], W.shape[1] * mesh.size(split.n)
    if jnp.shape(X)[-1:] == (n,):
        split = split._replace(columns=())  # X comes whole although W does not
    X, keep = check_inputs(X, n // mesh.size(split.columns), m, mask)
    mesh.check_varies(W, "W", split.m + split.n)
    mesh.check_varies(X, "X", split.t + split.columns)
    return W, X, keep, split


def check_weights(W: ArrayLike, parts: int = 1) -> Array:
    """W as a (m, n) array with n >= 2 in all its parts, or ValueError."""
    W = real_array(W, "W")
    if W.ndim != 2:
        raise ValueError(
            f"W must have shape (m, n), outputs x inputs; got shape {W.shape}. For a stack of "
            "weights use jax.vmap; reshape a kernel with several input or output axes to two."
        )
    m, n = W.shape
    if m == 0:
        raise ValueError(f"W must have at least one row; got shape {W.shape}.")
    check_width(n * parts, "W")
    return W


def check_width(n: int, name: str) -> None:
    """n is the base of the logarithm, so it must be at least 2."""
    if n < 2:
        raise ValueError(
            f"the input width n is the base of the logarithm and must be at least 2; got n = {n} "
            f"from {name}. A layer with one input has no alignment to measure: leave it out."
        )


def check_inputs(
    X: ArrayLike, n: int, m: int, mask: ArrayLike | None
) -> tuple[Array, Bool[Array, "..."] | None]:
    """X as a (..., n) array with its masked tokens zero, and the boolean mask; or ValueError."""
    X = real_array(X, "X")
    if X.ndim == 0 or X.shape[-1] != n:
        hint = (
            " W is outputs x inputs: a Flax kernel (inputs x outputs) is passed as kernel.T."
            if X.ndim and X.shape[-1] == m
            else ""
        )
        raise ValueError(
            f"X must have shape (..., {n}), tokens first, to match W of shape ({m}, {n}); "
            f"got shape {X.shape}.{hint}"
        )
    keep = None if mask is None else check_mask(mask, X.shape[:-1])
    return zero_masked(X, keep), keep


def check_outputs(Y: ArrayLike, X: Array, m: int, keep: Array | None) -> Array:
    """Y as the (..., m) array of W's own products with its masked tokens zero, or ValueError."""
    Y = real_array(Y, "Y")
    if Y.shape != (*X.shape[:-1], m):
        raise ValueError(
            f"Y must be X @ W.T, of shape {(*X.shape[:-1], m)}, before bias and soft-cap; "
            f"got shape {Y.shape}."
        )
    return zero_masked(Y, keep)


def check_mask(mask: ArrayLike, tokens: tuple[int, ...]) -> Bool[Array, "..."]:
    """The mask as a boolean array over the token axes, or ValueError."""
    mask = jnp.asarray(mask)
    if mask.shape != tokens:
        raise ValueError(
            f"mask must have one entry per token, shape {tokens}; got shape {mask.shape}. "
            "Write 1 (or True) for tokens to keep; use jnp.broadcast_to for a mask shared by axes."
        )
    return mask != jnp.zeros((), mask.dtype)


def zero_masked(X: Array, keep: Array | None) -> Array:
    """X with the tokens that are not kept set to zero; tokens lead, any number of axes follow."""
    if keep is None:
        return X
    # where, not multiplication: a padded token may hold nan, and 0 * nan is nan.
    keep = keep[(..., *(None,) * (X.ndim - keep.ndim))]
    return jnp.where(keep, X, jnp.zeros((), X.dtype))


def native(A: Array, acc: jnp.dtype) -> Array:
    """`A` in its own dtype where hardware multiplies it, else in `acc`."""
    return A if A.dtype in NATIVE else A.astype(acc)


def product(X: Array, W: Array, acc: jnp.dtype) -> Array:
    """X W^T accumulated in `acc`, from operands in their own dtype where hardware multiplies it."""
    if X.dtype != W.dtype or X.dtype not in NATIVE:
        X, W = X.astype(acc), W.astype(acc)
    return jnp.matmul(X, W.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=acc)


def finite_part(A: Float[Array, "*stack m n"]) -> tuple[Array, Float[Array, "*stack"]]:
    """(A, 0), or (zeros, nan) where A has a non-finite entry: what a decomposition may be given.

    LAPACK's SVD of a matrix with an inf in it may never return. Add the second to the result.
    """
    finite = jnp.all(jnp.isfinite(A), axis=(-2, -1))
    return jnp.where(finite[..., None, None], A, 0), jnp.where(finite, 0, jnp.nan).astype(A.dtype)
