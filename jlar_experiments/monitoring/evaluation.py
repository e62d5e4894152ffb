"""The monitor on the records of the two studies, with trivial comparators on pre-training.

    python -m jlar_experiments.monitoring.evaluation FOLDER [--json PATH]

FOLDER holds the runs of `jlar paper grokking` or of `jlar paper pretraining`. Of the first: when
`grokking` and `decline` ring, in runs that reach 95% validation accuracy and in controls that do
not. Of the second: each run is compared with a baseline of its optimiser, the run on most unique
tokens, of every seed there is; baselines with each other. A comparator is what LAR's deviation is,
on another number: its distance from the baseline's, towards the side on which memorisation lies,
averaged in the same windows. The threshold of a comparator, and of "deviation, as the others", is
the largest level at which a pair of baselines would have rung in one half of the configurations,
the optimisers if there are two, else even and odd seeds; it is judged on the other half, both ways.
The monitor's own signals have their default thresholds, which come from elsewhere. Criterion and
results: jlar_experiments/log/monitor.md.
"""

import argparse
import itertools
import json
import pathlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from jlar._trend import Window

import jlar
from jlar._monitor import LEVEL

from .. import records, report
from ..grokking import analysis, dating, results
from ..grokking.paper import STUDY
from ..logs import Log
from . import verdict

NOISES = jlar.Thresholds().noises
SHORT = 40  # epochs of the runs of figure 9, which end before anything can grok
SMOOTH = 0.03  # doublings to either side that the validation loss is averaged over for its minimum


@dataclass(frozen=True)
class Run:
    """One record: its settings and its columns."""

    optimiser: str
    tokens: int
    seed: int
    columns: dict[str, Float[np.ndarray, "rows"]]

    @property
    def overfits_at(self) -> float | None:
        """Step of the least validation loss; None if that is among the last tenth of the steps."""
        seen = np.isfinite(self.columns["val_loss"])
        step, loss = self.columns["step"][seen], self.columns["val_loss"][seen]
        near = np.abs(np.log2(step[:, None] / step)) <= SMOOTH
        at = float(step[np.argmin(near @ loss / near.sum(axis=1))])
        return at if at < 0.9 * step[-1] else None


def read(folder: pathlib.Path) -> list[Run]:
    """All pre-training runs below a folder."""
    found = []
    for path in sorted(folder.rglob("config.json")):
        settings = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
        rows = [row for row in records.read(path.parent / "metrics.jsonl") if row["step"] > 0]
        if "unique_tokens" not in settings or not rows:
            continue
        names = ("step", "lar", "train_loss", "val_loss", "x", "w", "keep_rate")
        columns = {
            name: np.array([row.get(name, np.nan) for row in rows], np.float64) for name in names
        }
        columns["rms X"], columns["weight norm"] = np.sqrt(columns["x"]), np.sqrt(columns["w"])
        found.append(
            Run(settings["optimiser"], settings["unique_tokens"], settings["seed"], columns)
        )
    return found


# How far on the side of memorisation the first is from the second.
DISTANCES = {
    "deviation, as the others": lambda run, base: base["lar"] - run["lar"],
    "training loss": lambda run, base: base["train_loss"] - run["train_loss"],
    "rms of X": lambda run, base: np.log(run["rms X"] / base["rms X"]),
    "weight norm": lambda run, base: np.log(run["weight norm"] / base["weight norm"]),
}


@jax.jit
def _levels(
    steps: Float[Array, "rows"], values: Float[Array, "rows"]
) -> tuple[Float[Array, "rows"], Float[Array, "rows"]]:
    def update(window: Window, at: tuple[Array, Array]) -> tuple[Window, tuple[Array, Array]]:
        window, _ = window.push(jnp.log2(at[0]), at[1])
        single, noise = window.noise
        return window, (window.level(LEVEL, single)[1], noise)

    empty = jax.tree.map(lambda stacked: stacked[0], Window.empty(1))
    return jax.lax.scan(update, empty, (steps, values))[1]


def excess(run: Run, base: Run, name: str) -> Float[np.ndarray, "rows"]:
    """Level less a multiple of the noise, at two consecutive steps; -inf where there is none."""
    at = run.columns["step"]
    there = {
        key: np.interp(at, base.columns["step"], column) for key, column in base.columns.items()
    }
    distance = DISTANCES[name](run.columns, there)
    level, noise = _levels(jnp.asarray(at, jnp.float32), jnp.asarray(distance, jnp.float32))
    over = np.asarray(level) - NOISES * np.asarray(noise)
    over = np.where(np.isfinite(over), over, -np.inf)
    return np.minimum(over, np.append(-np.inf, over[:-1]))


def own_alarms(run: Run, base: Run | None) -> dict[str, float | None]:
    """Steps at which the monitor as it is rings first, by signal, and for any of them."""

    def log(each: Run) -> Log:
        step, lar, loss = (each.columns[name] for name in ("step", "lar", "train_loss"))
        return Log(step, lar, loss)

    baseline = None
    if base is not None:
        columns = (base.columns[name] for name in ("step", "lar", "train_loss"))
        baseline = jlar.Baseline.from_points(*columns)
    monitor, _ = verdict.watched(jlar.Monitor.init(), log(run), baseline)
    found = verdict.verdict(monitor, log(run), baseline)
    steps = {name: found["signals"][name]["step"] for name in verdict.OVERFITTING}
    return steps | {"any": found["first_alarm_step"]}


