"""Errors at each file operation, flipped bits, strange folders: nothing is lost or made up."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from faults import each_fault
from jlar_experiments import checkpoint, cli, errors, folder, records, report
from jlar_experiments.checkpoint import Checkpoints
from jlar_experiments.errors import Trouble
from jlar_experiments.grokking import ensemble, study
from jlar_experiments.grokking.config import GrokConfig

# Of a call that fails orbax leaves tasks behind that nobody waits for.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{name}")
    for name in ("pytest.PytestUnraisableExceptionWarning", "RuntimeWarning", "ResourceWarning")
]

STATE = {
    "a": np.random.default_rng(0).standard_normal((30, 7)).astype(np.float32),
    "b": {"flag": np.array(True), "count": np.int32(7), "half": np.ones(50, np.float16)},
}
LIKE = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, STATE))


def saved(place: Path, *steps):
    checkpoints = Checkpoints(place)
    for step in steps:
        checkpoints.save(step, jax.tree.map(lambda a, s=step: a + a.dtype.type(s), STATE))
        checkpoints.wait()
    checkpoints.close()
    return place


def newest(place: Path, said=None):
    with contextlib.closing(Checkpoints(place)) as checkpoints:
        return checkpoints.newest(LIKE, (said if said is not None else []).append)


def whole(found):
    """Whether the state is that which was saved under its step, to the bit."""
    step, state = found
    expected = jax.tree.map(lambda a: a + a.dtype.type(step), STATE)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
    return all(np.asarray(one).tobytes() == np.asarray(two).tobytes() for one, two in pairs)


def contents(place: Path):
    """Every file and folder below, and what is in the files."""
    return {
        str(each.relative_to(place)): each.read_bytes() if each.is_file() else None
        for each in sorted(place.rglob("*"))
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("two") / "checkpoints", 10, 20)


def test_no_flipped_bit_goes_unnoticed(two, tmp_path):
    """Where a flipped bit changes nothing (a time stamp), the state is that which was saved."""
    chance, unnoticed, harmless = random.Random(0), [], 0
    files = [each for each in sorted((two / "20").rglob("*")) if each.is_file()]
    data = [each for each in files if each.parent.name == "d"]
    for i in range(45):
        file = chance.choice(data if i % 3 else files).relative_to(two)
        place = Path(shutil.copytree(two, tmp_path / str(i)))
        raw = bytearray((place / file).read_bytes())
        bit = chance.randrange(8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
        (place / file).write_bytes(raw)
        said = []
        found = newest(place, said)
        assert found is not None
        if not whole(found):
            unnoticed.append((file, bit))
        if found[0] == 20:
            harmless += 1
        else:
            assert len(said) == 1 and "\n" not in said[0] and "20 is damaged" in said[0]
            assert (place / "20.damaged").exists()
        shutil.rmtree(place)
    assert not unnoticed and harmless < 30


def test_damaged_metadata_moves_its_checkpoint_aside(two, tmp_path):
    """Orbax reads it of every checkpoint before it saves one, and fails at any it cannot read."""
    file = Path("20", "_CHECKPOINT_METADATA")
    raw = (two / file).read_bytes()
    for at in range(0, len(raw), 5):
        place = Path(shutil.copytree(two, tmp_path / str(at)))
        (place / file).write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at % 7]) + raw[at + 1 :])
        said = []
        found = newest(place, said)
        assert found is not None and whole(found)
        assert said == [] if found[0] == 20 else len(said) == 1 and "20 is damaged" in said[0]
        saved(place, 30)
        assert (place / "30").exists() and (place / "20").exists() == (found[0] == 20)
        shutil.rmtree(place)


def test_folders_of_somebody_else_are_not_deleted(two, tmp_path):
    """Numbered folders beside checkpoints are renamed; a linked folder is refused."""
    place = Path(shutil.copytree(two, tmp_path / "checkpoints"))
    for year in ("3", "007", "²", "2021", "2022"):
        (place / year).mkdir()
        (place / year / "cat.jpg").write_bytes(b"cat")
    found = newest(place)
    assert found is not None and found[0] == 20
    saved(place, 30, 40)
    assert len(list(place.glob("*/cat.jpg"))) == 5


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_folder_of_jlars_own_is_moved_aside(kind, two, tmp_path):
    """A link to a whole checkpoint elsewhere, where orbax would stop; a pipe in place of a file."""
    place = Path(shutil.copytree(two, tmp_path / "checkpoints"))
    elsewhere = Path(shutil.copytree(two, tmp_path / "elsewhere"))
    odd = place / "20" if kind == "link" else place / "20" / "_CHECKPOINT_METADATA"
    replaced(odd, kind, elsewhere / "20")
    before, said = contents(elsewhere), []
    found = newest(place, said)
    assert found is not None and found[0] == 10 and whole(found)
    assert len(said) == 1 and "20 is damaged" in said[0]
    saved(place, 30, 40, 50)
    assert (place / "20.damaged").exists() and contents(elsewhere) == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ENOSPC, "No space left on device"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
        ValueError("UNAVAILABLE: Error reading local file: Stale file handle"),
    ],
)
def test_an_error_of_the_machine_touches_nothing(error, two, monkeypatch):
    before = contents(two)

    def load(*_):
        raise KeyError("incompatible handler") from error  # as orbax wraps it

    monkeypatch.setattr(checkpoint.ocp, "load", load)
    with pytest.raises(Trouble):
        newest(two)
    assert contents(two) == before


def test_too_few_open_files_touch_nothing(two):
    before, (soft, hard) = contents(two), resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    outcomes = set()
    for more in range(0, 60, 3):
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, hard))
        try:
            found = newest(two)
            outcomes.add("loaded")
            assert found is not None and found[0] == 20 and whole(found)
        except Exception as error:
            outcomes.add("refused")
            assert errors.trouble(error), error
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert contents(two) == before
    assert outcomes == {"loaded", "refused"}


def test_faults_while_loading_touch_nothing(two):
    before, count = contents(two), 0
    for ended in each_fault(lambda: newest(two), errno.EIO):
        assert ended is None or errors.trouble(ended), ended
        assert contents(two) == before
        count += 1
    assert count > 3


def test_faults_while_saving_leave_the_old_or_the_new(two, tmp_path):
    copies = (Path(shutil.copytree(two, tmp_path / str(i))) for i in range(500))
    ends, places = set(), [next(copies)]
    for ended in each_fault(lambda: saved(places[-1], 30)):
        assert ended is None or errors.trouble(ended), ended
        said = []
        found = newest(places[-1], said)
        assert found is not None and whole(found)
        # What orbax had half written, or half deleted because it was superseded, is set aside.
        assert not said or (len(said) == 1 and f"checkpoint {found[0]} is" not in said[0])
        ends.add(found[0])
        places.append(next(copies))  # what has failed may still write into the last one
    assert ends == {20, 30}


ROWS = [{"step": i, "lar": i / 7} for i in range(6)]


def kept(path, last):
    due = {None: range(last)}
    return records.keep(
        path, lambda row: row["step"] < last, place=lambda r: (None, r["step"]), due=due
    )


def test_faults_in_records_leave_the_old_or_the_new(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for change, ends in (
        (lambda: records.append(path, ROWS[4:]), (ROWS[:4], ROWS)),
        (lambda: kept(path, 2), (ROWS[:4], ROWS[:2])),
        (lambda: records.write_whole(path, '{"step": 9}\n'), (ROWS[:4], [{"step": 9}])),
    ):
        seen = []
        path.unlink(missing_ok=True)
        records.append(path, ROWS[:4])
        for ended in each_fault(change):
            assert ended is None or isinstance(ended, OSError)
            assert records.read(path) in ends
            seen.append(records.read(path))
            ahead = path.with_suffix(".ahead.jsonl")
            assert len(seen[-1]) > 2 or "step" in seen[-1][0] or records.read(ahead) == ROWS[2:4]
            for each in tmp_path.iterdir():
                each.unlink()
            records.append(path, ROWS[:4])
        assert all(end in seen for end in ends)


SETTINGS = {"p": 7, "width": 8, "heads": 2, "layers": 1, "epochs": 20, "batch_size": 8}
CONFIG = GrokConfig(**SETTINGS, log_every=5, seeds=2)
OPTIONS = [
    f"--{n.replace('_', '-')}={v}" for n, v in (SETTINGS | {"log_every": 5, "seeds": 2}).items()
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of `jlar grok` with its report."""
    place = tmp_path_factory.mktemp("finished") / "run"
    with study.opened(CONFIG, place):
        assert ensemble.run(CONFIG, place, checkpoint_seconds=0)
    report.write(place)
    return place


