"""The monitor over a whole log, and what it says: a paragraph, and one JSON object."""

import math
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlar._monitor import ALIGNED, OVERFITTING, SIGNALS
from jlar.monitor import Baseline, Monitor, Signal

from ..logs import Log

ADVICE = (
    "Look at the validation loss; without one, stop, or go back to the last checkpoint at or "
    "before step {step}, from where the alarm built up, and take more data or more weight decay."
)
ENOUGH = 12  # points
CHUNK = 1024  # rows that are watched by one program; a log is padded to a multiple
DENSEST = 2**16  # rows per doubling of steps; float32 tells log2(step) apart to 2**-19
STILL = 0.005  # LAR per doubling of steps, that counts as settled
RECENT = 0.5  # doublings that the slope is over

Points = dict[str, Float[np.ndarray, "rows 4"]]
Columns = tuple[Float[Array, "rows"], ...]


@eqx.filter_jit
def scanned(
    monitor: Monitor, baseline: Baseline | None, log: Columns
) -> tuple[Monitor, dict[str, Float[Array, "rows 4"]]]:
    """The monitor after the rows of (steps, LARs, losses), and its signals after each.

    Rows with a nan change nothing; signals are nan where not in force.
    """

    def update(monitor: Monitor, row: tuple[Array, ...]) -> tuple[Monitor, Any]:
        step, lar, loss = row
        monitor = monitor.update(step, lar, loss=loss, baseline=baseline)
        signals = monitor.signals
        in_force = (signals.limit > 0) & (signals.heard > 0)
        traced = {name: getattr(signals, name) for name in ("level", "allowance", "S", "limit")}
        return monitor, {name: jnp.where(in_force, a, jnp.nan) for name, a in traced.items()}

    return jax.lax.scan(update, monitor, log)


def thinned(log: Log) -> Log:
    """The last row of each `DENSEST`th of a doubling: the same run, logged less often where it can.

    Rows at every step are all kept up to about step 94,000. The monitor holds the same at any
    cadence, and rows much closer to each other than these are at one step for it.
    """
    u = np.log2(np.maximum(log.step, np.finfo(float).tiny))
    use = np.diff(np.floor(u * DENSEST), append=np.inf) > 0
    return replace(log, step=log.step[use], lar=log.lar[use], loss=log.loss[use])


def watched(monitor: Monitor, log: Log, baseline: Baseline | None) -> tuple[Monitor, Points]:
    """The same of a whole log, in pieces of one length, which compile once."""
    columns = np.array([log.step, log.lar, log.loss], np.float32)
    pieces: list[dict[str, np.ndarray]] = []
    for start in range(0, len(log.step), CHUNK):
        piece = columns[:, start : start + CHUNK]
        padding = (0, 0), (0, CHUNK - piece.shape[1])
        padded = np.pad(piece, padding, constant_values=np.nan)
        monitor, traced = scanned(monitor, baseline, tuple(map(jnp.asarray, padded)))
        pieces.append({name: np.asarray(a)[: piece.shape[1]] for name, a in traced.items()})
    return monitor, {name: np.concatenate([a[name] for a in pieces]) for name in pieces[0]}


def verdict(
    monitor: Monitor, points: Points, log: Log, baseline: Baseline | None
) -> dict[str, Any]:
    """What the monitor has `watched` in a log, as the object that `jlar watch --json` prints."""
    signals = {name: _signal(monitor, points, name, log) for name in SIGNALS}
    rang = [signals[name] for name in OVERFITTING if signals[name]["rang"]]
    first = min(rang, key=lambda each: each["step"], default={"step": None, "step_before": None})
    why = [] if rang else _unknown(monitor, signals, log, baseline)
    slope = _slope(log)
    return {
        "verdict": "alarm" if rang else "cannot tell" if why else "no alarm",
        "cannot_tell_because": why,
        "rang": bool(rang),
        "first_alarm_step": first["step"],
        "step_before": first["step_before"],
        "says": _status(signals, slope, len(log.step)),
        "signals": signals,
        "noise": _noise(monitor, baseline),
        "baselines": 0 if baseline is None else baseline.runs,
        "step": _whole(float(log.step[-1])),
        "lar": float(log.lar[-1]),
        "peak_lar": _plain(monitor.peak_lar),
        "slope_per_doubling": slope,
        "width": monitor.n,
        "points": len(log.step),
    }


