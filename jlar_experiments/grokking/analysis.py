"""What a run's records say, seed by seed, and the paper's points to set beside it."""

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import errors, records
from ..ending import median
from ..errors import Refusal
from ..folder import settings
from ..records import Row
from .config import GrokConfig

POINTS = ("memorised", "grokked", "final")
REFERENCE = Path(__file__).parents[1] / "reference"
FRACTIONS = (0.05, 0.1, 0.2, 0.3)  # of set B
SHARE = 0.99  # of the answers right: an accuracy above it counts as learnt


@dataclass
class Timeline:
    """The logs of one seed, in order, and the epochs of its memorisation and grokking."""

    seed: int
    rows: list[Row] = field(default_factory=list)
    memorised: int | None = None
    grokked: int | None = None

    def add(self, row: Row) -> None:
        """Take in the next log."""
        self.rows.append(row)
        if row["train_acc"] > SHARE:
            if self.memorised is None and row["val_acc"] < 0.5:
                self.memorised = row["epoch"]
            if self.grokked is None and row["val_acc"] > SHARE:
                self.grokked = row["epoch"]

    @property
    def epoch(self) -> int:
        """The epoch of the last log, -1 before the first."""
        return self.rows[-1]["epoch"] if self.rows else -1

    def end(self, config: GrokConfig) -> int:
        """The last epoch of this seed, as far as it is known."""
        if self.grokked is None:
            return config.epochs
        return min(config.epochs, self.grokked + config.after_grok)

    def finished(self, config: GrokConfig) -> bool:
        """Whether this seed has trained as long as it should."""
        return self.epoch >= self.end(config)

    def at(self, point: str) -> Row | None:
        """The log at `memorised`, `grokked` or `final` (the last so far)."""
        epoch = self.epoch if point == "final" else getattr(self, point)
        return next((row for row in self.rows if row["epoch"] == epoch), None)


def timelines(config: GrokConfig, rows: Sequence[Row], path: Path) -> dict[int, Timeline]:
    """The records of every seed, in the order of the seeds.

    Raises:
        Refusal: a row is not one of this run; the message names the file that it is from.
    """
    lines = {seed: Timeline(seed) for seed in config.all_seeds}
    for number, row in enumerate(rows, start=1):
        try:
            lines[row["seed"]].add(row)
            if type(row["epoch"]) is not int:
                raise TypeError("its epoch is no whole number")
        except (KeyError, TypeError) as error:
            why = errors.line(error)
            raise Refusal(f"{path}, row {number} is not of a run like this ({why})") from error
    return lines


@dataclass(frozen=True)
class Run:
    """Everything in a run folder but the checkpoints."""

    config: GrokConfig
    environment: Row
    seeds: dict[int, Timeline]
    spectra: list[Row]

    @property
    def logs(self) -> int:
        """How many there are, of all seeds together."""
        return sum(len(line.rows) for line in self.seeds.values())

    @property
    def grokked(self) -> bool:
        """Whether any seed has."""
        return any(line.grokked is not None for line in self.seeds.values())

    @property
    def finished(self) -> bool:
        """Whether every seed has trained as long as it should."""
        return self.ended(self.config)

    def ended(self, config: GrokConfig) -> bool:
        """Whether every seed has trained as long as these settings ask for."""
        return all(line.finished(config) for line in self.seeds.values())


def read(folder: Path) -> Run:
    """The run in this folder."""
    stored, config = settings(folder, "grok", GrokConfig)
    path = folder / "metrics.jsonl"
    rows = records.read(path)
    lines = timelines(config, rows, path)
    path = folder / "alpha.jsonl"  # by benchmarks/alpha.py, where it was run
    fitted = records.read(path)
    try:
        alphas = {(each["seed"], each["epoch"]): each["alpha"] for each in fitted}
    except (KeyError, TypeError) as error:
        raise Refusal(f"{path} holds other rows ({errors.line(error)})") from error
    for row in rows if alphas else ():
        row["alpha"] = alphas.get((row["seed"], row["epoch"]))
    return Run(config, stored, lines, records.read(folder / "spectra.jsonl"))


