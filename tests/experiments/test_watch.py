"""`jlar watch`: logs of every form, the verdicts, exit codes, and what goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jlar_experiments import cli
from jlar_experiments import watch as command
from jlar_experiments.monitoring import runs, verdict

STEPS = np.arange(50, 10_001, 50)


def run(*arguments):
    try:
        return cli.main(["watch", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code


def lar(name, noise=0.002, seed=0):
    clean = runs.pretraining(name, STEPS.astype(float))
    return clean + noise * np.random.default_rng(seed).standard_normal(len(STEPS))


def table(path, columns, delimiter=","):
    rows = zip(*columns.values(), strict=True)
    lines = [delimiter.join(columns), *(delimiter.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def jsonl(path, **columns):
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def falling(tmp_path):
    return table(tmp_path / "falling.csv", {"step": STEPS, "lar": lar("muon_400M")})


@pytest.fixture
def steady(tmp_path):
    return table(tmp_path / "steady.csv", {"step": STEPS, "lar": lar("muon_100B", seed=1)})


@pytest.mark.parametrize("name", runs.declines())
def test_the_papers_runs(name, tmp_path, capsys):
    log = table(tmp_path / "run.csv", {"step": STEPS, "lar": lar(name)})
    base = f"{name.split('_')[0]}_100B"
    baseline = table(tmp_path / "base.csv", {"step": STEPS, "lar": lar(base, seed=1)})
    for more in ([], ["--baseline", baseline]):
        code = run(log, "--json", *more)
        found = json.loads(capsys.readouterr().out)
        assert code == (3 if found["rang"] else 0)
        assert found["rang"] == (name in runs.OVERFITTING), (name, more, found)
        if found["rang"]:
            assert 500 < found["first_alarm_step"] <= runs.OVERFITTING[name][1], (name, more)


@pytest.mark.parametrize("name", ["muon_400M", "muon_100B"])
def test_a_dense_log_is_judged_at_fewer_points_alike(name, tmp_path, monkeypatch, capsys):
    steps = np.arange(1.0, 20_001)
    values = runs.pretraining(name, steps) + 0.002 * np.random.default_rng(0).normal(size=20_000)
    log = table(tmp_path / "run.csv", {"step": steps, "lar": values})
    found = []
    for densest in (2**16, 2**9):
        monkeypatch.setattr(verdict, "DENSEST", densest)
        run(log, "--json")
        found.append(json.loads(capsys.readouterr().out))
    every, fewer = found
    assert every["points"] == 20_000 and 2000 < fewer["points"] < 6000
    assert fewer["notes"][-1] == f"judged at {fewer['points']} of them"
    assert every["verdict"] == fewer["verdict"] == ("alarm" if "400M" in name else "no alarm")
    if every["rang"]:
        # A point is a seven-hundredth of its step; the noise of the points adds to that.
        assert fewer["first_alarm_step"] == pytest.approx(every["first_alarm_step"], rel=0.05)
    assert fewer["step"] == every["step"] == 20_000


def test_json_is_one_object_with_every_signal(falling, steady, capsys):
    assert run(falling, "--baseline", steady, "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert found["rang"] is True and found["first_alarm_step"] in STEPS
    assert set(found["signals"]) == {"deviation", "matched_loss", "decline", "grokking"}
    for signal in found["signals"].values():
        assert {"level", "allowance", "S", "limit", "rang", "step", "step_before"} <= set(signal)
    apart = found["signals"]["deviation"]
    assert apart["rang"] and apart["S"] > apart["limit"] and apart["step"] in STEPS
    assert apart["step_before"] in STEPS and apart["step_before"] < apart["step"]
    assert apart["until"] == 10_000 and apart["in_force_since"] < 1000
    matched = found["signals"]["matched_loss"]  # no training loss: nothing to say
    assert matched["level"] is matched["until"] is None and not matched["rang"]
    assert found["says"] == "deviating" and found["points"] == 200
    assert found["verdict"] == "alarm" and found["cannot_tell_because"] == []
    assert found["noise"]["source"].startswith("the default") and found["baselines"] == 1

    assert run(steady, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rang"] is False and found["first_alarm_step"] is None
    assert found["verdict"] == "no alarm"


def test_paragraph(falling, steady, capsys):
    assert run(falling, "--baseline", steady) == 3
    said = capsys.readouterr().out
    assert (
        said.count("\n") == 2
        and "LAR 'lar', no training loss; 200 rows" in said
        and "compared with" in said
    )
    assert "ALARM (deviation) since step" in said and "declining" in said
    assert "go back to the last checkpoint at or before step" in said
    assert run(steady) == 0
    assert "No alarm" in capsys.readouterr().out


def test_forms_of_logs(tmp_path, capsys):
    values, loss = lar("muon_400M"), 10 * STEPS**-0.3
    wall = {"Wall time": STEPS + 1.7e9, "Step": STEPS, "Value": values}
    export = {
        "Step": STEPS,
        "big-run - lar": values,
        "big-run - lar__MIN": values,
        "big-run - lar__MAX": values,
    }
    quoted = {f'"{name}"': [f'"{value}"' for value in column] for name, column in export.items()}
    whole = [{"_step": int(s), "train/lar": float(v)} for s, v in zip(STEPS, values, strict=True)]
    (tmp_path / "array.json").write_text(json.dumps(whole))
    forms = [
        table(tmp_path / "tensorboard.csv", wall),
        table(tmp_path / "wandb.csv", export),
        table(tmp_path / "quoted.csv", quoted),
        table(tmp_path / "tabs.tsv", {"global_step": STEPS, "LAR": values}, "\t"),
        jsonl(
            tmp_path / "metrics.jsonl", step=STEPS.tolist(), lar=list(values), train_loss=list(loss)
        ),
        tmp_path / "array.json",
    ]
    firsts = []
    for form in forms:
        assert run(form, "--json") == 3, form
        firsts.append(json.loads(capsys.readouterr().out)["first_alarm_step"])
    assert len(set(firsts)) == 1
    odd = table(tmp_path / "odd.csv", {"t": STEPS, "alignment": values, "nll": loss})
    names = ["--step-column", "t", "--lar-column", "alignment", "--loss-column", "nll"]
    assert run(odd, *names, "--baseline", forms[4], "--json") == 0  # the same run twice
    assert json.loads(capsys.readouterr().out)["signals"]["matched_loss"]["until"] == 10_000


def test_run_and_baseline_in_one_export(tmp_path, capsys):
    columns = {"Step": STEPS, "a - lar": lar("muon_400M"), "b - lar": lar("muon_100B")}
    both = table(tmp_path / "both.csv", columns)
    names = ["--lar-column", "a - lar", "--baseline", both]
    assert run(both, *names, "--baseline-column", "b - lar", "--json") == 3
    assert json.loads(capsys.readouterr().out)["signals"]["deviation"]["rang"]
    assert run(both, *names, "--baseline-column", "c") == 2
    assert "no column 'c'" in capsys.readouterr().err


def test_the_width_from_k_and_grokking_is_good_news(tmp_path, capsys):
    epochs = np.arange(20, 1001, 20)
    values = 0.6 + 0.12 / (1 + np.exp(-(epochs - 500) / 50))
    loss = np.where(epochs < 100, 4.7, 0.05)
    k = 128.0 ** (2 * (1 - values))
    log = table(
        tmp_path / "grok.csv", {"epoch": epochs, "lar": values, "train_loss": loss, "k_pred": k}
    )
    assert run(log, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["width"] == 128 and found["signals"]["grokking"]["rang"] and not found["rang"]
    assert run(log) == 0
    assert "Good news since step" in capsys.readouterr().out


def test_a_short_log_says_so(tmp_path, capsys):
    log = table(tmp_path / "short.csv", {"step": [10, 20], "lar": [0.5, 0.6]})
    assert run(log) == 4
    assert "Cannot tell: 2 points are too few (12 at least)." in capsys.readouterr().out


# Why the absence of an alarm says nothing: (columns of the log, of the baseline, options, reason).
LOSS = 10 * STEPS**-0.3
STEADY = {"step": STEPS, "lar": lar("muon_100B")}
UNKNOWN = {
    "initialisation": ({"step": STEPS, "lar": 0.5 - 0 * STEPS}, None, [], "never rose above its"),
    "end of the baseline": (
        STEADY, {key: a[:80] for key, a in STEADY.items()}, [],
        "at the same step ended at step 4000 because the run left its steps",
    ),
    "no overlap": (
        STEADY, {"step": STEPS + 20_000, "lar": lar("muon_100B")}, [], "was never possible",
    ),
    "losses": (
        STEADY | {"loss": np.where(STEPS < 3000, LOSS, 0.1)}, STEADY | {"loss": LOSS}, [],
        "because the run left its losses",
    ),
    "first epoch": (STEADY, STEADY, ["--second-epoch", "60"], "nothing to learn the noise from"),
}  # fmt: skip


@pytest.mark.parametrize("why", UNKNOWN)
def test_what_cannot_be_told_is_said_with_the_reason(why, tmp_path, capsys):
    columns, other, options, said = UNKNOWN[why]
    arguments = [table(tmp_path / "run.csv", columns), *options]
    if other is not None:
        arguments += ["--baseline", table(tmp_path / "other.csv", other)]
    assert run(*arguments) == 4
    out = capsys.readouterr().out
    assert "Cannot tell: " in out and said in out and "nothing here looks like" not in out
    assert run(*arguments, "--json") == 4
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "cannot tell" and said in found["cannot_tell_because"][-1]


def test_the_noise_is_said_and_where_it_was_learnt(steady, tmp_path, capsys):
    seeds = [
        table(tmp_path / f"{seed}.csv", {"step": STEPS, "lar": lar("muon_100B", seed=seed)})
        for seed in (2, 3)
    ]
    several = [word for seed in seeds for word in ("--baseline", seed)]
    sources = {
        "the default, or 2.5 times that of a point": ["--baseline", seeds[0]],
        "2.5 times the spread of 2 baselines": several,
        "2.5 times what the first epoch shows, until step 6000": [*several, "--second-epoch", 6000],
        "2.5 times what the first epoch shows": ["--second-epoch", 6000],
    }
    for source, options in sources.items():
        assert run(steady, *options) == 0
        said = capsys.readouterr().out
        assert f"noise ({source}" in said and "nothing here looks like overfitting" in said
        assert ("says little without a baseline" in said) == ("--baseline" not in options)
        assert all(f"{seed}" in said for seed in options[1:2] if options[0] == "--baseline")
    assert run(steady, "--baseline", steady) == 2
    assert "is the log itself" in capsys.readouterr().err
    assert run(steady, "--second-epoch", 20_000) == 0  # it has seen nothing twice
    assert run(steady, "--second-epoch", 0) == 2


BAD = [
    (["nowhere.csv"], "nowhere.csv"),
    (["{log}", "--lar-column", "LAR"], "has no column 'LAR'; it has 'step', 'lar'"),
    (["{log}", "--step-column", "t"], "has no column 't'; it has 'step', 'lar'"),
    (["{log}", "--loss-column", "loss"], "has no column 'loss'; it has 'step', 'lar'"),
    (["{log}", "--baseline", "nowhere.csv"], "nowhere.csv"),
    (["{log}", "--n", "1"], "--n is the input width"),
    (["{log}", "--n", "abc"], "--n"),
    (["{log}", "--only", "seed"], "COLUMN=VALUE"),
    (["{log}", "--only", "seed=1"], "has no column 'seed'"),
    (["{log}", "--only", "step=7"], "no row with 'step'"),
    (["{empty}"], "holds no rows"),
    (["{other}"], "has no column 'lar'; it has 'step', 'accuracy': name it by --lar-column"),
    (["{two}"], "several columns for --lar-column: 'a - lar', 'b - lar'"),
    (["{seeds}"], "choose one with --only seed=0"),
    (["{log}", "--baseline", "{point}"], "two or more different steps"),
    ([], "LOG"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD)
def test_bad_input_is_one_line(arguments, named, falling, tmp_path, capsys):
    paths = {
        "log": falling,
        "empty": table(tmp_path / "empty.csv", {"step": [], "lar": []}),
        "other": table(tmp_path / "other.csv", {"step": [1], "accuracy": [0.5]}),
        "two": table(tmp_path / "two.csv", {"Step": [1], "a - lar": [0.5], "b - lar": [0.5]}),
        "seeds": table(tmp_path / "seeds.csv", {"step": [1, 1], "seed": [0, 1], "lar": [0.5, 0.5]}),
        "point": table(tmp_path / "point.csv", {"step": [1], "lar": [0.5]}),
    }
    assert run(*(each.format(**paths) for each in arguments)) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("jlar watch: error")
    assert named in said.err


def test_plot(falling, steady, tmp_path):
    for name, more in (("alone.png", []), ("both.png", ["--baseline", steady])):
        assert run(falling, "--plot", tmp_path / name, *more) == 3
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert 10_000 < (tmp_path / name).stat().st_size < 300_000


def test_follow_ends_at_the_alarm(falling, tmp_path, monkeypatch, capsys):
    lines = falling.read_text().splitlines(keepends=True)
    log = tmp_path / "growing.csv"
    log.write_text(lines[0])
    left = iter(["".join(lines[1:60]) + lines[60][:4], lines[60][4:], *lines[61:]])
    slept = []

    def grow(seconds):
        slept.append(seconds)
        with log.open("a") as file:
            file.write(next(left))

    monkeypatch.setattr(command.time, "sleep", grow)
    assert run(log, "--follow", "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == found["first_alarm_step"]
    assert run(falling, "--json") == 3
    assert json.loads(capsys.readouterr().out)["first_alarm_step"] == found["first_alarm_step"]
    assert len(slept) > 10


def test_follow_outlives_what_happens_to_files(falling, tmp_path, monkeypatch, capsys):
    text = falling.read_text()
    header, log = text.splitlines(keepends=True)[0], tmp_path / "log.csv"
    steps = [
        lambda: log.write_text(""),
        lambda: log.write_text(header),
        lambda: log.write_text(text[:400]),
        lambda: log.unlink(),
        lambda: log.write_text("step,los"),
        lambda: log.rename(tmp_path / "log.csv.1"),
        lambda: log.mkdir(),
        lambda: log.rmdir(),
        lambda: log.write_bytes(b"\0\xff\0\1" * 99),
        lambda: log.write_text(text),
    ]
    monkeypatch.setattr(command.time, "sleep", lambda seconds: steps.pop(0)())
    assert run(log, "--follow") == 3 and not steps
    said = capsys.readouterr()
    assert "ALARM" in said.out and "No such file" in said.err and "holds no rows" in said.err
    assert all(line.startswith(("waiting: ", "step ")) for line in said.err.splitlines())


def test_follow_of_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", interrupted)
    assert run(tmp_path / "nowhere", "--follow") == 2
    assert "No such file" in capsys.readouterr().err.splitlines()[-1]
    assert run("-", "--follow") == 2
    assert "--follow needs a file" in capsys.readouterr().err


def test_follow_ends_at_ctrl_c(steady, monkeypatch, capsys):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", interrupted)
    assert run(steady, "--follow") == 0
    said = capsys.readouterr()
    assert "No alarm" in said.out and "step 10000" in said.err


def test_help_fits_and_loads_nothing_heavy(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 90
    for option in ("--baseline", "--n", "--json", "--follow", "--plot", "--lar-column", "--only"):
        assert option in said
    code = "import sys, jlar_experiments.watch; assert not {'jax', 'numpy'} & set(sys.modules)"
    root = str(Path(cli.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": root})