def alarms(pairs: list[tuple[Run, Run]], quiet: list[tuple[Run, Run]]) -> dict[str, list]:
    """By method, the first alarm of every pair (run, baseline), None for none."""
    found: dict[str, list] = {}
    for run, base in pairs:
        for name, step in own_alarms(run, base).items():
            found.setdefault(f"monitor with baseline: {name}", []).append(step)
        found.setdefault("monitor without: decline", []).append(own_alarms(run, None)["decline"])
    for name in DISTANCES:
        found[name] = []
        for run, base in pairs:
            others = [pair for pair in quiet if _half(pair[0]) != _half(run)]
            at = max((excess(*pair, name).max() for pair in others), default=np.inf)
            rings = excess(run, base, name) > max(at, 0)
            found[name].append(float(run.columns["step"][rings.argmax()]) if rings.any() else None)
    return found


_halves: dict[str, bool] = {}


def _half(run: Run) -> bool:
    return _halves[run.optimiser] if len(_halves) == 2 else bool(run.seed % 2)


def evaluation(runs: list[Run]) -> dict[str, Any]:
    """The table: by method, alarms on runs that overfit, on those that do not, and on baselines."""
    _halves.clear()
    _halves.update({name: bool(i) for i, name in enumerate(sorted({r.optimiser for r in runs}))})
    most = {run.optimiser: 0 for run in runs}
    for run in runs:
        most[run.optimiser] = max(most[run.optimiser], run.tokens)
    bases = [run for run in runs if run.tokens == most[run.optimiser]]
    pairs = [
        (run, base) for run, base in itertools.product(runs, bases)
        if run is not base and run.optimiser == base.optimiser
    ]  # fmt: skip
    quiet = [pair for pair in pairs if pair[0] in bases]
    table = {}
    for name, steps in alarms(pairs, quiet).items():
        rows = list(zip(pairs, steps, strict=True))
        table[name] = {
            "baselines": _share([step for (run, _), step in rows if run in bases]),
            "no overfitting": _share(
                [step for (run, _), step in rows if run not in bases and run.overfits_at is None]
            ),
            **_timing([(step, run.overfits_at) for (run, _), step in rows if run.overfits_at]),
        }
    return {"runs": len(runs), "pairs": len(pairs), "table": table}


def grokking(runs: list[analysis.Run]) -> dict[str, dict[str, str]]:
    """The table, by size of the task and signal; runs too short to grok are left out."""
    found: dict[str, list[tuple[float | None, float | None]]] = {}
    for run in runs:
        for line in run.seeds.values() if run.config.epochs > SHORT else ():
            epochs, lar = dating.series(line, "lar")
            loss = dating.series(line, "train_loss")[1]
            log = Log(epochs, lar, loss)
            monitor, _ = verdict.watched(jlar.Monitor.init(n=run.config.width), log, None)
            said = verdict.verdict(monitor, log, None)["signals"]
            for name in ("grokking", "decline"):
                row = found.setdefault(f"p = {run.config.p}: {name}", [])
                row.append((said[name]["step"], dating.crossing(line, 0.95)))
    table = {}
    for name, rows in found.items():
        timing = _timing([(step, epoch) for step, epoch in rows if epoch is not None])
        titles = ("grokking: ring", "before 95%", "alarm / epoch of 95%")
        controls = _share([step for step, epoch in rows if epoch is None])
        table[name] = dict(zip(titles, timing.values(), strict=True)) | {"controls: ring": controls}
    return table


def _share(steps: list[float | None]) -> str:
    return f"{sum(step is not None for step in steps)} of {len(steps)}"


def _timing(rows: list[tuple[float | None, float]]) -> dict[str, str]:
    """Detections, how many before the minimum, and the alarm's step over the minimum's."""
    ratios = [step / minimum for step, minimum in rows if step is not None]
    spread = np.quantile(ratios, [0, 0.5, 1]) if ratios else [np.nan] * 3
    return {
        "overfitting": f"{len(ratios)} of {len(rows)}",
        "before the minimum": f"{sum(ratio < 1 for ratio in ratios)} of {len(rows)}",
        "alarm / minimum": "{1:.2f} ({0:.2f}-{2:.2f})".format(*spread),
    }


def markdown(table: dict[str, dict[str, str]]) -> str:
    """The table as the README shows it."""
    columns = list(next(iter(table.values())))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row.values())} |" for name, row in table.items()]
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="of the runs")
    parser.add_argument("--json", type=pathlib.Path, help="also write the result here")
    arguments = parser.parse_args()
    if report.study(arguments.folder) == STUDY:
        found = {"table": grokking(results.read(arguments.folder))}
    else:
        found = evaluation(read(arguments.folder))
    print(markdown(found["table"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
