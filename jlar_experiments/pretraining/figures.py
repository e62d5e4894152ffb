"""The static figure of the results' page: losses and LAR of all runs of a preset, from records.

    python -m jlar_experiments.pretraining.figures RUNS lar.png

The legend says what lines and marks are; LAR is smoothed.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .analysis import Run, read, smoothed

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 100,
    "savefig.dpi": 130,
    "svg.hashsalt": "jlar",  # the same records give the same file
}
COLOURS = ("#333333", "#1f4e9c", "#2c8a57", "#d1762a", "#b3364b", "#8a4fa3", "#7f7f7f")


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """First seeds, by optimiser."""
    first = min(run.config.seed for run in runs)
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.config.seed == first or len(runs) == 1:
            found.setdefault(run.config.optimiser, []).append(run)
    return found


def _arm(run: Run) -> str:
    """The run's label without its optimiser: what has a colour of its own."""
    return run.label.split(", ", 1)[1]


def _size(run: Run) -> str:
    epochs = f"{run.config.epochs:.3g}"
    return f"{_arm(run)}, {epochs} epoch{'' if epochs == '1' else 's'}"


def _colours(runs: Sequence[Run]) -> dict[str, str]:
    """Of each arm, the same in every figure."""
    arms = dict.fromkeys(_arm(run) for run in runs)
    return dict(zip(arms, itertools.cycle(COLOURS[:-1]), strict=False))  # the last is grey


def losses_and_lar(runs: list[Run]) -> Figure:
    """One column per optimiser, one colour per size of the data."""
    groups, colours = _groups(runs), _colours(runs)
    figure = Figure(figsize=(max(6.4, 3.6 * len(groups)), 4.8), layout="constrained")
    grid: np.ndarray = figure.subplots(2, len(groups), squeeze=False, sharex="col")
    for (name, group), (above, below) in zip(groups.items(), grid.T, strict=True):
        for run in group:
            step, colour = run.curve("step"), colours[_arm(run)]
            above.plot(step, run.train_loss, color=colour, linewidth=0.7, alpha=0.6)
            losses = run.curve("val_loss")[run.validated]
            above.plot(run.validated, losses, color=colour, linewidth=1.4)
            lar = smoothed(run.lar, 10)
            below.plot(step, lar, color=colour, linewidth=1.2)
            rang = list(run.alarms.values())[:1]
            below.plot(rang, lar[rang], color=colour, marker="v", markersize=7, linestyle="")
            if run.overfits:
                for axes in (above, below):
                    axes.axvline(run.overfitting_step, color=colour, linestyle=":", linewidth=0.9)
        above.set_title(name)
        below.set(xlabel="step", ylabel="LAR")
    grid[0, 0].set_ylabel("loss, nats")
    sizes = {_size(run): Line2D([], [], color=colours[_arm(run)]) for run in runs}
    kinds = {
        "validation loss": Line2D([], [], color="grey", linewidth=1.4),
        "lowest validation loss": Line2D([], [], color="grey", linestyle=":"),
        "training loss": Line2D([], [], color="grey", linewidth=0.7, alpha=0.6),
        "first alarm": Line2D([], [], color="grey", marker="v", linestyle=""),
    }
    shown = sizes | kinds
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=5)
    return figure


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m jlar_experiments.pretraining.figures FOLDER PNG")
    with matplotlib.rc_context(STYLE):
        losses_and_lar(read(Path(sys.argv[1]))).savefig(sys.argv[2])
