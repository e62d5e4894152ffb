"""A run that is killed, at any moment and often, ends with the numbers of one that was not."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jlar_experiments import records
from jlar_experiments.checkpoint import Checkpoints, Foreign
from jlar_experiments.errors import Refusal
from jlar_experiments.grokking import ensemble, study, train
from jlar_experiments.grokking.config import GrokConfig

TINY = {"p": 7, "width": 8, "heads": 2, "layers": 1, "batch_size": 8, "seeds": 2, "lr": 0.01}
CONFIG = GrokConfig(**TINY, epochs=70, log_every=10, after_grok=20)


def result(folder: Path):
    """Records without wall-clock fields, spectra as bytes, and every final array."""
    rows = []
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        rows.append({k: v for k, v in json.loads(text).items() if not k.endswith("_seconds")})
    config = GrokConfig(**json.loads((folder / "config.json").read_text())["settings"])
    checkpoints = Checkpoints(folder / "checkpoints")
    newest = checkpoints.newest(jax.eval_shape(lambda: train.initial(config)), pytest.fail)
    checkpoints.close()
    assert newest is not None
    arrays = [np.asarray(a) for a in jax.tree.leaves(newest[1])]
    return rows, (folder / "spectra.jsonl").read_bytes(), newest[0], arrays


def assert_same(one: Path, two: Path):
    (rows, spectra, epoch, arrays), others = result(one), result(two)
    assert (rows, spectra, epoch) == others[:3]
    for ours, theirs in zip(arrays, others[3], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def cut(path: Path, wanted):
    rows = [row for row in records.read(path) if wanted(row)]
    records.write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def start(folder: Path, **options):
    with study.opened(CONFIG, folder):
        return ensemble.run(CONFIG, folder, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert start(folder)
    return folder


def test_continued_with_larger_settings(uninterrupted, tmp_path):
    """Ended between two logs, then twice as long: as if it had been so from the beginning."""
    folder = tmp_path / "run"
    for epochs, after_grok in ((25, 0), (70, 20)):
        config = dataclasses.replace(CONFIG, epochs=epochs, after_grok=after_grok)
        with study.opened(config, folder):
            assert ensemble.run(config, folder)
    assert_same(uninterrupted, folder)
    stored = json.loads((folder / "config.json").read_text())
    assert stored["continued_from"] == [{"epochs": 25, "after_grok": 0}]
    with pytest.raises(Refusal, match="epochs 70, not 25"):
        with study.opened(dataclasses.replace(CONFIG, epochs=25), folder):
            pass


class Stop(Exception):
    """In place of a kill, where the moment matters."""


@pytest.mark.parametrize("place", ["_log", "_save", "_advance"])
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_stopped_between_any_two_steps(uninterrupted, tmp_path, monkeypatch, place, seconds):
    original, calls = getattr(ensemble.Ensemble, place), []

    def stop(self, *arguments, **options):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise Stop
        return original(self, *arguments, **options)

    monkeypatch.setattr(ensemble.Ensemble, place, stop)
    for _ in range(2):
        with pytest.raises(Stop):
            start(tmp_path / "run", checkpoint_seconds=seconds)
    monkeypatch.setattr(ensemble.Ensemble, place, original)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 30, "torn')
    assert start(tmp_path / "run")
    assert_same(uninterrupted, tmp_path / "run")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(uninterrupted, tmp_path, capsys):
    folder = tmp_path / "run"
    assert start(folder, checkpoint_seconds=0.0)
    newest = max((folder / "checkpoints").iterdir(), key=lambda each: int(each.name))
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[:50])
    assert start(folder)
    said = capsys.readouterr().err
    assert f"checkpoint {newest.name} is damaged" in said and "continuing from epoch" in said
    assert_same(uninterrupted, folder)


def test_a_finished_run_is_left_alone(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert not start(uninterrupted)
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_version_is_not_lost(uninterrupted, tmp_path, monkeypatch):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    kept = sorted((folder / "checkpoints").rglob("*"))
    initial = train.initial
    monkeypatch.setattr(train, "initial", lambda config: initial(config)._replace(monitor=None))
    assert not start(folder)  # its records say that it is finished
    cut(folder / "metrics.jsonl", lambda row: row["epoch"] < 30)
    with pytest.raises(Foreign, match=r"saved by another version: its state differs in monitor\."):
        start(folder)
    assert sorted((folder / "checkpoints").rglob("*")) == kept


def test_seeds_leave_when_they_have_finished(uninterrupted):
    rows, *_ = result(uninterrupted)
    for seed in CONFIG.all_seeds:
        epochs = [row["epoch"] for row in rows if row["seed"] == seed]
        assert epochs == list(range(0, epochs[-1] + 1, 10)) and epochs[-1] <= 70


def test_killed_at_random_moments(tmp_path):
    settings = {**TINY, "epochs": 40, "log_every": 2}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    environment = {**os.environ, "PYTHONPATH": str(Path(study.__file__).parents[2])}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    for name, kills in (("whole", 0), ("killed", 10)):  # what the first compiles serves all
        folder = tmp_path / name
        command = [sys.executable, str(Path(__file__).parents[1] / "killed.py"), str(kills)]
        command += [str(folder), "grok", *options, "--checkpoint-seconds=0", f"--out={folder}"]
        done = subprocess.run(command, env=environment, timeout=600)
        assert done.returncode == 0, folder.with_suffix(".log").read_text()
    assert "Traceback" not in (tmp_path / "killed.log").read_text()
    assert_same(tmp_path / "killed", tmp_path / "whole")
