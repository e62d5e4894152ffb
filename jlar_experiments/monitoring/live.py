"""The monitor beside a run that trains: its state is on the device, what it says in the records."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import jlar

from ..progress import say
from .verdict import MEANING, OVERFITTING, SIGNALS


@jax.jit
def watch(
    monitor: jlar.Monitor,
    step: Int[Array, ""],
    lar: Float[Array, ""],
    train_loss: Float[Array, ""],
    baseline: jlar.Baseline | None = None,
) -> tuple[jlar.Monitor, Bool[Array, "signals"]]:
    """The monitor after this step, and which of `SIGNALS` ring now; a known step changes nothing.

    Dispatched like a training step: nothing waits for it, and what rings is read when the metrics
    of the step are.
    """
    at = {}
    if baseline is not None:
        at["baseline_lar"] = baseline.at_step(step)
        at["baseline_at_loss"] = baseline.at_loss(train_loss)
    new = monitor.update(step, lar, train_loss=train_loss, **at)
    later = step.astype(jnp.float32) > monitor.step
    new = jax.tree.map(lambda a, b: jnp.where(later, a, b), new, monitor)
    return new, jnp.stack([getattr(new, name).alarm for name in SIGNALS])


watch_each = jax.jit(jax.vmap(watch))
"""`watch` over a leading axis of runs, without baselines."""


def names(rings: Bool[np.ndarray, "signals"]) -> list[str]:
    """The signals that ring, as a record has them."""
    return [name for name, ringing in zip(SIGNALS, rings, strict=True) if ringing]


class Bell:
    """Says once that a signal rings, also if the run is interrupted and goes on."""

    def __init__(self, monitor: jlar.Monitor):
        self._said = {name for name in SIGNALS if bool(getattr(monitor, name).rang)}

    def hear(self, ringing: Iterable[str], where: str) -> None:
        """Tell what is new among the signals that ring now."""
        for name in ringing:
            if name not in self._said:
                self._said.add(name)
                kind = "ALARM" if name in OVERFITTING else "good news"
                say(f"{where}: {kind} ({name}): {MEANING[name]}")
