"""The paper's figures 1, 2, 3, 9 and 21 to 25 over all runs of a folder, from records alone."""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .analysis import POINTS, Run, Timeline, figure3, of_set, paper_point, title
from .config import GrokConfig
from .figures import ACCURACY, LAR, POINT_COLOURS, STYLE, band, save, spectrum, square
from .plan import SMALL_P, small

Lines = list[Timeline]
FREE = ("seed", "seeds", "epochs", "after_grok", "spectra_every", "log_every")
PARTS = ("final_grokked", "final_not_grokked")


def label(config: GrokConfig) -> str:
    """The run in a few words: its task and what else is not the default, or the relative's."""
    usual = small() if config.p == SMALL_P else GrokConfig()
    if config.model == "mlp":
        usual = dataclasses.replace(usual, layers=GrokConfig.layers)
    said = (*FREE, "task", "train_fraction", "p")
    names = [each.name for each in dataclasses.fields(config) if each.name not in said]
    other = [name for name in names if getattr(config, name) != getattr(usual, name)]
    return ", ".join([title(config), *(_setting(name, getattr(config, name)) for name in other)])


def _setting(name: str, value: object) -> str:
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return value if isinstance(value, str) else f"{words} {value:g}"


def cells(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone, under what they have in common."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(label(run.config), []).append(run)
    return found


def lines(runs: Iterable[Run]) -> Lines:
    """Every seed of these runs."""
    return [line for run in runs for line in run.seeds.values()]


def draw(runs: Sequence[Run], folder: Path) -> dict[str, str]:
    """Write each figure that the runs allow as PNG and SVG; returns name -> caption."""
    a, b = of_set(runs, "A"), of_set(runs, "B")
    first = [run for run in a if run.config.task == "x+y"][:1]
    others = [run for run in a if run.config.task != "x+y"]
    dips = [run for run in runs if run.config.log_every == 1]
    relatives = [run for run in runs if run.config.p == SMALL_P]
    drawings: dict[str, tuple[Callable[[], Figure], Sequence[Run], str]] = {
        "figure1": (lambda: _grid([*a, *b], _mean), [*a, *b], MEAN),
        "figure2": (lambda: _spectra(first), first, SPECTRA.format("x+y at 50%", "2")),
        "figure3": (lambda: _scatter({"A": a, "B": b}), [*a, *b], SCATTER),
        "figure9": (lambda: _dips(dips), dips, DIPS),
        "figure21": (lambda: _spectra(others), others, SPECTRA.format("the other tasks", "21")),
        "figure22": (lambda: _spectra(b), b, SPECTRA.format("set B", "22")),
        "figure23": (lambda: _grid(a, _each_seed), a, SEEDS.format("set A", "23")),
        "figure24": (lambda: _grid(b, _each_seed), b, SEEDS.format("set B", "24")),
        "relative": (lambda: _grid(relatives, _mean), relatives, RELATIVE),
        "figure25": (lambda: _grid([*a, *b], _full_range), [*a, *b], FULL),
    }
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, (drawing, wanted, caption) in drawings.items():
            if wanted:
                save(drawing(), folder / name)
                drawn[name] = caption
    return drawn


MEAN = (
    "LAR of the unembedding over the training set and validation accuracy, mean ± standard "
    "deviation over seeds, finished ones keeping their last value; dashed: mean epochs of "
    "memorised and grokked (the paper's figure 1)."
)
SPECTRA = (
    "Weight spectrum p and activation spectrum q at memorised, grokked and final, {}, one seed of "
    "each (the paper's figure {})."
)
SCATTER = (
    "k95 against k_pred = n^(2(1-LAR)), every run; small: the paper's points (its figure 3). Left "
    "set A, right set B."
)
DIPS = (
    "How far LAR falls below its initial value within the first epochs, against batch size over "
    "training set size, one log per epoch (the paper's figure 9)."
)
SEEDS = "LAR and validation accuracy of each seed, {} (the paper's figure {})."
RELATIVE = (
    "Past the paper, on a smaller relative (p = 31, width 64, one block): LAR and validation "
    "accuracy of tasks, controls and set-ups."
)
FULL = "The same over the full range of epochs, which is logarithmic (the paper's figure 25)."


def _grid(runs: Sequence[Run], panel: Callable[[Axes, Axes, Lines], None]) -> Figure:
    """One panel per cell: LAR on the left axis, validation accuracy on the right."""
    found = cells(runs)
    columns = min(3, len(found))
    height = math.ceil(len(found) / columns)
    figure = Figure(figsize=(3.3 * columns + 0.6, 2.4 * height + 0.3), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False, sharey=True).ravel()
    for axes in grid[len(found) :]:
        axes.set_visible(False)
    for i, (axes, (name, own)) in enumerate(zip(grid, found.items(), strict=False)):
        right = axes.twinx()
        panel(axes, right, lines(own))
        axes.set_title(textwrap.fill(f"{name} (n = {len(lines(own))})", 40))
        right.set_ylim(-0.03, 1.03)
        if i % columns == 0:
            axes.set_ylabel("LAR", color=LAR)
        if i % columns == columns - 1 or i == len(found) - 1:
            right.set_ylabel("validation accuracy", color=ACCURACY)
        else:
            right.set_yticklabels([])
        if i + columns >= len(found):
            axes.set_xlabel("epoch")
    return figure


def _mean(left: Axes, right: Axes, own: Lines) -> None:
    band(left, own, "lar", LAR)
    band(right, own, "val_acc", ACCURACY)
    for point in ("memorised", "grokked"):
        epochs = [row["epoch"] for line in own if (row := line.at(point))]
        if epochs:
            left.axvline(
                float(np.mean(epochs)), color=POINT_COLOURS[point], linestyle="--", linewidth=1
            )


def _each_seed(left: Axes, right: Axes, own: Lines) -> None:
    for line in own:
        epochs = [row["epoch"] for row in line.rows]
        for axes, name, colour in ((left, "lar", LAR), (right, "val_acc", ACCURACY)):
            values = [np.nan if row[name] is None else row[name] for row in line.rows]
            axes.plot(epochs, values, color=colour, linewidth=1, alpha=0.75)


def _full_range(left: Axes, right: Axes, own: Lines) -> None:
    _each_seed(left, right, own)
    left.set_xscale("log")


def _spectra(runs: Sequence[Run]) -> Figure:
    """One row per cell, first seed; one column per point."""
    found = list(cells(runs).items())
    figure = Figure(figsize=(8.6, 2.7 * len(found) + 0.3), layout="constrained")
    grid = figure.subplots(len(found), 3, squeeze=False, sharey=True)
    for panels, (name, own) in zip(grid, found, strict=True):
        rows = {row["point"]: row for row in own[0].spectra}
        for axes, point in zip(panels, POINTS, strict=True):
            if point in rows:
                spectrum(axes, rows[point], own[0].seeds[rows[point]["seed"]])
            else:
                axes.set_title(f"not {point}")
                axes.tick_params(labelbottom=False, bottom=False)
        panels[0].set_ylabel(f"{name}\nshare of the energy")
    grid[0][0].set_ylim(bottom=1e-6)
    drawn = [axes for axes in grid.flat if axes.lines]
    if drawn:
        drawn[0].legend(loc="upper right")
    return figure


def _scatter(sets: dict[str, list[Run]]) -> Figure:
    figure = Figure(figsize=(9.2, 4.5), layout="constrained")
    for axes, (name, runs) in zip(figure.subplots(1, 2), sets.items(), strict=True):
        paper = [each for each in figure3() if each["set"] == name]
        for point in POINTS:
            kinds = PARTS if point == "final" else (point,)
            small = [each for each in paper if each["checkpoint"] in kinds]
            axes.plot(
                [float(each["k_pred"]) for each in small],
                [float(each["k95"]) for each in small],
                ".",
                color=POINT_COLOURS[point],
                alpha=0.4,
                markersize=5,
                markeredgewidth=0,
            )
            for grokked, marker in ((True, "*"), (False, "X")):
                rows = [
                    row
                    for line in lines(runs)
                    if (line.grokked is not None) == grokked and (row := line.at(point))
                ]
                if rows:
                    axes.plot(
                        [row["k_pred"] for row in rows],
                        [row["k95"] for row in rows],
                        marker,
                        color=POINT_COLOURS[point],
                        markersize=11 if grokked else 7,
                        markeredgecolor="white",
                        label=f"{_named(point, grokked)} (n = {len(rows)})",
                    )
        square(axes, 128)
        axes.set_title(f"set {name}; small: the paper's {len(paper)} points")
        if runs:
            axes.legend(loc="lower right", fontsize=7.5)
    return figure


def _named(point: str, grokked: bool) -> str:
    if point == "final":
        return paper_point(point, grokked).replace("_", " ")
    return point if grokked else f"{point}, not grokked later"


def _dips(runs: Sequence[Run]) -> Figure:
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    ordered = sorted(runs, key=_ratio)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(ordered)))
    for run, colour in zip(ordered, colours, strict=True):
        for line in run.seeds.values():
            lar = [row["lar"] for row in line.rows]
            named = f"{_ratio(run):.2f}: {run.config.batch_size} of {run.config.train_pairs}"
            left.plot([row["step"] for row in line.rows], lar, color=colour, label=named)
            right.plot(_ratio(run), lar[0] - min(lar), "o", color=colour)
    left.set(xlabel="step", ylabel="LAR", xscale="symlog", xlim=(0, None))
    left.legend(fontsize=7, title="batch size of training pairs", title_fontsize=7)
    right.set(xlabel="batch size / training set size", ylabel="dip of LAR", xscale="log")
    return figure


def _ratio(run: Run) -> float:
    return min(1.0, run.config.batch_size / run.config.train_pairs)
