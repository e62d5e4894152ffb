"""Energies: the sums of squares of W, X and Y = X W^T, enough for LAR and its dimension k."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from . import _checks as check
from ._checks import Inputs, Mask, Outputs, Weights
from ._mesh import Axes, Split, on_auto_axes, size, total
from ._pool import Pool, counts


def log_ratio(log_overlap: Float[Array, "*stack"], n: int) -> Float[Array, "*stack"]:
    """LAR = 1 + 1/2 log_n(overlap), equation (3), from the natural logarithm of the overlap."""
    return 1 + (0.5 / math.log(n)) * log_overlap


def effective_dimension(lar: Float[ArrayLike, "*stack"], n: int) -> Float[Array, "*stack"]:
    r"""The number of directions a layer of this alignment uses.

    $k = n^{2(1-LAR)} = 1/\sum_i p_i q_i$, equation (6) of Shehper and Vaswani, arXiv 2605.28975,
    for LARs of any shape and the input width n >= 2. If p is uniform on k directions that hold all
    of q, this returns exactly k: LAR = 1 gives 1, LAR = 1/2 (no alignment) gives n, and less gives
    more than n. Unlike LAR it compares across widths.

    Returns:
        k, of the shape of `lar`, at least float32, in [1, inf]; nan where `lar` is nan.

    Example:
        >>> import jlar
        >>> print(f"{jlar.effective_dimension(0.75, n=256):.2f}")
        16.00
    """
    check.check_width(n, "the argument n")
    lar = check.real_array(lar, "lar")
    return jnp.exp(2 * (1 - lar.astype(check.accumulator(lar))) * math.log(n))


class Energies(Pool):
    r"""Sums of squares of one weight matrix at work, and token counts.

    $\|XW^T\|^2$ and $\|X\|^2$ add over tokens, so micro-batches, shards and hosts pool exactly,
    also after a million calls: `a + b`, `sum(list)` and, of what vmap or scan stacked, `.sum(axis)`
    are the energies of all the tokens together. (The mean of their LARs is another number: the
    logarithm is not linear.) A scan may carry them from `zeros`. Over the devices of a shard_map
    use `axes=`, or `jax.lax.all_gather(e, "data").sum()`.

    Example:
        >>> import jax, jlar
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> halves = jlar.energies(W, X[:32]) + jlar.energies(W, X[32:])
        >>> print(f"{halves.lar:.4f} {jlar.lar(W, X):.4f} {halves.count}")
        0.5024 0.5024 64
    """

    sums: Float[Array, "*stack 6 2"]
    """What the properties are read from, as two floats each: y, x, w, calls, kept and all tokens.
    One array, so that one matrix is one output of a program."""
    n: int = eqx.field(static=True)
    """Input width, the base of the logarithm."""

    @classmethod
    def zeros(cls, n: int, stack: tuple[int, ...] = (), dtype=jnp.float32) -> "Energies":
        """No tokens of a width-n layer: what a scan starts to accumulate from."""
        check.check_width(n, "the argument n")
        return cls(jnp.zeros((*stack, 6, 2), dtype), n)

    @classmethod
    def of(
        cls, squares: Sequence[Float[Array, "*stack"]], counts: Float[Array, "..."], n: int
    ) -> "Energies":
        """From the sums of squares of Y, X, W, and counts: (*stack, 3, 2), or (3, 2) for all."""
        # A number is held as two floats, of which the second is what rounding took from the first.
        high = jnp.stack([*squares], axis=-1)
        low = jnp.zeros_like(high)
        pairs = jnp.stack([high, low], axis=-1)
        counts = jnp.expand_dims(counts, range(pairs.ndim - counts.ndim))
        # Added to zeros and not broadcast, to be sharded as the stack is.
        return cls(jnp.concatenate([pairs, jnp.zeros_like(pairs) + counts], axis=-2), n)

    @property
    def y(self) -> Float[Array, "*stack"]:
        """Sum of squares of Y = X W^T over the kept tokens."""
        return self._number(0)

    @property
    def x(self) -> Float[Array, "*stack"]:
        """Sum of squares of X over the kept tokens."""
        return self._number(1)

    @property
    def w(self) -> Float[Array, "*stack"]:
        """Sum of squares of W, added again with every call pooled; w / calls is that of one W."""
        return self._number(2)

    @property
    def lar(self) -> Float[Array, "*stack"]:
        """Log-alignment ratio of all that was pooled, differentiable, in [-inf, 1].

        nan if W, X or mask is zero or not finite, or Y is float16 with a root mean square below
        2e-6. -inf if the sum of squares of Y is 0 and the product of the other two above 1e-9: then
        the overlap is below 1e-16. Else nan if one of the three sums is not between 1e-18 and 3e38
        (float32), where squares may have been flushed to zero or the sum was infinite (`jlar.lar`
        takes any size).
        """
        y, x, w = self.y, self.x, self.w / self.calls
        overlap = jnp.log(y) - jnp.log(x) - jnp.log(w)
        # If all squares of Y were flushed to zero, their sum is below 2^-86 (float32), which is
        # next to nothing where x * w is above 2^-30.
        zero = (y == 0) & (x * w > least_sum(y.dtype) ** 0.5)
        reliable = is_reliable(x) & is_reliable(w) & (is_reliable(y) | zero)
        # A factor, and not one of two values, so that the gradient is nan too.
        return log_ratio(overlap * jnp.where(reliable, 1, jnp.nan), self.n)

    @property
    def effective_dimension(self) -> Float[Array, "*stack"]:
        """$k = n^{2(1-LAR)}$, see `jlar.effective_dimension`."""
        return effective_dimension(self.lar, self.n)


def energy(a: Array, acc: jnp.dtype) -> Float[Array, ""]:
    """Sum of squares."""
    return jnp.sum(jnp.square(a.astype(acc)))


def least_sum(dtype: jnp.dtype) -> float:
    """The sum of squares below which what was flushed to zero may count: 2^-60 in float32.

    Up to 2^40 squares may have been flushed, each below 2^-126: together they are below 2^-86, a
    rounding error of a larger sum.
    """
    return float(jnp.finfo(dtype).tiny) * 2.0**66


def is_reliable(square: Float[Array, "*stack"]) -> Bool[Array, "*stack"]:
    """Whether a sum of squares is neither so small nor so large that it may be wrong."""
    return (square > least_sum(square.dtype)) & jnp.isfinite(square)


def unless_rounded(
    y: Float[Array, "*stack"], dtype: jnp.dtype, entries: ArrayLike, exponent: ArrayLike = 0
) -> Float[Array, "*stack"]:
    """y, the sum of squares of so many entries over 2^exponent, or nan where float16 is too coarse.

    Its steps are 2^-24 or more: nan for a root mean square below 2^-19. Zeros may be those of
    masked tokens or of rows of zeros on this device, but they may also be rounded: their sum is one
    that is too small to be reliable by itself, and nothing beside one that is not.
    """
    if dtype != jnp.float16:
        return y
    least = jnp.ldexp(jnp.ones((), y.dtype), -38 - 2 * jnp.asarray(exponent)) * entries
    return jnp.where(y == 0, 2.0**-80, jnp.where(y < least, jnp.nan, y))


def _entries(Y: Array, keep: Array | None) -> ArrayLike:
    """How many entries of Y are those of kept tokens."""
    return Y.size if keep is None else jnp.sum(keep, dtype=jnp.float32) * Y.shape[-1]


def sums(W: Array, X: Array, y: Float[Array, ""], keep: Array | None, split: Split) -> Energies:
    """Sums over all devices, of W and X in any layout with masked tokens zero, and of their y."""
    acc = check.accumulator(W, X, y)
    squares = (
        total(y.astype(acc), split.t + split.outputs, split),
        total(energy(X, acc), split.t + split.columns, split),
        total(energy(W, acc), split.m + split.n, split),
    )
    of_tokens = counts(keep, math.prod(X.shape[:-1]), acc, split)
    return Energies.of(squares, of_tokens, W.shape[1] * size(split.n))


def _of_output(
    reduce: Callable[[Array], Any], W: Array, X: Array, Y: ArrayLike | None, keep: Any, split: Split
) -> Any:
    """What `reduce` makes of the Y given, with its masked tokens zero, or of the product."""
    if Y is not None:
        Y, shape = check.real_array(Y, "Y"), (*X.shape[:-1], W.shape[0] * size(split.gathered))
        check.need(
            Y.shape == shape,
            f"Y must be X @ W.T, of shape {shape}, before bias and soft-cap; got shape {Y.shape}.",
        )
        return reduce(check.zero_masked(Y, keep))
    check.need(
        not (unknown := split.n + split.columns + split.gathered),
        f"Y must be given where the axes {unknown} split W or X so that no device can compute "
        "its part of X W^T: pass the layer's own Y, summed over the axes of the inputs, or "
        "take jlar.grams(...).energies, which needs none.",
    )
    acc = check.accumulator(W, X)
    return on_auto_axes(lambda W, X: reduce(check.product(X, W, acc)))(W, X)


def energies(
    W: Weights,
    X: Inputs,
    *,
    Y: Outputs | None = None,
    mask: Mask | None = None,
    axes: Axes | Split | None = None,
) -> Energies:
    """Sums of squares of W, X and Y = X W^T, from which LAR follows and which pool over batches.

    Cheap when Y is at hand, as the logits are in a loss: three reductions that fuse with it.
    Without Y the product is computed, O(t m n); `jlar.grams` does without it, and is cheaper when
    tokens and outputs both outnumber n. Differentiable, as `jlar.lar` is. Equation (1) of arXiv
    2605.28975, pooled before the logarithm.

    Returns:
        `Energies` without leading axes, float32 (float64 if an input is). A sum that float32 cannot
        hold, of entries beyond some 1e-9 to 1e18, gives a LAR of nan.

    Example:
        >>> import jax, jlar
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> e = jlar.energies(W, X, Y=X @ W.T)
        >>> print(f"{e.lar:.4f} {e.effective_dimension:.1f} {e.keep_rate}")
        0.5024 62.7 1.0
    """
    W, X, keep, split = check.operands(W, X, mask, axes)
    acc = check.accumulator(W, X)
    y = _of_output(lambda Y: energy(Y, acc), W, X, Y, keep, split)
    if Y is not None:
        Y = jnp.asarray(Y)
        y = unless_rounded(y, Y.dtype, _entries(Y, keep))
    return sums(W, X, y, keep, split)


def lar(
    W: Weights,
    X: Inputs,
    *,
    Y: Outputs | None = None,
    mask: Mask | None = None,
    axes: Axes | Split | None = None,
) -> Float[Array, ""]:
    r"""Log-alignment ratio of a weight matrix W and the inputs X it multiplies.

    $LAR = \log_n ( \|XW^T\|_{RMS} / (\|W\|_{RMS} \|X\|_{RMS}) )$, RMS norms over all entries
    of the pooled batch: 1 if W has rank one and every input lies along it; 1/2 if the inputs ignore
    the structure of W, as at initialisation; -inf if all inputs lie in the null space of W, or so
    nearly that the norm of XW^T is below some 1e-37 of the product of the others. Trained layers
    mostly lie between 0.3 and 0.8. Equation (1) of arXiv 2605.28975.

    The LAR of `jlar.energies`, but for W, X and Y of any size: each is read twice, for its largest
    entry and for its squares over that. O(t (m + n) + m n) given Y. Differentiable in W, X and Y to
    any order, except where one is 0. To pool batches add their energies: never average LARs.

    `lar(W - W0, X0)`, `lar(W0, X - X0)` and `lar(W - W0, X - X0)` are alpha, omega and u of Everett
    et al., arXiv 2407.05872: how a change of W and X since W0 and X0 lines up with either.

    Returns:
        A scalar in [-inf, 1], float32 (float64 if an input is); nan if W or the kept X is zero,
        anything kept is not finite, or what was flushed to zero may count: if the largest magnitude
        in W, in X or in a Y that is given and not zero is below 1e-30, the root mean square of a
        float16 Y below 2e-6, or Y is zero where W and X are small.

    Example:
        >>> import jax, jlar
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> print(f"independent {jlar.lar(W, X):.3f}, along the rows of W {jlar.lar(W, W):.3f}")
        independent 0.502, along the rows of W 0.583
    """
    W, X, keep, split = check.operands(W, X, mask, axes)
    acc = check.accumulator(W, X)
    (W, W_exponent), (X, X_exponent) = check.unit(W, acc, split), check.unit(X, acc, split)

    def square(product: Array) -> tuple[Array, Array]:
        scaled, exponent = check.unit(product, acc, split, given=Y is not None)
        return energy(scaled, acc), exponent

    y, exponent = _of_output(square, W, X, Y, keep, split)
    if Y is not None:  # else the product is that of the W and X that have been scaled
        Y = jnp.asarray(Y)
        y = unless_rounded(y, Y.dtype, _entries(Y, keep), exponent)
        exponent -= W_exponent + X_exponent
    unit = sums(W, X, y, keep, split)
    # Of small W and X a Y that is given as zeros may have been flushed.
    small = W_exponent + X_exponent < jnp.finfo(acc).minexp + 28
    flushed = small & (unit.y == 0) & (Y is not None)
    exponent = jnp.where(flushed, jnp.nan, exponent.astype(acc))
    return unit.lar + exponent * (math.log(2) / math.log(unit.n))
