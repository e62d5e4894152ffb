"""A pre-training run: killed, terminated, damaged, moved to another mesh, fed with bad data."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jlar.monitor import Baseline, Monitor
from jlar_experiments import cli, logs
from jlar_experiments.checkpoint import Checkpoints, Foreign
from jlar_experiments.errors import Stopped, Trouble
from jlar_experiments.monitoring import verdict
from jlar_experiments.pretraining import (
    corpus,
    data,
    inputs,
    report,
    sharding,
    study,
    texts,
    train,
)
from jlar_experiments.pretraining.config import PretrainConfig

SETTINGS = {
    "width": 16, "layers": 1, "heads": 2, "hidden": 16, "length": 8, "batch": 8, "steps": 30,
    "unique_tokens": 160, "validation_tokens": 64, "validate_every": 5, "inspect_every": 10,
    "checkpoint_every": 8, "warm_up": 2, "unroll": 1,
    "lr": 0.02,  # for a LAR that is no longer initialisation's
}  # fmt: skip
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
TIMES = ("tokens_per_second", "mfu")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A corpus of forty small documents."""
    folder = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    for i in range(40):
        letters = random.choice(list("abcdefgh"), 400)
        (folder / f"{i}.txt").write_text("".join(letters))
    return folder


@pytest.fixture(scope="module")
def config(text):
    return PretrainConfig(corpus=str(text), **SETTINGS)


@pytest.fixture(scope="module")
def tokens(config, tmp_path_factory):
    return inputs.tokens(config, tmp_path_factory.mktemp("data"))


def rows(folder: Path, name: str = "metrics.jsonl"):
    """The records without the clock's."""
    lines = (folder / name).read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in lines]


def start(config, folder, tokens, baseline=None):
    with study.opened(config, "bytes-tiny", folder, tokens):
        return study.run(config, folder, tokens, baseline)


@pytest.fixture(scope="module")
def whole(config, tokens, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert start(config, folder, tokens)
    return folder


def test_records(whole, config, tokens):
    found = rows(whole)
    assert [row["step"] for row in found] == list(range(30))
    assert found[-1]["tokens"] == 30 * 64 and found[-1]["epoch"] == 12.0 == config.epochs
    measured = [row["step"] for row in found if "val_loss" in row]
    assert measured == [0, 5, 10, 15, 20, 25, 29]
    assert 0.4 < found[0]["lar"] < 0.6 and found[0]["keep_rate"] == 1
    lar = 1 + np.log(found[7]["y"] / found[7]["x"] / found[7]["w"]) / np.log(16) / 2
    np.testing.assert_allclose(found[7]["lar"], lar, rtol=1e-5)
    seen = rows(whole, "inspections.jsonl")
    assert [row["step"] for row in seen] == [0, 10, 20, 29]
    for row in seen:
        np.testing.assert_allclose(row["L3"] + row["D3"], found[row["step"]]["lar"], rtol=1e-4)
        np.testing.assert_allclose(row["lars"]["unembedding"], found[row["step"]]["lar"], rtol=1e-6)
        assert len(row["p"]) == len(row["q"]) == 16 and len(row["lars"]["gate"]) == 1
        np.testing.assert_allclose(row["stable_rank"] * row["p"][0], 1, rtol=1e-5)
    assert not start(config, whole, tokens)  # finished


def same(folder, whole):
    assert rows(folder) == rows(whole)
    assert rows(folder, "inspections.jsonl") == rows(whole, "inspections.jsonl")


def test_killed_at_random_moments(whole, text, tmp_path):
    """With as many devices as this process has: sums over eight are others than over one."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["PYTHONPATH"] = str(Path(study.__file__).parents[2])
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
    folder = tmp_path / "run"
    command = [sys.executable, str(Path(__file__).parents[1] / "killed.py"), "10", str(folder)]
    command += ["pretrain", *OPTIONS, "--checkpoint-every=2", f"--corpus={text}"]
    command += [f"--data={tmp_path / 'data'}", f"--out={folder}"]
    done = subprocess.run(command, env=environment, timeout=600)
    said = folder.with_suffix(".log").read_text()
    assert done.returncode == 0 and "continuing from step" in said and "Traceback" not in said, said
    same(folder, whole)


def test_sigterm_saves_first(whole, config, tokens, tmp_path, monkeypatch, capsys):
    advance = study.Study.advance

    def interrupted(self):
        advance(self)
        if self.step == 13:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(study.Study, "advance", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        start(config, tmp_path / "run", tokens)
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(rows(tmp_path / "run")) == 13
    assert (tmp_path / "run" / "checkpoints" / "13").exists()
    monkeypatch.setattr(study.Study, "advance", advance)
    assert start(config, tmp_path / "run", tokens)
    same(tmp_path / "run", whole)


def test_an_alarm_is_that_of_watch_and_is_said_once(config, tokens, tmp_path, monkeypatch, capsys):
    steps = np.arange(1, 31)
    high = Baseline.from_runs([(steps, np.full(30, 0.99), None)])
    advance, folder = study.Study.advance, tmp_path / "run"

    def interrupted(self):
        advance(self)
        if self.step == 26:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(study.Study, "advance", interrupted)
    with pytest.raises(Stopped):
        start(config, folder, tokens, high)
    said = capsys.readouterr().err
    assert said.count("ALARM") == 1 and "ALARM (deviation): LAR is below the baseline's at" in said
    monkeypatch.setattr(study.Study, "advance", advance)
    assert start(config, folder, tokens, high)
    said = capsys.readouterr().err
    assert "ALARM" not in said and "tokens/s · deviation" in said
    first = next(row["step"] for row in rows(folder) if row["alarms"])
    assert rows(folder)[-1]["alarms"] == ["deviation"] and first < 26
    log = logs.read(folder / "metrics.jsonl")
    seen = verdict.watched(
        Monitor.init(n=config.width, second_epoch=config.sequences / config.batch), log, high
    )
    assert verdict.verdict(*seen, log, high)["first_alarm_step"] == first
    assert f"{first} (deviation)" in report.report([folder]).text


def copied(whole, tmp_path):
    """The finished run without its last rows, so that it has something to do again."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    return folder


def damage(checkpoint: Path):
    for file in checkpoint.rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[:50])


