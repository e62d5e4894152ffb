"""Update alignment: how the change of a layer's weights and inputs lines up with either."""

from functools import partial
from typing import NamedTuple

from jaxtyping import Array, Float

from . import _checks as check
from ._checks import Inputs, Mask, Weights
from ._energies import lar
from ._mesh import Axes, Split


class UpdateAlignment(NamedTuple):
    """What `jlar.update_alignment` returns: the LARs of X0 dW^T, dX W0^T and dX dW^T."""

    alpha: Float[Array, ""]
    omega: Float[Array, ""]
    u: Float[Array, ""]


def update_alignment(
    W0: Weights,
    W: Weights,
    X0: Inputs,
    X: Inputs,
    *,
    mask: Mask | None = None,
    axes: Axes | Split | None = None,
) -> UpdateAlignment:
    r"""The log-alignment ratios of the three terms by which training changes a layer's output.

    With dW = W - W0 and dX = X - X0 the output is
    $XW^T = X_0 W_0^T + X_0\,dW^T + dX\,W_0^T + dX\,dW^T$; alpha, omega and u are `jlar.lar` of the
    second, third and fourth term, $\log_n (\|AB^T\|_{RMS} / (\|A\|_{RMS} \|B\|_{RMS}))$. Each is
    1/2 where the factors ignore each other and 1 where B has rank one and A lies along it.

    What the parameterisation literature calls full alignment is alpha = u = 1, omega = 1/2: an
    update may line up with any input, a random W0 hardly can. As LAR is at most
    $1 + \frac12 \log_n p_1$, and $p_1$ of independent entries tends to $(1 + \sqrt{n/m})^2 / n$,
    omega is at most $1/2 + \log_n(1 + \sqrt{n/m})$ at random initialisation.

    The terms are those of Everett et al., arXiv 2407.05872. Squares are summed over tokens before
    the logarithm; the scheduler m-wojnar/maxP averages the logarithm over tokens, which is equal
    only if all rows have the same ratio.

    Args: W0 and X0 at the reference step, usually initialisation; W and X now, of the same tokens
        in the same order; axes may name "t" and "m".

    Returns:
        `UpdateAlignment(alpha, omega, u)`, scalars in [-inf, 1], float32 (float64 if an input is),
        by three products, O(t m n). nan where a factor is zero (also where half precision rounds an
        update away), and where anything kept is not finite.

    Example:
        >>> import jax, jax.numpy as jnp, jlar
        >>> W0, X0 = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> X = X0 + 0.1
        >>> W = W0 + 0.01 * jnp.outer(jnp.ones(64), X0[0])  # a step of one token
        >>> print(" ".join(f"{a:.2f}" for a in jlar.update_alignment(W0, W, X0[:1], X[:1])))
        1.00 0.52 0.41
    """
    named = {"W0": W0, "W": W, "X0": X0, "X": X}
    W0, W, X0, X = (check.real_array(a, name) for name, a in named.items())
    for name, before, now in (("W", W0, W), ("X", X0, X)):
        check.need(
            before.shape == now.shape,
            f"{name}0 and {name} must have the same shape, before and after; got {before.shape} "
            f"and {now.shape}. Pass the same tokens and the same layer at both steps.",
        )
    acc = check.accumulator(W0, W, X0, X)
    W0, W, X0, X = (a.astype(acc) for a in (W0, W, X0, X))
    term = partial(lar, mask=mask, axes=axes)
    return UpdateAlignment(alpha=term(W - W0, X0), omega=term(W0, X - X0), u=term(W - W0, X - X0))
