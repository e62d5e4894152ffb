"""The class Spectra: what is read from p and q (`spectra`, which makes them, is in _alignment)."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from . import _checks as check
from ._energies import log_ratio


class TopOverlap(NamedTuple):
    """LAR = L + D: L of the leading directions alone, and D, at least 0, what the others add."""

    L: Float[Array, "*stack"]
    D: Float[Array, "*stack"]


class Spectra(eqx.Module):
    r"""Weight spectrum p and activation spectrum q over the right singular directions of W.

    $p_i = s_i^2 / \sum_j s_j^2$ (equation 2) and $q_i = \sum_x (v_i \cdot x)^2 / \sum_x \|x\|^2$,
    uncentred; both of length n, in descending order of p, p zero on the null space of W, each
    summing to 1. Where singular values coincide (the null space of a W with m < n, say) the basis,
    and with it how q is split among those directions, is arbitrary; no property below depends on it
    except `rank_corr` and, through the spread of q, `corr` and `sigma_q`.
    """

    p: Float[Array, "*stack n"]
    q: Float[Array, "*stack n"]

    @property
    def lar(self) -> Float[Array, "*stack"]:
        r"""$1 + \frac12 \log_n \sum_i p_i q_i$, equation (3)."""
        return log_ratio(jnp.log(jnp.sum(self.p * self.q, axis=-1)), self.p.shape[-1])

    @property
    def sigma_p(self) -> Float[Array, "*stack"]:
        """Population standard deviation of p, from 0 (uniform) to sqrt(n - 1)/n (rank one)."""
        return jnp.sqrt(jnp.mean(jnp.square(_centred(self.p)), axis=-1))

    @property
    def sigma_q(self) -> Float[Array, "*stack"]:
        """Population standard deviation of q, from 0 (isotropic) to sqrt(n - 1)/n."""
        return jnp.sqrt(jnp.mean(jnp.square(_centred(self.q)), axis=-1))

    @property
    def participation_p(self) -> Float[Array, "*stack"]:
        r"""Directions that p is spread over, $1 / \sum_i p_i^2$, from 1 to n; $2^{H_2(p)}$, B.4."""
        return 1 / jnp.sum(jnp.square(self.p), axis=-1)

    @property
    def participation_q(self) -> Float[Array, "*stack"]:
        r"""Directions that q is spread over, $1 / \sum_i q_i^2$, from 1 to n."""
        return 1 / jnp.sum(jnp.square(self.q), axis=-1)

    @property
    def stable_rank(self) -> Float[Array, "*stack"]:
        r"""$\|W\|_F^2 / \|W\|_2^2 = 1/p_1$, equation (10), from 1 to the rank of W."""
        return 1 / self.p[..., 0]

    @property
    def effective_rank(self) -> Float[Array, "*stack"]:
        """Exponential of the entropy of the singular values over their sum, equation (11).

        If W lacks rank take spectra by method="svd": by "gram" p has rounding errors, and their
        roots count here.
        """
        s = jnp.sqrt(self.p)
        s = s / jnp.sum(s, axis=-1, keepdims=True)
        s = jnp.where(s == 0, 1, s)  # 1 log 1 is 0, as 0 log 0 should be, and is finite
        return jnp.exp(-jnp.sum(s * jnp.log(s), axis=-1))

    @property
    def corr(self) -> Float[Array, "*stack"]:
        """Pearson correlation of p and q, in [-1, 1]; nan where either is constant."""
        return _pearson(self.p, self.q)

    @property
    def rank_corr(self) -> Float[Array, "*stack"]:
        """Spearman correlation of p and q (ties share their mean rank), in [-1, 1]."""
        ranks = [jax.scipy.stats.rankdata(a, axis=-1) for a in (self.p, self.q)]
        missing = jnp.isnan(jnp.sum(self.p + self.q, axis=-1))  # nan would be given a rank
        return jnp.where(missing, jnp.nan, _pearson(*ranks))

    def top(self, k: int | Int[Array, ""]) -> TopOverlap:
        r"""Split LAR into the k leading directions and the rest, $LAR = L_k + D_k$.

        $L_k = 1 + \frac12 \log_n \sum_{i \le k} p_i q_i$ is in [-inf, LAR], and D_n = 0. Section 5
        of the paper finds the signature of overfitting in L_1. O(n). k is from 1 to n and may be
        traced (vmap over several k); ValueError if it is a Python number outside.
        """
        n = self.p.shape[-1]
        inside = not isinstance(k, int) or 1 <= k <= n
        check.need(inside, f"k must be from 1 to n = {n}, the number of directions; got {k}.")
        leading = jax.lax.broadcasted_iota(int, self.p.shape, self.p.ndim - 1) < k
        overlap = jnp.sum(jnp.where(leading, self.p * self.q, 0), axis=-1)
        L = log_ratio(jnp.log(overlap), n)
        return TopOverlap(L, self.lar - L)


def _centred(a: Float[Array, "*stack n"]) -> Float[Array, "*stack n"]:
    # The shift makes a constant spectrum exactly 0, so that its correlation is nan and not noise.
    a = a - a[..., :1]
    return a - jnp.mean(a, axis=-1, keepdims=True)


def _pearson(a: Float[Array, "*stack n"], b: Float[Array, "*stack n"]) -> Float[Array, "*stack"]:
    a, b = (c / jnp.linalg.norm(c, axis=-1, keepdims=True) for c in map(_centred, (a, b)))
    return jnp.sum(a * b, axis=-1)
