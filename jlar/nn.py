"""Equinox wrappers that return LAR as an auxiliary output of the call."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._energies import Energies, energies
from ._transform import Where, evaluate, probes_for


class Linear(eqx.Module):
    """An `eqx.nn.Linear` whose call returns `(y, Energies)`, for models written by hand.

    Like `eqx.nn.Linear` it takes one input of shape (n,); under `jax.vmap` the energies come back
    stacked and `.sum()` pools them. The energies are those of the product, before the bias.

    Example:
        >>> import equinox as eqx, jax, jlar
        >>> layer = jlar.nn.Linear(eqx.nn.Linear(16, 4, key=jax.random.key(0)))
        >>> x = jax.random.normal(jax.random.key(1), (100, 16))
        >>> y, e = jax.vmap(layer)(x)
        >>> print(y.shape, e.lar.shape, f"{e.sum().lar:.2f}")
        (100, 4) (100,) 0.52
    """

    linear: eqx.nn.Linear

    def __call__(
        self, x: Float[Array, "n"], *, key: Any = None
    ) -> tuple[Float[Array, "..."], Energies]:
        """(what the layer returns, the energies of its weight, x and their product)."""
        W = self.linear.weight
        y = W @ x
        e = energies(W, x, Y=y)
        if self.linear.bias is not None:
            y = y + self.linear.bias
        return jnp.squeeze(y) if self.linear.out_features == "scalar" else y, e


class WithLAR(eqx.Module):
    """What `with_lar` returns."""

    model: PyTree
    where: Where = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Energies]]:
        """(what the model returns, {path: Energies} of the chosen layers)."""
        call = evaluate(lambda model, *a, **k: model(*a, **k), where=self.where)
        return call(self.model, *args, **kwargs)


def with_lar(model: PyTree, where: Where = None) -> WithLAR:
    """The same model, whose call returns `(output, {path: Energies})`.

    Parameters, gradients and output are the model's own; the energies are auxiliary. Tied
    embeddings are measured as unembedding where `eqx.nn.Shared` ties a Linear to them. Cost: a few
    reductions per layer; the model is traced backwards once to collect them (`jlar.evaluate`).

    Args:
        model: any callable equinox Module.
        where: `where(model)` -> the `eqx.nn.Linear` layers to measure: one, a list of them, or a
            part of the model that contains them. Default: every one with two inputs or more.

    Returns:
        A Module with the model in its field `model`. Under `jax.vmap` over a batch the energies
        come back stacked: pool them with `.sum()`.

    Raises:
        ValueError: here where `where` chooses no layer, and in the call, at trace time, where a
            layer cannot be measured (see `jlar.value_and_grad`).

    Example:
        >>> import equinox as eqx, jax, jlar
        >>> model = eqx.nn.MLP(8, 4, 32, depth=1, key=jax.random.key(0))
        >>> model = jlar.nn.with_lar(model, where=lambda m: m.layers[-1])
        >>> x = jax.random.normal(jax.random.key(1), (100, 8))
        >>> out, lars = jax.vmap(model)(x)
        >>> print(out.shape, {path: f"{e.sum().lar:.2f}" for path, e in lars.items()})
        (100, 4) {'layers.1': '0.57'}
    """
    probes_for(model, where)  # raises here, not in the first call
    return WithLAR(model, where)
