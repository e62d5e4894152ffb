"""The formula: overlap of two spectra <-> log-alignment ratio <-> effective dimension."""

import math

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ._checks import accumulator, check_width, real_array


def log_ratio(log_overlap: Float[Array, "*stack"], n: int) -> Float[Array, "*stack"]:
    """LAR = 1 + 1/2 log_n(overlap), equation (3), from the natural logarithm of the overlap."""
    return 1 + (0.5 / math.log(n)) * log_overlap


def effective_dimension(lar: Float[ArrayLike, "*stack"], n: int) -> Float[Array, "*stack"]:
    r"""The number of directions a layer of this alignment uses.

    $k = n^{2(1-LAR)} = 1/\sum_i p_i q_i$, equation (6) of Shehper and Vaswani, arXiv 2605.28975.

    If p is uniform on k directions that hold all of q, this returns exactly k: LAR = 1 gives 1,
    LAR = 1/2 (no alignment) gives n, and anything below 1/2 gives more than n. Unlike LAR it
    compares across widths.

    Args:
        lar: log-alignment ratios, any shape.
        n: input width of the layer, the base of the logarithm; at least 2.

    Returns:
        k, same shape as `lar`, at least float32, in [1, inf]; nan where `lar` is nan.

    Raises:
        ValueError: n < 2.

    Example:
        >>> import jlar
        >>> print(f"{jlar.effective_dimension(0.75, n=256):.2f}")
        16.00
    """
    check_width(n, "the argument n")
    lar = real_array(lar, "lar")
    lar = lar.astype(accumulator(lar))
    return jnp.exp(2 * (1 - lar) * math.log(n))
