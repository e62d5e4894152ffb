"""An equinox model whose call returns LAR as an auxiliary output."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from ._capture import capture
from ._energies import Energies, energies
from ._program import Where


class WithLAR(eqx.Module):
    """What `with_lar` returns."""

    model: PyTree
    where: Where = eqx.field(static=True)
    measure: Callable[..., PyTree] = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Energies]]:
        """(what the model returns, {path: Energies} of its matrices)."""
        call = capture(_call, where=self.where, measure=self.measure)
        return call(self.model, *args, **kwargs)


def _call(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def with_lar(
    model: PyTree, where: Where = None, *, measure: Callable[..., PyTree] = energies
) -> WithLAR:
    """The same model, whose call returns `(output, {path: Energies})`, by `jlar.capture`.

    Parameters, gradients and output are the model's own; the energies are auxiliary.

    Args:
        model: any callable equinox Module.
        where: what to measure, by path, as for `jlar.capture`. Default: every matrix.
        measure: what to measure of it, as for `jlar.capture`.

    Returns:
        A Module with the model in its field `model`. Under `jax.vmap` over a batch the energies
        come back stacked: pool them with `.sum()`.

    Raises:
        ValueError: in the call, at trace time, as `jlar.capture`.

    Example:
        >>> import equinox as eqx, jax, jlar
        >>> model = eqx.nn.MLP(8, 4, 32, depth=1, key=jax.random.key(0))
        >>> model = jlar.nn.with_lar(model, where="layers.1.*")
        >>> x = jax.random.normal(jax.random.key(1), (100, 8))
        >>> out, lars = jax.vmap(model)(x)
        >>> print(out.shape, {path: f"{e.sum().lar:.2f}" for path, e in lars.items()})
        (100, 4) {'layers.1.weight': '0.57'}
    """
    return WithLAR(model, where, measure)
