"""Energies: the sums of squares of W, X and Y = X W^T, enough for LAR and its dimension k."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from . import _checks as check
from . import _mesh as mesh
from ._lar import effective_dimension, log_ratio
from ._pool import Pool, counts


class Energies(Pool):
    r"""Sums of squares of one weight matrix at work, and token counts.

    $\|XW^T\|^2$ and $\|X\|^2$ add over tokens, so micro-batches, shards and hosts pool exactly: the
    energies of two batches of the same W, added, are those of the concatenated batch. (The mean of
    their LARs is another number: the logarithm is not linear.) `sum(list)` and `.sum(axis)` pool
    lists and stacks; what vmap or scan stacked has its leading axes on every field and property.

    Example:
        >>> import jax, jlar
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> halves = jlar.energies(W, X[:32]) + jlar.energies(W, X[32:])
        >>> print(f"{halves.lar:.4f} {jlar.lar(W, X):.4f} {halves.count}")
        0.5024 0.5024 64
    """

    sums: Float[Array, "*stack 8"]
    """What `y`, `x`, `w`, `calls`, `count` and `keep_rate` are read from: one array, so that one
    matrix is one output of a program."""
    n: int = eqx.field(static=True)
    """Input width, the base of the logarithm."""

    @classmethod
    def zeros(cls, n: int, stack: tuple[int, ...] = (), dtype=jnp.float32) -> "Energies":
        """No tokens of a width-n layer: what a scan starts to accumulate from."""
        check.check_width(n, "the argument n")
        return cls(jnp.zeros((*stack, 8), dtype), n)

    @classmethod
    def of(
        cls,
        squares: Sequence[Float[Array, "*stack"]],
        counts: Float[Array, "*stack_or_none 5"],
        n: int,
    ) -> "Energies":
        """From the squares of Y, X and W, and what `Pool.limbs` returns, of each or the same."""
        like = jnp.zeros_like(squares[0])  # sharded as the stack is, where types say so
        return cls(jnp.stack([*squares, *(like + c for c in jnp.moveaxis(counts, -1, 0))], -1), n)

    def limbs(self) -> Float[Array, "*stack 5"]:
        """Calls, then kept and all tokens as limbs."""
        return jnp.asarray(self.sums)[..., 3:]

    def _with(self, counts: Float[Array, "*stack 5"]) -> "Energies":
        return Energies(jnp.concatenate([self.sums[..., :3], counts], -1), self.n)

    @property
    def y(self) -> Float[Array, "*stack"]:
        """Sum of squares of Y = X W^T over the kept tokens."""
        return jnp.asarray(self.sums)[..., 0]

    @property
    def x(self) -> Float[Array, "*stack"]:
        """Sum of squares of X over the kept tokens."""
        return jnp.asarray(self.sums)[..., 1]

    @property
    def w(self) -> Float[Array, "*stack"]:
        """Sum of squares of W, once per call; w / calls is that of W."""
        return jnp.asarray(self.sums)[..., 2]

    @property
    def lar(self) -> Float[Array, "*stack"]:
        """Log-alignment ratio of all that was pooled; nan if W, X or mask is zero or not finite."""
        overlap = jnp.log(self.y) - jnp.log(self.x) - jnp.log(self.w / self.calls)
        # An infinite x or w alone (overflow, or inf in the data) would read as -inf, a valid LAR.
        finite = jnp.isfinite(self.y) & jnp.isfinite(self.x) & jnp.isfinite(self.w)
        return log_ratio(jnp.where(finite, overlap, jnp.nan), self.n)

    @property
    def effective_dimension(self) -> Float[Array, "*stack"]:
        """$k = n^{2(1-LAR)}$, see `jlar.effective_dimension`."""
        return effective_dimension(self.lar, self.n)


def measure(
    W: ArrayLike, X: ArrayLike, Y: ArrayLike | None, mask: ArrayLike | None, split: mesh.Split
) -> Energies:
    """The differentiable sums behind `lar` and `energies`, of one device's parts of W, X and Y."""
    W, X, keep, split = check.operands(W, X, mask, split)
    acc = check.accumulator(W, X)
    if Y is not None:
        y = energy(check.check_outputs(Y, X, W.shape[0] * mesh.size(split.gathered), keep), acc)
    elif parts := split.n + split.columns + split.gathered:
        raise ValueError(
            f"Y must be given where the axes {parts} split W or X so that no device can compute "
            "its part of X W^T: pass the layer's own Y, summed over the axes of the inputs, or "
            "take jlar.grams(...).energies, which needs none."
        )
    else:
        y = mesh.unsharded(lambda W, X: energy(check.product(X, W, acc), acc))(W, X)
    return sums(W, X, y, keep, X.shape[:-1], W.shape[1] * mesh.size(split.n), split)


def energy(a: Array, acc: jnp.dtype) -> Float[Array, ""]:
    """Sum of squares."""
    return jnp.sum(jnp.square(a.astype(acc)))