def test_damaged_checkpoints(whole, config, tokens, tmp_path, capsys):
    folder = copied(whole, tmp_path)
    last, before = sorted((int(c.name) for c in (folder / "checkpoints").iterdir()), reverse=True)
    damage(folder / "checkpoints" / str(last))
    assert start(config, folder, tokens)
    said = capsys.readouterr().err
    assert f"checkpoint {last} is damaged" in said and f"continuing from step {before}" in said
    assert rows(folder) == rows(whole)
    for each in (folder / "checkpoints").iterdir():
        damage(each)
    like = (train.Program(config, sharding.mesh(1)).abstract_state, jax.ShapeDtypeStruct((), "i4"))
    warnings = []
    checkpoints = Checkpoints(folder / "checkpoints")
    assert checkpoints.newest(like, warnings.append) is None
    checkpoints.close()
    assert len(warnings) == 3 and "no checkpoint is left" in warnings[-1]


def test_a_finished_run_needs_no_checkpoint(whole, config, tokens, tmp_path, monkeypatch):
    """Nor is one of another version lost: a run that has something to do is refused."""

    def newest(*_):
        raise Foreign("saved by another version")

    folder = copied(whole, tmp_path)
    monkeypatch.setattr(Checkpoints, "newest", newest)
    assert not start(config, folder, tokens)
    assert rows(folder) == rows(whole)
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:-1]
    (folder / "metrics.jsonl").write_text("".join(text))
    with pytest.raises(Foreign):
        start(config, folder, tokens)


def test_restores_onto_another_mesh(whole, config, tokens):
    """Saved by eight devices; taken up by two that share each matrix, and by one."""
    states = []
    for tensor, count in ((2, 4), (1, 1)):
        program = train.Program(config, sharding.mesh(tensor, jax.devices()[:count]))
        checkpoints = Checkpoints(whole / "checkpoints")
        everywhere = jax.sharding.NamedSharding(program.mesh, jax.sharding.PartitionSpec())
        position = jax.ShapeDtypeStruct((), "i4", sharding=everywhere)
        found = checkpoints.newest((program.abstract_state, position), pytest.fail)
        assert found is not None
        step, (state, position) = found
        checkpoints.close()
        assert step == int(state.step) == int(position) == 30
        assert len(state.model.blocks.q.sharding.device_set) == count
        assert state.optimiser[1][0].mu.blocks.q.sharding == program.places.model.blocks.q
        states.append(jax.device_get(state))
    for one, two in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, two)


