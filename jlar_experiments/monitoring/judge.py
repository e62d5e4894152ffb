"""What a person loses by believing the monitor, beside trivial comparators.

    python -m jlar_experiments.monitoring.judge FOLDER [FOLDER ...] [--json PATH]
    python -m jlar_experiments.monitoring.judge curves [--logs 30] [--json PATH]

A FOLDER holds the logs of `suite` or the runs of a pre-training study. Healthy are, of the suite,
the runs whose text is seen once, of a study those with most unique text. The baseline of a healthy
run is the other healthy runs of its recipe, that of another run all of them. A run overfits if its
validation loss is lowest before nine tenths of its steps. Regret is the validation loss at the
first alarm, or at the end if there is none, less the lowest. A comparator is the signal `deviation`
of another number than LAR, towards the side on which memorisation lies; its allowance is a multiple
of the noise, the least at which no more than one in eighteen healthy runs of the suite's half "fit"
rings. "curves" are the paper's runs of 3B parameters, rebuilt from its table 2 with six kinds of
noise. Criterion: log/monitor.md.
"""

import argparse
import collections
import gzip
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jlar.monitor import Baseline, Monitor, Thresholds

from .. import records
from ..logs import Log
from . import runs, suite, verdict

Columns = dict[str, Float[np.ndarray, "rows"]]
# Toward memorisation these fall. The unit only matters for what the monitor takes for rounding.
COMPARATORS: dict[str, Callable[[Columns], np.ndarray]] = {
    "LAR, treated as the comparators": lambda log: log["lar"],
    "training loss": lambda log: log["train_loss"] / 10,
    "rms of X": lambda log: -0.5 * np.log(log["x"]) / 10,
    "norm of W": lambda log: -0.5 * np.log(log["w"]) / 10,
}
FALSE_ALARMS = 1 / 18  # of the healthy runs of the half that chooses
DRAWS = 5000
NOISES = ((0.0005, 0.0), (0.001, 0.0), (0.0023, 0.0), (0.003, 0.0), (0.001, 0.6), (0.002, 0.6))
"""Of the curves: standard deviation, and autocorrelation from point to point."""


