"""Spectra: p of the weights and q of the activations, by SVD of W or from the two Gram matrices."""

from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from . import _checks as check
from . import _mesh as mesh
from ._energies import Energies, energy
from ._gram import gram
from ._lar import log_ratio
from ._pool import Pool, counts

HIGHEST = jax.lax.Precision.HIGHEST


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

        Where W lacks rank take spectra by method="svd": the roots of rounding errors count here.
        """
        s = jnp.sqrt(self.p)
        return jnp.exp(jnp.sum(jax.scipy.special.entr(s / jnp.sum(s, -1, keepdims=True)), -1))

    @property
    def corr(self) -> Float[Array, "*stack"]:
        """Pearson correlation of p and q, in [-1, 1]; nan where either is constant."""
        return _pearson(self.p, self.q)

    @property
    def rank_corr(self) -> Float[Array, "*stack"]:
        """Spearman correlation of p and q (ties share their mean rank), in [-1, 1]."""
        ranks = [jax.scipy.stats.rankdata(a, axis=-1) for a in (self.p, self.q)]
        poisoned = jnp.isnan(jnp.sum(self.p + self.q, axis=-1))  # nan would be given a rank
        return jnp.where(poisoned, jnp.nan, _pearson(*ranks))

    def top(self, k: int | Int[Array, ""]) -> "TopOverlap":
        r"""Split LAR into the k leading directions and the rest, $LAR = L_k + D_k$.

        $L_k = 1 + \frac12 \log_n \sum_{i \le k} p_i q_i$ is in [-inf, LAR], and D_n = 0. Section 5
        of the paper finds the signature of overfitting in L_1. O(n).

        Args:
            k: how many leading directions, 1 to n; may be traced (vmap over several k).

        Raises:
            ValueError: k is outside 1..n (when it is a Python number).
        """
        n = self.p.shape[-1]
        if isinstance(k, int) and not 1 <= k <= n:
            raise ValueError(f"k must be from 1 to n = {n}, the number of directions; got {k}.")
        overlap = jnp.sum(jnp.where(jnp.arange(n) < k, self.p * self.q, 0), axis=-1)
        L = log_ratio(jnp.log(overlap), n)
        return TopOverlap(L, self.lar - L)


class TopOverlap(NamedTuple):
    """What `Spectra.top` returns: LAR = L + D."""

    L: Float[Array, "*stack"]
    """LAR of the k leading directions alone."""
    D: Float[Array, "*stack"]
    """What the other directions add, at least 0."""


def _centred(a: Float[Array, "*stack n"]) -> Float[Array, "*stack n"]:
    # The shift makes a constant spectrum exactly 0, so that its correlation is nan and not noise.
    a = a - a[..., :1]
    return a - jnp.mean(a, axis=-1, keepdims=True)


def _pearson(a: Float[Array, "*stack n"], b: Float[Array, "*stack n"]) -> Float[Array, "*stack"]:
    a, b = _centred(a), _centred(b)
    a = a / jnp.linalg.norm(a, axis=-1, keepdims=True)
    b = b / jnp.linalg.norm(b, axis=-1, keepdims=True)
    return jnp.sum(a * b, axis=-1)


class Grams(Pool):
    """The second moments $W^T W$ and $X^T X$ of one weight matrix at work, both n x n.

    They add over tokens as `Energies` do, never need Y, and never need W or X in one place: sums
    over shards of the rows of W and of the tokens are exact. They hold everything the spectra do.
    """

    w: Float[Array, "*stack n n"]
    """W^T W, once per call; w / calls is W^T W."""
    x: Float[Array, "*stack n n"]
    """X^T X over the kept tokens."""
    counts: Float[Array, "*stack 5"]
    """Calls, then kept and all tokens (read `calls`, `count`, `keep_rate`)."""

    @classmethod
    def zeros(cls, n: int, stack: tuple[int, ...] = (), dtype=jnp.float32) -> "Grams":
        """No tokens of a width-n layer: what a scan starts to accumulate from."""
        check.check_width(n, "the argument n")
        w, x = (jnp.zeros((*stack, n, n), dtype) for _ in range(2))
        return cls(w, x, jnp.zeros((*stack, 5), dtype))

    def limbs(self) -> Float[Array, "*stack 5"]:
        """Calls, then kept and all tokens as limbs."""
        return self.counts

    def _with(self, counts: Float[Array, "*stack 5"]) -> "Grams":
        return Grams(self.w, self.x, counts)

    @property
    def energies(self) -> Energies:
        r"""The same calls as sums of squares: $\|XW^T\|^2 = \langle W^T W, X^T X \rangle$."""
        w = self.w / self.calls[..., None, None]
        squares = (
            jnp.sum(w * self.x, axis=(-2, -1)),
            jnp.trace(self.x, axis1=-2, axis2=-1),
            jnp.trace(self.w, axis1=-2, axis2=-1),
        )
        return Energies.of(squares, self.counts, self.x.shape[-1])

    @property
    def lar(self) -> Float[Array, "*stack"]:
        """Log-alignment ratio of everything pooled, without logits; nan as `Energies.lar`."""
        return self.energies.lar

    @property
    def pp(self) -> Float[Array, "*stack"]:
        r"""$\sum_i p_i^2$, from 1/n (uniform) to 1 (rank one), in O(n^2): no eigh."""
        return jnp.sum(jnp.square(self._excess), axis=(-2, -1)) + 1 / self.x.shape[-1]

    @property
    def sigma_p(self) -> Float[Array, "*stack"]:
        """Population standard deviation of p, in O(n^2): no eigh."""
        return jnp.sqrt(jnp.mean(jnp.sum(jnp.square(self._excess), axis=-1), axis=-1))

    @property
    def _excess(self) -> Float[Array, "*stack n n"]:
        # W^T W of trace one less that of a uniform spectrum, so that small differences stay exact.
        n = self.w.shape[-1]
        trace = jnp.trace(self.w, axis1=-2, axis2=-1)[..., None, None]
        return self.w / trace - jnp.eye(n, dtype=self.w.dtype) / n

    def spectra(self) -> Spectra:
        """p and q by one n x n `eigh`, O(n^3). Entries of p below about n eps p_1 are rounding."""
        w, poison = check.finite_part(self.w)
        squares, V = jnp.linalg.eigh(w, symmetrize_input=False)
        # Both are non-negative but for rounding.
        p = jnp.maximum(squares[..., ::-1], 0)
        q = jnp.sum(V * jnp.matmul(self.x, V, precision=HIGHEST), axis=-2)[..., ::-1]
        p, q = p / jnp.sum(p, -1, keepdims=True), jnp.maximum(q, 0)
        q = q / jnp.trace(self.x, axis1=-2, axis2=-1)[..., None]
        return Spectra(p=p + poison[..., None], q=q + poison[..., None])


def grams(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t inputs"],
    *,
    mask: Shaped[ArrayLike, "*t"] | None = None,
    axes: mesh.Axes | mesh.Split | None = None,
) -> Grams:
    """$W^T W$ and $X^T X$: everything the spectra and LAR need, in n x n numbers.

    LAR from them needs no logits, so it works next to a fused loss; they pool over batches and
    shards as `Energies` do. O((m + t) n^2). Gradients stop here.

    Args:
        W: weights (m, n), outputs x inputs.
        X: inputs (..., n), any number of leading token axes; half precision is summed in float32.
        mask: (...,) of 0/1 or bool, one per token; tokens with 0 do not count, even if nan.
        axes: inside `jax.shard_map`, the mesh axes that split tokens, outputs and inputs, such as
            `{"t": "data", "m": "model"}`: sums of n x n numbers over them. Where "n" is split, W
            and X are exchanged as well, each device sending its part once, at most n x n numbers at
            a time.

    Returns:
        `Grams` of two (n, n) matrices, float32 (float64 if an input is).

    Raises:
        ValueError: at trace time, for wrong ranks or widths, n = 1, complex or misshapen arguments.

    Example:
        >>> import jax, jlar
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> pooled = jlar.grams(W, X[:32]) + jlar.grams(W, X[32:])
        >>> print(f"{pooled.lar:.4f} {pooled.spectra().corr:.2f}")
        0.5024 0.15
    """
    return second_moments(W, X, mask, mesh.split(axes))


def second_moments(W: ArrayLike, X: ArrayLike, mask: ArrayLike | None, split: mesh.Split) -> Grams:
    """The Grams, from one device's parts of W and X."""
    W, X, keep, split = check.operands(W, X, mask, split)
    W, X = jax.lax.stop_gradient((W, X))
    acc = check.accumulator(W, X)
    w = gram(check.native(W, acc), acc, split, split.m, split.n, last_axis_first=True)
    x = gram(check.native(X, acc), acc, split, split.t, split.columns)
    return Grams(w, x, counts(keep, X.shape[:-1], acc, split))


