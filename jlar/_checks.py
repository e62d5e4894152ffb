"""Checks of (W, X, Y, mask) at trace time, and the arithmetic that all functions share."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Shaped

from ._mesh import Axes, Split, as_split, check_varies, size, varying

# Inputs and outputs have names of their own, because inside shard_map the columns or rows of W may
# be split over devices where X and Y are whole.
Weights = Float[ArrayLike, "m n"]
Inputs = Float[ArrayLike, "*t inputs"]
Outputs = Float[ArrayLike, "*t outputs"]
Mask = Shaped[ArrayLike, "*t"]

MULTIPLIED = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)
"""The dtypes that hardware multiplies; others are converted first."""


def need(holds: bool, message: str) -> None:
    """ValueError with this message unless it holds."""
    if not holds:
        raise ValueError(message)


def real_array(a: ArrayLike, name: str) -> Array:
    """`a` as an array of real numbers."""
    if isinstance(a, (int, np.integer, np.ndarray)):
        a = np.asarray(a)
        if a.dtype.kind in "iu" and a.dtype != jax.dtypes.canonicalize_dtype(a.dtype):
            a = a.astype(float)  # JAX would wrap it to 32 bits without a word
    try:
        a = jnp.asarray(a)
    except TypeError:
        raise ValueError(f"{name} must be an array or a number; got {type(a).__name__}.") from None
    need(not jnp.iscomplexobj(a), f"{name} must be real; got {a.dtype}: stack .real and .imag.")
    return a


def check_width(n: int, name: str) -> None:
    """ValueError unless n may be the base of the logarithm."""
    need(
        n >= 2,
        f"the input width n, base of the logarithm, must be at least 2; got n = {n} from {name}.",
    )


def matrices(W: ArrayLike, X: ArrayLike) -> tuple[Array, Array]:
    """W and X as arrays of real numbers with the right number of axes, or ValueError."""
    W, X = real_array(W, "W"), real_array(X, "X")
    need(
        W.ndim == 2 and W.shape[0] > 0,
        "W must have shape (m, n), outputs x inputs, and at least one row; got shape "
        f"{W.shape}. For a stack use jax.vmap; reshape a kernel of more axes to two.",
    )
    need(X.ndim > 0, "X must have shape (..., n), tokens first; got a scalar.")
    return W, X


def operands(
    W: ArrayLike, X: ArrayLike, mask: ArrayLike | None, axes: Axes | Split | None
) -> tuple[Array, Array, Bool[Array, "..."] | None, Split]:
    """W, X with its masked tokens zero, the boolean mask and what splits them; or ValueError.

    The `columns` of what splits them are empty where X has all n columns.
    """
    (W, X), split = matrices(W, X), as_split(axes)
    m, n = W.shape[0], W.shape[1] * size(split.n)
    check_width(n, "W")
    if X.shape[-1] == n:
        split = split._replace(columns=())  # X comes whole although W does not
    columns = n // size(split.columns)
    need(
        X.shape[-1] == columns,
        f"X must have shape (..., {columns}), tokens first, to match W of shape ({m}, {columns}), "
        f"outputs x inputs (pass a Flax kernel as kernel.T); got shape {X.shape}.",
    )
    check_varies(W, "W", split.m + split.n)
    check_varies(X, "X", split.t + split.columns)
    keep = None if mask is None else per_token(mask, "mask", X.shape[:-1]).astype(bool)
    return W, zero_masked(X, keep), keep, split


def per_token(a: ArrayLike, name: str, tokens: tuple[int, ...]) -> Array:
    """`a` as an array of real numbers over the token axes, or ValueError."""
    a = real_array(a, name)
    need(
        a.shape == tokens,
        f"{name} must have one entry per token, shape {tokens}; got shape {a.shape}: use "
        "jnp.broadcast_to for what token axes share.",
    )
    return a


def zero_masked(X: Array, keep: Array | None) -> Array:
    """X with the tokens that are not kept set to zero; tokens lead, any number of axes follow."""
    if keep is None:
        return X
    # where, not multiplication: a padded token may hold nan, and 0 * nan is nan.
    return jnp.where(jnp.expand_dims(keep, range(keep.ndim, X.ndim)), X, 0)


def accumulator(*arrays: Array) -> jnp.dtype:
    """The dtype sums are held in: float64 if any operand is float64, else float32."""
    wide = any(a.dtype == jnp.float64 for a in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def multiplied(A: Array, acc: jnp.dtype) -> Array:
    """`A` in its own dtype where hardware multiplies it, else in `acc`."""
    return A if A.dtype in MULTIPLIED else A.astype(acc)


def product(X: Array, W: Array, acc: jnp.dtype) -> Array:
    """X W^T summed in `acc`; operands of one dtype that hardware multiplies are left in it."""
    if X.dtype != W.dtype or X.dtype not in MULTIPLIED:
        X, W = X.astype(acc), W.astype(acc)
    return jnp.matmul(X, W.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=acc)


def unit(
    A: Array, acc: jnp.dtype, split: Split, *, given: bool = True
) -> tuple[Array, Int[Array, ""]]:
    """A over a power of two, its largest entry between 1/2 and 1, and the exponent of that power.

    So no square overflows, and none that matters is flushed to zero; no mantissa changes. The
    largest entry is that of all devices. Of an array that was `given` it is nan if even that is so
    small, below some 1e-30, that others were flushed as they came.
    """
    # In float16 what is 2^-24 of the largest entry would be flushed.
    A = A.astype(acc) if A.dtype == jnp.float16 else multiplied(A, acc)
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(A)), initial=0).astype(acc)
    axes = tuple(dict.fromkeys(sum(split, ())))
    # JAX 0.12 refuses a pmax over axes along some of which it is known to be the same. With
    # check_vma=False nothing is known: then over all.
    axes = tuple(a for a in axes if a in varying(largest)) or axes
    _, exponent = jnp.frexp(jax.lax.pmax(largest, axes) if axes else largest)
    limit = jnp.finfo(A.dtype).maxexp - 2  # so that the factor is neither infinite nor flushed
    exponent = jnp.clip(exponent, -limit, limit)
    factor = jnp.ldexp(jnp.ones((), acc), -exponent).astype(A.dtype)
    if given:
        factor = jnp.where(exponent < jnp.finfo(A.dtype).nmant + 3 - limit, jnp.nan, factor)
    return A * factor, exponent


def finite_part(A: Float[Array, "*stack m n"]) -> tuple[Array, Float[Array, "*stack"]]:
    """(A, 0), or (zeros, nan) where A has a non-finite entry: what a decomposition may be given.

    LAPACK's SVD of a matrix with an inf in it may never return. Add the second to the result.
    """
    finite = jnp.all(jnp.isfinite(A), axis=(-2, -1))
    return jnp.where(finite[..., None, None], A, 0), jnp.where(finite, 0, jnp.nan).astype(A.dtype)