def run(*arguments):
    """Exit code, whether the parser or the command gives it; tracebacks are raised."""
    try:
        return cli.main([str(each) for each in arguments])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("limit", [8, 20])
def test_too_few_open_files_are_one_line(limit, finished, tmp_path):
    """At the start, and at a checkpoint; with none to spare uvloop would abort the process."""
    place = Path(shutil.copytree(finished, tmp_path / "run"))
    program = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
from jlar_experiments import cli
sys.exit(cli.command())
"""
    words = [sys.executable, "-c", program, "grok", *OPTIONS, "--epochs=40", f"--out={place}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    usual = (f"{place} had", "compiling", "continuing from", "epoch ")
    said = [line for line in done.stderr.splitlines() if not line.startswith(usual)]
    assert done.returncode == 1 and len(said) == 1 and "Too many open files" in said[0], done


def test_faults_while_a_folder_is_opened_lose_nothing(finished, tmp_path):
    longer = dataclasses.replace(CONFIG, epochs=25)
    for number, (config, fresh) in enumerate(((CONFIG, False), (longer, False), (CONFIG, True))):
        place = tmp_path / str(number)
        shutil.copytree(finished, place)

        def attempt(place=place, config=config, fresh=fresh):
            with study.opened(config, place, fresh=fresh):
                pass

        before = contents(finished)
        for ended in each_fault(attempt):
            assert ended is None or isinstance(ended, OSError)
            there = list(contents(place).values())
            same = (each for name, each in before.items() if fresh or name != "config.json")
            assert all(each in there for each in same)
            with study.opened(longer, place):  # it is a run's folder still
                pass
            shutil.rmtree(place)
            shutil.copytree(finished, place)
    new = tmp_path / "new" / "run"
    for ended in each_fault(lambda: study.opened(CONFIG, new).__enter__()):
        assert ended is None or isinstance(ended, OSError)
        with study.opened(CONFIG, new):
            assert folder.settings(new, "grok", GrokConfig)[1] == CONFIG
        shutil.rmtree(new)


def test_faults_while_the_report_is_written_leave_the_old_or_the_new(finished, tmp_path):
    place = Path(shutil.copytree(finished, tmp_path / "run"))
    (place / "report.html").write_text("old")
    seen = set()
    for ended in each_fault(lambda: report.write(place)):
        assert ended is None or isinstance(ended, OSError)
        written = (place / "report.html").read_text()
        assert written == "old" or written.endswith("</html>\n")
        seen.add(written == "old")
    assert seen == {True, False}


def test_one_process_per_folder(finished, tmp_path, capsys):
    place = Path(shutil.copytree(finished, tmp_path / "run"))
    before = contents(place)
    with study.opened(CONFIG, place):
        for extra in ([], ["--fresh"]):
            assert run("grok", *OPTIONS, f"--out={place}", *extra) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and "in use by another process" in said
    assert contents(place) == before


@pytest.mark.parametrize("name", ["append", "draft"])
def test_a_full_disk_is_one_line(name, finished, tmp_path, monkeypatch, capsys):
    """In records, and in the report."""
    place = Path(shutil.copytree(finished, tmp_path / "run"))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, name, full)
    new = [f"--out={tmp_path / 'new'}"] if name == "append" else [f"--out={place}"]
    assert run("grok", *OPTIONS, *new) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert len(said) == 1 and said[0].startswith("jlar grok: error: ")


DRAFT = ".metrics.jsonl.0123456789abcdef.draft"


def test_only_drafts_of_jlars_own_are_removed(finished, tmp_path, capsys):
    place = Path(shutil.copytree(finished, tmp_path / "run"))
    others = [".notes.draft", f".my{DRAFT}", DRAFT.replace("f", "F"), f"{DRAFT}.draft"]
    for name in others:
        (place / name).write_text("precious")
    (place / ".x.draft").mkdir()
    (place / DRAFT.replace("a", "b")).symlink_to(place / others[0])
    before = contents(place)
    (place / DRAFT).write_text("torn")
    assert run("grok", *OPTIONS, f"--out={place}") == 0
    assert set(contents(place)) == set(before)
    assert all((place / name).read_text() == "precious" for name in others)
    for number, name in enumerate((".novel.draft", "chapter.draft", f"x{DRAFT}")):
        mine = tmp_path / str(number)
        mine.mkdir()
        (mine / name).write_text("precious")
        (mine / DRAFT).write_text("torn")
        before = contents(mine)
        assert run("grok", *OPTIONS, f"--out={mine}") == 2
        said = capsys.readouterr().err
        assert "is not a run's folder" in said.splitlines()[-1] and contents(mine) == before


def test_fresh_sets_aside(finished, tmp_path, capsys):
    place = Path(shutil.copytree(finished, tmp_path / "run"))
    before = contents(place)
    assert run("grok", *OPTIONS, f"--out={place}", "--fresh", "--lr=0.01") == 0
    aside = contents(place / "earlier")
    assert all(aside[name] == text for name, text in before.items() if name != "lock")
    assert run("grok", *OPTIONS, f"--out={place}", "--fresh") == 0
    assert (place / "earlier-2" / "metrics.jsonl").exists()
    assert (place / "metrics.jsonl").read_bytes().count(b"\n") == before["metrics.jsonl"].count(
        b"\n"
    )
    assert run("report", place) == 0


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda lines: lines[:-1], "line 10: 20 is missing"),
        (lambda lines: lines[:3] + lines[4:], "line 5"),
        (lambda lines: [], "line 1: 0 is missing"),
        (lambda lines: [*lines[:3], b"garbage \xff", *lines[4:]], "line 4 is not a record"),
        (lambda lines: [*lines[:3], b"[1]", *lines[4:]], "line 4 is not a record"),
        (
            lambda lines: [*lines[:3], lines[3][:-1] + b', "\xed\xa0\x80": 1}', *lines[4:]],
            "line 4 is",
        ),
        (
            lambda lines: [*lines[:3], b'{"epoch": 5, "seed": 1}', *lines[4:]],
            "row 4 is not of a run like this",
        ),
        (
            lambda lines: [*lines[:3], b'{"epoch": "5"}', *lines[4:]],
            "line 4 is not a record of this run",
        ),
    ],
)
def test_records_that_do_not_fit_the_checkpoint(damage, named, finished, tmp_path, capsys):
    place = Path(shutil.copytree(finished, tmp_path / "run"))
    lines = (place / "metrics.jsonl").read_bytes().splitlines()
    (place / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in damage(lines)))
    before = contents(place)
    assert run("grok", *OPTIONS, f"--out={place}") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "metrics.jsonl" in said and named in said
    assert contents(place) == before


def test_other_numbers_are_refused(finished, tmp_path, capsys):
    place = Path(shutil.copytree(finished, tmp_path / "run"))
    with jax.enable_x64(True):
        assert run("grok", *OPTIONS, f"--out={place}") == 2
    wanted = f"{place / folder.CONFIG} is of a run with numbers jax_enable_x64 False, not True"
    assert wanted in capsys.readouterr().err
    with jax.default_prng_impl("rbg"):
        assert run("grok", *OPTIONS, f"--out={place}") == 2
    assert "jax_default_prng_impl threefry2x32, not rbg" in capsys.readouterr().err


def replaced(path: Path, kind: str, elsewhere: Path):
    """Put something else in the place of a file or folder: a link, a pipe, a folder or a file."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("")