@dataclass(frozen=True)
class Run:
    """The log of one run."""

    half: str
    recipe: str
    seed: int
    healthy: bool
    log: Columns

    @property
    def validations(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps of the validations, and their losses."""
        seen = np.isfinite(self.log["val_loss"])
        return self.log["step"][seen], self.log["val_loss"][seen]

    @property
    def lowest(self) -> float:
        """Step of the lowest validation loss."""
        step, loss = self.validations
        return float(step[np.argmin(loss)])

    @property
    def overfits(self) -> bool:
        """Whether that is not among the last tenth."""
        return not self.healthy and self.lowest < 0.9 * self.log["step"][-1]

    def regret(self, alarm: float) -> float:
        """What stopping at the alarm costs, in nats; 0 stands for none."""
        step, loss = self.validations
        return float(np.interp(alarm or step[-1], step, loss) - loss.min())


def read(folder: Path) -> list[Run]:
    """All runs of a folder, of the suite or of a study."""
    found = []
    for path in sorted(folder.glob("*.jsonl.gz")):
        name, count = path.name.removesuffix(".jsonl.gz").rsplit("-", 1)
        recipe = suite.RECIPES[name]
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        healthy = int(count) == recipe.steps * recipe.batch
        for seed in range(suite.SEEDS):
            own = _columns([row for row in rows if row["seed"] == seed])
            found.append(Run(recipe.half, name, seed, healthy, own))
    studied = []
    for path in sorted(folder.rglob("config.json")):
        settings = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
        if "unique_tokens" in settings:
            rows = [row for row in records.read(path.parent / "metrics.jsonl") if row["step"] > 0]
            studied.append((settings, _columns(rows)))
    most = max((settings["unique_tokens"] for settings, _ in studied), default=0)
    for settings, log in studied:
        name = f"{folder.name}, {settings['optimiser']}"
        healthy = settings["unique_tokens"] == most
        found.append(Run("study", name, settings["seed"], healthy, log))
    return found


def _columns(rows: list[dict[str, Any]]) -> Columns:
    names = ("step", "lar", "train_loss", "val_loss", "x", "w")
    return {name: np.array([row.get(name, np.nan) for row in rows], np.float64) for name in names}


def pairs(found: list[Run]) -> list[tuple[Run, list[Run]]]:
    """Each run, with the healthy runs of its recipe but itself."""
    with_others = []
    for run in found:
        others = [r for r in found if r.recipe == run.recipe and r.healthy and r is not run]
        if others:
            with_others.append((run, others))
    return with_others


def monitored(run: Run, others: Iterable[Run]) -> float:
    """Step of the first alarm of the monitor as it is; 0 for none."""
    logs = [(r.log["step"], r.log["lar"], r.log["train_loss"]) for r in others]
    baseline = Baseline.from_runs(logs) if logs else None
    log = Log(run.log["step"], run.log["lar"], run.log["train_loss"])
    return float(verdict.watched(Monitor.init(), log, baseline)[0].first_alarm_step)


def compared(run: Run, others: Iterable[Run], name: str, noises: float) -> float:
    """The same of the signal `deviation` of a comparator."""

    def values(each: Run) -> np.ndarray:
        # The monitor says nothing of a LAR that was never above .53; these have no such bound.
        return COMPARATORS[name](each.log) + 10

    baseline = Baseline.from_runs([(each.log["step"], values(each), None) for each in others])
    monitor = Monitor.init(thresholds=Thresholds(allowance=1e-6, noises=noises))
    silent = np.full(len(run.log["step"]), np.nan)
    log = Log(run.log["step"], values(run), silent)
    return float(verdict.watched(monitor, log, baseline)[0]["deviation"].first_alarm_step)


def multiple(chooses: list[tuple[Run, list[Run]]], name: str) -> float:
    """Of the noise: the least of .5, .57 ... 29 at which hardly any healthy run of these rings."""
    healthy = [pair for pair in chooses if pair[0].healthy]
    for candidate in np.round(0.5 * 1.15 ** np.arange(30), 2):
        if sum(compared(*pair, name, candidate) > 0 for pair in healthy) <= FALSE_ALARMS * len(
            healthy
        ):
            return float(candidate)
    raise ValueError(f"no multiple of the noise keeps the healthy runs of {name} quiet")


def alarms(judged: list[tuple[Run, list[Run]]], chosen: dict[str, float]) -> dict[str, list[float]]:
    """By method, the first alarm of each of the judged runs; 0 for none."""
    found = {
        "monitor, with baselines": [monitored(*pair) for pair in judged],
        "monitor, without": [monitored(run, ()) for run, _ in judged],
    }
    for name, times in chosen.items():
        found[name] = [compared(*pair, name, times) for pair in judged]
    found["oracle"] = [run.lowest if run.overfits else 0.0 for run, _ in judged]
    return found


def table(judged: list[Run], found: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """By method: regret, step of the alarm over that of the lowest loss, false alarms."""
    overfit = [run.overfits for run in judged]
    rows = {}
    for name, steps in found.items():
        regrets = [r.regret(at) for r, at, use in zip(judged, steps, overfit, strict=True) if use]
        ratios = [at / r.lowest for r, at in zip(judged, steps, strict=True) if r.overfits and at]
        others = [at for r, at in zip(judged, steps, strict=True) if not (r.overfits or r.healthy)]
        healthy = [at for run, at in zip(judged, steps, strict=True) if run.healthy]
        rows[name] = {
            "regret": float(np.mean(regrets)),
            "median regret": float(np.median(regrets)),
            "rings": f"{len(ratios)} of {sum(overfit)}",
            "before the lowest": f"{sum(r < 1 for r in ratios)} of {sum(overfit)}",
            "alarm / lowest": np.round(np.quantile(ratios or [np.nan], [0.5, 0, 1]), 2).tolist(),
            "false alarms": f"{sum(at > 0 for at in healthy)} of {len(healthy)}",
            "no minimum yet: rings": f"{sum(at > 0 for at in others)} of {len(others)}",
        }
    return rows


def difference(
    judged: list[Run], first: list[float], second: list[float]
) -> tuple[float, float, float]:
    """Mean regret of the first less the second, and its 95% interval over the recipes."""
    by_recipe = collections.defaultdict(list)
    for run, a, b in zip(judged, first, second, strict=True):
        if run.overfits:
            by_recipe[run.recipe].append(run.regret(a) - run.regret(b))
    groups, rng = list(by_recipe.values()), np.random.default_rng(0)
    means = []
    for _ in range(DRAWS):
        drawn = rng.integers(len(groups), size=len(groups))
        means.append(np.mean([x for i in drawn for x in groups[i]]))
    all_of_them = [x for group in groups for x in group]
    return float(np.mean(all_of_them)), *np.quantile(means, [0.025, 0.975]).tolist()


def judgement(folders: list[Path], chosen: dict[str, float] | None = None) -> dict[str, Any]:
    """The tables of the suite's judged half, of each of its recipes, and of each study.

    The search for the multiples of the noise is most of the time; `chosen` saves it.
    """
    every = [pair for folder in folders for pair in pairs(read(folder))]
    chooses = [pair for pair in every if pair[0].half == "fit"]
    chosen = chosen or {name: multiple(chooses, name) for name in COMPARATORS}
    result: dict[str, Any] = {"multiples of the noise": chosen}
    for half in ("judge", "fit", "study"):
        judged = [pair for pair in every if pair[0].half == half]
        if not judged:
            continue
        found, only = alarms(judged, chosen), [run for run, _ in judged]
        result[half] = {
            "table": table(only, found),
            "regret less that of the training loss": {
                name: difference(only, steps, found["training loss"])
                for name, steps in found.items()
            },
        }
        for recipe in dict.fromkeys(run.recipe for run in only):
            own = [i for i, run in enumerate(only) if run.recipe == recipe]
            if any(only[i].overfits for i in own):
                part = {name: [steps[i] for i in own] for name, steps in found.items()}
                result[half][recipe] = table([only[i] for i in own], part)
    return result


def curves(count: int, seed: int = 2000) -> dict[str, Any]:
    """By run of the paper: how many of its logs ring, and by when; one log of 100B as baseline."""
    each_scanned = eqx.filter_vmap(verdict.scanned, in_axes=(None, eqx.if_array(0), 0))
    result: dict[str, Any] = {"logs of each run and noise": count}
    for optimiser, side in itertools.product(("adam", "muon"), ("with baseline", "without")):
        firsts = collections.defaultdict(list)
        for sd, rho in NOISES:
            kind = {"sd": sd, "rho": rho, "seed": seed}
            baseline = None
            if side == "with baseline":
                logs = zip(*runs.logs(f"{optimiser}_100B", count, copy=1, **kind), strict=True)
                each = [Baseline.from_runs([(*log, None)]) for log in logs]
                baseline = jax.tree.map(lambda *a: jnp.stack(a), *each)
            for size in ("100B", "1.6B", "800M", "400M", "200M"):
                name = f"{optimiser}_{size}"
                steps, lar = runs.logs(name, count, **kind)
                log = (jnp.asarray(each) for each in (steps, lar, np.full(lar.shape, np.nan)))
                monitors, _ = each_scanned(Monitor.init(), baseline, tuple(log))
                firsts[name].append(np.asarray(monitors.first_alarm_step))
        for name, by_noise in firsts.items():
            first = np.concatenate(by_noise)
            rang, row = first > 0, {}
            row["rings"] = f"{rang.sum()} of {len(first)}"
            if name in runs.OVERFITTING:
                start, end = runs.OVERFITTING[name]
                for where, at in (("start", start), ("middle", (start + end) / 2), ("end", end)):
                    row[f"by the {where}"] = f"{(rang & (first <= at)).sum()} of {len(first)}"
                median = np.median(np.where(rang, first, np.inf))
                row["median lead"] = round(1 - float(median) / ((start + end) / 2), 3)
            result[f"{name}, {side}"] = row
    return result


def main() -> None:
    """Print the result as JSON, and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", help='of logs, or "curves"')
    parser.add_argument("--logs", type=int, default=30, help="of each curve and noise [30]")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    if arguments.folders == ["curves"]:
        found = curves(arguments.logs)
    else:
        found = judgement([Path(each) for each in arguments.folders])
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