def spectra(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t inputs"],
    *,
    mask: Shaped[ArrayLike, "*t"] | None = None,
    method: Literal["gram", "svd"] = "gram",
    axes: mesh.Axes | mesh.Split | None = None,
) -> Spectra:
    """The weight spectrum p and the activation spectrum q of inputs X on W's singular directions.

    Equation (2) of arXiv 2605.28975. Gradients stop here (the derivative of a basis of singular
    vectors does not exist where values coincide); differentiate `jlar.lar`.

    Args:
        W: weights (m, n), outputs x inputs, of any rank.
        X: inputs (..., n), any number of leading token axes.
        mask: (...,) of 0/1 or bool, one per token; tokens with 0 do not count, even if nan.
        method: "gram" is an `eigh` of W^T W, O((m + t) n^2 + n^3), far faster for tall W and made
            for meshes; p_i has an absolute error of order eps p_1. "svd" decomposes W, accurate
            over the whole spectrum, O(m n min(m, n)), and gathers a sharded W: take it where the
            tail of p matters, as for the effective rank of a W that lacks rank.
        axes: inside `jax.shard_map`, the mesh axes that split each dimension, as in `jlar.grams`;
            "svd" allows no more than "t".

    Returns:
        `Spectra` of p and q, (n,) each, float32 (float64 if an input is), non-negative; p is nan if
        W is zero, q is nan if the kept X is zero, both are nan if anything kept is not finite.

    Raises:
        ValueError: at trace time, for wrong ranks or widths, n = 1, complex or misshapen arguments,
            an unknown method.

    Example:
        >>> import jax.numpy as jnp
        >>> import jlar
        >>> W = jnp.array([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
        >>> s = jlar.spectra(W, jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> print(s.p, s.q)  # the third direction is W's null space
        [0.8 0.2 0. ] [0.5  0.25 0.25]
    """
    if method == "gram":
        return grams(W, X, mask=mask, axes=axes).spectra()
    if method != "svd":
        raise ValueError(f'method must be "gram" or "svd"; got {method!r}.')
    W, X, _, split = check.operands(W, X, mask, mesh.split(axes))
    if split.m or split.n:
        raise ValueError(
            f'method "svd" needs W whole on each device, and axes split it over '
            f'{split.m + split.n}; write method="gram".'
        )
    acc = check.accumulator(W, X)
    W, X = jax.lax.stop_gradient((W.astype(acc), X.astype(acc)))
    p, q, x = mesh.unsharded(_by_svd)(W, X)
    q, x = (mesh.total(a, split.t, split) for a in (q, x))
    return Spectra(p=p, q=q / x)