COMMAND = "import sys; from jlar_experiments import cli; sys.exit(cli.command())"
LIMITED = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
{COMMAND}
"""


def ended(code, folder, *options):
    """The exit code of a process that continues the run, and what it says beside its progress."""
    environment = {**os.environ, "PYTHONPATH": str(Path(study.__file__).parents[2])}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # the limit would spoil what is in it
    words = [sys.executable, "-c", code, "pretrain", *OPTIONS, f"--out={folder}", *options]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    usual = (f"{folder} had", f"{folder.name}: ", "compiling", "continuing from", "step ")
    return done.returncode, [x for x in done.stderr.splitlines() if not x.startswith(usual)]


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(
    whole, text, config, tokens, tmp_path
):
    """A limit on the size of files stands for a full disk; it is hit while training goes on."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    options = [f"--corpus={text}", f"--data={tokens.parent}", "--steps=60"]
    code, said = ended(LIMITED, folder, *options)
    assert code == 1 and len(said) == 1 and said[0].startswith("jlar pretrain: error: "), said
    assert "could not be written" in said[0] and "File too large" in said[0]
    assert said[0].endswith("the last good one is 30")
    assert start(dataclasses.replace(config, steps=60), folder, tokens)


def test_a_damaged_checkpoint_is_one_line(whole, text, tokens, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    [file] = (folder / "checkpoints" / "30" / "state" / "d").iterdir()
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 8
    file.write_bytes(raw)
    code, said = ended(COMMAND, folder, f"--corpus={text}", f"--data={tokens.parent}")
    assert code == 0 and len(said) == 1 and "checkpoint 30 is damaged" in said[0], said


def test_subsets_are_nested_and_validation_is_apart(config, tokens):
    def sequences(part, count, **settings):
        changed = dataclasses.replace(config, **settings)
        pieces = data.Sequences(changed, tokens, part, count)
        return [tuple(pieces[i].tolist()) for i in range(count)]

    small, large = sequences("train", 20), sequences("train", 300)
    assert large[:20] == small and sequences("train", 20, seed=5) == small
    training = {bytes(each) for each in sequences("train", 600)}
    held = (tokens / "validation.bin").read_bytes()[::2]
    documents = [text + b"\0" for text in texts.documents(config.corpus) if corpus.held_out(text)]
    assert b"".join(documents) == held
    assert not any(piece in held for piece in training)


def test_epochs(config, tokens):
    """Each epoch has every sequence once, in another order; the position is where it goes on."""
    iterator = data.batches(config, tokens, 0)  # 20 sequences in batches of 8
    batches = [next(iterator) for _ in range(10)]
    assert data.position(iterator) == 10
    seen = np.concatenate(batches).tolist()
    assert sorted(seen[:20]) == sorted(seen[20:40]) and seen[:20] != seen[20:40]
    again = data.batches(config, tokens, 7)
    np.testing.assert_array_equal(next(again), batches[7])
    other = data.batches(dataclasses.replace(config, seed=1), tokens, 0)
    assert next(other).tolist() != batches[0].tolist()
    for each in (iterator, again, other):
        each.close()


def test_one_process_per_folder(whole, config, tokens, capsys):
    with study.opened(config, "bytes-tiny", whole, tokens):
        for extra in ([], ["--fresh"]):
            place = [f"--corpus={config.corpus}", f"--data={tokens.parent}", f"--out={whole}"]
            assert run("pretrain", "--preset=bytes-tiny", *OPTIONS, *place, *extra) == 2
            said = capsys.readouterr().err
            assert "in use by another process" in said.splitlines()[-1] and "Trace" not in said


def run(*arguments):
    try:
        return cli.main([str(each) for each in arguments])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--unique-tokens=1000000"], "--unique-tokens must be at most"),
        (["--validation-tokens=1000000"], "--validation-tokens must be at most"),
        (["--batch=6"], "--batch must be a multiple of 8"),
        (["--tensor=3"], "--tensor must divide"),
        (["--tensor=4", "--hidden=18"], "--hidden must be a multiple of 4"),
        (["--length=100000", "--unique-tokens=200000", "--validation-tokens=200000"], "fewer than"),
        (["--corpus=nowhere"], "--corpus must be"),
        (["--optimiser=adam"], "--weight-decay must be 0 for adam"),
        (["--warm-up=31"], "--warm-up must be from 0 to steps (30)"),
        (["--heads=3"], "--heads must divide"),
        (["--lr=nan"], "--lr must be positive"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_compiled(
    options, named, text, tokens, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train.Program, "initial", pytest.fail, raising=False)
    where = [f"--data={tokens.parent}", f"--out={tmp_path / 'run'}"]
    assert run("pretrain", *OPTIONS, f"--corpus={text}", *where, *options) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("jlar pretrain: error: ") and named in said[-1]
    assert not (tmp_path / "run").exists()


def test_token_files_that_lie(tokens, tmp_path, capsys):
    folder = tmp_path / "tokens"
    shutil.copytree(tokens, folder)
    ids = np.fromfile(folder / "train.bin", "<u2")
    ids[77] = 300
    ids.tofile(folder / "train.bin")
    where = [f"--corpus={folder}", f"--out={tmp_path / 'run'}"]
    assert run("pretrain", *OPTIONS, *where) == 2
    assert "train.bin is not what it was when it was made" in capsys.readouterr().err
    stored = json.loads((folder / "tokens.json").read_text())
    stored["sha256"]["train"] = hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest()
    (folder / "tokens.json").write_text(json.dumps(stored))
    assert run("pretrain", *OPTIONS, *where) == 2
    said = capsys.readouterr().err
    assert "--vocabulary must exceed every id" in said and "300" in said
    ids[:-1].tofile(folder / "train.bin")
    assert run("pretrain", *OPTIONS, *where) == 2
    assert "as tokens.json says" in capsys.readouterr().err
    (folder / "tokens.json").write_text("{}")
    assert run("pretrain", *OPTIONS, *where) == 2
    assert "does not describe token files" in capsys.readouterr().err


def test_bpe_tokens_read_back_as_the_text(text, tmp_path, capsys):
    from tokenizers import Tokenizer

    out = tmp_path / "bpe"
    options = [str(text), "--tokenizer=bpe", "--vocabulary=280", f"--out={out}"]
    assert run("data", *options) == 0
    assert "held out" in capsys.readouterr().out
    stored = corpus.sidecar(out)
    assert (
        257 < stored.vocabulary <= 280
        and stored.largest_id < 280
        and stored.documents["validation"] > 0
    )
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    ids = np.fromfile(out / "validation.bin", "<u2")
    end = tokenizer.token_to_id(corpus.END)
    first = ids[: np.argmax(ids == end)].tolist()
    held = [each for each in texts.documents(str(text)) if corpus.held_out(each)]
    assert tokenizer.decode(first).encode() == held[0]
    assert (ids == end).sum() == len(held) == stored.documents["validation"]


def test_one_file_is_cut_into_pieces(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i}\n" for i in range(100_000)))
    pieces = list(texts.documents(str(file)))
    assert b"".join(pieces) == file.read_bytes() and len(pieces) > 10
    assert all(len(each) < texts.PIECE + 100 and each.endswith(b"\n") for each in pieces)


def test_unsaved_is_an_error_of_the_command(text, tokens, tmp_path, monkeypatch, capsys):
    def full(self, step, state):
        raise Trouble("a checkpoint could not be written; there is no other")

    monkeypatch.setattr(Checkpoints, "save", full)
    where = [f"--corpus={text}", f"--data={tokens.parent}", f"--out={tmp_path / 'run'}"]
    assert run("pretrain", *OPTIONS, *where) == 1
    assert "could not be written" in capsys.readouterr().err.splitlines()[-1]
