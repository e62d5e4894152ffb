"""Run folders of both studies: made, refused, locked, compared with what is to run, set aside."""

import dataclasses
import fcntl
import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from . import options, records
from .errors import Locked, Refusal
from .progress import say
from .records import Row

T = TypeVar("T")

CONFIG, LOCK = "config.json", "lock"
FOLDERS = ("checkpoints", "figures")
RECORDS = ("metrics", "spectra", "inspections", "alpha")
FILES = (
    *(f"{name}{kind}" for name in RECORDS for kind in (".jsonl", ".ahead.jsonl")),
    "report.html",
)


@contextmanager
def opened(
    folder: Path,
    study: str,
    config: Any,
    *,
    fresh: bool = False,
    longer: Mapping[str, str] | None = None,
    free: Collection[str] = (),
    **described: Any,
) -> Iterator[None]:
    """The folder of one run, new or to be continued; no other process opens it within the block.

    Args:
        folder: made if there is none.
        study: the name of the study in config.json.
        config: the settings, a dataclass.
        fresh: begin again; what the folder holds moves into "earlier", "earlier-2" ... in it.
        longer: settings that may be larger than those of the run that is there, and what is then
            said.
        free: settings that may differ.
        described: what else is to be in config.json and to be the same when the run goes on.

    Raises:
        Refusal: the folder is not one of this study, or of a run with other settings. Nothing has
            been touched.
        Locked: another process has it.
    """
    _check(folder, study)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _check(folder, study)
        described = {**described, "numbers": records.numbers()}
        if (folder / CONFIG).exists() and not fresh:
            _go_on(folder, study, config, longer or {}, free, described)
        else:
            if (folder / CONFIG).exists():
                _set_aside(folder)
            new = {"study": study, "settings": dataclasses.asdict(config), **described}
            records.write_json(folder / CONFIG, {**new, **records.environment()})
        for each in folder.iterdir():
            if records.is_draft(each, (CONFIG, *FILES)):
                each.unlink()
        yield


def collection(folder: Path, study: str, **described: Any) -> None:
    """Make the folder that holds the runs of a study; `Refusal` if it is that of something else."""
    _check(folder, study)
    folder.mkdir(parents=True, exist_ok=True)
    if "settings" in (read(folder) or {}):
        raise Refusal(f"{folder} is that of a single run; choose another with --out")
    records.write_json(folder / CONFIG, {"study": study, **described})


def read(folder: Path) -> Row | None:
    """What config.json says, None if there is none; `Refusal` if it is not that of a study."""
    path = folder / CONFIG
    if not records.regular(path):
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict) or not isinstance(stored.get("study"), str):
        raise Refusal(f"{path} is not that of a run of jlar")
    return stored


def settings(folder: Path, study: str, kind: type[T]) -> tuple[Row, T]:
    """The rest of config.json, and the settings in it; `Refusal` if it is not that of this study.

    Args:
        study: its name in config.json.
        kind: the dataclass of its settings.
    """
    stored = read(folder)
    if stored is None or stored["study"] != study:
        raise Refusal(f"{folder / CONFIG} is not that of a run of `jlar {study}`")
    for name, of in (("versions", dict), ("continued_from", list)):
        if not isinstance(stored.get(name, of()), of):
            raise Refusal(f"{folder / CONFIG}: {name} is of another type")
    try:
        return stored, options.stored(stored.pop("settings", None), kind)
    except (TypeError, ValueError) as error:
        raise Refusal(f"{folder / CONFIG}: {error}") from error


def unused(path: Path) -> Path:
    """The path, or with the first number that makes it one where there is nothing."""
    numbered = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not os.path.lexists(p))


def _check(folder: Path, study: str) -> None:
    """Refuse, before anything is touched, what is not a folder of this study."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise Refusal(f"{folder} is not a folder; choose another with --out")
    stored = read(folder)
    if stored is None:
        drafts = (CONFIG, *FILES)
        own = (each.name == LOCK or records.is_draft(each, drafts) for each in folder.iterdir())
        if not all(own):
            raise Refusal(f"{folder} exists and is not a run's folder; choose another with --out")
    elif stored["study"] != study:
        raise Refusal(f"{folder} is that of `jlar {stored['study']}`; choose another with --out")
    for name in (CONFIG, LOCK, *FILES, *FOLDERS):
        path = folder / name
        kind = "folder" if name in FOLDERS else "file"
        own = path.is_dir() if name in FOLDERS else path.is_file()
        if os.path.lexists(path) and (path.is_symlink() or not own):
            raise Refusal(f"{path} is not a {kind} of jlar's own (no links); move it out of there")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Closed to other processes until the block ends, or this process does."""
    with open(folder / LOCK, "ab", opener=records.not_through_links) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Locked(f"{folder} is in use by another process") from error
        yield


def _go_on(
    folder: Path,
    study: str,
    config: Any,
    longer: Mapping[str, str],
    free: Collection[str],
    described: Row,
) -> None:
    """Check that the run in the folder is this one, and write down what is not as it was."""
    stored, earlier = settings(folder, study, type(config))
    there, here = dataclasses.asdict(earlier), dataclasses.asdict(config)
    grown = [name for name in longer if there[name] < here[name]]
    same = {name: value for name, value in there.items() if name not in (*grown, *free)}
    different = _different(same, here)
    for name, value in described.items():
        known = stored.get(name)
        if isinstance(known, dict) and isinstance(value, dict):
            different += [f"{name} {each}" for each in _different(known, value)]
        elif known != value:
            different.append(f"{name} {known}, not {value}")
    if different:
        listed = ", ".join(different)
        raise Refusal(
            f"{folder / CONFIG} is of a run with {listed}; choose --fresh or another --out"
        )
    for name in grown:
        say(f"{folder} had {name} {there[name]:,} and now has {here[name]:,}{longer[name]}")
    now = records.environment()
    before = {name: there[name] for name in grown}
    before |= {name: stored.get(name) for name in now if stored.get(name) != now[name]}
    if before:
        if changed := _different(before.get("versions") or {}, now["versions"]):
            say(
                f"{folder} goes on with other versions, and rounds as they do: {', '.join(changed)}"
            )
        history = [*stored.get("continued_from", ()), before]
        stored |= {"settings": there | {name: here[name] for name in grown}, **now}
        records.write_json(folder / CONFIG, stored | {"continued_from": history})


def _different(there: Row, here: Row) -> list[str]:
    return [
        f"{name} {value}, not {here.get(name)}"
        for name, value in there.items()
        if value != here.get(name)
    ]


def _set_aside(folder: Path) -> None:
    """Move all of a run into a folder of its own; config.json stays until the next replaces it."""
    aside = unused(folder / "earlier")
    aside.mkdir()
    records.write_whole(aside / CONFIG, (folder / CONFIG).read_text(encoding="utf-8"))
    for name in (*FILES, *FOLDERS):
        if (folder / name).exists():
            (folder / name).rename(aside / name)
    records.sync(aside)
    records.sync(folder)
    say(f"what was in {folder} is now in {aside}")
