"""What a table of alarms says, on runs whose alarms are known."""

import gzip
import json

import numpy as np
import pytest

from jlar_experiments.monitoring import judge, suite

STEPS = np.arange(10.0, 1201, 10)


def logged(rng, lowest=None):
    """LAR falls and validation loss rises from step `lowest` on."""
    late = np.zeros_like(STEPS) if lowest is None else np.maximum(np.log2(STEPS / lowest), 0)
    lar = 0.5 + 0.2 * np.minimum(STEPS / 200, 1) - 0.05 * late
    train, validation = 5 * STEPS**-0.2 - late, 5 * STEPS**-0.2 + late
    noisy = lar + 0.001 * rng.standard_normal(len(STEPS))
    columns = {"step": STEPS, "lar": noisy, "train_loss": train, "val_loss": validation}
    return columns | {"x": np.full(len(STEPS), 64.0), "w": 1000 + STEPS}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("pre-adamw", "post-bpe512"):
        recipe = suite.RECIPES[name]
        for count in (recipe.steps * recipe.batch, recipe.sequences):
            rows = []
            for seed in range(3):
                log = logged(rng, 400 if count == recipe.sequences else None)
                each = zip(*log.values(), strict=True)
                rows += [{"seed": seed} | dict(zip(log, row, strict=True)) for row in each]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}-{count}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path


def test_the_judgement_of_a_suite(folder):
    found = judge.judgement([folder])
    table = found["judge"]["table"]
    assert table["oracle"]["regret"] == 0 and table["oracle"]["before the lowest"] == "0 of 3"
    monitor = table["monitor, with baselines"]
    assert monitor["rings"] == "3 of 3" and monitor["false alarms"] == "0 of 3"
    assert 400 < monitor["alarm / lowest"][0] * 400 < 600
    # The loss that never rings is stopped at the end: log2(1200 / 400) nats above the lowest, and
    # what the smooth part of the loss has gained meanwhile.
    assert table["rms of X"]["rings"] == "0 of 3"
    end, least = (5 * s**-0.2 for s in (1200, 400))
    assert table["rms of X"]["regret"] == pytest.approx(end + np.log2(3) - least, abs=1e-6)
    mean, low, high = found["judge"]["regret less that of the training loss"]["oracle"]
    assert low <= mean <= high < 0


def test_a_run_that_has_no_minimum_yet_is_neither_healthy_nor_overfitting():
    log = logged(np.random.default_rng(0), 1150.0)
    run = judge.Run("judge", "x", 0, False, log)
    assert run.lowest == 1150 and not run.overfits and not run.healthy
    assert run.regret(0) == pytest.approx(log["val_loss"][-1] - log["val_loss"].min())


def test_curves_of_the_paper():
    found = judge.curves(2)
    assert found["adam_100B, with baseline"]["rings"] == "0 of 12"
    assert found["muon_400M, with baseline"]["by the middle"] == "12 of 12"
    assert found["muon_400M, with baseline"]["median lead"] > 0.2
