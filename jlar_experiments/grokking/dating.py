"""Rules that date the transition without validation data, and how well they do; from records."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from .analysis import SHARE, Timeline

Kind = Literal["ratio", "slope"]
KINDS: tuple[Kind, ...] = ("ratio", "slope")
Series = Float[np.ndarray, " logs"]

LOGS = 2  # so many logs in a row must agree before a rule alarms
LOOK_BACK = 1.5  # factor of epochs over which a slope is taken
THRESHOLDS: dict[Kind, Series] = {
    "ratio": np.linspace(0.95, 0.3, 14),
    "slope": np.geomspace(0.1, 3, 14),
}
NEAR = 0.25  # an alarm that is off by less, relative to the epoch of 95%, dates it


@dataclass(frozen=True)
class Rule:
    """An alarm after memorisation, from one measure alone.

    ratio: the measure is below `threshold` times its value at memorisation, or above that value
    over `threshold` if it is to rise. slope: its logarithm changes faster than `threshold` per
    unit of the logarithm of the epoch.
    """

    measure: str
    kind: Kind
    falls: bool
    threshold: float

    def alarm(self, line: Timeline) -> int | None:
        """The epoch of the first log at which the rule has held for `LOGS` logs."""
        start = next((i for i, row in enumerate(line.rows) if row["train_acc"] > SHARE), None)
        if start is None:
            return None
        epochs, values = series(line, self.measure)
        with np.errstate(all="ignore"):
            log = np.log(values) * (1 if self.falls else -1)
            if self.kind == "ratio":
                holds = log - log[start] < math.log(self.threshold)
            else:
                holds = _slopes(epochs, log) < -self.threshold
        for i in range(start + LOGS, len(epochs)):
            if all(holds[i - LOGS + 1 : i + 1]):
                return int(epochs[i])
        return None

    @property
    def text(self) -> str:
        """The rule in a few words."""
        if self.kind == "ratio":
            return (
                f"falls below {self.threshold:.2f}x"
                if self.falls
                else (f"rises above {1 / self.threshold:.2f}x")
            )
        return f"slope {'below -' if self.falls else 'above '}{self.threshold:.2f}"


def series(line: Timeline, measure: str) -> tuple[Series, Series]:
    """Epochs and values of all logs, nan where there is none; "a/b": a ratio of two measures."""
    if "/" in measure:
        (epochs, above), (_, below) = (series(line, each) for each in measure.split("/"))
        return epochs, above / below
    values = [row.get(measure) for row in line.rows]
    found = np.array([np.nan if value is None else value for value in values], float)
    return np.array([row["epoch"] for row in line.rows], float), found


def _slopes(epochs: Series, log: Series) -> Series:
    """d log / d ln epoch from `LOOK_BACK` times fewer epochs to each log; nan before the first."""
    time = np.log(np.maximum(epochs, 1e-9))
    before = np.interp(time - math.log(LOOK_BACK), time, log, left=np.nan)
    return (log - before) / math.log(LOOK_BACK)


def crossing(line: Timeline, accuracy: float) -> float | None:
    """The epoch at which validation accuracy first reaches this, interpolated between two logs."""
    epochs, values = series(line, "val_acc")
    above = np.flatnonzero(values >= accuracy)
    if not len(above):
        return None
    i = above[0]
    if i == 0:
        return float(epochs[0])
    share = (accuracy - values[i - 1]) / (values[i] - values[i - 1])
    return float(epochs[i - 1] + share * (epochs[i] - epochs[i - 1]))


@dataclass(frozen=True)
class Score:
    """How a rule did on some runs; the fewer false alarms and misses, then the nearer, the better.

    off: |ln(alarm / epoch of 95%)| of each run that groks and is dated.
    """

    grokking: int
    controls: int
    misses: int
    false_alarms: int
    off: tuple[float, ...]

    @property
    def order(self) -> tuple[float, float]:
        """Smaller is better."""
        return self.misses + self.false_alarms, float(np.median(self.off)) if self.off else math.inf

    @property
    def near(self) -> int:
        """How many runs are dated to within `NEAR` of the epoch of 95%."""
        return sum(math.exp(each) - 1 <= NEAR for each in self.off)


def score(rule: Rule, lines: Iterable[Timeline]) -> Score:
    """The rule's misses and false alarms; a run that reaches 95% groks, others are controls."""
    counts = {"grokking": 0, "controls": 0, "misses": 0, "false_alarms": 0}
    off = []
    for line in lines:
        alarm, truth = rule.alarm(line), crossing(line, 0.95)
        counts["controls" if truth is None else "grokking"] += 1
        if truth is None:
            counts["false_alarms"] += alarm is not None
        elif alarm is None:
            counts["misses"] += 1
        else:
            off.append(abs(math.log(alarm / truth)))
    return Score(**counts, off=tuple(off))


def chosen(
    lines: Sequence[Timeline], measure: str, kind: Kind, *, falls: bool | None = None
) -> Rule:
    """The best rule of this kind on these runs; the first of equals, which is the gentlest."""
    directions = (True, False) if falls is None else (falls,)
    rules = [
        Rule(measure, kind, direction, float(threshold))
        for direction in directions
        for threshold in THRESHOLDS[kind]
    ]
    return min(rules, key=lambda rule: score(rule, lines).order)