@dataclass(frozen=True)
class Cell:
    """Mean, sample standard deviation and number of values."""

    values: tuple[float, ...]

    def text(self, digits: int) -> str:
        """The mean, with +- the standard deviation over seeds if there are several."""
        values = [value for value in self.values if value is not None and not np.isnan(value)]
        if not values:
            return "-"
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"


def figure3() -> list[dict[str, str]]:
    """The points of the paper's figure 3."""
    with (REFERENCE / "fig3_points.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def title(config: GrokConfig) -> str:
    """The run in a few words."""
    modulus = "" if config.operation.permutations else f" mod {config.p}"
    return f"{config.task}{modulus}, {100 * config.train_fraction:g}% of pairs"


def reference(config: GrokConfig) -> tuple[str, list[dict[str, str]]]:
    """The paper's points to compare with, and what they are.

    Set B, x + y with 5 to 30%, where the run is one of its configurations; else set A.
    """
    points = figure3()
    percent = f"{100 * config.train_fraction:g}%"
    same = [
        each
        for each in points
        if each["set"] == "B" and float(each["train_fraction"]) == config.train_fraction
    ]
    if config.task == "x+y" and config.p == 97 and same:
        return f"x+y mod 97, {percent}, 5 seeds", same
    set_a = [each for each in points if each["set"] == "A"]
    return "all 12 tasks, 50%, 5 seeds each", set_a


def paper_point(point: str, grokked: bool) -> str:
    """The paper's name of a point: it tells runs that grokked from others at their end."""
    if point != "final":
        return point
    return "final_grokked" if grokked else "final_not_grokked"


HEADER: list[str] = [
    "",
    "epoch",
    "LAR",
    "k_pred",
    "k95",
    "n",
    "paper LAR",
    "paper k_pred",
    "paper k95",
    "paper n",
]


def summary(run: Run) -> tuple[str, list[list[str]]]:
    """What the paper's columns are, and the table: HEADER, then one line per point."""
    source, points = reference(run.config)
    table = [list(HEADER)]
    quantities = (("epoch", 0), ("lar", 3), ("k_pred", 1), ("k95", 1))
    for point in POINTS:
        rows = [row for line in run.seeds.values() if (row := line.at(point))]
        ours = [Cell(tuple(row[name] for row in rows)).text(n) for name, n in quantities]
        theirs = [
            _mean_and_range([float(each[name]) for each in points if _is(each, point, run)], digits)
            for name, digits in (("lar", 2), ("k_pred", 0), ("k95", 0))
        ]
        count = sum(_is(each, point, run) for each in points)
        table.append([point, *ours, str(len(rows)), *theirs, str(count)])
    lines = [line for line in run.seeds.values() if line.rows]
    medians = [
        Cell(tuple(median([row[name] for row in line.rows]) for line in lines)).text(digits)
        for name, digits in quantities[1:]
    ]
    table.append(["median of last 5", "-", *medians, str(len(lines)), *["-"] * 4])
    return source, table


def rang(line: Timeline) -> dict[str, int]:
    """Each signal of the monitor that rang, and the epoch of the log at which it first did."""
    first: dict[str, int] = {}
    for row in line.rows:
        for name in row.get("alarms", ()):
            first.setdefault(name, row["epoch"])
    return first


def _is(reference_point: dict[str, str], point: str, run: Run) -> bool:
    return reference_point["checkpoint"] == paper_point(point, run.grokked)


def _mean_and_range(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{np.mean(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def of_set(runs: Iterable[Run], name: str) -> list[Run]:
    """The runs of the paper's set A or B: all settings but seed and lengths are the defaults."""
    free = ("seed", "seeds", "epochs", "after_grok", "task", "train_fraction", "spectra_every")
    chosen = []
    for run in runs:
        config = run.config
        same = dataclasses.replace(GrokConfig(), **{each: getattr(config, each) for each in free})
        in_a = config.train_fraction == 0.5
        in_b = config.task == "x+y" and config.train_fraction in FRACTIONS
        if same == config and (in_a if name == "A" else in_b):
            chosen.append(run)
    return chosen
