"""The figure of `jlar watch`: LAR and its baseline, the signals and their thresholds, the slope."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..logs import Log
from .verdict import OVERFITTING, Points

LAR, BASELINE, ALARM = "#1f4e9c", "#888888", "#c0392b"
COLOURS = dict(zip(OVERFITTING, ("#d1762a", "#8a4fa3", "#2c8a57"), strict=True))


def draw(path: Path, title: str, log: Log, points: Points, found: dict[str, Any]) -> None:
    """Write the figure; its format follows from the name of the file."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "savefig.dpi": 160}):
        figure = Figure(figsize=(7, 7), layout="constrained")
        lar, apart, slope = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.4))
        lar.plot(log.step, log.lar, ".-", ms=3, lw=0.8, color=LAR, label="LAR")
        if np.isfinite(points["baseline"]).any():
            lar.plot(log.step, points["baseline"], color=BASELINE, label="baseline, smoothed")
        lar.set(ylabel="LAR", title=title)
        _signals(apart, log, points)
        slope.plot(log.step, points["slope"], color=LAR)
        slope.axhline(0, color="black", lw=0.5)
        slope.set(xlabel="step", ylabel="slope of LAR\nper doubling")
        after = points["slope"][len(log.step) // 4 :]
        if np.isfinite(after).any():  # the steep rise of the first steps would hide the rest
            margin = 0.01 + 0.1 * np.nanmax(np.abs(after))
            slope.set_ylim(np.nanmin(after) - margin, np.nanmax(after) + margin)
        for axes in (lar, apart, slope):
            if found["first_alarm_step"] is not None:
                axes.axvline(found["first_alarm_step"], color=ALARM, ls="--", lw=1)
        if found["first_alarm_step"] is not None:
            lar.plot([], [], color=ALARM, ls="--", label=f"alarm, {found['first_alarm_step']}")
        lar.legend(frameon=False)
        figure.savefig(path)


def _signals(axes: Axes, log: Log, points: Points) -> None:
    drawn = False
    for name in OVERFITTING:
        if np.isfinite(points[name]).any():
            drawn = True
            threshold = points[f"{name} threshold"]
            axes.plot(log.step, points[name], color=COLOURS[name], label=name.replace("_", " "))
            axes.plot(log.step, threshold, ":", color=COLOURS[name], lw=1)
            finite = threshold[np.isfinite(threshold)]
            axes.set_ylim(top=max(axes.get_ylim()[1], 2 * np.median(finite)))
    axes.axhline(0, color="black", lw=0.5)
    axes.set(ylabel="signals, in LAR\n(dotted: thresholds)")
    if drawn:
        axes.legend(frameon=False)
