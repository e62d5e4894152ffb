"""The monitor over a whole log, and what it says: a paragraph, and one JSON object."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

import jlar

from ..logs import Log

OVERFITTING = ("deviation", "matched_loss", "decline")
SIGNALS = (*OVERFITTING, "grokking")
MEANING = {
    "deviation": "LAR is below the baseline's at the same step",
    "matched_loss": "LAR is below the baseline's at the same training loss",
    "decline": "LAR has lost more since its peak than runs lose that do not overfit",
    "grokking": "the effective dimension is at two fifths of what it was at memorisation",
}
CHUNK = 256  # rows that are watched by one program; a log is padded to a multiple
STILL = 0.005  # LAR per doubling of steps, that counts as settled

Points = dict[str, Float[np.ndarray, "rows"]]


@eqx.filter_jit
def _watched(
    monitor: jlar.Monitor,
    columns: tuple[Float[Array, "chunk"], ...],
    real: Bool[Array, "chunk"],
) -> tuple[jlar.Monitor, dict[str, Float[Array, "chunk"]]]:
    def update(monitor: jlar.Monitor, at: tuple[Array, ...]) -> tuple[jlar.Monitor, Any]:
        step, lar, loss, at_step, at_loss, real = at
        updated = monitor.update(
            step, lar, train_loss=loss, baseline_lar=at_step, baseline_at_loss=at_loss
        )
        monitor = jax.tree.map(lambda a, b: jnp.where(real, a, b), updated, monitor)
        traced = {"slope": monitor.slope}
        for name in SIGNALS:
            signal = getattr(monitor, name)
            traced |= {name: signal.level, f"{name} threshold": signal.threshold}
        return monitor, traced

    return jax.lax.scan(update, monitor, (*columns, real))


def watched(
    monitor: jlar.Monitor, log: Log, baseline: jlar.Baseline | None
) -> tuple[jlar.Monitor, Points]:
    """The monitor after the rows of a log, and its levels and thresholds after each of them."""
    count = len(log.step)
    columns = [np.asarray(each, np.float32) for each in (log.step, log.lar, log.loss)]
    nothing = np.full(count, np.nan, np.float32)
    at_step = nothing if baseline is None else np.asarray(baseline.at_step(columns[0]))
    at_loss = nothing if baseline is None else np.asarray(baseline.at_loss(columns[2]))
    columns += [at_step, at_loss]
    pieces: list[dict[str, np.ndarray]] = []
    for start in range(0, count, CHUNK):
        piece = [each[start : start + CHUNK] for each in columns]
        size = len(piece[0])
        padded = tuple(jnp.asarray(np.pad(each, (0, CHUNK - size))) for each in piece)
        monitor, traced = _watched(monitor, padded, jnp.arange(CHUNK) < size)
        pieces.append({name: np.asarray(each)[:size] for name, each in traced.items()})
    points = {
        name: np.concatenate([piece[name] for piece in pieces]) for name in (pieces or [{}])[0]
    }
    return monitor, points | {"baseline": at_step}


def verdict(monitor: jlar.Monitor, log: Log, baseline: jlar.Baseline | None) -> dict[str, Any]:
    """What the monitor says of a log, as the object that `jlar watch --json` prints."""
    known = np.isfinite(log.lar)
    last = int(np.flatnonzero(known)[-1])
    signals = {}
    for name in SIGNALS:
        signal: jlar.Signal = getattr(monitor, name)
        signals[name] = {
            "level": _plain(signal.level),
            "threshold": _plain(signal.threshold),
            "alarm": bool(signal.rang),
            "step": _step(signal.first_alarm_step, log),
            "rings_now": bool(signal.alarm),
        }
    rang = [signals[name]["step"] for name in OVERFITTING if signals[name]["alarm"]]
    return {
        "alarm": bool(rang),
        "first_alarm_step": min(rang) if rang else None,
        "says": _status(monitor),
        "signals": signals,
        "step": _whole(float(log.step[last])),
        "lar": float(log.lar[last]),
        "peak_lar": _plain(monitor.peak_lar),
        "peak_step": None if jnp.isnan(monitor.peak_step) else round(float(monitor.peak_step)),
        "slope_per_doubling": _plain(monitor.slope),
        "slope_per_step": _plain(monitor.slope_per_step),
        "width": monitor.n,
        "points": int(known.sum()),
        "lar_not_finite": int(monitor.ignored),
        "replayed": int(monitor.replayed),
        "baseline": None if baseline is None else _compared(monitor, log, baseline),
    }


def _status(monitor: jlar.Monitor) -> str:
    if monitor.deviation.alarm | monitor.matched_loss.alarm:
        return "deviating"
    if monitor.decline.alarm:
        return "declining"
    slope = float(monitor.slope)
    if math.isnan(slope):
        return "too short"
    return "rising" if slope > STILL else "declining" if slope < -STILL else "settled"


def _compared(monitor: jlar.Monitor, log: Log, baseline: jlar.Baseline) -> dict[str, Any]:
    """How far the comparison reaches: the last step at which the baseline had something to say."""
    reach = {}
    for name, at in (
        ("same_step_until", baseline.at_step(log.step.astype(np.float32))),
        ("same_loss_until", baseline.at_loss(log.loss.astype(np.float32))),
    ):
        inside = np.isfinite(np.asarray(at)) & np.isfinite(log.lar)
        reach[name] = _whole(float(log.step[inside].max())) if inside.any() else None
    return reach


def paragraph(found: dict[str, Any]) -> str:
    """What LAR says, in words."""
    n, step = found["width"], found["step"]
    sentences = [_opening(found)]
    signals = found["signals"]
    for name in OVERFITTING:
        if signals[name]["alarm"]:
            sentences.append(_alarm(name, signals[name]))
    if not found["alarm"] and found["says"] != "too short":
        sentences.append("No alarm: nothing here looks like overfitting.")
    if found["baseline"] is not None:
        sentences.append(_reach(found["baseline"], step))
    if signals["grokking"]["alarm"]:
        left = n ** (-2 * signals["grokking"]["level"])
        sentences.append(
            f"Good news since step {signals['grokking']['step']}: the effective dimension is at "
            f"{left:.0%} of what it was at memorisation, the mark of grokking; no alarm."
        )
    counts = {
        "values of LAR were not finite": found["lar_not_finite"],
        "rows repeated a step that was known": found["replayed"],
    }
    notes = [f"{count} {what}" for what, count in counts.items() if count]
    if notes:
        sentences.append(", ".join(notes).capitalize() + "; they were left out.")
    return " ".join(sentence for sentence in sentences if sentence)


def _opening(found: dict[str, Any]) -> str:
    now = f"LAR is {found['lar']:.3f} at step {found['step']}"
    if found["says"] == "too short":
        return f"{now}; {found['points']} points are too few to say more (12 at least)."
    per_doubling, per_step = found["slope_per_doubling"], found["slope_per_step"]
    rate = f"{per_doubling:+.4f} per doubling of steps, {1000 * per_step:+.5f} per 1000 steps"
    trend = (
        "settled" if found["says"] == "settled" else "rising" if per_doubling > 0 else "declining"
    )
    peak = ""
    if found["peak_step"] is not None and (lost := found["peak_lar"] - found["lar"]) > 0.005:
        peak = f", {lost:.3f} below its peak near step {found['peak_step']}"
    return f"{now} and {trend}{peak} ({rate})."


def _alarm(name: str, signal: dict[str, Any]) -> str:
    far = f"{signal['level']:.4f} now, threshold {signal['threshold']:.4f}"
    over = "" if signal["rings_now"] else "; it has ended since"
    return f"ALARM ({name}) since step {signal['step']}: {MEANING[name]} ({far}){over}."


def _reach(baseline: dict[str, Any], step: float) -> str:
    said = []
    for name, what in (("same_step_until", "step"), ("same_loss_until", "training loss")):
        until = baseline[name]
        if until is None:
            said.append(f"the baseline cannot be compared at the same {what}")
        elif until < 0.98 * step:
            said.append(f"the baseline could be compared at the same {what} until step {until}")
    return ("; ".join(said).capitalize() + ".") if said else ""


def _step(value: Array, log: Log) -> float | None:
    """The step of the log that this float32 stands for."""
    if not jnp.isfinite(value):
        return None
    return _whole(float(log.step[np.nanargmin(np.abs(log.step - float(value)))]))


def _whole(value: float) -> float:
    return int(value) if value.is_integer() else value


def _plain(value: Array) -> float | None:
    return float(str(np.float32(value))) if jnp.isfinite(value) else None
