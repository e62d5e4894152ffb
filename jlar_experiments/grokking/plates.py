"""Figures over all runs of a folder, from records alone, as the paper has them and past it."""

import csv
import dataclasses
import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..records import Row
from .analysis import POINTS, Run, Timeline, figure3, of_set, paper_point, title
from .config import GrokConfig
from .figures import ACCURACY, LAR, POINT_COLOURS, STYLE, band, save, spectrum, square
from .plan import SMALL_P, small

Lines = list[Timeline]
FREE = ("seed", "seeds", "epochs", "after_grok", "spectra_every", "log_every")
PARTS = ("final_grokked", "final_not_grokked")
FIGURES = ("curves", "spectra", "dimensions", "relative")
FILES = tuple(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg"))


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
    relatives = [run for run in runs if run.config.p == SMALL_P]
    shown = [[run for run in a if run.grokked == groks and run.spectra] for groks in (True, False)]
    examples = [run for own in shown for run in own[:1]]
    drawings: dict[str, tuple[Callable[[], Figure], Sequence[Run], str]] = {
        "curves": (lambda: _grid([*a, *b]), [*a, *b], CURVES),
        "spectra": (lambda: _spectra(examples), examples, SPECTRA),
        "dimensions": (lambda: _scatter({"A": a, "B": b}), [*a, *b], SCATTER),
        "relative": (lambda: relative(runs_table(relatives)), relatives, RELATIVE),
    }
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, (drawing, wanted, caption) in drawings.items():
            if wanted:
                save(drawing(), folder / name)
                drawn[name] = caption
    return drawn


CURVES = (
    "LAR of the unembedding over the training set and validation accuracy, mean ± standard "
    "deviation over seeds, finished ones keeping their last value (as in the paper's figure 1)."
)
SPECTRA = (
    "Weight spectrum p and activation spectrum q at memorised, grokked and final, the first run "
    "that groks and the first that does not (as in the paper's figures 2 and 21)."
)
SCATTER = (
    "k95 against k_pred = n^(2(1-LAR)), every run; small: the paper's points (its figure 3). Left "
    "set A, right set B."
)
RELATIVE = (
    "Past the paper, on a smaller relative (p = 31, width 64, one block), means over seeds: LAR "
    "from memorised to the end, and there k over k95."
)


def _by_cell(runs: Sequence[Run]) -> dict[str, Lines]:
    return {name: lines(own) for name, own in cells(runs).items()}


def _grid(runs: Sequence[Run]) -> Figure:
    """One panel per cell: LAR on the left axis, validation accuracy on the right."""
    found = _by_cell(runs)
    columns = min(3, len(found))
    height = math.ceil(len(found) / columns)
    figure = Figure(figsize=(3 * columns + 0.6, 1.8 * height + 0.6), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False, sharey=True).ravel()
    for axes in grid[len(found) :]:
        axes.set_visible(False)
    for i, (axes, (name, own)) in enumerate(zip(grid, found.items(), strict=False)):
        right = axes.twinx()
        _mean(axes, right, own)
        axes.set_title(textwrap.fill(f"{name} (n\xa0=\xa0{len(own)})", 36))
        right.set_ylim(-0.03, 1.03)
        if i % columns == 0:
            axes.set_ylabel("LAR", color=LAR)
        if i % columns == columns - 1 or i == len(found) - 1:
            right.set_ylabel("validation accuracy", color=ACCURACY)
        else:
            right.set_yticklabels([])
        if i + columns >= len(found):
            axes.set_xlabel("epoch")
    marks = [Line2D([], [], color=POINT_COLOURS[each], linestyle="--") for each in POINTS[:2]]
    figure.legend(marks, POINTS[:2], loc="outside lower center", ncols=2)
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


def _spectra(runs: Sequence[Run]) -> Figure:
    """One row per run, its first seed; one column per point."""
    figure = Figure(figsize=(8.6, 2.7 * len(runs) + 0.5), layout="constrained")
    grid = figure.subplots(len(runs), 3, squeeze=False, sharey=True)
    for panels, run in zip(grid, runs, strict=True):
        rows = {row["point"]: row for row in run.spectra}
        there = [point for point in POINTS if point in rows]
        for axes, point in zip(panels, there, strict=False):
            spectrum(axes, rows[point], run.seeds[rows[point]["seed"]])
        for axes in panels[len(there) :]:
            axes.set_visible(False)
        panels[0].set_ylabel(f"{label(run.config)}\nshare of the energy")
    grid[0][0].set_ylim(bottom=1e-6)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
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


def relative(table: Sequence[Sequence[str]]) -> Figure:
    """The small relative, a line per setting: LAR from memorised to the end, and k over k95 there.

    Its rows may come from a file, `python -m jlar_experiments.grokking.plates runs.csv PNG`.
    """
    found: dict[str, list[list[float]]] = {}
    for name, _, *row in table[1:]:
        values = [math.nan if cell == "-" else float(cell) for cell in row]
        found.setdefault(name.replace("x+y mod 31, 60% of pairs, ", ""), []).append(values)
    figure = Figure(figsize=(8.6, 0.19 * len(found) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    for i, rows in enumerate(map(np.array, found.values())):
        # Without run and seed: 1 is LAR at memorised, 9 to 11 are LAR, k and k95 at the end.
        memorised, end, accuracy = rows[:, 1], rows[:, 9].mean(), rows[:, -1].mean()
        known = memorised[np.isfinite(memorised)]
        start = known.mean() if len(known) else end  # a dot alone, if none memorised
        colour = POINT_COLOURS["grokked" if accuracy > 0.95 else "final"]
        left.plot([start, end], [i, i], color=colour, linewidth=1)
        left.plot(start, i, "o", color=colour, markerfacecolor="white", markersize=4)
        left.plot(end, i, "o", color=colour, markersize=5)
        right.plot(np.mean(rows[:, 10] / rows[:, 11]), i, "o", color=colour, markersize=5)
    left.set(xlabel="LAR: circle at memorised, dot at the end", yticks=range(len(found)))
    left.set_yticklabels([f"{name} ({len(own)} seeds)" for name, own in found.items()], fontsize=7)
    left.invert_yaxis()
    left.margins(y=0.01)
    right.axvline(1, color="grey", linewidth=0.8)
    right.set(xlabel="k / k95 at the end", xlim=(0, None))
    marks = [Line2D([], [], color=POINT_COLOURS[each], marker="o") for each in ("grokked", "final")]
    words = "validation accuracy above 95% at the end", "below"
    figure.legend(marks, words, loc="outside upper center", ncols=2)
    return figure


def runs_table(runs: Sequence[Run]) -> list[list[str]]:
    """One line per seed of every run: where it was at each point."""
    header: list[str] = [
        "run",
        "seed",
        "memorised",
        "LAR",
        "k",
        "k95",
        "grokked",
        "LAR",
        "k",
        "k95",
        "last epoch",
        "LAR",
        "k",
        "k95",
        "val acc",
    ]
    table = [header]
    for run in runs:
        for seed, line in run.seeds.items():
            cells = [label(run.config), str(seed)]
            for point in ("memorised", "grokked", "final"):
                row = line.at(point)
                cells += [_cell(row, name, digits) for name, digits in _SHOWN]
            table.append([*cells, _cell(line.at("final"), "val_acc", 3)])
    return table


def _cell(row: Row | None, name: str, digits: int) -> str:
    return "-" if row is None or row[name] is None else f"{row[name]:.{digits}f}"


_SHOWN = (("epoch", 0), ("lar", 3), ("k_pred", 1), ("k95", 0))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m jlar_experiments.grokking.plates RUNS_CSV PNG")
    with Path(sys.argv[1]).open(encoding="utf-8") as file, matplotlib.rc_context(STYLE):
        relative(list(csv.reader(file))).savefig(sys.argv[2])
