"""Synthetic runs: the paper's ten pre-training curves rebuilt from its table 2, and noise."""

import csv
import functools
from importlib import resources

import numpy as np
from jaxtyping import Float

Steps = Float[np.ndarray, "points"]

LAST_STEP = 10_000
PEAKS = {"adam": 0.676, "muon": 0.688}  # of the 100B runs; section 5 of arXiv 2605.28975
# The 1000 steps in which the validation loss is least (same place).
OVERFITTING = {
    "adam_200M": (4000, 5000),
    "adam_400M": (7000, 8000),
    "muon_200M": (2000, 3000),
    "muon_400M": (5000, 6000),
    "muon_800M": (8000, 9000),
}


@functools.cache
def declines() -> dict[str, Float[np.ndarray, "9"]]:
    """The paper's table 2: LAR lost per 1000 steps in the windows 1001-2000 ... 9001-end."""
    source = resources.files("jlar_experiments") / "reference" / "table2_decline.csv"
    rows = list(csv.DictReader(source.read_text().splitlines()))
    runs: dict[str, list[float]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(float(row["decline_per_1000_steps"]))
    return {name: np.array(values) for name, values in runs.items()}


def pretraining(run: str, steps: Steps, *, peak_step: float, overshoot: float = 0.0) -> Steps:
    """LAR of one of the paper's runs, without noise.

    From 1/2 it rises along 1 - (1 - t)^3 to the peak of its optimiser at `peak_step`; from there
    the declines of table 2 are integrated, as a rate that is linear between the middles of
    the windows. `overshoot` adds a transient that dies within some hundred steps of the peak.
    """
    rates = declines()[run] / 1000
    middles = 1500.0 + 1000 * np.arange(len(rates))
    fine = np.arange(LAST_STEP + 1.0)
    rate = np.interp(fine, [peak_step, *middles], [0.0, *rates])
    lost = np.concatenate([[0.0], np.cumsum(rate)[:-1]])
    rise = 1 - np.clip(1 - fine / peak_step, 0, 1) ** 3
    peak = PEAKS[run.split("_")[0]]
    lar = 0.5 + (peak - 0.5) * rise - lost
    lar += overshoot * rise * np.exp(-np.maximum(fine - peak_step, 0) / 300)
    return np.interp(steps, fine, lar)
