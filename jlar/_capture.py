"""capture: any function of some weights also returns the statistics of every matrix among them."""

import itertools
from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jaxtyping import Array, ArrayLike, PyTree, Shaped

from . import _mesh as mesh
from ._energies import energies
from ._program import Program, Where


def capture(
    f: Callable[..., Any],
    *,
    measure: Callable[..., PyTree] = energies,
    has_aux: bool = False,
    where: Where = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    axes: mesh.Axes | None = None,
) -> Callable[..., Any]:
    r"""The same function, which also returns the energies of every matrix that multiplies data.

    A transformation like `jax.grad`, for any function that JAX can trace: equinox, flax (Linen and
    NNX), haiku, or arrays in a dict. It traces `f` once and finds each product of a *weight* (an
    array of the first argument; also after casts, transpositions, slices, as W + BA, under weight
    norm, dequantised) with *data* (whatever comes from anything else). Value and gradients are
    those of `f`, bit for bit op by op, to rounding once compiled; nothing in the model is edited.

    What counts as W (m, n), X and Y = X W^T is read from the product itself: contracted axes are
    the n inputs; free axes of the weight its m outputs; free axes of the data the tokens; batch
    axes stacked matrices, one row each. A convolution is a product with patches, `ragged_dot` a
    stack of matrices. Y is the product alone: before bias, soft-cap and temperature.

    - `jax.lax.scan`: weights that differ between iterations (scan over layers) have one row per
      iteration, others (a recurrent network) pool over them. `while_loop` pools whatever matrices
      it uses; `cond` gives count 0 and LAR nan to what did not run; `jax.checkpoint` recomputes
      nothing for statistics. Under `jax.disable_jit` JAX unrolls loops: a name for each iteration.
    - A weight used several times pools its uses. A slice is a matrix of its own, named by its
      index, `qkv.weight[0:64]`, or by a number, `#2`, where the program computes the index; so is
      a transposed use. A product with several leaves (W + BA) has the name of the largest.
    - A weight times numbers that `f` itself writes (`W @ jnp.eye(n)`) is another weight. Positions
      or grids made inside of `f` are such numbers: pass them as an argument to have them as data.
    - `jax.vmap` inside of `f` over weights that share their inputs makes one wide matrix of them;
      `jax.vmap(capture(f))` keeps them apart.
    - The body of a `custom_jvp` or `custom_vjp` is evaluated a second time for its statistics;
      XLA merges both unless the forward rule of the derivative computes something else. A callback
      that returns something is called twice there. As under `jax.jit`, such a function may not
      close over an argument of `f`.
    - Capture the loss, not the training step: the products of a backward pass have the same form.
    - A flax NNX module that changes itself (dropout, batch norm) is refused: capture a function of
      `nnx.split` parts.

    What cannot be measured is never dropped silently: `jlar.sites(f)(weights, ...)` lists every
    array with its products or the reason why there are none.

    Cost: two or three reductions per product, fused with it by XLA; no product is computed anew.
    Use it under `jax.jit`: by itself it runs op by op, as `jax.grad` does.

    Args:
        f: `f(weights, *args, **kwargs)` -> anything. Whether an array is a weight is decided by
            this first argument alone, not by what is differentiated; all others are data, also
            those that `f` closes over (masks, frozen matrices: put them into the first argument).
        measure: what is computed of each product. `jlar.energies` (LAR and its dimension),
            `jlar.grams` (p and q as well), or your own `measure(W, X, Y, mask)` of matrices
            (m, n), (t, n), (t, m) and a mask (t,) or None, which returns a pytree of *sums over
            tokens*: they are added where products pool. Stacked matrices see it under `jax.vmap`.
        has_aux: whether `f` returns (value, aux), as for `jax.value_and_grad`.
        where: what to measure: a predicate on paths, or a pattern or list of patterns such as
            "*.mlp.*" (as in `fnmatch`). Default: everything.
        mask: 0/1 or bool, one per token, for all products measured: their token axes have to be
            those of the mask, or some of them merged. Tokens with 0 do not count, even if nan. (Two
            axes of equal length are told apart by their order alone.)
        axes: inside `jax.shard_map`, what the types do not tell. An axis that splits only W or only
            X needs no word. Where one splits both, `{"n": "model"}` says that it splits the inputs;
            where it splits a stack of matrices, `{"stack": "expert"}` says that it splits them by
            rows, `{"m": "expert"}` by outputs. With check_vma=False say what splits tokens "t" and
            outputs "m" of all of them. Under jit leave it out.

    Returns:
        A function of the same arguments that returns `(f(...), statistics)`, or with has_aux
        `(value, (aux, statistics))`: what `jax.value_and_grad(..., has_aux=True)` expects.
        `statistics` maps the path of each matrix, as `blocks.0.mlp.up.weight`, to its measure: by
        default `jlar.Energies`, float32 (float64 if an operand is), whose `.lar` is in [-inf, 1]
        and nan where W, X or the mask is zero or not finite. They carry no gradient.

    Raises:
        ValueError: at trace time, where nothing is measured, the mask does not fit a product, or
            the parts of a shard_map cannot be told; it names the array and what to write.

    Source: equation (1) of arXiv 2605.28975, pooled before the logarithm.

    Example:
        >>> import jax, jax.numpy as jnp, jlar
        >>> params = {"up": jax.random.normal(jax.random.key(0), (8, 32)),
        ...           "down": jax.random.normal(jax.random.key(1), (32, 8))}
        >>> x = jax.random.normal(jax.random.key(2), (100, 8))
        >>> def loss(params, x):
        ...     return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"]) ** 2)
        >>> loss = jlar.capture(loss)
        >>> step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        >>> (value, lars), grads = step(params, x)
        >>> print({path: f"{e.lar:.2f} of {e.count} tokens" for path, e in lars.items()})
        {'down': '0.47 of 100 tokens', 'up': '0.49 of 100 tokens'}

        The root mean square of what each matrix reads, by a measure of one's own:

        >>> def inputs(W, X, Y, mask):
        ...     return {"squares": jnp.sum(X**2), "entries": jnp.float32(X.size)}
        >>> _, seen = jlar.capture(lambda p, x: x @ p["up"], measure=inputs)(params, x)
        >>> print({k: f"{jnp.sqrt(s['squares'] / s['entries']):.2f}" for k, s in seen.items()})
        {'up': '1.04'}
    """

    @wraps(f)
    def call(weights: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        program = Program(f, (weights, *args), kwargs, measure, where, mask, axes)
        result, seen = program.run()
        if not has_aux:
            return result, seen
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError(
                "with has_aux=True the function must return a pair (value, aux); got a "
                f"{type(result).__name__}. Return the pair, or leave has_aux out."
            )
        return result[0], (result[1], seen)

    return call


def metrics(lars: dict[str, Any], prefix: str = "lar/") -> dict[str, Array]:
    """Names and scalars as TensorBoard, Weights & Biases and their like want them.

    Args:
        lars: what `jlar.capture` returns (anything with a `lar`), or arrays by name.
        prefix: what each name begins with.

    Returns:
        A flat dict of scalars, one per matrix; the rows of stacks are numbered from 0,
        `lar/blocks.up.weight.0`. Works inside jit.

    Example:
        >>> import jax.numpy as jnp, jlar
        >>> flat = jlar.metrics({"head": jnp.float32(0.5), "blocks.up": jnp.array([0.25, 0.75])})
        >>> print({name: float(value) for name, value in flat.items()})
        {'lar/head': 0.5, 'lar/blocks.up.0': 0.25, 'lar/blocks.up.1': 0.75}
    """
    flat = {}
    for name, value in lars.items():
        lar = jax.numpy.asarray(getattr(value, "lar", value))
        for row in itertools.product(*map(range, lar.shape)):
            flat[".".join([prefix + name, *map(str, row)])] = lar[row]
    return flat
