"""What LAR says about the gap that the training loss does not: a partial correlation per run.

    python -m jlar_experiments.pretraining.beyond_loss

D is the LAR of a baseline less that of the run, the gap its validation less its training loss. A
cubic in the difference of the training losses is fitted to both and taken off; what is left of one
is correlated with what is left of the other. Neighbouring logs are alike, so the interval counts
n (1 - ab) / (1 + ab) independent ones, a and b the correlations of the remainders with themselves
one log later (Bartlett 1935), less four for the cubic. Pairs of baselines show what chance gives.
"""

import csv
from pathlib import Path

import numpy as np
from jaxtyping import Float

from . import analysis

RESULTS = Path(__file__).parents[1] / "results"
TABLE = RESULTS / "beyond_loss.csv"
DEGREE = 3
Logs = Float[np.ndarray, " logs"]


def remainder(values: Logs, given: Logs) -> Logs:
    """The values less their least-squares cubic in `given`."""
    powers = np.vander((given - given.mean()) / given.std(), DEGREE + 1)
    return values - powers @ np.linalg.lstsq(powers, values, rcond=None)[0]


def partial(a: Logs, b: Logs, given: Logs) -> tuple[float, float, float, float]:
    """(correlation of a and b given a cubic, its 95% interval, independent logs)."""
    a, b = remainder(a, given), remainder(b, given)
    alike = analysis.pearson(a[1:], a[:-1]) * analysis.pearson(b[1:], b[:-1])
    independent = len(a) * (1 - alike) / (1 + alike)
    r = analysis.pearson(a, b)
    reach = 1.96 / np.sqrt(independent - 3 - DEGREE)  # Fisher's z, a degree of freedom per power
    low, high = np.tanh(np.arctanh(r) + np.array([-reach, reach]))
    return r, float(low), float(high), independent


def row(preset: str, pair: analysis.Pair, kind: str) -> dict[str, str]:
    """One run against its baseline."""
    r, low, high, independent = partial(pair.D, pair.gap, pair.loss_difference)
    matched = pair.matched[found := ~np.isnan(pair.matched)]
    lar = [analysis.smoothed(run.lar, analysis.SMOOTHED) for run in (pair.base, pair.run)]
    rise = matched - (lar[0] - lar[1])[pair.steps][found]
    return {
        "preset": preset,
        "run": f"{pair.run.label}, seed {pair.run.config.seed}",
        "against": kind,
        "logs": str(len(pair.D)),
        "independent": f"{independent:.0f}",
        "r of D": f"{analysis.pearson(pair.D, pair.gap):.2f}",
        "r of losses": f"{analysis.pearson(pair.loss_difference, pair.gap):.2f}",
        "r of D given the losses": f"{r:.2f}",
        "95% interval": f"{low:.2f} to {high:.2f}",
        "matched logs": str(len(matched)),
        "matched D": f"{matched.mean():.3f}",
        "of it the baseline's own rise": f"{rise.mean():.3f}",
    }


def table() -> list[dict[str, str]]:
    """Every committed run, from its log."""
    found = []
    for preset in ("bytes-tiny", "cpu"):
        runs = analysis.read(RESULTS / preset)
        found += [row(preset, pair, "baseline") for pair in analysis.pairs(runs)]
        found += [row(preset, pair, "another baseline") for pair in analysis.floors(runs)]
    return found


if __name__ == "__main__":
    rows = table()
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
