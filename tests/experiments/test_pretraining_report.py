"""What is read out of records: curves with known answers, and a report from made-up runs."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats

from jlar_experiments import cli, page, records
from jlar_experiments.pretraining import analysis, report
from jlar_experiments.pretraining.analysis import Pair, Run
from jlar_experiments.pretraining.presets import PRESETS

STEPS = 100
step = np.arange(STEPS)
RISE = 0.5 + 0.2 * (1 - np.exp(-step / 10))


def run(tokens=1_024_000, seed=0, lar=RISE, train=None, val=None, preset="bytes-tiny", **settings):
    train = 5 * np.exp(-step / 30) if train is None else train
    val = train + 0.1 if val is None else val
    config = PRESETS[preset].config(
        unique_tokens=tokens, seed=seed, steps=STEPS, warm_up=5, **settings
    )
    rows = [
        {"step": i, "tokens": i, "train_loss": train[i], "lar": lar[i], "tokens_per_second": 9.0}
        | ({"val_loss": val[i]} if i % 5 == 0 or i == STEPS - 1 else {})
        for i in range(STEPS)
    ]
    matrices = {name: [0.5, 0.6] for name in ("q", "k", "v", "o", "gate", "up", "down")}
    spectrum = (np.arange(8, 0, -1) / 36).tolist()
    names = "corr rank_corr sigma_p sigma_q stable_rank effective_rank L1 D1".split()
    inspections = [
        {"step": i, "lars": matrices, "p": spectrum, "q": spectrum, **dict.fromkeys(names, 0.5)}
        for i in (0, 50, 99)
    ]
    return Run(config, preset, {"versions": {"jax": "0"}}, rows, inspections)


def test_smoothed():
    values = np.random.default_rng(0).standard_normal(50)
    wanted = [values[max(0, i - 7) : i + 7].mean() for i in range(50)]
    np.testing.assert_allclose(analysis.smoothed(values, 14), wanted, rtol=1e-12)


def test_correlations():
    a, b = np.random.default_rng(1).standard_normal((2, 40))
    np.testing.assert_allclose(analysis.pearson(a, a + b), scipy.stats.pearsonr(a, a + b)[0])
    np.testing.assert_allclose(analysis.spearman(a, a + b), scipy.stats.spearmanr(a, a + b)[0])
    assert np.isnan(analysis.pearson(a[:2], b[:2])) and np.isnan(analysis.pearson(a, 0 * a))


def test_gap_and_overfitting():
    val = 2 + ((step - 40) / 50) ** 2
    one = run(val=val, train=np.full(STEPS, 1.5))
    np.testing.assert_allclose(one.gap, val[one.validated] - 1.5)
    assert one.overfitting_step == 40 and one.overfits
    assert not run(val=2 - step / 100).overfits


def test_the_differential_and_its_controls():
    """A run whose LAR falls away from the baseline's as its gap grows, from step 50 on."""
    away = np.maximum(0, step - 50) / 50
    base = run()
    small = run(25_600, lar=RISE - 0.1 * away, val=5 * np.exp(-step / 30) + 0.1 + away)
    [pair] = analysis.pairs([base, small])
    assert pair.run is small and pair.base is base
    np.testing.assert_allclose(pair.D, 0.1 * away[pair.steps], atol=1e-12)
    np.testing.assert_allclose(pair.final(pair.D), 0.1 * away[[90, 95, 99]].mean(), rtol=1e-9)
    assert analysis.pearson(pair.D, pair.gap) > 0.99
    np.testing.assert_allclose(pair.loss_difference, 0, atol=1e-12)
    late = pair.steps[pair.steps > 60]
    matched = pair.matched[pair.steps > 60]  # the same training loss at the same step
    np.testing.assert_allclose(matched, 0.1 * away[late], atol=0.012)


def test_matched_loss_sees_through_a_run_that_is_only_further_along():
    """The same path at twice the speed: D is large, D at matched training loss is nothing."""
    fast = np.minimum(2 * step, STEPS - 1)
    base = run()
    quick = run(25_600, lar=RISE[fast], train=base.curve("train_loss")[fast])
    pair = Pair(quick, base)
    assert pair.D[0] < -0.02
    there = ~np.isnan(pair.matched)
    assert there[:5].all()
    np.testing.assert_allclose(pair.matched[:5], 0, atol=0.006)


def test_a_loss_the_baseline_never_had_is_not_matched():
    deep = run(25_600, train=5 * np.exp(-step / 30) - 1)
    pair = Pair(deep, run())
    assert np.isnan(pair.matched[-1]) and not np.isnan(pair.matched[0])
    assert np.isnan(pair.final(pair.matched))