def _by_svd(
    W: Float[Array, "m n"], X: Float[Array, "*t n"]
) -> tuple[Float[Array, "n"], Float[Array, "n"], Float[Array, ""]]:
    """p, and the sums of squares of X along each direction and in all; nan if W is not finite."""
    m, n = W.shape
    W, poison = check.finite_part(W)
    # full_matrices only where W is wide: there it completes v_1..v_m to a basis of R^n.
    _, s, Vt = jnp.linalg.svd(W, full_matrices=m < n)
    p = jnp.pad(jnp.square(s / s[0]), (0, n - s.shape[0]))
    q = jnp.sum(jnp.square(check.product(X, Vt, W.dtype)), axis=tuple(range(X.ndim - 1)))
    return p / jnp.sum(p) + poison, q + poison, energy(X, W.dtype)


class Alignment(NamedTuple):
    """What `jlar.alignment` returns."""

    p: Float[Array, "n"]
    """Weight spectrum, descending, sums to 1."""
    q: Float[Array, "n"]
    """Activation spectrum in the same order, sums to 1."""
    lar: Float[Array, ""]
    r"""Log-alignment ratio, $1 + \frac12 \log_n \sum_i p_i q_i$."""


def alignment(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t inputs"],
    *,
    mask: Shaped[ArrayLike, "*t"] | None = None,
    method: Literal["gram", "svd"] = "gram",
    axes: mesh.Axes | mesh.Split | None = None,
) -> Alignment:
    r"""The map (W, X) -> (p, q, LAR): two spectra and the logarithm of their overlap.

    $LAR = 1 + \frac12 \log_n \sum_i p_i q_i$, equation (3) of arXiv 2605.28975; see
    `jlar.spectra` for the arguments, cost and errors, `jlar.lar` for LAR alone at a fraction of it.

    Example:
        >>> import jax, jlar
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> p, q, lar = jax.jit(jlar.alignment)(W, X)
        >>> print(p.shape, q.shape, f"{lar:.4f}")
        (64,) (64,) 0.5024
    """
    s = spectra(W, X, mask=mask, method=method, axes=axes)
    return Alignment(s.p, s.q, s.lar)
