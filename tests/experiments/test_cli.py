"""The command line: one line for a bad value, nothing spoilt, and a run from end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jlar_experiments import cli
from jlar_experiments.grokking.config import GrokConfig

TINY = ["--p=7", "--width=8", "--heads=2", "--layers=1", "--epochs=20", "--batch-size=8"]


def run(*arguments):
    """Exit code, whether the parser or the command gives it."""
    try:
        return cli.main(list(arguments))
    except SystemExit as stop:
        return stop.code


BAD = [
    (["--epochs", "abc"], "--epochs"),
    (["--epochs", "0"], "--epochs"),
    (["--learning-rate", "1"], "--learning-rate"),
    (["--lear", "1"], "--lear"),
    (["--lr", "-1"], "--lr"),
    (["--lr", "nan"], "--lr"),
    (["--weight-decay", "inf"], "--weight-decay"),
    (["--task", "x*y"], "x+y"),
    (["--task", "13"], "12 S5:xyx"),
    (["--task", "x/y", "--p", "91"], "--p must be prime"),
    (["--task", "S5:xy", "--p", "5"], "--p"),
    (["--p", "2"], "--p"),
    (["--p", "1000001"], "--p"),
    (["--train-fraction", "0"], "--train-fraction"),
    (["--train-fraction", "1"], "--train-fraction"),
    (["--train-fraction", "nan"], "--train-fraction"),
    (["--p", "3", "--train-fraction", "0.95"], "--train-fraction leaves nothing"),
    (["--heads", "3"], "--heads must divide the width (128)"),
    (["--width", "1", "--heads", "1"], "--width"),
    (["--log-every", "21", "--epochs", "20"], "--log-every"),
    (["--seeds", "0"], "--seeds"),
    (["--seed", "-1"], "--seed"),
    (["--norm", "batch"], "--norm"),
    (["--embedding-scale", "0"], "--embedding-scale"),
    (["--checkpoint-seconds", "-1"], "--checkpoint-seconds"),
    (["--resume", "--fresh"], "--resume"),
    (["x+y"], "x+y"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD)
def test_a_bad_value_is_one_line_and_writes_nothing(
    arguments, named, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run("grok", *arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("jlar grok: error: ") and named in said.err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    other, model = tmp_path / "other", tmp_path / "model"
    for folder, name in ((other, "thesis.tex"), (model, "config.json")):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / name).write_text('{"hidden_size": 8}')
    for folder in (other, model, other / "thesis.tex"):
        for extra in ([], ["--fresh"]):
            assert run("grok", *TINY, "--out", str(folder), *extra) == 2
            assert capsys.readouterr().err.count("\n") == 1
    assert (other / "checkpoints").exists() and (model / "checkpoints").exists()
    assert run("report", str(other)) == 2


def test_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("grok", *TINY, "--seeds=2", "--norm=pre") == 0
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name == "grok-x+y-50-p7-seeds2-epochs20-batch_size8-width8-layers1-heads2-pre"
    said = capsys.readouterr().out
    assert "memorised" in said and "k95" in said and "12 tasks" in said and "report.html" in said
    assert max(map(len, said.splitlines()[:-1])) <= 80  # the last names the page
    page = (folder / "report.html").read_text()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["seed"]) for row in rows] == [(0, 0), (0, 1), (20, 0), (20, 1)]
    names = "epoch step seed train_loss train_acc val_loss val_acc lar k_pred k95 pr_p pr_q corr"
    assert {*names.split(), "q_in_top95"} <= set(rows[0])
    assert rows[-1]["step"] == 20 * 3  # 24 pairs in batches of 8
    points = [json.loads(line) for line in (folder / "spectra.jsonl").read_text().splitlines()]
    assert {each["point"] for each in points} >= {"final"}
    assert all(len(each["p"]) == len(each["q"]) == 8 for each in points)
    stored = json.loads((folder / "config.json").read_text())
    assert stored["settings"]["p"] == 7 and stored["versions"]["jax"] and "git_commit" in stored

    records = (folder / "metrics.jsonl").read_bytes()
    arguments = ["grok", *TINY, "--seeds=2", "--norm=pre", "--out", str(folder)]
    assert run(*arguments, "--lr=0.5") == 2  # other settings: refused
    assert "lr 0.001, not 0.5" in capsys.readouterr().err
    assert run(*arguments) == 0  # the same: nothing left to do
    assert "is finished" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == records
    (folder / "report.html").unlink()
    assert run("report", str(folder)) == 0 and (folder / "report.html").read_text() == page
    (folder / "metrics.jsonl").write_text("")
    assert run(*arguments, "--fresh") == 0
    assert (folder / "metrics.jsonl").read_text().count("\n") == len(rows)


def test_help_fits_and_names_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("grok", "--help") == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for name in GrokConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in said
    assert run("--help") == 0 and run() == 2


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_saves_and_says_how_to_go_on(name, tmp_path):
    root = str(Path(cli.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    # What a shell runs in the background ignores the signal, and so does what that starts.
    heeding = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = (
        f"import signal, sys; {heeding}; from jlar_experiments import cli; sys.exit(cli.main())"
    )
    command = [sys.executable, "-c", program, "grok", *TINY]
    command += ["--epochs=100000", "--weight-decay=0", "--log-every=50", "--out=run"]
    popen = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    with popen as process:  # closes its pipe
        try:
            while not (tmp_path / "run" / "metrics.jsonl").exists():
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.Signals[name])
            _, said = process.communicate(timeout=300)  # XLA compiles to its end first
        finally:
            process.kill()
    assert process.returncode == 128 + signal.Signals[name], said
    assert (
        said.splitlines()[-1].startswith(f"jlar grok: {name}: saved at epoch ")
        and "Trace" not in said
    )


# The command with `body` in place of its parser; a SIGINT comes where the body sends it.
INTERRUPTED = """
import atexit, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from jlar_experiments import cli
class Object:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
def body():
    {}
