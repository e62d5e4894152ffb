"""What the records of a preset's runs say: D(t) against the gap, its controls, rates of decline."""

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from jlar._monitor import OVERFITTING

from .. import folder as folders
from .. import records
from ..errors import Refusal
from ..records import Row
from ..report import names
from .config import PretrainConfig
from .presets import PRESETS

REFERENCE = Path(__file__).parents[1] / "reference" / "table2_decline.csv"
SMOOTHED = 14  # steps of the paper's centred window over the training loss
START = 0.1  # share of the run that correlations leave out: warm-up, where every LAR rises
WINDOWS = 10  # of table 2; the first, where LAR rises, is not in it
COMPARED = ("unique_tokens", "seed", "tensor", "unroll", "checkpoint_every")

Curve = Float[np.ndarray, " steps"]
Steps = Int[np.ndarray, " logs"]


@dataclass(frozen=True)
class Run:
    """The records of one run."""

    config: PretrainConfig
    preset: str
    environment: Row
    rows: list[Row]
    inspections: list[Row]
    common: frozenset[str] = frozenset()  # settings that all runs beside it share
    name: str = ""  # of its folder

    def curve(self, name: str) -> Curve:
        """A column of metrics.jsonl over all steps, nan where it was not measured."""
        values = [row.get(name) for row in self.rows]
        return np.array([np.nan if each is None else each for each in values], float)

    @cached_property
    def lar(self) -> Curve:
        """LAR of the unembedding."""
        return self.curve("lar")

    @cached_property
    def train_loss(self) -> Curve:
        """Training loss under the centred window."""
        return smoothed(self.curve("train_loss"), SMOOTHED)

    @cached_property
    def validated(self) -> Steps:
        """Steps with a validation loss."""
        return np.flatnonzero(~np.isnan(self.curve("val_loss")))

    @cached_property
    def gap(self) -> Float[np.ndarray, " logs"]:
        """Validation loss less smoothed training loss, at the validated steps."""
        return self.curve("val_loss")[self.validated] - self.train_loss[self.validated]

    @property
    def overfitting_step(self) -> int:
        """Step of the lowest validation loss."""
        return int(self.validated[np.argmin(self.curve("val_loss")[self.validated])])

    @property
    def overfits(self) -> bool:
        """Whether the mean of five validation losses ends 2% above the lowest such mean."""
        losses = self.curve("val_loss")[self.validated]
        width = min(5, len(losses))
        means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        return bool(means[-1] > 1.02 * means.min())

    @cached_property
    def alarms(self) -> dict[str, int]:
        """Signals of overfitting that rang while it trained, and the step at which each first did;
        the earliest first."""
        first: dict[str, int] = {}
        for row in self.rows:
            for name in row.get("alarms", ()):
                first.setdefault(name, row["step"])
        return {name: step for name, step in first.items() if name in OVERFITTING}

    @property
    def alarm(self) -> str:
        """The first alarm in words."""
        if not any("alarms" in row for row in self.rows):
            return "not watched"
        return next((f"{step} ({name})" for name, step in self.alarms.items()), "none")

    @property
    def finished(self) -> bool:
        """Whether its last step is in the records."""
        return self.rows[-1]["step"] >= self.config.steps - 1

    @property
    def label(self) -> str:
        """The run among others of its preset."""
        different = [
            f"{each.name} {value}"
            for each in dataclasses.fields(PretrainConfig)
            if each.name not in (*COMPARED, "optimiser", *self.common)
            and (value := getattr(self.config, each.name)) != getattr(self._usual, each.name)
        ]
        return ", ".join([self.config.optimiser, short(self.config.unique_tokens), *different])

    @property
    def _usual(self) -> PretrainConfig:
        return PRESETS[self.preset].config(optimiser=self.config.optimiser)


