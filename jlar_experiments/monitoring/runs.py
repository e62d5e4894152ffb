"""Synthetic runs: the paper's ten pre-training curves rebuilt from its table 2, and noise."""

import csv
import functools
from importlib import resources

import numpy as np
from jaxtyping import Float

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
def declines() -> dict[str, Float[np.ndarray, "windows"]]:
    """The paper's table 2: LAR lost per 1000 steps in the windows 1001-2000 ... 9001-end."""
    source = resources.files("jlar_experiments") / "reference" / "table2_decline.csv"
    runs: dict[str, list[float]] = {}
    for row in csv.DictReader(source.read_text(encoding="utf-8").splitlines()):
        runs.setdefault(row["run"], []).append(float(row["decline_per_1000_steps"]))
    return {name: np.array(values) for name, values in runs.items()}


def pretraining(
    run: str,
    steps: Float[np.ndarray, "points"],
    *,
    peak_step: float = 700.0,
    overshoot: float = 0.0,
) -> Float[np.ndarray, "points"]:
    """LAR of one of the paper's runs, without noise.

    From 1/2 it rises along 1 - (1 - t)^3 to the peak of its optimiser at `peak_step`; from there
    the declines of table 2 are integrated, as a rate that is linear between the middles of the
    windows. `overshoot` is a transient on top of the peak that dies within some hundred steps.
    """
    rates = declines()[run] / 1000
    fine = np.arange(LAST_STEP + 1.0)
    middles = 1500 + 1000 * np.arange(len(rates))
    rate = np.interp(fine, np.append(peak_step, middles), np.append(0, rates), left=0)
    rise = 1 - np.clip(1 - fine / peak_step, 0, 1) ** 3
    peak = PEAKS[run.split("_")[0]]
    transient = overshoot * rise * np.exp(-np.maximum(fine - peak_step, 0) / 200)
    return np.interp(steps, fine, 0.5 + (peak - 0.5) * rise + transient - np.cumsum(rate))


def logs(
    run: str, count: int, *, sd: float, rho: float, seed: int, copy: int = 0, points: int = 200
) -> tuple[Float[np.ndarray, "count points"], Float[np.ndarray, "count points"]]:
    """(steps, LAR) of `count` noisy logs of one run, with irregular steps.

    The noise is Gaussian with standard deviation `sd` and autocorrelation `rho` from point to
    point. The peak is between steps 500 and 1000 and every other log has an overshoot of .005: the
    i-th log of any run and `copy` has about the same recipe (peaks within 5%), and its own noise.
    """
    recipe = np.random.default_rng(seed)
    own = [seed, copy, round(1e5 * sd), round(100 * rho), points, list(declines()).index(run)]
    rng = np.random.default_rng(own)
    peaks = recipe.uniform(500, 1000, count) * rng.uniform(0.95, 1.05, count)
    steps = np.sort(rng.integers(1, LAST_STEP + 1, (count, points)), axis=1).astype(float)
    noise = rng.standard_normal((count, points))
    for i in range(1, points):
        noise[:, i] = rho * noise[:, i - 1] + np.sqrt(1 - rho**2) * noise[:, i]
    clean = [
        pretraining(run, at, peak_step=peak, overshoot=0.005 * (i % 2))
        for i, (at, peak) in enumerate(zip(steps, peaks, strict=True))
    ]
    return steps, np.stack(clean) + sd * noise
