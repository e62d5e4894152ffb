"""The monitor beside a run that trains: its state is on the device, what it says in the records."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlar._monitor import OVERFITTING, SIGNALS
from jlar.monitor import Baseline, Monitor, Signal

from ..progress import say


@jax.jit
def watch(
    monitor: Monitor,
    step: Int[Array, ""],
    lar: Float[Array, ""],
    loss: Float[Array, ""],
    baseline: Baseline | None = None,
) -> tuple[Monitor, Float[Array, "signals"]]:
    """The monitor after this step, and for each of `SIGNALS` that rings now the step before its
    first alarm built up, else -1.

    Dispatched like a training step: nothing waits for it, and what rings is read when the metrics
    of the step are.
    """
    new = monitor.update(step, lar, loss=loss, baseline=baseline)
    return new, jnp.where(new.signals.alarm, new.signals.step_before, -1)


watch_each = jax.jit(jax.vmap(watch))
"""`watch` over a leading axis of runs, without baselines."""


def names(rings: Float[np.ndarray, "signals"]) -> dict[str, int]:
    """The signals that ring, and the step before each of them built up."""
    return {name: int(at) for name, at in zip(SIGNALS, rings, strict=True) if at >= 0}


class Bell:
    """Says once that a signal rings, also if the run is interrupted and goes on."""

    def __init__(self, monitor: Monitor):
        self._said = {name for name in SIGNALS if monitor[name].first_alarm_step > 0}

    def hear(self, ringing: dict[str, int], where: str) -> None:
        """Tell what is new among the signals that ring now."""
        for name, before in ringing.items():
            if name not in self._said:
                self._said.add(name)
                kind = "ALARM" if name in OVERFITTING else "good news"
                what = Signal.meaning[name]
                say(f"{where}: {kind} ({name}): {what}; it built up from step {before}")
