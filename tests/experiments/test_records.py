"""Records that survive being torn, and what is read out of them."""

import json

import numpy as np
import pytest

from jlar_experiments import records
from jlar_experiments.grokking import analysis
from jlar_experiments.grokking.analysis import Timeline
from jlar_experiments.grokking.config import GrokConfig


def kept(path, last, due):
    """What stays of a file of one series when the run goes on after this epoch."""
    return records.keep(
        path,
        lambda row: row["epoch"] <= last,
        place=lambda row: (0, row["epoch"]),
        due={0: due},
    )


def test_torn_lines_are_dropped_and_the_rest_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert records.read(path) == kept(path, 0, []) == []
    records.append(path, [{"epoch": 0, "lar": 0.5}, {"epoch": 20, "lar": float("nan")}])
    records.append(path, [{"epoch": 40, "lar": [1.0]}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert [row["epoch"] for row in records.read(path)] == [0, 20]
    assert kept(path, 20, [0, 20])[1]["lar"] is None
    records.append(path, [{"epoch": 40, "lar": [1.0]}])
    assert path.read_bytes() == whole
    kept(path, 0, [0])
    assert path.read_bytes() == whole[: whole.index(b"\n") + 1]


def test_numbers_are_the_shortest_that_are_the_same_float32():
    for value in np.random.default_rng(0).standard_normal(100).astype(np.float32):
        number = records.number(value)
        assert np.float32(number) == value and len(json.dumps(number)) <= 14


def line(*accuracies):
    made = Timeline(0)
    for i, (train, val) in enumerate(accuracies):
        made.add({"epoch": 20 * i, "train_acc": train, "val_acc": val, "lar": i / 10})
    return made


def test_milestones():
    grokked = line((0.1, 0.1), (0.991, 0.4), (1.0, 0.2), (1.0, 0.991), (1.0, 1.0))
    assert (grokked.memorised, grokked.grokked, grokked.epoch) == (20, 60, 80)
    assert [grokked.at(point)["lar"] for point in analysis.POINTS] == [0.1, 0.3, 0.4]
    assert grokked.finished(GrokConfig(after_grok=20))
    assert not grokked.finished(GrokConfig(after_grok=40))
    assert grokked.finished(GrokConfig(after_grok=40, epochs=80))
    at_once = line((0.99, 0.4), (1.0, 0.995))  # 99% is not above 99%
    assert (at_once.memorised, at_once.grokked) == (None, 20)
    assert at_once.at("memorised") is None and not line().finished(GrokConfig())


@pytest.mark.parametrize(
    ("settings", "source", "counts"),
    [
        ({}, "all 12 tasks", (53, 37, 37, 9)),
        ({"task": "x-y", "train_fraction": 0.3}, "all 12 tasks", (53, 37, 37, 9)),
        ({"train_fraction": 0.3}, "x+y mod 97, 30%", (5, 5, 5, 0)),
        ({"train_fraction": 0.05}, "x+y mod 97, 5%", (5, 0, 0, 5)),
    ],
)
def test_the_papers_points(settings, source, counts):
    described, points = analysis.reference(GrokConfig(**settings))
    names = ("memorised", "grokked", "final_grokked", "final_not_grokked")
    found = tuple(sum(each["checkpoint"] == name for each in points) for name in names)
    assert described.startswith(source) and found == counts


def test_summary():
    seeds = {0: line((0.1, 0.1), (1.0, 0.2), (1.0, 1.0)), 1: line((0.1, 0.1), (1.0, 0.2))}
    for each in seeds.values():
        for row in each.rows:
            row |= {"k_pred": 10.0, "k95": None if row["epoch"] == 0 else 12.0}
    run = analysis.Run(GrokConfig(seeds=2), {}, seeds, [])
    source, table = analysis.summary(run)
    assert "12 tasks" in source and all(len(row) == len(analysis.HEADER) for row in table)
    memorised, grokked, final, median = table[1:]
    assert memorised[:6] == [
        "memorised",
        "20 ± 0",
        "0.100 ± 0.000",
        "10.0 ± 0.0",
        "12.0 ± 0.0",
        "2",
    ]
    assert grokked[:6] == ["grokked", "40", "0.200", "10.0", "12.0", "1"]
    last = [np.median([row["lar"] for row in each.rows[-5:]]) for each in seeds.values()]
    assert median[:2] == ["median of last 5", "-"] and median[5] == "2"
    assert median[2] == f"{np.mean(last):.3f} ± {np.std(last, ddof=1):.3f}"
    assert final[1] == "30 ± 14" and final[-1] == "37"


def test_what_has_no_encoding_is_written_escaped(tmp_path):
    """Half a character, which JSON and the names of folders may hold."""
    records.write_whole(tmp_path / "page", "\ud800 \udcff µ")
    assert (tmp_path / "page").read_text(encoding="utf-8") == r"\ud800 \udcff µ"