def sums(
    W: Array,
    X: Array,
    y: Float[Array, ""],
    keep: Array | None,
    tokens: tuple[int, ...],
    n: int,
    split: mesh.Split,
) -> Energies:
    """Sums over all devices, of W and X in any layout with masked tokens zero, and of their y."""
    acc = check.accumulator(W, X, y)
    squares = (
        mesh.total(y.astype(acc), split.t + split.outputs, split),
        mesh.total(energy(X, acc), split.t + split.columns, split),
        mesh.total(energy(W, acc), split.m + split.n, split),
    )
    return Energies.of(squares, counts(keep, tokens, acc, split), n)


def energies(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t inputs"],
    *,
    Y: Float[ArrayLike, "*t outputs"] | None = None,
    mask: Shaped[ArrayLike, "*t"] | None = None,
    axes: mesh.Axes | mesh.Split | None = None,
) -> Energies:
    """Sums of squares of W, X and Y = X W^T, from which LAR follows and which pool over batches.

    Free when Y is at hand, as the logits are in a loss: two reductions that fuse with it. Without
    Y the product is computed, O(t m n); `jlar.grams` gives the same LAR without any product of X
    and W, cheaper when tokens and outputs both outnumber n. Gradients stop here; differentiate
    `jlar.lar`. Source: equation (1) of arXiv 2605.28975, pooled before the logarithm.

    Args:
        W: weights (m, n), outputs x inputs, as `equinox.nn.Linear` stores them (a Flax kernel is
            `kernel.T`). A scalar factor on W cancels.
        X: inputs (..., n), any number of leading token axes; bf16 and smaller sum in float32.
        Y: X W^T (..., m), if already computed: before bias, soft-cap and temperature.
        mask: (...,) of 0/1 or bool, one per token; tokens with 0 do not count, even if nan.
        axes: inside `jax.shard_map`, the mesh axes that split tokens, outputs and inputs, such as
            `{"t": "data", "m": "model"}`; the result is that of the whole arrays, on every device,
            by sums of a few scalars. Along a named axis that does not split an array, its values
            have to be the same on every device. Where an axis splits "n", or both "m" and "t"
            (FSDP), Y has to be given: one device could not compute it.

    Returns:
        `Energies`, scalar fields, float32 (float64 if an input is). Entries of W, X and Y between
        about 1e-18 and 1e18 square within float32; a sum that overflows gives a LAR of nan.

    Raises:
        ValueError: at trace time, for wrong ranks or widths, n = 1, complex or misshapen arguments.

    Example:
        >>> import jax, jlar
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> def loss(W, X):
        ...     logits = X @ W.T
        ...     return (logits**2).mean(), jlar.energies(W, X, Y=logits)
        >>> (value, e), grad = jax.value_and_grad(loss, has_aux=True)(W, X)
        >>> print(f"{e.lar:.4f} {e.effective_dimension:.1f} {e.keep_rate}")
        0.5024 62.7 1.0
    """
    return jax.lax.stop_gradient(measure(W, X, Y, mask, mesh.split(axes)))


def lar(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t inputs"],
    *,
    Y: Float[ArrayLike, "*t outputs"] | None = None,
    mask: Shaped[ArrayLike, "*t"] | None = None,
    axes: mesh.Axes | mesh.Split | None = None,
) -> Float[Array, ""]:
    r"""Log-alignment ratio of a weight matrix W and the inputs X it multiplies.

    $LAR = \log_n ( \|XW^T\|_{RMS} / (\|W\|_{RMS} \|X\|_{RMS}) )$, RMS norms over all entries
    of the pooled batch: 1 if W has rank one and every input lies along it; 1/2 if the inputs ignore
    the structure of W, as at initialisation; -inf if all inputs lie in the null space of W.
    Trained layers are seen between 0.3 and 0.8. Equation (1) of arXiv 2605.28975.

    Cost: that of `jlar.energies`, O(t (m + n) + m n) given Y. Differentiable in W, X and Y to any
    order, except at W = 0 or X = 0. To pool batches, add their `jlar.energies`: never average LARs.

    Args:
        W: weights (m, n), outputs x inputs, as `equinox.nn.Linear` stores them (a Flax kernel is
            `kernel.T`). A scalar factor on W cancels.
        X: inputs (..., n), any number of leading token axes.
        Y: X W^T (..., m), if already computed: before bias, soft-cap and temperature.
        mask: (...,) of 0/1 or bool, one per token; tokens with 0 do not count, even if nan.
        axes: inside `jax.shard_map`, the mesh axes that split each dimension, as in
            `jlar.energies`.

    Returns:
        A scalar in [-inf, 1], float32 (float64 if an input is); nan if W or the kept X is zero or
        anything kept is not finite.

    Raises:
        ValueError: at trace time, for wrong ranks or widths, n = 1, complex or misshapen arguments.

    Example:
        >>> import jax, jlar
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> print(f"{jax.jit(jlar.lar)(W, X):.3f}")  # independent: about a half
        0.502
        >>> print(f"{jlar.lar(W, W):.3f}")  # inputs along the rows of W
        0.583
    """
    return measure(W, X, Y, mask, mesh.split(axes)).lar
