"""`jlar paper grokking`: ensembles, calls that add up, table 1 and the figures from records."""

import contextlib
import csv
import dataclasses
import gzip
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import jlar
from jlar_experiments import cli, records
from jlar_experiments.grokking import (
    analysis,
    beyond,
    dating,
    dip,
    ensemble,
    measures,
    plan,
    plates,
    results,
    study,
)
from jlar_experiments.grokking.analysis import Run, Timeline
from jlar_experiments.grokking.config import GrokConfig
from jlar_experiments.grokking.tasks import TASKS

TINY = {"p": 7, "width": 8, "heads": 2, "layers": 1, "batch_size": 8, "lr": 0.01}
BASE = GrokConfig(**TINY, epochs=40, log_every=10, after_grok=10)


def rows(folder):
    """The records without the wall clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.endswith("_seconds")} for line in lines
    ]


def start(configs, out, **options):
    planned = [(each, out / f"{i}") for i, each in enumerate(configs)]
    with contextlib.ExitStack() as stack:
        for each, folder in planned:
            stack.enter_context(study.opened(each, folder))
        assert ensemble.together(planned, **options)
    return [rows(folder) for _, folder in planned]


def assert_near(ours, alone):
    assert [row["epoch"] for row in ours] == [row["epoch"] for row in alone]
    for one, two in zip(ours, alone, strict=True):
        assert one["alarms"] == two["alarms"]
        for name, value in one.items():
            if name == "alarms":
                continue
            # An answer that is a tie to rounding may fall either way: one of some 20 pairs.
            slack = 0.06 if name.endswith("acc") else 2e-3 * abs(two[name]) + 1e-3
            if name not in ("k95", "logits_rank99", "fourier_k99"):  # counts, at a threshold
                assert abs(value - two[name]) <= slack, (name, one["epoch"])


def test_together_on_eight_devices_as_alone(tmp_path):
    """Tasks of equal shape and several seeds, of which some end sooner."""
    members = (("x+y", 0, 40), ("x-y", 1, 20), ("x^2+y^2", 2, 20), ("x+y", 3, 20))
    configs = [
        dataclasses.replace(BASE, task=name, seed=seed, epochs=epochs)
        for name, seed, epochs in members
    ]
    assert len({each.program for each in configs}) == 1
    together = start(configs, tmp_path / "together")
    assert [each[-1]["epoch"] for each in together] == [40, 20, 20, 20]
    [alone] = start([configs[1]], tmp_path / "alone")
    assert_near(together[1], alone)


def test_calls_add_up_and_an_interrupted_one_goes_on(tmp_path, monkeypatch, capsys):
    def runs(paper):
        return [dataclasses.replace(BASE, seed=seed) for seed in range(paper.seeds or 1)]

    monkeypatch.setattr(plan.PaperConfig, "runs", runs)
    out = tmp_path / "out"
    command = ["paper", "grokking", "--out", str(out)]
    assert cli.main([*command, "--minutes=0"]) == 0  # no time at all
    assert not list(out.glob("*/metrics.jsonl"))
    assert cli.main(command) == 0
    [first] = out.glob("*/metrics.jsonl")
    before = first.read_bytes()
    assert cli.main([*command, "--seeds=2"]) == 0
    assert first.read_bytes() == before and len(list(out.glob("*/metrics.jsonl"))) == 2
    said = capsys.readouterr().out
    assert "set A, paper" in said and "report.html" in said
    assert cli.main(["report", str(out)]) == 0
    results.pack(out)
    packed = tmp_path / "packed"
    packed.mkdir()
    for name in (results.PACKED, "config.json"):
        shutil.copy(out / name, packed)
    assert cli.main(["report", str(packed)]) == 0
    assert (packed / "logs.csv").read_text() == (out / "logs.csv").read_text()
    assert cli.main(["paper", "grokking", "--out", str(packed), "--seeds=2"]) == 0
    assert not list(packed.glob("*/metrics.jsonl"))  # what is packed is not trained again
    assert len(results.read(out)) == 2  # each run once, though it is there twice
    assert cli.main(["paper", "grokking", "--out", str(first.parent)]) == 2
    assert "is that of `jlar grok`; choose another" in capsys.readouterr().err


def timeline(seed, dates, *, k_after=15.0, every=20, end=1000):
    """A synthetic run: memorised and grokked at these epochs, k from 50 to `k_after`."""
    memorised, grokked = dates
    line = Timeline(seed)
    for epoch in range(0, end + 1, every):
        done = 0.0 if epoch < memorised else min(1.0, (epoch - memorised) / (grokked - memorised))
        k = 50 * (k_after / 50) ** done
        row = {"epoch": epoch, "step": 9 * epoch, "seed": seed, "train_loss": 0.1, "corr": 0.9}
        row |= {"train_acc": float(epoch >= memorised), "val_acc": done, "k_pred": k}
        row |= {"lar": 1 - np.log(k) / np.log(128) / 2, "k95": 80 + done * (k_after - 80)}
        row |= {"pr_p": k, "pr_q": k, "q_in_top95": 1.0, "logits_pr": k, "logits_rank99": k}
        row |= {"fourier_k99": k, "stable_rank": 5.0, "effective_rank": k, "weight_norm": 60 - done}
        line.add(row)
    return line


def synthetic(seed=0, dates=(60, 180), **settings):
    config = GrokConfig(seed=seed, epochs=1000, after_grok=1000, **settings)
    line = timeline(seed, dates, every=config.log_every)
    p = np.full(128, 1 / 128).tolist()
    points = [
        {"epoch": line.at(each)["epoch"], "seed": seed, "point": each, "p": p, "q": p}
        for each in ("memorised", "grokked", "final")
        if line.at(each)
    ]
    return Run(config, {}, {seed: line}, points)


@pytest.fixture
def runs():
    b = synthetic(train_fraction=0.3, dates=(40, 520))
    never = synthetic(task="x^3+xy^2+y", dates=(60, 10**6))
    return [synthetic(seed) for seed in range(3)] + [synthetic(task="x/y"), b, never]


def test_table1_against_numpy(runs):
    found = [(10.0, 12.0), (20.0, 19.0), (30.0, 37.0), (5.0, 5.0), (8.0, 8.0)]
    assert results.rmse(found) == pytest.approx((54 / 5) ** 0.5)
    generator, draws = np.random.default_rng(7), []
    for _ in range(20_000):  # resampling written out
        squares = [(found[i][0] - found[i][1]) ** 2 for i in generator.integers(5, size=5)]
        draws.append((sum(squares) / 5) ** 0.5)
    draws = np.sort(draws)
    half = (draws[19_500] - draws[500]) / 2
    assert results.half_interval(found) == pytest.approx(half, rel=0.03)
    assert np.isnan(results.half_interval(found[:4]))
    table = results.table1(runs)
    by = {row[0]: row[1:] for row in table[1:]}
    assert list(by) == [
        "set A, ours",
        "set A, paper",
        "x+y mod 97, 50% of pairs",
        "x/y mod 97, 50% of pairs",
        "x^3+xy^2+y mod 97, 50% of pairs",
        "set B, ours",
        "set B, paper",
        "x+y mod 97, 30% of pairs",
        "x+y mod 97, 30% of pairs, paper",
    ]
    ours = by["set A, ours"]
    assert "± " in ours[0] and "(n = 5)" in ours[0]
    assert ours[2].endswith("(n = 4)") and "±" not in ours[2] and "(n = 1)" in ours[3]
    assert by["set B, ours"][3] == "-" and by["set A, paper"][0] == "24.90 ± 1.67"
    assert "(n = 3)" in by["x+y mod 97, 50% of pairs"][0]
    file = (analysis.REFERENCE / "fig3_points.csv").read_text(encoding="utf-8")
    points = [row for row in csv.DictReader(file.splitlines()) if row["train_fraction"] == "0.30"]
    memorised = [row for row in points if row["checkpoint"] == "memorised"]
    errors = [(float(row["k_pred"]) - float(row["k95"])) ** 2 for row in memorised]
    wanted = (sum(errors) / 5) ** 0.5
    assert by["x+y mod 97, 30% of pairs, paper"][0].startswith(f"{wanted:.2f} ± ")


def test_spreads_are_sample_ones_and_a_stopped_run_is_not_past_the_transition(runs):
    assert analysis.Cell((1.0, 3.0)).text(3) == "2.000 ± 1.414"
    assert beyond._geometric([1.0, np.e]) == "1.65 (0.71)" and beyond._geometric([2.0]) == "2.00"
    line = runs[0].seeds[0]  # grokked at epoch 180 and ended at 1000
    stopped, whole = (
        Run(dataclasses.replace(runs[0].config, after_grok=after), {}, {0: line}, [])
        for after in (821, 820)
    )
    assert beyond._ratios([stopped], "k95", False) == []
    assert len(beyond._ratios([whole], "k95", False)) == 1


def test_the_dip_is_logged_at_every_step_of_the_run_itself(tmp_path):
    config = dataclasses.replace(BASE, seed=1, epochs=4, log_every=1)
    per_epoch = config.steps_per_epoch
    rows = list(dip.first_steps(config, 3 * per_epoch))
    with study.opened(config, tmp_path / "run"):
        ensemble.run(config, tmp_path / "run")
    logged = [row["lar"] for row in analysis.read(tmp_path / "run").seeds[1].rows[:4]]
    np.testing.assert_allclose([row[-1] for row in rows[::per_epoch]], logged, rtol=1e-5)
    assert [row[3] for row in rows] == list(range(3 * per_epoch + 1))
    assert dip.dip([0.5, 0.45, 0.6]) == pytest.approx(0.05)


def test_figures_from_records(runs, tmp_path):
    drawn = plates.draw(runs, tmp_path)
    assert set(drawn) == {"curves", "spectra", "dimensions"}
    for name in drawn:
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert (tmp_path / f"{name}.svg").exists()


def test_a_rule_alarms_where_k_falls(runs):
    line = runs[0].seeds[0]
    rule = dating.Rule("k_pred", "ratio", True, 0.5)
    # k halves at epoch 60 + 120 ln 2 / ln(50 / 15) = 129: below at 140, and again at 160.
    assert rule.alarm(line) == 160
    assert dating.crossing(line, 0.5) == pytest.approx(120)
    assert dating.crossing(line, 0.95) == pytest.approx(174)
    never = runs[5].seeds[0]
    assert dating.crossing(never, 0.5) is None and rule.alarm(never) is None
    found = dating.score(rule, [line, never])
    assert (found.grokking, found.controls, found.misses, found.false_alarms) == (1, 1, 0, 0)
    assert found.near == 1 and dating.chosen([line, never], "k_pred", "ratio").falls
    epochs, against = dating.series(line, "k_pred/k95")
    assert list(epochs) == [row["epoch"] for row in line.rows]
    np.testing.assert_allclose(against, [row["k_pred"] / row["k95"] for row in line.rows])


@pytest.mark.parametrize("number", [1, 3, 10])
def test_harmonics_of_a_planted_function(number):
    """Logits made of one component of functions of the answer have just its dimension."""
    task = TASKS[number - 1]
    waves = measures.harmonics(task, 97)
    basis, component = map(np.asarray, waves)
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-4)
    np.testing.assert_allclose(basis.sum(0), 0, atol=1e-4)  # no constant
    one = basis[:, component == 2]
    assert one.shape[1] == {1: 2, 3: 2, 10: 25}[number]
    gram = (one @ one.T + 1).astype(np.float32)  # and a constant, which does not count
    p = np.array([0.5, 0.25, 0.25], np.float32)
    spectra = jlar.Spectra(jnp.asarray(p), jnp.asarray(p))
    found = measures.comparators({"W": np.array([3.0, 4.0], np.float32)}, spectra, gram, waves)
    assert found.fourier_k99 == one.shape[1] and found.weight_norm == 5
    assert found.stable_rank == 2
    s = np.sqrt(p) / np.sqrt(p).sum()
    np.testing.assert_allclose(found.effective_rank, np.exp(-np.sum(s * np.log(s))), rtol=1e-5)
    values = np.linalg.eigvalsh(gram.astype(np.float64))[::-1]
    np.testing.assert_allclose(found.logits_pr, values.sum() ** 2 / (values**2).sum(), rtol=1e-3)
    before = np.cumsum(values) - values
    assert float(found.logits_rank99) == np.sum(before < 0.99 * values.sum())


def test_s5_components_are_those_of_left_translation():
    """Composing with any permutation maps each component of S5 into itself."""
    from jlar_experiments.grokking.tasks import composed, permutations

    basis, component = map(np.asarray, measures.harmonics(TASKS[9], 97))
    elements = permutations()
    moved = composed(elements[np.full(120, 77)], elements)
    inner = basis.T @ basis[moved]
    assert np.abs(inner[component[:, None] != component[None, :]]).max() < 1e-4


def test_every_planned_run_has_a_folder_of_its_own():
    for preset in ("quick", "cpu", "full"):
        planned = plan.PaperConfig(preset=preset).runs()
        assert len({plan.folder_name(each) for each in planned}) == len(planned)
    full = [each for each in planned if each.epochs == 50_000]
    assert len(full) == 12 * 5 + 4 * 5 and {each.after_grok for each in full} == {2000}
    longer = plan.PaperConfig(tasks="3 x-y", epochs=7, seeds=2).runs()
    assert [each.task for each in longer] == ["x-y", "x/y"] * 2
    assert {each.epochs for each in longer} == {7}


def packed_in(folder, run):
    """Put the pack of this run alone into the folder, as the study would; returns the pack."""
    records.write_json(folder / "config.json", {"study": "paper grokking"})
    row = {"settings": dataclasses.asdict(run.config), "rows": run.seeds[run.config.seed].rows}
    records.write_packed(folder / results.PACKED, [row])
    return folder / results.PACKED


def test_of_a_run_that_is_there_twice_the_longer_is_packed(runs, tmp_path):
    path, run = packed_in(tmp_path, runs[0]), runs[0]
    rows, metrics = run.seeds[0].rows, tmp_path / "run" / "metrics.jsonl"
    metrics.parent.mkdir()
    described = {"study": "grok", "settings": dataclasses.asdict(run.config)}
    records.write_json(metrics.parent / "config.json", described)
    for count, kept in ((10, len(rows)), (len(rows), len(rows))):
        records.append(metrics, rows[len(records.read(metrics)) : count])
        results.pack(tmp_path)
        [one] = results.packed(tmp_path).values()
        assert one.logs == kept and not list(tmp_path.glob("earlier*"))
    before = path.read_bytes()
    metrics.write_text("")
    records.append(metrics, [row | {"lar": 0.1} for row in rows])  # as many, but others
    results.pack(tmp_path)
    assert (tmp_path / f"earlier-{results.PACKED}").read_bytes() == before


def test_what_a_killed_report_has_drawn_is_removed_by_the_next(runs, tmp_path):
    packed_in(tmp_path, runs[0])
    for name in ("tmpkilled_0.draft", "tmpothers_0.draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "curves.svg").touch()
    (tmp_path / "tmpothers_0.draft" / "cat.png").touch()
    assert cli.main(["report", str(tmp_path)]) == 0
    assert [each.name for each in tmp_path.glob("*.draft")] == ["tmpothers_0.draft"]
    assert {each.name for each in (tmp_path / "figures").iterdir()} == {
        "curves.png",
        "curves.svg",
        "dimensions.png",
        "dimensions.svg",
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-30],
        lambda raw: raw[:40] + bytes([raw[40] ^ 255]) + raw[41:],
        lambda raw: b"not gzip",
        lambda raw: gzip.compress(b"[1]\n"),
        lambda raw: gzip.compress(b"{}\n"),
        lambda raw: gzip.compress(b'{"settings": {"p": "x"}, "rows": []}\n'),
        lambda raw: gzip.compress(b'{"settings": {"colour": 3}, "rows": []}\n'),
        lambda raw: gzip.compress(b'{"settings": {}, "rows": 3}\n'),
        lambda raw: gzip.compress(b'{"settings": {}, "rows": [3]}\n'),
        lambda raw: gzip.compress(b'{"settings": {}, "rows": [{"seed": 0, "epoch": 0}]}\n'),
        lambda raw: gzip.compress(
            b'{"settings": {}, "rows": [{"seed": 0, "train_acc": 0, "val_acc": 0}]}\n'
        ),
        None,
    ],
)
def test_a_damaged_pack_is_one_line(damage, runs, tmp_path, capsys):
    """None stands for a pipe, whose other end nobody has."""
    path = packed_in(tmp_path, runs[0])
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
        os.mkfifo(path)
    for command in (["report", str(tmp_path)], ["paper", "grokking", f"--out={tmp_path}"]):
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and str(path) in said
    assert results.main(tmp_path) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said
