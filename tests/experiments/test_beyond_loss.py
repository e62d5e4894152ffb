"""The partial correlation of D and the gap, and the published table of it."""

import csv

import numpy as np
import pytest
from scipy import stats

from jlar_experiments.pretraining import beyond_loss, variants


def test_what_follows_from_the_losses_alone_is_taken_off():
    x, noise = np.linspace(0, 1, 200), np.random.default_rng(0).normal(size=(2, 200))
    r, low, high, independent = beyond_loss.partial(x**2 + noise[0], 3 - x + noise[1], x)
    assert low < 0 < high and abs(r) < 0.2 and independent == pytest.approx(200, rel=0.1)
    r, low, _, _ = beyond_loss.partial(x**2 + noise[0], x + noise[0] + noise[1], x)
    assert low > 0.5 and r == pytest.approx(0.5**0.5, abs=0.1)


def test_slow_noise_counts_for_fewer_independent_logs():
    walk = np.cumsum(np.random.default_rng(1).normal(size=(2, 400)), axis=1)
    _, _, _, independent = beyond_loss.partial(*walk, np.arange(400.0))
    assert independent < 40


def test_the_published_table_is_what_the_committed_logs_give():
    with beyond_loss.TABLE.open(encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    assert len(published) == 16 and published == beyond_loss.table()


def test_a_size_that_was_not_run_is_predicted_by_a_line():
    """By a regression whose origin is that size: its intercept and the intercept's interval."""
    rng = np.random.default_rng(0)
    sizes = np.repeat([1e5, 1e6, 5e6], 4)
    z = 0.3 + 0.1 * np.log10(sizes) + 0.1 * rng.standard_normal(12)
    found = [
        variants.Point(int(size), 10, 0, float(np.tanh(each)), 0, 0, 0, 0)
        for size, each in zip(sizes, z, strict=True)
    ]
    fit = stats.linregress(np.log10(sizes / variants.LARGEST), z)
    reach = stats.t.ppf(0.975, 10) * fit.intercept_stderr
    ends = np.tanh(fit.intercept + np.array([0, -reach, reach]))
    np.testing.assert_allclose(variants.predicted(found), ends, rtol=1e-9)
