"""Parts of the static figures, and the README's, drawn from the records of a run:

python -m jlar_experiments.grokking.figures RUN lar.png
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..records import Row
from .analysis import Run, Timeline, read, title

LAR, ACCURACY = "#1f4e9c", "#d1762a"
POINT_COLOURS = {"memorised": "#8a4fa3", "grokked": "#2c8a57", "final": "#333333"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 130,
    "svg.hashsalt": "jlar",  # the same records give the same file
}


def save(figure: Figure, path: Path) -> None:
    """As PNG and as SVG, both the same for the same records."""
    figure.savefig(path.with_name(path.name + ".png"))
    figure.savefig(path.with_name(path.name + ".svg"), metadata={"Date": None})


def over_epochs(run: Run) -> Figure:
    """LAR and validation accuracy over the epochs, as in the paper's figure 1."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    band(left, run.seeds.values(), "lar", LAR)
    band(right, run.seeds.values(), "val_acc", ACCURACY)
    for point, side in (("memorised", "right"), ("grokked", "left")):
        lines = run.seeds.values()
        if epochs := [row["epoch"] for line in lines if (row := line.at(point))]:
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


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m jlar_experiments.grokking.figures FOLDER PNG")
    with matplotlib.rc_context(STYLE):
        over_epochs(read(Path(sys.argv[1]))).savefig(sys.argv[2])
