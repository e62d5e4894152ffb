"""Spectra: p of the weights and q of the activations, by SVD of W or from the two Gram matrices."""

import math
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from . import _checks as check
from ._energies import Energies, energy, log_ratio
from ._mesh import Axes, Split, gram, total, unsharded
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
        s = s / jnp.sum(s, axis=-1, keepdims=True)
        return jnp.exp(-jnp.sum(s * jnp.log(jnp.where(s == 0, 1, s)), axis=-1))  # 0 log 0 = 0

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

    def top(self, k: int | Int[Array, ""]) -> "TopOverlap":
        r"""Split LAR into the k leading directions and the rest, $LAR = L_k + D_k$.

        $L_k = 1 + \frac12 \log_n \sum_{i \le k} p_i q_i$ is in [-inf, LAR], and D_n = 0. Section 5
        of the paper finds the signature of overfitting in L_1. O(n). k is from 1 to n and may be
        traced (vmap over several k); ValueError if it is a Python number outside.
        """
        n = self.p.shape[-1]
        check.need(
            not isinstance(k, int) or 1 <= k <= n,
            f"k must be from 1 to n = {n}, the number of directions; got {k}.",
        )
        leading = jax.lax.broadcasted_iota(int, self.p.shape, self.p.ndim - 1) < k
        overlap = jnp.sum(jnp.where(leading, self.p * self.q, 0), axis=-1)
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
    Their sums are plain float32, of which k additions one by one lose up to k 2^-24: what is read
    from more than 2^16 calls is nan.
    """

    w: Float[Array, "*stack n n"]
    """W^T W, once per call; w / calls is W^T W."""
    x: Float[Array, "*stack n n"]
    """X^T X over the kept tokens."""
    sums: Float[Array, "*stack 3 2"]
    """What `calls`, `count` and `keep_rate` are read from."""

    @classmethod
    def zeros(cls, n: int, stack: tuple[int, ...] = (), dtype=jnp.float32) -> "Grams":
        """No tokens of a width-n layer: what a scan starts to accumulate from."""
        check.check_width(n, "the argument n")
        w, x = (jnp.zeros((*stack, n, n), dtype) for _ in range(2))
        return cls(w, x, jnp.zeros((*stack, 3, 2), dtype))

    @property
    def energies(self) -> Energies:
        r"""The same calls as sums of squares: $\|XW^T\|^2 = \langle W^T W, X^T X \rangle$."""
        calls = jnp.where(self.calls <= 2**16, self.calls, jnp.nan)
        w = self.w / calls[..., None, None]
        squares = jnp.sum(w * self.x, axis=(-2, -1)), _trace(self.x), _trace(self.w)
        return Energies.of(squares, self.sums, self.x.shape[-1])

    def _total(self, gram: Float[Array, "*stack n n"]) -> Float[Array, "*stack"]:
        """The trace, or nan where what is read from the Gram cannot be sure."""
        trace = _trace(gram)
        least = float(jnp.finfo(trace.dtype).tiny) * 2.0**66  # as in Energies.lar
        sure = (trace > least) & jnp.isfinite(trace) & (self.calls <= 2**16)
        return jnp.where(sure, trace, jnp.nan)

    @property
    def lar(self) -> Float[Array, "*stack"]:
        """Log-alignment ratio of everything pooled, without logits; as `Energies.lar`."""
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
        uniform = jnp.broadcast_to(jnp.eye(n, dtype=self.w.dtype) / n, self.w.shape)
        return self.w / self._total(self.w)[..., None, None] - uniform

    def spectra(self) -> Spectra:
        """p and q by one n x n `eigh`, O(n^3), without gradient.

        Entries of p below about n eps p_1 are rounding. nan as of `jlar.spectra`, and where a trace
        is not between 1e-18 and 3e38 (float32).
        """
        w, x, of_W, of_X = jax.lax.stop_gradient(
            (self.w, self.x, self._total(self.w), self._total(self.x))
        )
        w, missing = check.finite_part(w)
        squares, V = jnp.linalg.eigh(w, symmetrize_input=False)
        # Both are non-negative but for rounding.
        p = jnp.maximum(squares[..., ::-1], 0)
        q = jnp.maximum(jnp.sum(V * jnp.matmul(x, V, precision=HIGHEST), axis=-2)[..., ::-1], 0)
        p = jnp.where(jnp.isnan(of_W)[..., None], jnp.nan, p / jnp.sum(p, axis=-1, keepdims=True))
        return Spectra(p=p, q=q / of_X[..., None] + missing[..., None])


def _trace(A: Float[Array, "*stack n n"]) -> Float[Array, "*stack"]:
    return jnp.trace(A, axis1=-2, axis2=-1)


def grams(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t inputs"],
    *,
    mask: Shaped[ArrayLike, "*t"] | None = None,
    axes: Axes | Split | None = None,
) -> Grams:
    """$W^T W$ and $X^T X$: everything the spectra and LAR need, in n x n numbers.

    LAR from them needs no logits, so it works next to a fused loss; they pool over batches and
    shards as `Energies` do. O((m + t) n^2). Differentiable, but for their spectra.

    Args, Raises: those of every function of (W, X), `help(jlar)`. Over `axes` go sums of n x n
    numbers; where "n" is split, W and X as well, each device sending its part once.

    Returns:
        `Grams` of two (n, n) matrices, float32 (float64 if an input is).

    Example:
        >>> import jax, jlar
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> pooled = jlar.grams(W, X[:32]) + jlar.grams(W, X[32:])
        >>> print(f"{pooled.lar:.4f} {pooled.spectra().corr:.2f}")
        0.5024 0.15
    """
    W, X, keep, split = check.operands(W, X, mask, axes)
    acc = check.accumulator(W, X)
    w = total(gram(check.native(W, acc), acc, split.m, split.n), (), split)
    x = total(gram(check.native(X, acc), acc, split.t, split.columns), (), split)
    return Grams(w, x, counts(keep, math.prod(X.shape[:-1]), acc, split))


def spectra(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t inputs"],
    *,
    mask: Shaped[ArrayLike, "*t"] | None = None,
    method: Literal["gram", "svd"] = "gram",
    axes: Axes | Split | None = None,
) -> Spectra:
    """The weight spectrum p and the activation spectrum q of inputs X on W's singular directions.

    Equation (2) of arXiv 2605.28975. Gradients stop here (the derivative of a basis of singular
    vectors does not exist where values coincide); differentiate `jlar.lar`.

    Args, Raises: those of every function of (W, X), `help(jlar)`, and
        method: "gram" is an `eigh` of W^T W, O((m + t) n^2 + n^3), far faster for tall W and made
            for meshes; p_i has an absolute error of order eps p_1. "svd" decomposes W, accurate
            over the whole spectrum, O(m n min(m, n)), and gathers a sharded W (`axes` may name no
            more than "t"): take it where the tail of p matters, as for the effective rank of a W
            that lacks rank.

    Returns:
        `Spectra` of p and q, (n,) each, float32 (float64 if an input is), non-negative, for W and X
        of any size; p is nan if W is zero, q if the kept X is, both if W is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import jlar
        >>> W = jnp.array([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
        >>> s = jlar.spectra(W, jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> print(s.p, s.q)  # the third direction is W's null space
        [0.8 0.2 0. ] [0.5  0.25 0.25]
    """
    W, X, keep, split = check.operands(W, X, mask, axes)
    acc = check.accumulator(W, X)
    W, X = jax.lax.stop_gradient((W, X))
    W = check.unit(W, acc, split.m + split.n, split)[0]
    X = check.unit(X, acc, split.t + split.columns, split)[0]
    if method == "gram":
        return grams(W, X, mask=keep, axes=split).spectra()
    check.need(method == "svd", f'method must be "gram" or "svd"; got {method!r}.')
    check.need(
        not split.m + split.n,
        f'method "svd" needs W whole on each device, and axes split it over {split.m + split.n}; '
        'write method="gram".',
    )
    p, q, x = unsharded(_by_svd)(W.astype(acc), X.astype(acc))
    q, x = (total(a, split.t, split) for a in (q, x))
    return Spectra(p=p, q=q / x)


def _by_svd(
    W: Float[Array, "m n"], X: Float[Array, "*t n"]
) -> tuple[Float[Array, "n"], Float[Array, "n"], Float[Array, ""]]:
    """p, and the sums of squares of X along each direction and in all; nan if W is not finite."""
    m, n = W.shape
    W, missing = check.finite_part(W)
    # full_matrices only where W is wide: there it completes v_1..v_m to a basis of R^n.
    _, s, Vt = jnp.linalg.svd(W, full_matrices=m < n)
    p = jnp.pad(jnp.square(s / s[0]), (0, n - s.shape[0]))
    q = jnp.sum(jnp.square(check.product(X, Vt, W.dtype)), axis=tuple(range(X.ndim - 1)))
    return p / jnp.sum(p) + missing, q + missing, energy(X, W.dtype)


class Alignment(NamedTuple):
    """What `jlar.alignment` returns: weight spectrum, activation spectrum, log-alignment ratio."""

    p: Float[Array, "n"]
    q: Float[Array, "n"]
    lar: Float[Array, ""]


def alignment(
    W: Float[ArrayLike, "m n"],
    X: Float[ArrayLike, "*t inputs"],
    *,
    mask: Shaped[ArrayLike, "*t"] | None = None,
    method: Literal["gram", "svd"] = "gram",
    axes: Axes | Split | None = None,
) -> Alignment:
    r"""The map (W, X) -> (p, q, LAR): two spectra and the logarithm of their overlap.

    $LAR = \log_n$ of equation (3), $1 + \frac12 \log_n \sum_i p_i q_i$. Arguments, cost, errors and
    gradients are those of `jlar.spectra`; `jlar.lar` has LAR alone at a fraction of the cost.

    Example:
        >>> import jax, jlar
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> p, q, lar = jax.jit(jlar.alignment)(W, X)
        >>> print(p.shape, q.shape, f"{lar:.4f}")
        (64,) (64,) 0.5024
    """
    s = spectra(W, X, mask=mask, method=method, axes=axes)
    return Alignment(s.p, s.q, s.lar)


def principal_dimension(
    X: Float[ArrayLike, "*t n"],
    fraction: float = 0.95,
    *,
    mask: Shaped[ArrayLike, "*t"] | None = None,
) -> Float[Array, ""]:
    """The number of principal components that hold a fraction of the variance of X (k95).

    Centred PCA over the tokens, as the paper compares with $k = n^{2(1-LAR)}$ (section 4 of arXiv
    2605.28975). O(t n^2 + n^3), from the n x n covariance. A whole number has no gradient.

    Args: X, of at least one token axis, and mask as of every function, `help(jlar)`;
        fraction: share of the variance to hold, in (0, 1].

    Returns:
        A whole number in [1, n] as a floating-point scalar, so that nan can say that X is not
        finite, constant, or all masked.

    Example:
        >>> import jax.numpy as jnp
        >>> import jlar
        >>> X = jnp.array([[3.0, 0.0, 1.0], [-3.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, -1.0, 1.0]])
        >>> print(jlar.principal_dimension(X), jlar.principal_dimension(X, fraction=0.9))
        2.0 1.0
    """
    check.need(
        0 < fraction <= 1, f"fraction is a share of the variance, in (0, 1]; got {fraction}."
    )
    X = check.real_array(X, "X")
    check.need(
        X.ndim >= 2, f"X must have shape (..., n) with at least one token axis; got {X.shape}."
    )
    tokens, acc = X.shape[:-1], check.accumulator(X)
    keep = None if mask is None else check.kept(mask, tokens)
    X = check.zero_masked(jax.lax.stop_gradient(X.astype(acc)), keep)
    X = check.unit(X, acc, (), Split())[0]
    count = math.prod(tokens) if keep is None else jnp.sum(keep, dtype=jnp.int32)
    over_tokens = tuple(range(X.ndim - 1))
    mean = jnp.sum(X, axis=over_tokens, keepdims=True) / jnp.asarray(count, acc)
    centred = check.zero_masked(X - mean, keep)
    covariance, missing = check.finite_part(gram(centred, acc, (), ()))
    variances = jnp.linalg.eigvalsh(covariance)[::-1]
    held = jnp.cumsum(jnp.maximum(variances, 0)) + missing
    # Compared at the last entry with itself, not with a separately rounded total.
    enough = jnp.argmax(held >= jnp.asarray(fraction, acc) * held[-1]) + 1
    return jnp.where(held[-1] > 0, enough.astype(acc), jnp.nan)
