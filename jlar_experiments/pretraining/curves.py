"""The panels of the report on pre-training runs: one colour per run in all of them."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..panels import COLOURS, GREY, Curve, Dash, Panel
from .analysis import Run, floors, pairs, pearson, smoothed
from .model import MATRICES

SMOOTHED = 10  # steps of the mean over LAR and D

LOSSES = "Full line: validation; dotted: training, a mean over 14 steps."
LAR = (
    "LAR of the unembedding on the training batches, a mean over 10 steps. Triangle: the monitor's "
    "first alarm, which sees no validation loss. Circle: the lowest validation loss of a run that "
    "overfits."
)
DIMENSION = (
    "k, the effective dimension n^(2(1-LAR)), is how many directions the data and the matrix share "
    "(n is the width)."
)
D = (
    "D is LAR of the baseline (the run on the most data with the same other settings) less LAR of "
    "the run at the same step: what LAR has lost by seeing the same data again. Grey: D between "
    "baselines of two seeds, the noise floor. The form of the paper's figure 5."
)
MATCHED = (
    "D against the baseline when its training loss was the same; it ends where the run's loss "
    "falls below any of the baseline's."
)
AGAINST = "{} against the generalisation gap, one point per validation; r is Pearson's correlation."
SPLIT = (
    "Of the leading singular direction: its share p1 of the matrix's energy and q1 of the data's, "
    "and LAR = L1 + D1, its part in that direction and in the rest. In the paper overfitting shows "
    "in L1, through q1, with Muon also p1."
)
INSPECTED = {
    "Spread of p": ("sigma_p", "Standard deviation of p, each direction's share of the matrix."),
    "Spread of q": ("sigma_q", "Standard deviation of q, each direction's share of the data."),
    "Correlation of p and q": ("corr", "Pearson's (the form of the paper's figure 12)."),
    "Rank correlation of p and q": ("rank_corr", "Spearman's."),
    "Stable rank": ("stable_rank", "Energy of the unembedding over its largest direction's."),
    "Effective rank": ("effective_rank", "The exponential of the entropy of p."),
}


def coloured(runs: Sequence[Run]) -> dict[str, str]:
    """The colour of each run, by its name."""
    return dict(zip((run.name for run in runs), itertools.cycle(COLOURS), strict=False))


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Losses, LAR and k; the gap, D and its controls; what was inspected; spectra at the end."""
    colours = coloured(runs)

    def over(values: Callable[[Run], Any], what: str = "", dash: Dash = "solid") -> list[Curve]:
        return [
            Curve(what + run.name, colours[run.name], run.curve("step"), values(run), dash)
            for run in runs
        ]

    def validated(values: Callable[[Run], Any], what: str = "") -> list[Curve]:
        return [
            Curve(what + run.name, colours[run.name], run.validated, values(run)) for run in runs
        ]

    validation = validated(lambda run: run.curve("val_loss")[run.validated], "validation, ")
    training = over(lambda run: run.train_loss, "training, ", "dot")
    lar = [*over(lambda run: smoothed(run.lar, SMOOTHED)), *_marks(runs, colours)]
    return [
        Panel("Loss, nats", LOSSES, "step", "loss", [*validation, *training]),
        Panel("LAR", LAR, "step", "LAR", lar),
        Panel(
            "Generalisation gap, nats",
            "Validation loss less training loss.",
            "step",
            "gap",
            validated(lambda run: run.gap),
        ),
        Panel(
            "Effective dimension",
            DIMENSION,
            "step",
            "k",
            over(lambda run: run.config.width ** (2 * (1 - smoothed(run.lar, SMOOTHED)))),
        ),
        *_differential(runs, colours),
        *_inspected(runs, colours),
        _spectra(runs, colours),
    ]


