"""The default thresholds of `jlar.Monitor` and their error rates, on synthetic runs.

    python -m jlar_experiments.monitoring.calibration [--logs 30] [--json PATH] [--defaults]

The ten pre-training runs of the paper are rebuilt from its table 2 (runs.py) and given seven kinds
of noise, `--logs` logs of 200 irregular points each. For every candidate of the allowed decline per
doubling and of the multiple of the noise, the floors are the least at which fewer than one in a
hundred of the logs that do not overfit alarm, for the worst kind of noise; the candidate that then
sees most overfitting logs before the middle of the 1000 steps of their least validation loss is
taken. Chosen on Adam it is judged on Muon and the reverse, with other seeds; the defaults are what
both together choose, rounded up. `--defaults` judges the monitor as it is, with and without a
baseline, on a third set of seeds. Criterion and result:
jlar_experiments/log/monitor.md. Deterministic.
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jlar

from . import runs

OPTIMISERS = ("adam", "muon")
SIZES = ("100B", "1.6B", "800M", "400M", "200M")
# Standard deviation and autocorrelation from point to point.
NOISES = (
    (0.0005, 0.0), (0.001, 0.0), (0.002, 0.0), (0.003, 0.0), (0.005, 0.0),
    (0.001, 0.6), (0.002, 0.6),
)  # fmt: skip
ALLOWED = (0.005, 0.0075, 0.010)
MULTIPLES = (0.6, 0.8, 1.0, 1.2, 1.5, 2.0)
FALSE_ALARMS = 0.01
CANDIDATES = {"decline": ALLOWED, "deviation": ("deviation",)}

Signal = str | float  # "deviation", or the decline that is allowed


@eqx.filter_jit
def trace(
    monitor: jlar.Monitor,
    steps: Float[Array, "logs points"],
    lar: Float[Array, "logs points"],
    baseline: Float[Array, "logs points"],
) -> dict[str, Float[Array, "2 logs points"]]:
    """Level and noise of the two signals after every point; -inf where there are none."""

    def update(monitor: jlar.Monitor, at: tuple[Array, ...]) -> tuple[jlar.Monitor, Any]:
        monitor = monitor.update(at[0], at[1], baseline_lar=at[2])
        signals = {name: getattr(monitor, name) for name in CANDIDATES}
        return monitor, {
            name: jnp.where(
                jnp.isfinite(each.threshold + each.level),
                jnp.stack([each.level, each.noise]),
                jnp.array([[-jnp.inf], [0.0]])[:, 0],
            )
            for name, each in signals.items()
        }

    def one(columns: tuple[Array, ...]) -> dict[str, Array]:
        return jax.lax.scan(update, monitor, columns)[1]

    traced = jax.vmap(one)((steps, lar, baseline))
    return {name: jnp.moveaxis(each, -1, 0) for name, each in traced.items()}


def traces(count: int, seed: int) -> dict[tuple, dict[str | float, np.ndarray]]:
    """By (optimiser, size, noise): the steps, the trace of the deviation, and that of the decline
    for every candidate of the allowed decline.

    The decline is traced without a baseline, the deviation from another log of the 100B run.
    """
    found = {}
    for key, columns in batches(count, seed):
        found[key] = {"steps": np.asarray(columns[0], np.float64)}
        found[key]["deviation"] = np.asarray(trace(jlar.Monitor.init(), *columns)["deviation"])
        alone = columns[0], columns[1], jnp.full_like(columns[2], jnp.nan)
        for allowed in ALLOWED:
            monitor = jlar.Monitor.init(thresholds=jlar.Thresholds(allowed=allowed))
            found[key][allowed] = np.asarray(trace(monitor, *alone)["decline"])
    return found


def batches(count: int, seed: int) -> Iterator[tuple[tuple, tuple[Array, Array, Array]]]:
    """((optimiser, size, noise), (steps, LAR, the baseline's LAR)) of `count` logs of each run."""
    for optimiser, noise in itertools.product(OPTIMISERS, NOISES):
        kind = {"sd": noise[0], "rho": noise[1], "seed": seed}
        logs = zip(*runs.logs(f"{optimiser}_100B", count, copy=1, **kind), strict=True)
        baselines = [jlar.Baseline.from_points(*log) for log in logs]
        for size in SIZES:
            steps, lar = runs.logs(f"{optimiser}_{size}", count, **kind)
            pairs = zip(baselines, steps, strict=True)
            at = np.stack([at_step(baseline, each) for baseline, each in pairs])
            a, b, c = (jnp.asarray(each, jnp.float32) for each in (steps, lar, at))
            yield (optimiser, size, noise), (a, b, c)


def at_step(baseline: jlar.Baseline, steps: np.ndarray) -> np.ndarray:
    """What `baseline.at_step` gives, without compiling for every number of knots."""
    u, knots, lar = np.log2(steps), np.asarray(baseline.doublings), np.asarray(baseline.lar)
    return np.interp(u, knots, lar, left=np.nan, right=np.nan)


def highest(traced: dict, signal: Signal, multiple: float, until: float = np.inf) -> np.ndarray:
    """Per log, the floor at which the signal just rings by step `until`, confirmed once."""
    level, noise = traced[signal]
    excess = np.where(traced["steps"] <= until, level - multiple * noise, -np.inf)
    return np.minimum(excess[:, 1:], excess[:, :-1]).max(axis=1)


def overfits(optimiser: str, size: str) -> bool:
    """Whether this run of the paper overfits within its 10,000 steps."""
    return f"{optimiser}_{size}" in runs.OVERFITTING


def floor(found: dict, signal: Signal, multiple: float, optimisers: tuple[str, ...]) -> float:
    """The least at which fewer than `FALSE_ALARMS` of the logs that do not overfit ring."""
    quiet = [key for key in found if key[0] in optimisers and not overfits(*key[:2])]
    by_noise = [
        np.concatenate([highest(found[key], signal, multiple) for key in quiet if key[2] == noise])
        for noise in NOISES
    ]
    return float(max(np.quantile(each, 1 - FALSE_ALARMS) for each in by_noise))


def seen(
    found: dict, signal: Signal, multiple: float, at: float, optimisers: tuple[str, ...]
) -> dict[str, list[float]]:
    """Share of the logs of each overfitting run that ring by the start, middle and end of the 1000
    steps of least validation loss, over all kinds of noise up to .003."""
    shares = {}
    for run, (start, end) in runs.OVERFITTING.items():
        keys = [key for key in found if f"{key[0]}_{key[1]}" == run and key[2][0] <= 0.003]
        if run.split("_")[0] in optimisers:
            shares[run] = [
                float(np.mean([highest(found[key], signal, multiple, t) > at for key in keys]))
                for t in (start, (start + end) / 2, end)
            ]
    return shares


def choice(found: dict, name: str, optimisers: tuple[str, ...]) -> dict[str, Any]:
    """The candidate of most detections by the middle at the allowed rate of false alarms."""
    candidates = []
    for signal, multiple in itertools.product(CANDIDATES[name], MULTIPLES):
        at = floor(found, signal, multiple, optimisers)
        shares = seen(found, signal, multiple, at, optimisers)
        score = float(np.mean([middle for _, middle, _ in shares.values()]))
        candidates.append({"signal": signal, "noises": multiple, "floor": at, "score": score})
    return max(candidates, key=lambda each: each["score"])


def judgement(found: dict, chosen: dict[str, Any], optimisers: tuple[str, ...]) -> dict[str, Any]:
    """False alarms of each quiet run and detections of each overfitting one, at what was chosen."""
    signal, at, multiple = chosen["signal"], chosen["floor"], chosen["noises"]
    false = {}
    for optimiser, size in itertools.product(optimisers, SIZES):
        if not overfits(optimiser, size):
            keys = [key for key in found if key[:2] == (optimiser, size)]
            rang = np.concatenate([highest(found[key], signal, multiple) > at for key in keys])
            false[f"{optimiser}_{size}"] = f"{rang.sum()} of {len(rang)}"
    return {"false_alarms": false, "seen": seen(found, signal, multiple, at, optimisers)}


@eqx.filter_jit
def first_alarms(*columns: Float[Array, "logs points"]) -> Float[Array, "logs"]:
    """Where the monitor as it is first rings in each log, whatever the signal; nan if nowhere."""

    def update(monitor: jlar.Monitor, at: tuple[Array, ...]) -> tuple[jlar.Monitor, None]:
        return monitor.update(at[0], at[1], baseline_lar=at[2]), None

    def one(*columns: Array) -> Array:
        return jax.lax.scan(update, jlar.Monitor.init(), columns)[0].first_alarm_step

    return jax.vmap(one)(*columns)


def defaults(count: int, seed: int) -> dict[str, Any]:
    """Alarms of the monitor as it is, by run: of quiet ones by noise, of the others by deadline."""
    result: dict[str, Any] = {}
    for (optimiser, size, noise), columns in batches(count, seed):
        sides = {"with baseline": columns[2], "without": jnp.full_like(columns[2], jnp.nan)}
        for side, baseline in sides.items():
            first = np.asarray(first_alarms(*columns[:2], baseline))
            run = f"{optimiser}_{size}"
            start, end = runs.OVERFITTING.get(run, (np.inf, np.inf))
            by = [int((first <= t).sum()) for t in dict.fromkeys((start, (start + end) / 2, end))]
            cell = result.setdefault(f"{run} {side}", {})
            cell[f"sd {noise[0]}, rho {noise[1]}"] = [*by, f"of {count}"]
    return result


def calibration(count: int) -> dict[str, Any]:
    """Chosen on one optimiser and judged on the other, both ways; and chosen on both."""
    chosen_on, judged_on = traces(count, 0), traces(count, 1000)
    halves = [((each,), (other,)) for each, other in itertools.permutations(OPTIMISERS)]
    result: dict[str, Any] = {}
    for name, (own, other) in itertools.product(CANDIDATES, [*halves, (OPTIMISERS, OPTIMISERS)]):
        chosen = choice(chosen_on, name, own)
        title = f"{name}, chosen on {'+'.join(own)}, judged on {'+'.join(other)}"
        result[title] = chosen | judgement(judged_on, chosen, other)
    return result


def main() -> None:
    """Print the result as JSON, and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--logs", type=int, default=30, help="per run and kind of noise [30]")
    parser.add_argument("--json", type=pathlib.Path, help="also write the result here")
    parser.add_argument(
        "--defaults", action="store_true", help="only the error rates of the monitor as it is"
    )
    arguments = parser.parse_args()
    count = arguments.logs
    found = defaults(count, 2000) if arguments.defaults else calibration(count)
    text = json.dumps({"logs": count} | found, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
