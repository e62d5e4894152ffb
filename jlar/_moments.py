"""Moments of p and q from the Grams: most of what the spectra tell, mostly without an eigh."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from . import _mesh as mesh
from ._spectra import Grams, Spectra, grams


class Moments(eqx.Module):
    r"""Second moments of the weight spectrum p and the activation spectrum q.

    With $A = W^T W / \mathrm{tr}(W^T W)$ and $B = X^T X / \mathrm{tr}(X^T X)$, Frobenius products
    of n x n matrices give, in O(n^2) and without any eigendecomposition,

    * `pp` $= \sum p_i^2 = \langle A, A \rangle$, and `sigma_p` from it,
    * `pq` $= \sum p_i q_i = \langle A, B \rangle$, and `lar` from it.

    q is the diagonal of B in the basis of W's singular directions, so its spread needs that basis:
    `qq` $= \sum q_i^2$, `sigma_q` and `corr` cost one `eigh`, O(n^3). All are computed when they
    are read; under jit, what is not read costs nothing, and what several need is done once.
    `qq_bound` $= \langle B, B \rangle \ge \sum q_i^2$, equal where A and B commute, needs none.
    """

    grams: Grams
    """The Grams they are moments of."""

    @property
    def pp(self) -> Float[Array, "*stack"]:
        """Sum of p^2, from 1/n (uniform) to 1 (rank one). No eigh."""
        return _overlap(_excess(self.grams.w), _excess(self.grams.w)) + self._uniform

    @property
    def pq(self) -> Float[Array, "*stack"]:
        """Sum of p q, in [0, 1]; 1/pq is the effective dimension k. No eigh."""
        return _overlap(_excess(self.grams.w), _excess(self.grams.x)) + self._uniform

    @property
    def qq_bound(self) -> Float[Array, "*stack"]:
        """Sum of the squared eigenvalues of X^T X, normalised: at least `qq`. No eigh."""
        return _overlap(_excess(self.grams.x), _excess(self.grams.x)) + self._uniform

    @property
    def lar(self) -> Float[Array, "*stack"]:
        """Log-alignment ratio. No eigh."""
        return self.grams.lar

    @property
    def sigma_p(self) -> Float[Array, "*stack"]:
        """Population standard deviation of p. No eigh."""
        excess = _excess(self.grams.w)
        return jnp.sqrt(_overlap(excess, excess) * self._uniform)

    @property
    def qq(self) -> Float[Array, "*stack"]:
        """Sum of q^2, from 1/n to 1. One eigh."""
        return jnp.sum(jnp.square(self._spectra.q), axis=-1)

    @property
    def sigma_q(self) -> Float[Array, "*stack"]:
        """Population standard deviation of q. One eigh."""
        return self._spectra.sigma_q

    @property
    def corr(self) -> Float[Array, "*stack"]:
        """Pearson correlation of p and q. One eigh."""
        return self._spectra.corr

    @property
    def _spectra(self) -> Spectra:
        return self.grams.spectra()

    @property
    def _uniform(self) -> Float[Array, ""]:
        return jnp.asarray(1 / self.grams.x.shape[-1], self.grams.x.dtype)


def _excess(gram: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    """The Gram of trace one, less that of a uniform spectrum: small differences stay exact."""
    n = gram.shape[-1]
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    return gram / trace - jnp.eye(n, dtype=gram.dtype) / n


def _overlap(
    A: Float[Array, "*stack n n"], B: Float[Array, "*stack n n"]
) -> Float[Array, "*stack"]:
    return jnp.sum(A * B, axis=(-2, -1))


def moments(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t n"],
    *,
    mask: Shaped[ArrayLike, "*t"] | None = None,
    axes: mesh.Axes | None = None,
) -> Moments:
    """Sums of p^2, p q and q^2 with LAR, corr and both spreads, as few as are read.

    For widths where an `eigh` per step is too much (n = 4,096), on any mesh. O((m + t) n^2), and
    O(n^3) only for what `Moments` says needs it. Gradients stop here. Equations (3) to (5) of
    arXiv 2605.28975.

    Args:
        W: weights (m, n), outputs x inputs.
        X: inputs (..., n), any number of leading token axes.
        mask: (...,) of 0/1 or bool, one per token; tokens with 0 do not count, even if nan.
        axes: inside `jax.shard_map`, the mesh axes that split each dimension, as in `jlar.grams`.

    Returns:
        `Moments`, float32 (float64 if an input is); nan where W or the kept X is zero or not
        finite.

    Raises:
        ValueError: at trace time, for wrong ranks or widths, n = 1, complex or misshapen arguments.

    Example:
        >>> import jax, jlar
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> m = jlar.moments(W, X)
        >>> print(f"{m.pp:.4f} {m.pq:.4f} {m.lar:.4f}; with an eigh {m.qq:.4f} {m.corr:.2f}")
        0.0312 0.0159 0.5024; with an eigh 0.0159 0.15
    """
    return Moments(grams(W, X, mask=mask, axes=axes))
