"""The monitor over a whole log, and what it says: a paragraph, and one JSON object."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jlar._monitor import ALIGNED, SIGNALS
from jlar.monitor import Baseline, Monitor

from ..logs import Log

OVERFITTING = SIGNALS[:3]
MEANING = {
    "deviation": "LAR is below the baseline's at the same step",
    "matched_loss": "LAR is below the baseline's at the same training loss",
    "decline": "LAR has lost more since its peak than runs lose that do not overfit",
    "grokking": "the effective dimension is at two fifths of what it was at memorisation",
}
ADVICE = (
    "Look at the validation loss; without one, stop, or go back to the last checkpoint at or "
    "before step {step}, from where the alarm built up, and take more data or more weight decay."
)
ENOUGH = 12  # points
CHUNK = 256  # rows that are watched by one program; a log is padded to a multiple
STILL = 0.005  # LAR per doubling of steps, that counts as settled
RECENT = 0.5  # doublings that the slope is over

Points = dict[str, Float[np.ndarray, "rows 4"]]


@eqx.filter_jit
def _watched(
    monitor: Monitor,
    baseline: Baseline | None,
    columns: tuple[Float[Array, "chunk"], ...],
    real: Bool[Array, "chunk"],
) -> tuple[Monitor, dict[str, Float[Array, "chunk 4"]]]:
    def update(monitor: Monitor, at: tuple[Array, ...]) -> tuple[Monitor, Any]:
        step, lar, loss, real = at
        updated = monitor.update(step, lar, loss=loss, baseline=baseline)
        monitor = jax.tree.map(lambda a, b: jnp.where(real, a, b), updated, monitor)
        signals = monitor.signals
        traced = {name: getattr(signals, name) for name in ("level", "allowance", "S", "limit")}
        silent = signals.since == 0
        return monitor, {name: jnp.where(silent, jnp.nan, a) for name, a in traced.items()}

    return jax.lax.scan(update, monitor, (*columns, real))


def watched(monitor: Monitor, log: Log, baseline: Baseline | None) -> tuple[Monitor, Points]:
    """The monitor after the rows of a log, and its signals after each; nan where not in force."""
    columns = [np.asarray(each, np.float32) for each in (log.step, log.lar, log.loss)]
    pieces: list[dict[str, np.ndarray]] = []
    for start in range(0, len(log.step), CHUNK):
        piece = [each[start : start + CHUNK] for each in columns]
        size = len(piece[0])
        padded = tuple(jnp.asarray(np.pad(each, (0, CHUNK - size))) for each in piece)
        monitor, traced = _watched(monitor, baseline, padded, jnp.arange(CHUNK) < size)
        pieces.append({name: np.asarray(each)[:size] for name, each in traced.items()})
    return monitor, {name: np.concatenate([a[name] for a in pieces]) for name in pieces[0]}


def verdict(monitor: Monitor, log: Log, baseline: Baseline | None) -> dict[str, Any]:
    """What the monitor says of a log, as the object that `jlar watch --json` prints."""
    signals = {name: _signal(monitor, name, log) for name in SIGNALS}
    rang = [signals[name] for name in OVERFITTING if signals[name]["alarm"]]
    first = min(rang, key=lambda each: each["step"], default={"step": None, "step_before": None})
    why = [] if rang else _unknown(monitor, log, baseline)
    slope = _slope(log)
    return {
        "verdict": "alarm" if rang else "cannot tell" if why else "no alarm",
        "cannot_tell_because": why,
        "alarm": bool(rang),
        "first_alarm_step": first["step"],
        "step_before": first["step_before"],
        "says": _status(signals, slope, len(log.step)),
        "signals": signals,
        "noise": _noise(monitor, baseline),
        "step": _whole(float(log.step[-1])),
        "lar": float(log.lar[-1]),
        "peak_lar": _plain(monitor.peak_lar),
        "slope_per_doubling": slope,
        "width": monitor.n,
        "points": len(log.step),
    }


def _signal(monitor: Monitor, name: str, log: Log) -> dict[str, Any]:
    signal = monitor[name]
    heard = bool(signal.limit > 0)
    numbers = {key: getattr(signal, key) for key in ("level", "allowance", "S", "limit")}
    return {
        **{key: _plain(value) if heard else None for key, value in numbers.items()},
        "alarm": bool(signal.first_alarm_step > 0),
        "step": _step(signal.first_alarm_step, log),
        "step_before": _step(signal.step_before, log),
        "rings_now": bool(signal.alarm),
        "in_force_since": _step(signal.since, log),
        "until": _step(jnp.exp2(signal.doublings), log) if signal.doublings > 0 else None,
    }


def _unknown(monitor: Monitor, log: Log, baseline: Baseline | None) -> list[str]:
    """Why the absence of an alarm says nothing; empty if it says something."""
    second, last = float(monitor.second_epoch), float(monitor.step)
    if len(log.step) < ENOUGH:
        return [f"{len(log.step)} points are too few ({ENOUGH} at least)"]
    if monitor.peak_lar <= ALIGNED:
        return [f"LAR never rose above its value at initialisation (it reached "
                f"{float(monitor.peak_lar):.3f}, and {ALIGNED} are needed)"]  # fmt: skip
    if last < second:
        return []  # it has seen nothing twice
    # The first two points cannot be judged, nor can what is before the second epoch.
    half = max(last / 2, 1.1 * second, float(log.step[2]))
    asked = {"decline": "LAR had not risen before step"} if baseline is None else {}
    if baseline is not None:
        asked["deviation"] = "the comparison with the baseline at the same step"
        if baseline.by_loss is not None and np.isfinite(log.loss).any():
            asked["matched_loss"] = "the comparison with the baseline at the same training loss"
    why = []
    for name, what in asked.items():
        signal = monitor[name]
        since, until = float(signal.since), _step(jnp.exp2(signal.doublings), log)
        if signal.doublings == 0:
            why.append(f"{what} was never possible")
        elif since == 0:
            left = "its losses" if name == "matched_loss" else "its steps"
            why.append(f"{what} ended at step {until} because the run left {left}")
        elif since > half:
            began = "" if baseline is None else " began at step"
            why.append(f"{what}{began} {_step(signal.since, log)}")
    learnt = monitor["decline" if baseline is None else "deviation"].noise > 0
    if second > 0 and not learnt and (baseline is None or baseline.runs == 1):
        why.append(f"the first epoch, until step {_whole(second)}, has nothing to learn the noise "
                   "from")  # fmt: skip
    return why


def _noise(monitor: Monitor, baseline: Baseline | None) -> dict[str, Any]:
    """How large the noise is that the allowance rests on, and where it was learnt."""
    name = "decline" if baseline is None else "deviation"
    signal, source = monitor[name], "default: that of a point about its neighbours"
    if signal.noise > 0:
        source = f"{name} in the first epoch, until step {_whole(float(monitor.second_epoch))}"
    elif baseline is not None and baseline.runs > 1:
        source = f"spread of {baseline.runs} baselines"
    return {"allowance": _plain(signal.allowance), "source": source}


def _slope(log: Log) -> float | None:
    """Change of LAR per doubling of steps, over the last half of a doubling."""
    use = log.step > max(log.step[-1] * 2**-RECENT, 0)
    if use.sum() < ENOUGH // 2:
        return None
    return float(np.polyfit(np.log2(log.step[use]), log.lar[use], 1)[0])


def _status(signals: dict[str, Any], slope: float | None, points: int) -> str:
    if signals["deviation"]["rings_now"] or signals["matched_loss"]["rings_now"]:
        return "deviating"
    if signals["decline"]["rings_now"]:
        return "declining"
    if slope is None or points < ENOUGH:
        return "too short"
    return _trend(slope)


def _trend(slope: float) -> str:
    return "rising" if slope > STILL else "declining" if slope < -STILL else "settled"


def paragraph(found: dict[str, Any]) -> str:
    """What LAR says, in words."""
    sentences, signals = [_opening(found)], found["signals"]
    sentences += [_alarm(name, signals[name]) for name in OVERFITTING if signals[name]["alarm"]]
    if found["verdict"] == "alarm":
        sentences.append(ADVICE.format(step=found["step_before"]))
    elif found["verdict"] == "no alarm":
        sentences.append("No alarm: nothing here looks like overfitting.")
    else:
        sentences.append(f"Cannot tell: {'; '.join(found['cannot_tell_because'])}.")
    if found["noise"]["allowance"]:
        noise = found["noise"]
        sentences.append(f"Counted beyond {noise['allowance']:.4f} (noise: {noise['source']}).")
    if signals["grokking"]["alarm"]:
        left = found["width"] ** (-2 * signals["grokking"]["level"])
        sentences.append(
            f"Good news since step {signals['grokking']['step']}: the effective dimension is at "
            f"{left:.0%} of what it was at memorisation, the mark of grokking; no alarm."
        )
    return " ".join(sentences)


def _opening(found: dict[str, Any]) -> str:
    now, slope = f"LAR is {found['lar']:.3f} at step {found['step']}", found["slope_per_doubling"]
    if slope is None:
        return f"{now}."
    lost = (found["peak_lar"] or 0) - found["lar"]
    peak = f", {lost:.3f} below its peak" if lost > 0.005 else ""
    return f"{now} and {_trend(slope)}{peak} ({slope:+.4f} per doubling of steps)."


def _alarm(name: str, signal: dict[str, Any]) -> str:
    far = f"by {signal['level']:.4f} now, of which {signal['allowance']:.4f} are allowed"
    over = "" if signal["rings_now"] else "; it has ended since"
    return f"ALARM ({name}) since step {signal['step']}: {MEANING[name]} ({far}){over}."


def _step(value: Array, log: Log) -> float | None:
    """The step of the log that this float32 stands for; None for 0."""
    if value == 0:
        return None
    return _whole(float(log.step[np.argmin(np.abs(log.step - float(value)))]))


def _whole(value: float) -> float:
    return int(value) if value.is_integer() else value


def _plain(value: Array) -> float | None:
    return float(str(np.float32(value))) if math.isfinite(value) else None