def test_baselines():
    runs = [run(seed=0), run(seed=1), run(25_600, seed=1), run(25_600, seed=2), run(tied=True)]
    found = [(p.run.config.seed, p.base.config.seed) for p in analysis.pairs(runs)]
    assert found == [(1, 1), (2, 0)]
    assert [(p.run.config.seed, p.base.config.seed) for p in analysis.floors(runs)] == [(1, 0)]
    assert "tied True" in runs[-1].label


def test_declines():
    """A fall of .001 per step after a peak at step 20: .01 per tenth of the run."""
    lar = np.where(step < 20, 0.5 + step / 100, 0.7 - 0.001 * (step - 20))
    cells = analysis.declines(run(lar=lar, val=2 + np.abs(step - 60) / 50))
    assert np.isnan(cells[0][0])
    np.testing.assert_allclose([value for value, _ in cells[1:]], 0.01, rtol=1e-6)
    assert [leads for _, leads in cells] == [False] * 2 + [True] * 3 + [False] * 4
    paper = analysis.paper_declines()
    assert len(paper) == 10 and paper["muon_200M"][:2] == [(0.0113, True), (0.0183, True)]
    assert all(len(column) == 9 for column in paper.values())


@pytest.mark.parametrize("several", [True, False])
def test_report(several, tmp_path, capsys):
    away = np.maximum(0, step - 50) / 50
    made = [run(), run(seed=1), run(25_600, lar=RISE - 0.1 * away, val=5 - step / 50 + 4 * away)]
    made += [run(25_600, seed=1), run(optimiser="muon", preset="cpu", lar=RISE * 0.9)]
    for i, each in enumerate(made if several else made[:1]):
        folder = tmp_path / "runs" / str(i) if several else tmp_path / "runs"
        folder.mkdir(parents=True)
        stored = {"study": "pretrain", "preset": each.preset, **each.environment}
        stored["settings"] = dataclasses.asdict(each.config)
        records.write_whole(folder / "config.json", json.dumps(stored))
        training = each.config.seed == 1  # still, when the report is drawn
        records.append(folder / "metrics.jsonl", each.rows[:40] if training else each.rows)
        records.append(folder / "inspections.jsonl", each.inspections)
    if several:
        root = {"study": "pretrain", "preset": "bytes-tiny"}
        records.write_whole(tmp_path / "runs" / "config.json", json.dumps(root))
    assert cli.main(["report", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    assert "paper peak" in said and ("matched D" in said) == several
    html = (tmp_path / "runs" / "report.html").read_text()
    assert ("Differential D" in html) == several and "LAR of gate" in html and "113*" in html
    assert max(map(len, said.splitlines()[:-1])) <= 80  # the last names the page


def test_tables_are_rectangular():
    runs = [run(), run(25_600), run(seed=1)]
    leading = report.leading_table(runs)
    assert leading[1][2] == "1.069" and leading[-1][2] == "about 3"  # the root of 8/7
    tables = (report.overview(runs), report.comparison(runs), report.decline_table(runs), leading)
    for table in tables:
        assert len({len(row) for row in table}) == 1 and page.text(table)


def test_alarms():
    ringing = run()
    for row in ringing.rows:
        row["alarms"] = ["grokking"] * (row["step"] > 20) + ["decline"] * (30 < row["step"] < 50)
    assert ringing.alarms == {"decline": 31} and ringing.alarm == "31 (decline)"
    assert run().alarm == "not watched"
    assert dataclasses.replace(ringing, rows=ringing.rows[:31]).alarm == "none"


def test_the_page_says_in_its_first_lines_what_the_monitor_says_or_why_it_cannot():
    quiet, low, few = run(), run(lar=np.full(STEPS, 0.5)), run(25_600, lar=np.full(STEPS, 0.5))
    for each in (quiet, low, few):
        for row in each.rows:
            row["alarms"] = []
    few.rows[40]["alarms"] = ["deviation"]  # it had a baseline, as the records say
    assert report.monitored(quiet) == "did not ring"
    unknown = "cannot tell: LAR never rose above its value at initialisation (it reached 0.500"
    assert report.monitored(low).startswith(unknown)
    assert f"; the monitor, which sees no validation loss, {unknown}" in report.verdict([low])
    assert report.monitored(few) == "rang at step 40 (deviation)"
    assert report.verdict([quiet, low, few]).endswith("in 1 others, and cannot tell of 1")
    blind = run(lar=np.full(STEPS, np.nan))
    assert report.monitored(blind) == "cannot tell: LAR was never a number"