cli._parser = body
atexit.register(time.sleep, 0.3)
sys.exit(cli.command())
"""


@pytest.mark.parametrize(
    ("body", "code", "lines"),
    [
        ("import interrupting; time.sleep(9)", 130, 1),
        ("import interrupting; sys.exit(2)", 2, 0),
        ("atexit.register(os.kill, os.getpid(), signal.SIGINT); sys.exit(2)", 2, 0),
        ("Object(); time.sleep(9)", 130, 1),
    ],
    ids=["import", "import, then the end", "the end", "finaliser"],
)
def test_an_interrupt_is_neither_lost_nor_late(body, code, lines, tmp_path):
    """In an import it waits, out of a finaliser it comes again, and at the end it is ignored."""
    module = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    (tmp_path / "interrupting.py").write_text(module)
    paths = os.pathsep.join([str(Path(cli.__file__).parents[1]), str(tmp_path)])
    command = [sys.executable, "-c", INTERRUPTED.format(body)]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (code, lines), done
    assert lines == 0 or done.stderr.startswith("jlar: interrupted"), done


# A tokenizer in training goes on after an interrupt, like the real ones, and sends one itself.
DEAF = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import tokenizers
from jlar_experiments import cli
class Tokenizer:
    def __init__(self, model):
        pass
    def train_from_iterator(self, *_):
        for second in range(60):
            try:
                if second == 0:
                    os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                pass
tokenizers.Tokenizer = Tokenizer
sys.exit(cli.command())
"""


def test_an_interrupt_does_not_wait_for_a_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 9)
    command = [sys.executable, "-c", DEAF, "data", "text.txt", "--tokenizer=bpe", "--out=made"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=40
    )
    assert done.returncode == 130 and done.stderr.count("\n") == 2, done
    assert [each.name for each in tmp_path.iterdir()] == ["text.txt"]


def test_names_differ_with_every_setting():
    names = {GrokConfig().name}
    other = {"task": "x/y", "norm": "pre", "heads": 8, "embedding_scale": 0.5, "log_every": 10}
    for name, value in other.items():
        names.add(GrokConfig(**{name: value}).name)
    assert len(names) == 6 and not any(set(name) & set("/|^ ") for name in names)


@pytest.mark.parametrize("name", ["jax", "orbax", "matplotlib", "plotly", "optax", "tqdm"])
def test_help_loads_nothing_heavy(name):
    code = f"import sys, jlar_experiments.cli; assert {name!r} not in sys.modules"
    root = str(Path(cli.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": root})
