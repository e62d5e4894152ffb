"""What a table of alarms says, on runs whose alarms are known."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from jlar_experiments.monitoring import judge, suite

RESULTS = Path(judge.__file__).parents[1] / "results"
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


def rounded(text):
    """Of JSON: the last digits of a mean depend on the instructions that the processor has."""
    return json.loads(text, parse_float=lambda number: f"{float(number):.12g}")


def published(name):
    return (RESULTS / "monitor" / name).read_text(encoding="utf-8")


def without(names, value):
    if not isinstance(value, dict):
        return value
    return {key: without(names, each) for key, each in value.items() if key not in names}


def test_the_published_judgement_is_that_of_the_committed_logs():
    """Of the comparators only the one that all are compared with, and without the search for the
    multiples of the noise: these are most of the time.
    """
    text = published("judge.json")
    chosen = {"training loss": json.loads(text)["multiples of the noise"]["training loss"]}
    found = judge.judgement([RESULTS / name for name in ("suite", "bytes-tiny", "cpu")], chosen)
    wanted = without(judge.COMPARATORS.keys() - chosen.keys(), rounded(text))
    assert str(rounded(json.dumps(found))) == str(wanted)


def test_a_published_multiple_is_the_least_at_which_hardly_any_healthy_run_rings():
    name = "training loss"
    chosen = json.loads(published("judge.json"))["multiples of the noise"][name]
    pairs = [p for p in judge.pairs(judge.read(RESULTS / "suite")) if p[0].healthy]
    pairs = [pair for pair in pairs if pair[0].half == "fit"]
    below = round(0.5 * 1.15 ** (round(np.log(chosen / 0.5) / np.log(1.15)) - 1), 2)
    rings = [sum(judge.compared(*p, name, at) > 0 for p in pairs) for at in (below, chosen)]
    assert rings[0] > judge.FALSE_ALARMS * len(pairs) >= rings[1]


def test_the_published_table_of_curves_is_that_of_the_monitor():
    text = published("curves.json")
    found = judge.curves(json.loads(text)["logs of each run and noise"])
    assert str(rounded(json.dumps(found))) == str(rounded(text))
    assert found["adam_100B, with baseline"]["rings"] == "0 of 180"
    assert found["muon_400M, with baseline"]["by the middle"] == "180 of 180"
    assert found["muon_400M, with baseline"]["median lead"] > 0.2