@pytest.mark.parametrize("name", [folder.CONFIG, folder.LOCK, *folder.FILES, *folder.FOLDERS])
@pytest.mark.parametrize("kind", ["link", "pipe", "other"])
def test_what_is_not_jlars_own_is_refused(name, kind, finished, tmp_path, capsys):
    """Nothing is written through a link, nor waited for at a pipe (which has no other end)."""
    place, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(finished, place)
    is_folder = name in folder.FOLDERS
    elsewhere.mkdir() if is_folder else elsewhere.write_text("precious")
    other = "file" if is_folder else "folder"
    replaced(place / name, other if kind == "other" else kind, elsewhere)
    for extra in ([], ["--fresh"]):
        assert run("grok", *OPTIONS, f"--out={place}", *extra) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and name in said
    assert not list(elsewhere.iterdir()) if is_folder else elsewhere.read_text() == "precious"


@pytest.mark.parametrize("value", [3, "x", ["x"], {"x": 1}, None, "\ud800"])
@pytest.mark.parametrize(
    "name", ["study", "settings", "versions", "numbers", "continued_from", "device"]
)
def test_a_config_of_other_types_is_at_most_one_line(name, value, finished, tmp_path, capsys):
    place = tmp_path / "run"
    shutil.copytree(finished, place)
    stored = json.loads((place / folder.CONFIG).read_text()) | {name: value, "machine": "another"}
    (place / folder.CONFIG).write_text(json.dumps(stored))
    for command in (["grok", *OPTIONS, f"--out={place}"], ["report", place]):
        code = run(*command)
        assert code in (0, 2)
        assert code == 0 or capsys.readouterr().err.count("\n") == 1