def _signal(monitor: Monitor, points: Points, name: str, log: Log) -> dict[str, Any]:
    signal = monitor[name]
    heard, rang = bool(signal.doublings > 0), bool(signal.first_alarm_step > 0)
    silent = np.flatnonzero(np.isnan(points["level"][:, SIGNALS.index(name)]))
    since = log.step[silent[-1] + 1 if len(silent) else 0 :]
    numbers = {key: getattr(signal, key) for key in ("level", "allowance", "S", "limit")}
    return {
        **{key: _plain(value) if heard else None for key, value in numbers.items()},
        "rang": rang,
        "step": _step(signal.first_alarm_step, log),
        "step_before": _step(signal.step_before, log) if rang else None,
        "rings_now": bool(signal.alarm),
        "in_force_since": _whole(float(since[0])) if len(since) else None,
        "until": _step(jnp.exp2(signal.doublings), log) if heard else None,
    }


def _unknown(
    monitor: Monitor, signals: dict[str, Any], log: Log, baseline: Baseline | None
) -> list[str]:
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
        if baseline.knots[1, -1] > 0 and np.isfinite(log.loss).any():
            asked["matched_loss"] = "the comparison with the baseline at the same training loss"
    why = []
    for name, what in asked.items():
        since, until = signals[name]["in_force_since"], signals[name]["until"]
        if until is None:
            why.append(f"{what} was never possible")
        elif since is None:
            left = "its losses" if name == "matched_loss" else "its steps"
            why.append(f"{what} ended at step {until} because the run left {left}")
        elif since > half:
            began = "" if baseline is None else " began at step"
            why.append(f"{what}{began} {since}")
    learnt = monitor["decline" if baseline is None else "deviation"].noise > 0
    if second > 0 and not learnt and (baseline is None or baseline.runs == 1):
        why.append(f"the first epoch, until step {_whole(second)}, has nothing to learn the noise "
                   "from")  # fmt: skip
    return why


def _noise(monitor: Monitor, baseline: Baseline | None) -> dict[str, Any]:
    """How large the noise is that the allowance rests on, and where it was learnt."""
    name = "decline" if baseline is None else "deviation"
    signal, source = monitor[name], "the default, or 2.5 times that of a point about its neighbours"
    if signal.noise > 0:
        end = _whole(float(monitor.second_epoch))
        source = f"2.5 times what the first epoch shows, until step {end}"
    elif baseline is not None and baseline.runs > 1:
        source = f"2.5 times the spread of {baseline.runs} baselines"
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
    sentences += [_alarm(name, signals[name]) for name in OVERFITTING if signals[name]["rang"]]
    if found["verdict"] == "alarm":
        sentences.append(ADVICE.format(step=found["step_before"]))
    elif found["verdict"] == "no alarm":
        sentences.append("No alarm: nothing here looks like overfitting.")
        if not found["baselines"]:
            sentences.append("Of a small model that says little without a baseline.")
    else:
        sentences.append(f"Cannot tell: {'; '.join(found['cannot_tell_because'])}.")
    if found["noise"]["allowance"]:
        noise = found["noise"]
        sentences.append(f"Up to {noise['allowance']:.4f} is taken for noise ({noise['source']}).")
    if signals["grokking"]["rang"]:
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
    return f"ALARM ({name}) since step {signal['step']}: {Signal.meaning[name]} ({far}){over}."


def _step(value: Array, log: Log) -> float | None:
    """The step of the log that this float32 stands for; None for 0."""
    if value == 0:
        return None
    return _whole(float(log.step[np.argmin(np.abs(log.step - float(value)))]))


def _whole(value: float) -> float:
    return int(value) if value.is_integer() else value


def _plain(value: Array) -> float | None:
    return float(str(np.float32(value))) if math.isfinite(value) else None
