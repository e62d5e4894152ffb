"""An equinox model whose call returns LAR as an auxiliary output."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from ._capture import capture
from ._energies import energies
from ._program import Where

__all__ = ["with_lar"]


def __dir__() -> list[str]:
    return __all__


class _WithLAR(eqx.Module):
    model: PyTree
    where: Where = eqx.field(static=True)
    measure: Callable[..., PyTree] = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, PyTree]]:
        call = capture(type(self.model).__call__, where=self.where, measure=self.measure)
        return call(self.model, *args, **kwargs)


def with_lar(
    model: PyTree, where: Where = None, *, measure: Callable[..., PyTree] = energies
) -> _WithLAR:
    """The same model, whose call returns `(output, {path: Energies})`, by `jlar.capture`.

    Parameters, gradients and output are the model's own, a callable equinox Module in the field
    `model`; `where`, `measure` and errors (in the call) are those of `jlar.capture`. Under
    `jax.vmap` over a batch the energies come back stacked: pool them with `.sum()`.

    Example:
        >>> import equinox as eqx, jax, jlar
        >>> model = eqx.nn.MLP(8, 4, 32, depth=1, key=jax.random.key(0))
        >>> x = jax.random.normal(jax.random.key(1), (100, 8))
        >>> out, lars = jax.vmap(jlar.nn.with_lar(model, where="layers.1.*"))(x)
        >>> print(out.shape, {path: f"{e.sum().lar:.2f}" for path, e in lars.items()})
        (100, 4) {'layers.1.weight': '0.57'}
    """
    return _WithLAR(model, where, measure)
