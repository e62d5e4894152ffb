"""One ensemble of grokking runs from its first epoch, or its last checkpoint, to its end."""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from .. import records
from ..checkpoint import Checkpoints
from ..config import GrokConfig
from ..progress import Progress, say
from . import analysis, train
from .analysis import Timeline


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
        stored = _stored(path)
        if not fresh:
            _check_same(stored, config, folder)
            return
        for name in ("metrics.jsonl", "spectra.jsonl", "report.html"):
            (folder / name).unlink(missing_ok=True)
        for name in ("checkpoints", "figures"):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    described = {"study": "grok", "settings": dataclasses.asdict(config), **records.environment()}
    records.write_whole(path, json.dumps(described, indent=2) + "\n")


def _stored(path: Path) -> GrokConfig:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["study"] == "grok":
            return GrokConfig(**stored["settings"])
    except (ValueError, KeyError, TypeError):
        pass
    raise Refused(f"{path} is not that of a run of `jlar grok`; choose another folder with --out")


def _check_same(stored: GrokConfig, config: GrokConfig, folder: Path) -> None:
    there, here = dataclasses.asdict(stored), dataclasses.asdict(config)
    different = [name for name in here if there[name] != here[name]]
    if different:
        listed = ", ".join(f"{name} {there[name]}, not {here[name]}" for name in different)
        raise Refused(f"{folder} holds a run with {listed}; choose --fresh or another --out")


class Study:
    """The run in a folder: its state, its records and where it stands."""

    def __init__(self, config: GrokConfig, folder: Path, *, checkpoint_seconds: float):
        self.config, self.folder = config, folder
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.checkpoint_seconds = checkpoint_seconds
        self.saved_at = time.monotonic()
        self.data = train.data(config)

    def resume(self, warn: Callable[[str], None]) -> None:
        """Take up the newest checkpoint and forget the records after it; or start anew."""
        like = jax.eval_shape(functools.partial(train.initial, self.config))
        found = self.checkpoints.newest(like, warn)
        self.epoch, self.state = found or (0, train.initial(self.config))
        last = self.epoch if found else -1
        records.keep(self.folder / "spectra.jsonl", lambda row: row["epoch"] <= last)
        rows = records.keep(self.folder / "metrics.jsonl", lambda row: row["epoch"] <= last)
        self.seeds = analysis.timelines(self.config, rows)
        self.started = found is not None

    def live(self) -> list[int]:
        """The indices of the seeds that still train."""
        lines = self.seeds.values()
        return [i for i, line in enumerate(lines) if not line.finished(self.config)]

    def end(self) -> int:
        """The last epoch, as far as it is known."""
        ends = [
            self.config.epochs
            if line.grokked is None
            else min(line.grokked + self.config.after_grok, self.config.epochs)
            for line in self.seeds.values()
        ]
        return max(self.epoch, *ends)

    def advance(self, live: list[int]) -> float:
        """Train these seeds up to the next log; returns the seconds it took."""
        start = time.perf_counter()
        upto = min(self.epoch + self.config.log_every, self.config.epochs)
        live_now = _indices(live)
        self.state = train.advanced(self.config, self.state, self.data, live_now, self.epoch, upto)
        jax.block_until_ready(self.state)
        self.epoch = upto
        return time.perf_counter() - start

    def log(self, live: list[int], training_seconds: float) -> list[records.Row]:
        """Evaluate these seeds and append to the records; the rows are on disk when it returns."""
        start = time.perf_counter()
        metrics, spectra = jax.device_get(train.evaluated(self.state, self.data, _indices(live)))
        seconds = {
            "training_seconds": round(training_seconds, 4),
            "evaluation_seconds": round(time.perf_counter() - start, 4),
        }
        lines = list(self.seeds.values())
        rows, points = [], []
        for place, index in enumerate(live):
            line = lines[index]
            row = {
                "epoch": self.epoch,
                "step": self.epoch * self.config.steps_per_epoch,
                "seed": line.seed,
                **{name: records.number(a[place]) for name, a in metrics._asdict().items()},
                **seconds,
            }
            line.add(row)
            rows.append(row)
            points += self._points(line, spectra.p[place], spectra.q[place])
        records.append(self.folder / "spectra.jsonl", points)
        records.append(self.folder / "metrics.jsonl", rows)
        return rows

    def _points(self, line: Timeline, p: np.ndarray, q: np.ndarray) -> list[records.Row]:
        reached = {
            "memorised": line.memorised == self.epoch,
            "grokked": line.grokked == self.epoch,
            "final": line.finished(self.config),
        }
        if not any(reached.values()):
            reached["between"] = self.epoch % self.config.spectra_every == 0
        spectra = {name: [records.number(each) for each in a] for name, a in (("p", p), ("q", q))}
        return [
            {"epoch": self.epoch, "seed": line.seed, "point": point, **spectra}
            for point, now in reached.items()
            if now
        ]

    def save(self) -> None:
        """Save a checkpoint, unless the last one is recent and more is to come."""
        now = time.monotonic()
        if self.live() and self.started and now - self.saved_at < self.checkpoint_seconds:
            return
        self.checkpoints.save(self.epoch, self.state)
        self.started, self.saved_at = True, now


def run(config: GrokConfig, folder: Path, *, checkpoint_seconds: float = 15.0) -> bool:
    """Train, or continue, the run in this folder; False if there was nothing left to do."""
    study = Study(config, folder, checkpoint_seconds=checkpoint_seconds)
    try:
        return _train(study)
    finally:
        study.checkpoints.close()


def _train(study: Study) -> bool:
    study.resume(say)
    if study.started and not study.live():
        return False
    progress = Progress(study.config.epochs, study.epoch)
    try:
        if study.started:
            say(f"continuing from epoch {study.epoch}")
        else:
            study.log(study.live(), 0.0)
            study.save()
        while live := study.live():
            rows = study.log(live, study.advance(live))
            study.save()
            progress.show(study.epoch, rows, study.end())
        return True
    finally:
        progress.close()


def _indices(live: list[int]) -> jax.Array:
    return jnp.asarray(np.array(live, dtype=np.int32))
