"""The folder of a run of `jlar grok`: its settings, records, checkpoints, and where it stands."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from .. import records
from ..checkpoint import Checkpoints, Foreign
from ..config import GrokConfig
from ..records import Row
from . import analysis, train
from .analysis import Timeline

LENGTHS = ("epochs", "after_grok")  # may grow from one call to the next


class Refused(Exception):
    """The folder holds something that this run would spoil; the message is one line."""


def prepare(config: GrokConfig, folder: Path, *, fresh: bool) -> None:
    """Make the folder ready for this run: new, to be continued, or emptied if `fresh`."""
    path = folder / "config.json"
    if folder.exists() and not path.exists():
        leftover = folder.is_dir() and all(each.suffix == ".tmp" for each in folder.iterdir())
        if not leftover:
            raise Refused(f"{folder} exists and is not a run's folder; choose another with --out")
    if path.exists():
        stored, earlier = _stored(path)
        if not fresh:
            _check_same(earlier, config, folder)
            if earlier != config:
                _write_longer(path, stored, config)
            return
        for name in ("metrics.jsonl", "spectra.jsonl", "alpha.jsonl", "report.html"):
            (folder / name).unlink(missing_ok=True)
        for name in ("checkpoints", "figures"):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, {"study": "grok", "settings": dataclasses.asdict(config), **records.environment()})


def longest(config: GrokConfig, folder: Path) -> GrokConfig:
    """These settings, but no shorter than the run in the folder, if there is one, already is."""
    if not (folder / "config.json").exists():
        return config
    _, there = _stored(folder / "config.json")
    lengths = {name: max(getattr(config, name), getattr(there, name)) for name in LENGTHS}
    return dataclasses.replace(config, **lengths)


def claimed(folder: Path) -> IO[str] | None:
    """A file that keeps other processes from training this run while it is open; None: they do."""
    file = (folder / "lock").open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except OSError:
        file.close()
        return None
    return file


def _write(path: Path, described: Row) -> None:
    records.write_whole(path, json.dumps(described, indent=2) + "\n")


def _stored(path: Path) -> tuple[Row, GrokConfig]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["study"] == "grok":
            return stored, GrokConfig(**stored["settings"])
    except (ValueError, KeyError, TypeError):
        pass
    raise Refused(f"{path} is not that of a run of `jlar grok`; choose another folder with --out")


def _check_same(stored: GrokConfig, config: GrokConfig, folder: Path) -> None:
    there, here = dataclasses.asdict(stored), dataclasses.asdict(config)
    different = [
        name
        for name in here
        if there[name] != here[name] and not (name in LENGTHS and there[name] < here[name])
    ]
    if different:
        listed = ", ".join(f"{name} {there[name]}, not {here[name]}" for name in different)
        raise Refused(f"{folder} holds a run with {listed}; choose --fresh or another --out")


def _write_longer(path: Path, stored: Row, config: GrokConfig) -> None:
    """The settings of a run that goes on further than it was started for, and how it was before."""
    shorter = {name: stored["settings"][name] for name in LENGTHS}
    settings = dataclasses.asdict(config)
    before = [*stored.get("continued_from", ()), shorter]
    _write(path, {**stored, "settings": settings, "continued_from": before})


class Run:
    """A run as its folder has it: settings, records, and the state of its seeds when last saved."""

    def __init__(self, config: GrokConfig, folder: Path):
        self.config, self.folder = config, folder
        self.checkpoints = Checkpoints(folder / "checkpoints")

    def resume(self, warn: Callable[[str], None]) -> None:
        """Take up the newest checkpoint and forget the records after it; or start anew."""
        config = self.config
        like = jax.eval_shape(functools.partial(train.initial, config))
        try:
            found = self.checkpoints.newest(like, warn)
        except Foreign:
            self.seeds = analysis.timelines(config, records.read(self.folder / "metrics.jsonl"))
            self.started = self.finished()
            if not self.started:
                raise
            return
        self.started = found is not None
        state = jax.device_get(found[1] if found else train.initial(config))
        self.states = [train.member(state, i) for i in range(config.seeds)]
        reached = dict(zip(config.all_seeds, state.epoch.tolist(), strict=True))

        def still_holds(row: Row) -> bool:
            # A run that ended between two logs, and now goes on, would have no log there.
            between = row["epoch"] % config.log_every and row["epoch"] < config.epochs
            return self.started and row["epoch"] <= reached[row["seed"]] and not between

        rows = records.keep(self.folder / "metrics.jsonl", still_holds)
        self.seeds = analysis.timelines(config, rows)
        ended = {seed for seed, line in self.seeds.items() if line.finished(config)}
        records.keep(
            self.folder / "spectra.jsonl",
            lambda row: still_holds(row) and (row["point"] != "final" or row["seed"] in ended),
        )

    @property
    def lines(self) -> list[Timeline]:
        """The records of every seed, in order."""
        return list(self.seeds.values())

    def finished(self) -> bool:
        """Whether every seed has trained as long as it should."""
        return all(line.finished(self.config) for line in self.lines)

    def end(self) -> int:
        """The last epoch of any seed, as far as it is known."""
        return max(line.end(self.config) for line in self.lines)

    def record(self, place: int, epoch: int, metrics: Row, p: Any, q: Any) -> Row:
        """The next log of one seed, in memory; returns it."""
        line = self.lines[place]
        step = epoch * self.config.steps_per_epoch
        row = {"epoch": epoch, "step": step, "seed": line.seed, **metrics}
        line.add(row)
        self._pending = [*self._pending, row]
        self._points = [*self._points, *self._spectra(line, p, q)]
        return row

    _pending: Sequence[Row] = ()
    _points: Sequence[Row] = ()

    def _spectra(self, line: Timeline, p: Any, q: Any) -> list[Row]:
        epoch = line.epoch
        now = {
            "memorised": line.memorised == epoch,
            "grokked": line.grokked == epoch,
            "final": line.finished(self.config),
            "between": epoch % self.config.spectra_every == 0,
        }
        spectra = {name: [records.number(each) for each in a] for name, a in (("p", p), ("q", q))}
        seed = line.seed
        return [
            {"epoch": epoch, "seed": seed, "point": point, **spectra} for point in now if now[point]
        ]

    def write(self) -> None:
        """Append what was recorded to the files; on disk when it returns."""
        for name, rows in (("spectra.jsonl", self._points), ("metrics.jsonl", self._pending)):
            if rows:
                records.append(self.folder / name, rows)
        self._pending = self._points = ()

    def save(self) -> None:
        """Save a checkpoint of all seeds, in the background, under the sum of their epochs."""
        together = jax.tree.map(lambda *arrays: np.stack(arrays), *self.states)
        self.checkpoints.save(int(together.epoch.sum()), together)
        self.started = True
