"""Grams: W^T W and X^T X, enough for the spectra and LAR, however W and X lie on devices."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from . import _checks as check
from ._checks import Inputs, Mask, Weights
from ._energies import Energies, is_reliable
from ._mesh import Axes, Split, names, size, total, vary_as
from ._pool import Pool, counts
from ._spectra import Spectra


class Grams(Pool):
    r"""The second moments $W^T W$ and $X^T X$ of one weight matrix at work, both n x n.

    They pool by `+` and `sum` as `Energies` do and hold everything the spectra need, but are plain
    sums, of which k additions one by one lose up to k 2^-24 (float32): what is read from more than
    2^16 calls is nan, and so is what is read of a trace that is not between 1e-18 and 3e38. On a
    CPU, with n below some 16, as much is lost within a call: there give it at most 2^16 tokens.
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
        w = self.w / self.calls[..., None, None]
        squares = jnp.sum(w * self.x, axis=(-2, -1)), _trace(self.x), _trace(self.w)
        exact = jnp.where(self.calls <= 2**16, 1, jnp.nan)
        return Energies.of([exact * a for a in squares], self.sums, self.x.shape[-1])

    @property
    def lar(self) -> Float[Array, "*stack"]:
        """Log-alignment ratio of everything pooled, without logits; as `Energies.lar`."""
        return self.energies.lar

    def _reliable_trace(self, gram: Float[Array, "*stack n n"]) -> Float[Array, "*stack"]:
        """The trace, or nan if it is too small or large or of more than 2^16 calls."""
        trace = _trace(gram)
        return jnp.where(is_reliable(trace) & (self.calls <= 2**16), trace, jnp.nan)

    def spectra(self) -> Spectra:
        """p and q by one n x n `eigh`, O(n^3), without gradient; nan as of `jlar.spectra`.

        Entries of p below about n eps p_1 are rounding.
        """
        w, x = jax.lax.stop_gradient((self.w, self.x))
        w_trace, x_trace = self._reliable_trace(w), self._reliable_trace(x)
        w, missing = check.finite_part(w)
        squares, V = jnp.linalg.eigh(w, symmetrize_input=False)
        q = jnp.sum(V * jnp.matmul(x, V, precision=jax.lax.Precision.HIGHEST), axis=-2)
        # eigh has ascending order; both are non-negative but for rounding.
        p, q = (jnp.maximum(a[..., ::-1], 0) for a in (squares, q))
        p = p / jnp.sum(p, axis=-1, keepdims=True)
        p = jnp.where(jnp.isnan(w_trace)[..., None], jnp.nan, p)
        return Spectra(p=p, q=q / x_trace[..., None] + missing[..., None])


def _trace(A: Float[Array, "*stack n n"]) -> Float[Array, "*stack"]:
    return jnp.trace(A, axis1=-2, axis2=-1)


def grams(
    W: Weights, X: Inputs, *, mask: Mask | None = None, axes: Axes | Split | None = None
) -> Grams:
    """$W^T W$ and $X^T X$: everything the spectra and LAR need, in n x n numbers.

    LAR from them needs no logits, so it works next to a fused loss. O((m + t) n^2). Differentiable,
    but for their spectra. The devices along `axes` exchange sums of n x n numbers; where "n" is
    split, each also sends its part of W and X once.

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
    W, X = check.multiplied(W, acc), check.multiplied(X, acc)
    w = total(gram(W, acc, split.m, split.n), (), split)
    x = total(gram(X, acc, split.t, split.columns), (), split)
    return Grams(w, x, counts(keep, math.prod(X.shape[:-1]), acc, split))


def gram(
    A: Float[Array, "*t c"], acc: jnp.dtype, rows: tuple[str, ...], columns: tuple[str, ...]
) -> Float[Array, "n n"]:
    """A^T A over all leading axes in dtype `acc`, summed over the mesh axes that split A.

    `rows` and `columns` are those axes inside a shard_map. Explicit mesh axes are read from A's
    type, and this calls itself in a shard_map. With automatic axes XLA decides what moves.
    """
    sharding = jax.typeof(A).sharding
    if sharding.mesh.explicit_axes and not sharding.mesh.manual_axes:
        *leading, last = map(names, sharding.spec)
        split_rows: tuple[str, ...] = sum(leading, ())
        if split_rows + last:
            on_device = partial(gram, acc=acc, rows=split_rows, columns=last)
            return jax.shard_map(
                on_device,
                mesh=sharding.mesh,
                in_specs=sharding.spec,
                out_specs=PartitionSpec(),
                axis_names={*split_rows, *last},
            )(A)
    local = _exchanged(A, acc, columns) if columns else _gram(A, acc)
    return jax.lax.psum(local, (*rows, *columns))


def _exchanged(
    A: Float[Array, "*t c"], acc: jnp.dtype, columns: tuple[str, ...]
) -> Float[Array, "n n"]:
    """This device's share of A^T A, where each device has some columns of every row.

    The devices exchange columns for rows, until each has some rows whole: block by block, so that
    no exchange carries more than n rows of n numbers.
    """
    A = A.reshape(-1, A.shape[-1])
    devices, n = size(columns), A.shape[-1] * size(columns)
    blocks = max(1, -(-A.shape[0] // (devices * n)))
    per_block = devices * -(-A.shape[0] // (devices * blocks))
    A = jnp.pad(A, [(0, blocks * per_block - A.shape[0]), (0, 0)])

    def add(so_far: Array, block: Array) -> tuple[Array, None]:
        whole = jax.lax.all_to_all(block, columns, split_axis=0, concat_axis=1, tiled=True)
        return so_far + _gram(whole, acc), None

    zero = vary_as(jnp.zeros((n, n), acc), A)
    return jax.lax.scan(add, zero, A.reshape(blocks, per_block, A.shape[1]))[0]


def _gram(A: Float[Array, "*t c"], acc: jnp.dtype) -> Float[Array, "c c"]:
    # One contraction over all token axes: merging them first would gather a sharded second one.
    leading = list(range(A.ndim - 1))
    highest = jax.lax.Precision.HIGHEST
    return jnp.tensordot(A, A, (leading, leading), precision=highest, preferred_element_type=acc)
