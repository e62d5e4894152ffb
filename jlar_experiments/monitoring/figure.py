"""The figure of `jlar watch`: LAR and its baseline, and the evidence of each signal."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from jlar._monitor import OVERFITTING
from jlar.monitor import Baseline

from ..logs import Log
from .verdict import Points

LAR, BASELINE, ALARM = "#1f4e9c", "#888888", "#c0392b"
COLOURS = dict(zip(OVERFITTING, ("#d1762a", "#8a4fa3", "#2c8a57"), strict=True))


def draw(
    path: Path,
    title: str,
    log: Log,
    baseline: Baseline | None,
    points: Points,
    found: dict[str, Any],
) -> None:
    """Write the figure; its format follows from the name of the file."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "savefig.dpi": 160}):
        figure = Figure(figsize=(7, 6), layout="constrained")
        lar, apart, evidence = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
        lar.plot(log.step, log.lar, ".-", ms=3, lw=0.8, color=LAR, label="LAR")
        if baseline is not None:
            at = baseline.at_step(np.maximum(log.step, 1e-9))
            label = "baseline" if baseline.runs == 1 else f"mean of {baseline.runs} baselines"
            lar.plot(log.step, np.where(at.known, at.lar, np.nan), color=BASELINE, label=label)
        lar.set(ylabel="LAR", title=title)
        for i, (name, colour) in enumerate(COLOURS.items()):
            label = name.replace("_", " ")
            apart.plot(log.step, points["level"][:, i], color=colour, label=label)
            apart.plot(log.step, points["allowance"][:, i], ":", color=colour, lw=1)
            share = points["S"][:, i] / points["limit"][:, i]
            evidence.plot(log.step, share, color=colour, label=label)
        apart.set(ylabel="signals, in LAR\n(dotted: allowed)")
        evidence.axhline(1, color="black", lw=0.5)
        evidence.set(xlabel="step", ylabel="evidence S\nover its limit")
        evidence.legend(frameon=False)
        if (first := found["first_alarm_step"]) is not None:
            for axes in (lar, apart, evidence):
                axes.axvline(first, color=ALARM, ls="--", lw=1)
            lar.plot([], [], color=ALARM, ls="--", label=f"alarm, {first}")
        lar.legend(frameon=False)
        figure.savefig(path)