def smoothed(values: Curve, width: int) -> Curve:
    """Centred mean over `width` steps, over what there is of them near the ends."""
    whole = np.concatenate([[0.0], np.cumsum(values)])
    step = np.arange(len(values))
    first, last = np.maximum(step - width // 2, 0), np.minimum(step + width // 2, len(values))
    return (whole[last] - whole[first]) / (last - first)


def short(tokens: int) -> str:
    """A number of tokens in a few characters."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{letter}"
    return str(tokens)


def read(*folders: Path) -> list[Run]:
    """All runs of two rows or more that these folders are or hold; large data first."""
    paths = [each for folder in folders for each in _runs(folder)]
    found = [
        run for path, name in zip(paths, names(paths), strict=True) if (run := _run(path, name))
    ]
    common = frozenset(
        each.name
        for each in dataclasses.fields(PretrainConfig)
        if len({getattr(run.config, each.name) for run in found}) == 1
    )
    found = [dataclasses.replace(run, common=common) for run in found]
    order = {"adam": 0, "adamw": 1, "muon": 2}
    found.sort(key=lambda r: (order[r.config.optimiser], -r.config.unique_tokens, r.config.seed))
    return found


def _runs(folder: Path) -> list[Path]:
    """The folder itself if it is a run, else those in it that may be."""
    if (folder / "metrics.jsonl").exists():
        return [folder]
    return sorted(each for each in folder.iterdir() if (each / "metrics.jsonl").exists())


def _run(path: Path, name: str) -> Run | None:
    stored = folders.read(path)
    if stored is None or stored["study"] != "pretrain":
        return None
    stored, config = folders.settings(path, "pretrain", PretrainConfig)
    if stored.get("preset") not in PRESETS:
        raise Refusal(f"{path / 'config.json'}: there is no preset {stored.get('preset')!r}")
    rows = records.read(path / "metrics.jsonl")
    inspections = records.read(path / "inspections.jsonl")
    preset = stored.pop("preset")
    return Run(config, preset, stored, rows, inspections, name=name) if len(rows) > 1 else None


def baseline(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run on the most data with the same other settings: of the same seed if there is one."""

    def settings(each: Run) -> tuple:
        return tuple(v for k, v in vars(each.config).items() if k not in COMPARED)

    same = [each for each in runs if settings(each) == settings(run)]
    most = max(each.config.unique_tokens for each in same)
    if run.config.unique_tokens == most:
        return None
    largest = [each for each in same if each.config.unique_tokens == most]
    own = [each for each in largest if each.config.seed == run.config.seed]
    return (own or largest)[0]


@dataclass(frozen=True)
class Pair:
    """A run and its baseline at the steps validated in both, after the first tenth."""

    run: Run
    base: Run

    @cached_property
    def steps(self) -> Steps:
        """The steps compared."""
        both = np.intersect1d(self.run.validated, self.base.validated)
        return both[both >= START * self.run.config.steps]

    @property
    def every_D(self) -> Curve:
        """LAR_baseline - LAR_run at every step of both; one of them may still be training."""
        both = min(len(self.base.lar), len(self.run.lar))
        return self.base.lar[:both] - self.run.lar[:both]

    @cached_property
    def D(self) -> Float[np.ndarray, " logs"]:
        """LAR_baseline - LAR_run."""
        return self.base.lar[self.steps] - self.run.lar[self.steps]

    @cached_property
    def gap(self) -> Float[np.ndarray, " logs"]:
        """Of the run."""
        return self.run.gap[np.isin(self.run.validated, self.steps)]

    @cached_property
    def loss_difference(self) -> Float[np.ndarray, " logs"]:
        """The trivial comparator: training loss of the baseline less that of the run."""
        return self.base.train_loss[self.steps] - self.run.train_loss[self.steps]

    @cached_property
    def matched(self) -> Float[np.ndarray, " logs"]:
        """D against the baseline when its training loss was the same; nan where it never was."""
        lowest = np.minimum.accumulate(self.base.train_loss)
        first = int(START * self.base.config.steps)
        losses, lars = lowest[first:][::-1], smoothed(self.base.lar, SMOOTHED)[first:][::-1]
        own = self.run.train_loss[self.steps]
        inside = (own >= losses[0]) & (own <= losses[-1])
        D = np.interp(own, losses, lars) - smoothed(self.run.lar, SMOOTHED)[self.steps]
        return np.where(inside, D, np.nan)

    def final(self, values: Float[np.ndarray, " logs"]) -> float:
        """Mean over the last tenth of the run; nan where nothing was measured there."""
        last = values[self.steps >= (1 - START) * self.run.config.steps]
        last = last[~np.isnan(last)]
        return float(last.mean()) if len(last) else float("nan")


def pairs(runs: Sequence[Run]) -> list[Pair]:
    """Every run with its baseline, where there is anything to compare yet."""
    found = [Pair(run, base) for run in runs if (base := baseline(run, runs)) is not None]
    return [pair for pair in found if len(pair.steps)]


def floors(runs: Sequence[Run]) -> list[Pair]:
    """Baselines with baselines of another seed: what D is where nothing differs."""
    largest = [run for run in runs if baseline(run, runs) is None]
    found = [
        Pair(run, base)
        for base in largest
        for run in largest
        if run.config.seed > base.config.seed
        and run.label == base.label
        and run.config.unique_tokens == base.config.unique_tokens
    ]
    return [pair for pair in found if len(pair.steps)]


def pearson(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Correlation; nan for fewer than three points or no spread."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def spearman(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Correlation of ranks; ties, which measured floats hardly have, keep their order."""
    ranks = [np.argsort(np.argsort(each, kind="stable")).astype(float) for each in (a, b)]
    return pearson(*ranks)


def declines(run: Run) -> list[tuple[float, bool]]:
    """Table 2 of one run: (decline, whether the window leads up to overfitting) for 9 windows.

    The decline is minus the slope of LAR, per tenth of the run as the paper's is per 1000 of 10,000
    steps; nan before LAR's peak. The last three windows that end before overfitting lead up to it.
    """
    size = run.config.steps // WINDOWS
    peak, stop = int(np.argmax(run.lar)), run.overfitting_step
    found = []
    for window in range(1, WINDOWS):
        end = (window + 1) * size
        steps = np.arange(window * size, min(end, len(run.lar)))
        late = len(steps) > 2 and end > peak
        slope = np.polyfit(steps, run.lar[steps], 1)[0] if late else np.nan
        leads = run.overfits and stop - 3 * size < end <= stop + size / 2
        found.append((float(-slope * size), bool(leads)))
    return found


def paper_declines() -> dict[str, list[tuple[float, bool]]]:
    """Table 2 of the paper, per run, in the order of the windows."""
    table: dict[str, list[tuple[float, bool]]] = {}
    with REFERENCE.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            cell = (float(row["decline_per_1000_steps"]), row["ends_at_overfitting"] == "1")
            table.setdefault(row["run"], []).append(cell)
    return table