def _marks(runs: Sequence[Run], colours: dict[str, str]) -> list[Curve]:
    curves = []
    for run in runs:
        lar, marks = smoothed(run.lar, SMOOTHED), {}
        if run.overfits:
            marks["circle-open"] = ("lowest validation loss", run.overfitting_step)
        for signal, step in list(run.alarms.items())[:1]:
            marks["triangle-down"] = (f"monitor: {signal}", step)
        for mark, (words, step) in marks.items():
            label = f"{words}, {run.name}"
            curves.append(Curve(label, colours[run.name], [step], lar[[step]], mark=mark))
    return curves


def _differential(runs: Sequence[Run], colours: dict[str, str]) -> list[Panel]:
    """D over the run, at matched loss, and against the gap beside the loss's own difference."""
    found, floor = pairs(runs), floors(runs)
    if not found:
        return []
    every = [(p.run.name, colours[p.run.name], p) for p in found]
    every += [(f"{p.run.name} and {p.base.name}", GREY, p) for p in floor]
    against: dict[str, list[Curve]] = {"D": [], "The difference of training losses": []}
    for pair in found:
        measures = (pair.D, pair.loss_difference)
        for curves, values in zip(against.values(), measures, strict=True):
            label = f"{pair.run.name}: r = {pearson(values, pair.gap):.3f}"
            curves.append(Curve(label, colours[pair.run.name], pair.gap, values, mark="circle"))
    over = [
        Curve(name, colour, np.arange(len(pair.every_D)), smoothed(pair.every_D, SMOOTHED))
        for name, colour, pair in every
    ]
    matched = [Curve(name, colour, pair.steps, pair.matched) for name, colour, pair in every]
    return [
        Panel("Differential D", D, "step", "D", over),
        Panel("D at the same training loss", MATCHED, "step", "D", matched),
        *(
            Panel(f"{what} against the gap", AGAINST.format(what), "gap, nats", y, curves,
                  together=False)
            for (what, curves), y in zip(against.items(), ("D", "nats"), strict=True)
        ),
    ]  # fmt: skip


def _inspected(runs: Sequence[Run], colours: dict[str, str]) -> list[Panel]:
    def panel(title: str, caption: str, y: str, of: Callable[[dict], Any]) -> Panel:
        curves = [
            Curve(
                run.name,
                colours[run.name],
                [row["step"] for row in run.inspections],
                [_nan(of(row)) for row in run.inspections],
            )
            for run in runs
            if run.inspections
        ]
        return Panel(title, caption, "step", y, curves)

    split: dict[str, Callable[[dict], Any]] = {
        "p1": lambda row: row["p"][0],
        "q1": lambda row: row["q"][0],
        "L1": lambda row: row["L1"],
        "D1": lambda row: row["D1"],
    }
    first = next(iter(split))
    return [
        *(panel(name, SPLIT if name == first else "", name, of) for name, of in split.items()),
        *(
            panel(title, caption, name, lambda row, name=name: row[name])
            for title, (name, caption) in INSPECTED.items()
        ),
        *(
            panel(
                f"LAR of {matrix}",
                "Mean over layers (the form of the paper's figures 17 to 20).",
                "LAR",
                lambda row, matrix=matrix: np.mean([_nan(each) for each in row["lars"][matrix]]),
            )
            for matrix in MATRICES
        ),
    ]


def _nan(value: float | None) -> float:
    return np.nan if value is None else value


def _spectra(runs: Sequence[Run], colours: dict[str, str]) -> Panel:
    curves = []
    for run in runs:
        for row in run.inspections[-1:]:
            index = np.arange(1, len(row["p"]) + 1)
            letters: tuple[tuple[str, str, Dash], ...]
            letters = (("p", "weights", "solid"), ("q", "data", "dot"))
            for letter, what, dash in letters:
                values = np.where(np.array(row[letter]) > 0, row[letter], np.nan)
                label = f"{letter}, {what}, {run.name}"
                curves.append(Curve(label, colours[run.name], index, values, dash))
    words = (
        "p, the share of the matrix's energy in each singular direction (full line), and q, the "
        "share of the data's (dotted), at the last inspection."
    )
    return Panel("Spectra", words, "direction i", "share of energy", curves, log="xy")