def test_a_config_in_no_encoding_is_refused(finished, tmp_path, capsys):
    place = Path(shutil.copytree(finished, tmp_path / "run"))
    raw = (place / folder.CONFIG).read_bytes()
    (place / folder.CONFIG).write_bytes(raw.replace(b'"machine": "', b'"machine": "\xed\xa0\x80'))
    for extra in ([], ["--fresh"]):
        assert run("grok", *OPTIONS, f"--out={place}", *extra) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{place / folder.CONFIG} is not that of a run" in said


def test_names_in_no_encoding_are_shown_escaped(finished, tmp_path):
    place = shutil.copytree(finished, tmp_path / "run\udcff")
    command = [sys.executable, "-m", "jlar_experiments.cli", "report", str(place)]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and r"run\udcff/report.html" in done.stdout


@given(
    damages=st.lists(
        st.tuples(
            st.integers(0, 10**6),
            st.sampled_from(["missing", "shorter", "flipped", "another's"]),
            st.floats(0, 1, exclude_max=True),
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.generate],  # each trial may train: to find a smaller case takes long
    suppress_health_check=list(HealthCheck),
)
def test_whatever_is_damaged_is_told_in_a_line_and_no_record_is_lost(
    damages, finished, tmp_path_factory, capsys
):
    place = Path(shutil.copytree(finished, tmp_path_factory.mktemp("damaged") / "run"))
    files = [each for each in sorted(place.rglob("*")) if each.is_file()]
    records_there = {each: each.read_bytes() for each in files if each.suffix == ".jsonl"}
    for which, kind, where in damages:
        file = files[which % len(files)]
        records_there.pop(file, None)
        data = bytearray(file.read_bytes() if file.exists() else b"")
        at = int(where * len(data))
        if kind == "missing":
            file.unlink(missing_ok=True)
        elif kind == "shorter":
            file.write_bytes(data[:at])
        elif kind == "another's":
            file.write_bytes((finished / files[which % 7].relative_to(place)).read_bytes())
        elif data:
            data[at] ^= 1 << which % 8
            file.write_bytes(data)
    capsys.readouterr()
    for command in (["report", place], ["grok", *OPTIONS, f"--out={place}"]):
        code = run(*command)
        said = capsys.readouterr().err.strip().splitlines()
        assert code in (0, 1, 2)
        assert code == 0 or "error: " in said[-1]
    # What a restart would write again stands in `metrics.ahead.jsonl`.
    there = {line for each in place.rglob("*.jsonl") for line in each.read_bytes().splitlines()}
    assert all(there.issuperset(text.splitlines()) for text in records_there.values())
