"""Token files: what is no text is named, nothing is left behind, changed texts make new ones."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest

from jlar_experiments import cli, drafts
from jlar_experiments.pretraining import corpus, texts

LINES = [f"this is line {i} of a text that is long enough\n" for i in range(40_000)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES))
    return path


def made(text, out, capsys):
    assert cli.main(["data", str(text), f"--out={out}"]) == 0
    return capsys.readouterr()


@pytest.mark.parametrize(
    ("bad", "named"), [(b"\0", "a NUL at byte"), (b"\xff\xfe", "no UTF-8 at byte")]
)
def test_what_is_no_text_is_named_with_its_byte(bad, named, text, tmp_path, capsys):
    at = len("".join(LINES[:30_000]))
    data = text.read_bytes()
    text.write_bytes(data[:at] + bad + data[at:])
    assert cli.main(["data", str(text), f"--out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert f"{text} is not text: {named} {at}" in said[-1]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["text.txt"]
    folder = tmp_path / "folder"
    folder.mkdir()
    text.rename(folder / "bad.txt")
    for i in range(40):
        (folder / f"good{i}.txt").write_text("".join(LINES[i : i + 9]))
    assert f"{folder / 'bad.txt'} ({named} {at})" in made(folder, tmp_path / "out", capsys).err


def test_a_name_in_no_encoding_has_token_files_too(text):
    named = text.rename(text.with_name("text\udcff.txt"))
    assert corpus.folder(str(named), "bytes", 256, text.parent).name.startswith(named.name)


def test_a_text_that_has_changed_makes_new_token_files_and_keeps_the_old(text, tmp_path, capsys):
    out = tmp_path / "out"
    assert "making" in made(text, out, capsys).err
    before = (out / "train.bin").read_bytes()
    assert "making" not in made(text, out, capsys).err
    text.write_text("".join(LINES[::-1]))
    assert "has changed since" in made(text, out, capsys).err
    assert (out / "train.bin").read_bytes() != before
    assert (tmp_path / "out.earlier" / "train.bin").read_bytes() == before


def test_the_draft_of_a_killed_run_is_removed_by_the_next(text, tmp_path, capsys):
    out = tmp_path / "out"
    program = (
        "import time; from jlar_experiments import cli; "
        "from jlar_experiments.pretraining import corpus; "
        "corpus.held_out = lambda text: time.sleep(100); "
        f"cli.main(['data', {str(text)!r}, '--out', {str(out)!r}])"
    )
    running = subprocess.Popen([sys.executable, "-c", program])
    while not list(tmp_path.glob("out.*/train.bin")):
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert len(list(tmp_path.glob("out.*"))) == 1
    made(text, out, capsys)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "text.txt"]


def test_only_drafts_of_jlars_own_are_removed(text, tmp_path, capsys):
    """One of another process, of which there is no more than a locked file, is not."""
    names = ("mine", "thesis00", "linked00", "living00", "lockless", "empty000", "killed00")
    left = {name: tmp_path / f"out.{name}.draft" for name in names}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, draft in left.items():
        draft.symlink_to(elsewhere) if name == "linked00" else draft.mkdir()
    for name in ("mine", "thesis00", "linked00", "living00", "killed00"):
        (left[name] / "lock").touch()
    for name in ("mine", "thesis00"):
        (left[name] / "thesis.txt").write_text("precious")
    for name in ("train.bin", "tokenizer.json", ".tokens.json.0123456789abcdef.draft"):
        (left["killed00"] / name).touch()
        (left["lockless"] / name).touch()
    with (left["living00"] / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made(text, tmp_path / "out", capsys)
    still = {name for name, draft in left.items() if draft.exists()}
    assert still == {"mine", "thesis00", "linked00", "living00"}
    assert (left["mine"] / "thesis.txt").read_text() == "precious"
    assert (elsewhere / "lock").exists()
    assert not (tmp_path / "out" / "lock").exists()


def test_a_draft_that_is_removed_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    """By another process, which can only think that it was left."""
    flock, calls = fcntl.flock, []

    def removed(file, how):
        [draft] = tmp_path.iterdir()
        if not calls:
            shutil.rmtree(draft)
        calls.append(draft)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed)
    with drafts.folder(tmp_path, "out.", ["x"]) as draft:
        (draft / "x").write_text("x")
    assert len(calls) == 2 and calls[1] == draft and not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_text(tmp_path):
    path = tmp_path / "long.txt"
    with path.open("w") as file:
        for i in range(64):
            file.write(f"{i} " * 2**18 + "\n")
    assert path.stat().st_size > 2**25
    tracemalloc.start()
    total = sum(map(len, texts.documents(str(path))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == path.stat().st_size and peak < 2**23


def test_the_sidecar_counts_what_is_there(text, tmp_path, capsys):
    out = tmp_path / "out"
    made(text, out, capsys)
    there = json.loads((out / "tokens.json").read_text())
    assert sum(there["tokens"].values()) == text.stat().st_size + sum(there["documents"].values())
    corpus.verify(out)


@pytest.mark.parametrize("value", [None, "x", [], {}, True, -1, 10**30, {"train": "x"}, "\ud800"])
@pytest.mark.parametrize(
    "name", ["vocabulary", "tokens", "documents", "largest_id", "sha256", "dtype", "tokenizer"]
)
def test_token_files_that_are_described_otherwise_are_one_line(name, value, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    stored = {"corpus": "x", "tokenizer": "bytes", "vocabulary": 256, "dtype": "<u2", "python": ""}
    stored |= {name: {"train": 2, "validation": 2} for name in ("tokens", "documents")}
    stored |= {"largest_id": 9, "source": "", "sha256": {"train": "a", "validation": "b"}}
    for file in corpus.FILES.values():
        (out / file).write_bytes(bytes(4))
    (out / "tokens.json").write_text(json.dumps(stored))
    assert corpus.sidecar(out).tokens["train"] == 2
    (out / "tokens.json").write_text(json.dumps(stored | {name: value}))
    data = ["data", str(tmp_path / "text.txt"), f"--out={out}"]
    for command in (data, ["pretrain", f"--corpus={out}", f"--out={tmp_path / 'run'}"]):
        assert cli.main(command) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said and str(out) in said


@pytest.mark.parametrize("name", ["tokens.json", "train.bin"])
def test_pipes_are_not_waited_for(name, text, tmp_path, capsys):
    out = tmp_path / "out"
    made(text, out, capsys)
    (out / name).unlink()
    os.mkfifo(out / name)
    for command in (["data", str(text), f"--out={out}"], ["pretrain", f"--corpus={out}"]):
        assert cli.main(command) == 2
        assert capsys.readouterr().err.endswith(f"{out / name} is not a file\n")
