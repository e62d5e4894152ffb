"""The figures of one run, in the form of the paper's figures 1, 2 and 3; from records only."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..records import Row
from .analysis import POINTS, Run, Timeline, paper_point, reference
from .config import GrokConfig

LAR, ACCURACY = "#1f4e9c", "#d1762a"
POINT_COLOURS = {"memorised": "#8a4fa3", "grokked": "#2c8a57", "final": "#333333"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "svg.hashsalt": "jlar",  # the same records give the same file
}


LAR_CAPTION = (
    "LAR of the unembedding over the whole training set, and validation accuracy, of which LAR "
    "knows nothing (the form of the paper's figure 1). Dashed: the first logs with training "
    "accuracy above 99% and validation accuracy below 50% (memorised), and with both above 99% "
    "(grokked). Several seeds: mean ± standard deviation, finished ones keeping their last value."
)
SPECTRA_CAPTION = (
    "Weight spectrum p and activation spectrum q of the unembedding over its right singular "
    "directions (the form of the paper's figure 2), first seed. Where there are fewer tokens than "
    "directions, the last ones are its null space: p is zero there."
)
DIMENSIONS_CAPTION = (
    "k95, the principal components that hold 95% of the variance of the unembedding's inputs, "
    "against k_pred = n^(2(1-LAR)) (the form of the paper's figure 3). Small: the paper's points."
)


def draw(run: Run, folder: Path) -> dict[str, str]:
    """Write each figure as PNG and SVG into the folder; returns name -> caption."""
    drawings = {"lar": (_over_epochs, LAR_CAPTION), "dimensions": (_dimensions, DIMENSIONS_CAPTION)}
    if any(row["point"] in POINTS for row in run.spectra):
        drawings["spectra"] = (_spectra, SPECTRA_CAPTION)
    with matplotlib.rc_context(STYLE):
        for name, (drawing, _) in drawings.items():
            save(drawing(run), folder / name)
    return {name: caption for name, (_, caption) in drawings.items()}


def save(figure: Figure, path: Path) -> None:
    """As PNG and as SVG, both the same for the same records."""
    figure.savefig(path.with_name(path.name + ".png"))
    figure.savefig(path.with_name(path.name + ".svg"), metadata={"Date": None})


def title(config: GrokConfig) -> str:
    """The run in a few words."""
    modulus = "" if config.operation.permutations else f" mod {config.p}"
    return f"{config.task}{modulus}, {100 * config.train_fraction:g}% of pairs"


def _over_epochs(run: Run) -> Figure:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    band(left, run.seeds.values(), "lar", LAR)
    band(right, run.seeds.values(), "val_acc", ACCURACY)
    for point, side in (("memorised", "right"), ("grokked", "left")):
        if epochs := run.epochs(point):
            mean = float(np.mean(epochs))
            left.axvline(mean, color=POINT_COLOURS[point], linestyle="--", linewidth=1)
            left.annotate(
                f"{point} {mean:.0f}",
                (mean, 1.01),
                xycoords=("data", "axes fraction"),
                color=POINT_COLOURS[point],
                ha=side,
                fontsize=8,
            )
    left.set(xlabel="epoch", ylabel="LAR of the training data")
    right.set(ylabel="validation accuracy", ylim=(-0.03, 1.03))
    left.yaxis.label.set_color(LAR)
    right.yaxis.label.set_color(ACCURACY)
    count = len(run.seeds)
    seeds = f"mean ± std of {count} seeds" if count > 1 else f"seed {run.config.seed}"
    left.set_title(f"{title(run.config)}; {seeds}", pad=16)
    return figure


def band(axes: Axes, lines: Iterable[Timeline], name: str, colour: str) -> None:
    """Mean and standard deviation over seeds; each keeps its last value once it has finished."""
    lines = list(lines)
    epochs = sorted({row["epoch"] for line in lines for row in line.rows})
    curves = []
    for line in lines:
        own = [row["epoch"] for row in line.rows]
        values = [np.nan if row[name] is None else row[name] for row in line.rows]
        curves.append(np.interp(epochs, own, values))
    mean = np.mean(curves, axis=0)
    axes.plot(epochs, mean, color=colour, linewidth=1.6)
    if len(curves) > 1:
        spread = np.std(curves, axis=0, ddof=1)
        axes.fill_between(
            epochs, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0
        )


def _spectra(run: Run) -> Figure:
    first = next(row["seed"] for row in run.spectra if row["point"] in POINTS)
    rows = [row for row in run.spectra if row["seed"] == first and row["point"] in POINTS]
    figure = Figure(figsize=(2.7 * len(rows) + 0.6, 3.1), layout="constrained")
    grid = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for axes, row in zip(grid, rows, strict=True):
        spectrum(axes, row, run.seeds[first])
    grid[0].set_ylabel("share of the energy")
    grid[0].set_ylim(bottom=1e-6)
    grid[-1].legend(loc="upper right")
    return figure


def spectrum(axes: Axes, row: Row, line: Timeline) -> None:
    """p and q of one point over the directions, with their correlation in the title."""
    p, q = np.array(row["p"]), np.array(row["q"])
    index = np.arange(1, len(p) + 1)
    shown = p > p.max() * 1e-7  # the null space has no place on a logarithmic axis
    axes.semilogy(index, q, color=ACCURACY, linewidth=1.2, label="q, activations")
    axes.semilogy(index[shown], p[shown], color=LAR, linewidth=1.6, label="p, weights")
    log = line.at(row["point"])
    corr = "" if log is None or log["corr"] is None else f"\ncorr(p, q) = {log['corr']:.3f}"
    axes.set_title(f"{row['point']}, epoch {row['epoch']}{corr}")
    axes.set_xlabel("direction i")


def _dimensions(run: Run) -> Figure:
    figure = Figure(figsize=(4.6, 4.3), layout="constrained")
    axes = figure.add_subplot()
    source, points = reference(run.config)
    _paper(axes, points, run.grokked)
    for point in POINTS:
        rows = [row for line in run.seeds.values() if (row := line.at(point))]
        axes.plot(
            [np.nan if row["k_pred"] is None else row["k_pred"] for row in rows],
            [np.nan if row["k95"] is None else row["k95"] for row in rows],
            "*",
            color=POINT_COLOURS[point],
            markersize=12,
            markeredgecolor="white",
            label=f"{point} (n = {len(rows)})",
        )
    square(axes, run.config.width)
    axes.set_title(f"{title(run.config)}\npaper: {source}")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def square(axes: Axes, width: int) -> None:
    """Logarithmic axes of k_pred and k95, with the line on which they are equal."""
    low = 1 if width < 32 else 5
    axes.plot([low, width], [low, width], color="grey", linewidth=0.8, zorder=0)
    axes.annotate("k95 = k_pred", (low * 1.15, low * 1.3), color="grey", fontsize=8, rotation=45)
    axes.set(xscale="log", yscale="log", xlabel="k_pred = n^(2(1-LAR))", ylabel="k95")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= tick <= width * 1.1]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.FixedLocator(ticks))
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter(ticker.ScalarFormatter())


def _paper(axes: Axes, points: list[dict[str, str]], grokked: bool) -> None:
    for point in POINTS:
        chosen = [each for each in points if each["checkpoint"] == paper_point(point, grokked)]
        axes.plot(
            [float(each["k_pred"]) for each in chosen],
            [float(each["k95"]) for each in chosen],
            ".",
            color=POINT_COLOURS[point],
            alpha=0.45,
            markersize=5,
            markeredgewidth=0,
            label=f"paper, {paper_point(point, grokked).replace('_', ' ')} (n = {len(chosen)})",
        )
