"""The figures over all runs of a preset, in the form of the paper's; from records only."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .analysis import Run, floors, pairs, pearson, short, smoothed
from .model import MATRICES

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.framealpha": 0.7,  # legible where it lies on a curve
    "legend.edgecolor": "none",
    "legend.fontsize": 7.5,
    "figure.dpi": 100,
    "savefig.dpi": 130,
    "svg.hashsalt": "jlar",  # the same records give the same file
}
COLOURS = ("#333333", "#1f4e9c", "#2c8a57", "#d1762a", "#b3364b", "#8a4fa3", "#7f7f7f")
Drawing = Callable[[list[Run]], Figure]


def draw(runs: list[Run], folder: Path) -> dict[str, str]:
    """Write each figure as PNG and SVG into the folder; returns name -> caption."""
    drawings: dict[str, tuple[Drawing, str]] = {
        "lar": (_lar, LAR_CAPTION),
        "differential": (_differential, DIFFERENTIAL_CAPTION),
        "controls": (_controls, CONTROLS_CAPTION),
        "spectra": (_spectra, SPECTRA_CAPTION),
        "spread": (_spread, SPREAD_CAPTION),
        "top": (_top, TOP_CAPTION),
        "ranks": (_ranks, RANKS_CAPTION),
        "matrices": (_matrices, MATRICES_CAPTION),
    }
    if not pairs(runs):
        del drawings["differential"], drawings["controls"]
    with matplotlib.rc_context(STYLE):
        for name, (drawing, _) in drawings.items():
            figure = drawing(runs)
            figure.savefig(folder / f"{name}.png")
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return {name: caption for name, (_, caption) in drawings.items()}


LAR_CAPTION = (
    "Training and validation loss (above) and LAR of the unembedding on the training batch "
    "(below), one column per optimiser, one colour per size of the data. Dotted: lowest "
    "validation loss. Triangle: first alarm of the monitor, which sees no validation loss."
)
DIFFERENTIAL_CAPTION = (
    "Generalisation gap of each run (above) and its LAR differential D, baseline less run (below): "
    "the form of the paper's figure 5. Grey: D between baselines of two seeds, the noise floor."
)
CONTROLS_CAPTION = (
    "Left: D against the gap. Middle: the trivial comparator, training loss of the baseline less "
    "that of the run. Right: D at matched training loss, against the baseline when its training "
    "loss was the same; it ends where the run's loss falls below any of the baseline's."
)
SPECTRA_CAPTION = (
    "Weight spectrum p and activation spectrum q of the unembedding over its right singular "
    "directions: the first seed of the largest and the smallest data set, first optimiser."
)
SPREAD_CAPTION = (
    "Standard deviations of p and q and their Pearson and Spearman correlation over the run: the "
    "form of the paper's figure 12."
)
TOP_CAPTION = (
    "The leading direction: p1, q1, and the split LAR = L1 + D1 into the first direction and the "
    "rest. In the paper the signature of overfitting is in L1, through q1, with Muon also p1."
)
RANKS_CAPTION = "Stable and effective rank of the unembedding: the form of the paper's figure 13."
MATRICES_CAPTION = (
    "LAR of every other matrix, mean over layers; full lines: baseline, dashed: smallest data set. "
    "The paper's figures 17 to 20 in one."
)


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """First seeds, by optimiser."""
    first = min(run.config.seed for run in runs)
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.config.seed == first or len(runs) == 1:
            found.setdefault(run.config.optimiser, []).append(run)
    return found


def _grid(rows: int, columns: int, height: float = 2.4) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(max(6.4, 3.6 * columns), height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex="col")


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


def _lar(runs: list[Run]) -> Figure:
    groups, colours = _groups(runs), _colours(runs)
    figure, grid = _grid(2, len(groups))
    for (name, group), (above, below) in zip(groups.items(), grid.T, strict=True):
        for run in group:
            step, colour = run.curve("step"), colours[_arm(run)]
            above.plot(step, run.train_loss, color=colour, linewidth=0.7, alpha=0.6)
            losses = run.curve("val_loss")[run.validated]
            above.plot(run.validated, losses, color=colour, linewidth=1.4, label=_size(run))
            lar = smoothed(run.lar, 10)
            below.plot(step, lar, color=colour, linewidth=1.2)
            rang = list(run.alarms.values())[:1]
            below.plot(rang, lar[rang], color=colour, marker="v", markersize=7, linestyle="")
            if run.overfits:
                for axes in (above, below):
                    axes.axvline(run.overfitting_step, color=colour, linestyle=":", linewidth=0.9)
        above.set_title(f"{name}: validation (thick), training loss")
        above.legend(loc="lower left")
        below.set(xlabel="step", ylabel="LAR")
    grid[0, 0].set_ylabel("loss, nats")
    return figure


def _differential(runs: list[Run]) -> Figure:
    found, colours = pairs(runs), _colours(runs)
    names = list(dict.fromkeys(pair.run.config.optimiser for pair in found))
    figure, grid = _grid(2, len(names))
    for name, (above, below) in zip(names, grid.T, strict=True):
        own = [pair for pair in found if pair.run.config.optimiser == name]
        for pair in own:
            colour = colours[_arm(pair.run)]
            first = pair.run.config.seed == min(each.run.config.seed for each in own)
            above.plot(
                pair.run.validated, pair.run.gap, color=colour, linewidth=1.2,
                label=_size(pair.run) if first else None,
            )  # fmt: skip
            below.plot(smoothed(pair.every_D, 10), color=colour, linewidth=1)
        for pair in floors([run for run in runs if run.config.optimiser == name]):
            below.plot(smoothed(pair.every_D, 10), color="grey", linewidth=0.7)
        above.set_title(f"{name}: generalisation gap")
        above.legend()
        below.set(xlabel="step", ylabel="D = LAR$_{baseline}$ - LAR")
    grid[0, 0].set_ylabel("nats")
    return figure


def _controls(runs: list[Run]) -> Figure:
    found, colours = pairs(runs), _colours(runs)
    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for pair in found:
        colour = colours[_arm(pair.run)]
        for axes, values in ((left, pair.D), (middle, pair.loss_difference)):
            r = pearson(values, pair.gap)
            axes.plot(
                pair.gap,
                values,
                ".",
                color=colour,
                markersize=3,
                label=f"seed {pair.run.config.seed}: r = {r:.3f}",
            )
        right.plot(pair.steps, pair.matched, color=colour, linewidth=1)
    for pair in floors(runs):
        right.plot(pair.steps, pair.matched, color="grey", linewidth=0.7)
    right.axhline(0, color="grey", linewidth=0.6)
    left.set(xlabel="generalisation gap, nats", ylabel="D")
    middle.set(xlabel="generalisation gap, nats", ylabel="difference of training losses, nats")
    right.set(xlabel="step", ylabel="D at matched training loss")
    if len(found) <= 4:
        left.legend()
        middle.legend()
    arms = list(dict.fromkeys(_arm(pair.run) for pair in found))
    if len(arms) > 1:
        right.legend([Line2D([], [], color=colours[arm]) for arm in arms], arms)
    return figure


def _spectra(runs: list[Run]) -> Figure:
    first = [run for run in next(iter(_groups(runs).values())) if run.inspections]
    chosen = [first[0], first[-1]] if len(first) > 1 else first
    figure = Figure(figsize=(9.2, 2.5 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), 4, squeeze=False, sharey=True, sharex=True)
    for run, line in zip(chosen, grid, strict=True):
        rows = run.inspections
        picked = [rows[round(i * (len(rows) - 1) / 3)] for i in range(4)]
        for row, axes in zip(picked, line, strict=True):
            index = np.arange(1, len(row["p"]) + 1)
            axes.loglog(index, row["q"], ".", color="#d1762a", markersize=3, label="q, activations")
            axes.loglog(index, row["p"], color="#1f4e9c", label="p, weights")
            axes.set_title(f"step {row['step']}, corr {_number(row['corr'])}", fontsize=8.5)
        line[0].set_ylabel(f"{run.config.optimiser}, {short(run.config.unique_tokens)}")
    for axes in grid[-1]:
        axes.set_xlabel("direction i")
    grid[0, -1].legend()
    return figure


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _over(runs: list[Run], quantities: dict[str, Callable[[dict], float | None]]) -> Figure:
    """Inspected quantities over the run: a row for each, a column per optimiser."""
    groups, colours = _groups(runs), _colours(runs)
    figure, grid = _grid(len(quantities), len(groups), 1.7)
    for (name, group), column in zip(groups.items(), grid.T, strict=True):
        for run in group:
            steps, colour = [row["step"] for row in run.inspections], colours[_arm(run)]
            for axes, of in zip(column, quantities.values(), strict=True):
                values = [of(row) for row in run.inspections]
                shown = [np.nan if each is None else each for each in values]
                axes.plot(steps, shown, color=colour, linewidth=1.2, label=_size(run))
        column[0].set_title(name)
        column[0].legend()
        column[-1].set_xlabel("step")
    for axes, label in zip(grid[:, 0], quantities, strict=True):
        axes.set_ylabel(label)
    return figure


def _spread(runs: list[Run]) -> Figure:
    names = {"$\\sigma_p$": "sigma_p", "$\\sigma_q$": "sigma_q", "Pearson": "corr"}
    names["Spearman"] = "rank_corr"
    return _over(runs, {label: lambda row, n=n: row[n] for label, n in names.items()})


def _top(runs: list[Run]) -> Figure:
    return _over(
        runs,
        {
            "$p_1$": lambda row: row["p"][0],
            "$q_1$": lambda row: row["q"][0],
            "$L_1$": lambda row: row["L1"],
            "$D_1$": lambda row: row["D1"],
        },
    )


def _ranks(runs: list[Run]) -> Figure:
    names = {"stable rank": "stable_rank", "effective rank": "effective_rank"}
    return _over(runs, {label: lambda row, n=n: row[n] for label, n in names.items()})


def _matrices(runs: list[Run]) -> Figure:
    groups = _groups(runs)
    figure, grid = _grid(1, len(groups), 3.2)
    for (name, group), axes in zip(groups.items(), grid[0], strict=True):
        ends = [group[0], group[-1]] if len(group) > 1 else group
        for run, line in zip(ends, ("-", "--"), strict=False):
            _matrix_lines(axes, run, line, labelled=run is group[0])
        axes.set(title=name, xlabel="step", ylabel="LAR, mean over layers")
        axes.legend(ncols=2)
    return figure


def _matrix_lines(axes: Axes, run: Run, line: str, *, labelled: bool) -> None:
    steps = [row["step"] for row in run.inspections]
    for matrix, colour in zip(MATRICES, COLOURS, strict=True):
        values = [
            np.mean([np.nan if each is None else each for each in row["lars"][matrix]])
            for row in run.inspections
        ]
        label = matrix if labelled else None
        axes.plot(steps, values, line, color=colour, linewidth=1.1, label=label)
