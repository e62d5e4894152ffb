"""The folder of a run of `jlar grok`: its settings, records, checkpoints, and where it stands."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import folder as folders
from .. import records
from ..checkpoint import Checkpoints, Foreign
from ..records import Row
from . import analysis, train
from .analysis import Timeline
from .config import GrokConfig

# May grow from one call to the next; there is nothing more to say of it.
LENGTHS: dict[str, str] = dict.fromkeys(("epochs", "after_grok"), "")


def opened(
    config: GrokConfig, folder: Path, *, fresh: bool = False
) -> AbstractContextManager[None]:
    """The folder of this run, made ready and closed to other processes; see `folder.opened`."""
    return folders.opened(folder, "grok", config, fresh=fresh, longer=LENGTHS)


def longest(config: GrokConfig, folder: Path) -> GrokConfig:
    """These settings, but no shorter than the run in the folder, if there is one, already is."""
    if not (folder / "config.json").exists():
        return config
    _, there = folders.settings(folder, "grok", GrokConfig)
    lengths = {name: max(getattr(config, name), getattr(there, name)) for name in LENGTHS}
    return dataclasses.replace(config, **lengths)


class Run:
    """A run as its folder has it: settings, records, and the state of its seeds when last saved."""

    def __init__(self, config: GrokConfig, folder: Path):
        self.config, self.folder = config, folder
        self.checkpoints = Checkpoints(folder / "checkpoints")

    def resume(self, warn: Callable[[str], None]) -> None:
        """Take up the newest checkpoint and forget the records after it; or start anew."""
        config, metrics = self.config, self.folder / "metrics.jsonl"
        like = jax.eval_shape(functools.partial(train.initial, config))
        try:
            found = self.checkpoints.newest(like, warn)
        except Foreign:
            self.seeds = analysis.timelines(config, records.read(metrics), metrics)
            self.started = self.finished()
            if not self.started:
                raise
            return
        self.started = found is not None
        state = jax.device_get(found[1] if found else train.initial(config))
        self.states = [train.member(state, i) for i in range(config.seeds)]
        reached = dict(zip(config.all_seeds, state.epoch.tolist(), strict=True))

        def passed(row: Row) -> bool:
            return self.started and row["epoch"] <= reached[row["seed"]]

        def still_holds(row: Row) -> bool:
            # A run that ended between two logs, and now goes on, would have no log there.
            between = row["epoch"] % config.log_every and row["epoch"] < config.epochs
            return passed(row) and not between

        every = config.log_every
        logged = {
            seed: [*range(0, last + 1, every), *[last] * (last % every and last == config.epochs)]
            for seed, last in reached.items()
        }
        rows = records.keep(
            metrics,
            still_holds,
            passed=passed,
            place=lambda row: (row["seed"], row["epoch"]),
            due=logged if self.started else {},
        )
        self.seeds = analysis.timelines(config, rows, metrics)
        ended = {seed for seed, line in self.seeds.items() if line.finished(config)}
        records.keep(
            self.folder / "spectra.jsonl",
            lambda row: still_holds(row) and (row["point"] != "final" or row["seed"] in ended),
            passed=passed,
            place=lambda row: (row["seed"], (row["epoch"], row["point"])),
            due={seed: self._points_due(line) for seed, line in self.seeds.items()},
        )

    def _points_due(self, line: Timeline) -> list[tuple[int, str]]:
        """Where the spectra of this seed are recorded, among the logs that it has so far."""
        return [(row["epoch"], point) for row in line.rows for point in self._points_at(line, row)]

    def _points_at(self, line: Timeline, row: Row) -> list[str]:
        epoch = row["epoch"]
        points = {
            "memorised": line.memorised == epoch,
            "grokked": line.grokked == epoch,
            "final": row is line.rows[-1] and line.finished(self.config),
            "between": epoch % self.config.spectra_every == 0,
        }
        return [name for name, there in points.items() if there]

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
        spectra = {name: [records.number(each) for each in a] for name, a in (("p", p), ("q", q))}
        at = {"epoch": line.epoch, "seed": line.seed}
        return [{**at, "point": each, **spectra} for each in self._points_at(line, line.rows[-1])]

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
