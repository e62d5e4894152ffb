"""Runs of equal shape that train together: one program, chunks of epochs, all devices."""

import contextlib
import math
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from .. import records
from ..errors import Stopped
from ..monitoring import live
from ..progress import Progress, say
from ..records import Row
from ..signals import stops
from . import train
from .analysis import Timeline
from .config import GrokConfig
from .study import Run


@dataclass(frozen=True, eq=False)
class Member:
    """One seed of one run."""

    run: Run
    place: int
    data: train.Data

    @property
    def line(self) -> Timeline:
        """Its records."""
        return self.run.lines[self.place]

    @property
    def upto(self) -> int:
        """The epoch of its next log."""
        every = self.run.config.log_every
        return min((self.line.epoch // every + 1) * every, self.run.config.epochs)

    def finished(self) -> bool:
        """Whether it has trained as long as it should."""
        return self.line.finished(self.run.config)


def run(config: GrokConfig, folder: Path, *, checkpoint_seconds: float = 15.0) -> bool:
    """Train, or continue, the run in this folder; False if there was nothing left to do."""
    return together([(config, folder)], checkpoint_seconds=checkpoint_seconds)


def together(
    runs: Sequence[tuple[GrokConfig, Path]],
    *,
    checkpoint_seconds: float = 15.0,
    until: float = math.inf,
) -> bool:
    """Train, or continue, runs whose `program` is equal; False if there was nothing to do here.

    Args:
        runs: the settings of each and its folder, within `study.opened`.
        checkpoint_seconds: time between checkpoints; changes no number.
        until: the time (`time.monotonic`) at which to stop, between two logs.
    """
    with contextlib.ExitStack() as stack:
        folders = [Run(config, folder) for config, folder in runs]
        for each in folders:
            stack.callback(each.checkpoints.close)
        return Ensemble(folders, checkpoint_seconds=checkpoint_seconds).train(until)


class Ensemble:
    """The members on the devices; those that have finished leave between two chunks of epochs."""

    def __init__(self, runs: Sequence[Run], *, checkpoint_seconds: float):
        self.runs, self.checkpoint_seconds = runs, checkpoint_seconds
        self.program = runs[0].config.program
        if any(each.config.program != self.program for each in runs):
            raise ValueError("runs that train together must have equal programs")

    def train(self, until: float) -> bool:
        """Train until all members have finished; False if there was nothing left to do."""
        for each in self.runs:
            each.resume(say)
        todo = [each for each in self.runs if not (each.started and each.finished())]
        if not todo:
            return False
        self._take(todo)
        progress = Progress(max(each.config.epochs for each in todo), self.epoch())
        try:
            if self.epoch():
                say(f"continuing from epoch {self.epoch()}")
            with stops(signal.SIGINT, signal.SIGTERM) as stop:
                # Training is compiled beside the first log, each on a core of its own.
                with ThreadPoolExecutor(1) as other:
                    compiled = other.submit(self._compile)
                    self._log([each for each in self.members if each.line.epoch < 0], 0.0)
                    self._save(force=True)
                    compiled.result()
                while (live := self._live()) and time.monotonic() < until and not stop():
                    rows = self._log(live, self._advance(live))
                    self._save(force=False)
                    progress.show(self.epoch(), rows, max(each.end() for each in todo))
                self._save(force=True)
            if stop():
                raise Stopped(stop(), f"saved at epoch {self.epoch()}")
            return True
        finally:
            progress.close()

    def epoch(self) -> int:
        """The epoch of the member that is furthest."""
        return max(0, *(each.line.epoch for each in self.members), 0)

    def _live(self) -> list[Member]:
        return [each for each in self.members if not each.finished()]

    def _take(self, runs: list[Run]) -> None:
        """Make members of the seeds of these runs and put them onto the devices."""
        self.members = []
        for each in runs:
            data = train.data(each.config)
            places = range(each.config.seeds)
            self.members += [Member(each, i, train.member(data, i)) for i in places]
        self.bells = {each: live.Bell(each.run.states[each.place].monitor) for each in self.members}
        self.unsaved: set[Run] = {each for each in runs if not each.started}
        self.saved_at = time.monotonic()
        self._place(self.members)

    def _place(self, members: list[Member]) -> None:
        """Put these members onto the devices, evenly: the last ones again where there is room."""
        self.placed = members
        devices = jax.devices()[: len(members)]
        each_has = -(-len(members) // len(devices))
        padded = [*members, *[members[-1]] * (each_has * len(devices) - len(members))]
        self.mesh = jax.sharding.Mesh(np.array(devices), ("run",))
        sharding = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec("run"))
        states = jax.tree.map(lambda *a: np.stack(a), *(m.run.states[m.place] for m in padded))
        data = jax.tree.map(lambda *a: jnp.stack(a), *(m.data for m in padded))
        self.state, self.data = jax.device_put((states, data), sharding)

    def _fetch(self) -> None:
        """Bring the states of all members back to their runs."""
        state = jax.tree.map(np.array, self.state)  # a copy: the next chunk takes the buffers over
        for i, each in enumerate(self.placed):
            each.run.states[each.place] = train.member(state, i)

    def _compile(self) -> None:
        nowhere = np.zeros(len(self.state.epoch), np.int32)
        train.advanced.lower(self.program, self.mesh, self.state, self.data, nowhere).compile()

    def _advance(self, live: list[Member]) -> float:
        """Train these members up to their next logs; returns the seconds it took for each."""
        if len(live) <= math.ceil(len(self.placed) / 2) < len(self.placed):
            self._fetch()
            self._place(live)
        start = time.perf_counter()
        last = np.zeros(len(self.state.epoch), np.int32)  # to be trained up to epoch 0: not at all
        for i, each in enumerate(self.placed):
            last[i] = 0 if each.finished() else each.upto
        self.state = train.advanced(self.program, self.mesh, self.state, self.data, last)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / len(live)

    def _log(self, members: list[Member], training_seconds: float) -> list[Row]:
        """Evaluate and append the logs of these members; the rows are on disk when it returns."""
        if not members:
            return []
        start = time.perf_counter()
        metrics, spectra = train.evaluated(self.mesh, self.state, self.data)
        state = self.state
        # A last log between two others is not there if the run goes on, so no monitor sees it.
        regular = jnp.where(state.epoch % self.program.log_every == 0, state.epoch, 0)
        monitor, rings = live.watch_each(state.monitor, regular, metrics.lar, metrics.train_loss)
        self.state = state._replace(monitor=monitor)
        metrics, spectra, rings = jax.device_get((metrics, spectra, rings))
        seconds = {
            "training_seconds": round(training_seconds, 4),
            "evaluation_seconds": round((time.perf_counter() - start) / len(members), 4),
        }
        rows = []
        for i, each in enumerate(self.placed):
            if each in members:
                values = {name: records.number(a[i]) for name, a in metrics._asdict().items()}
                epoch = each.upto if each.line.epoch >= 0 else 0
                alarms = live.names(rings[i])
                row = {**values, "alarms": list(alarms), **seconds}
                rows.append(each.run.record(each.place, epoch, row, spectra.p[i], spectra.q[i]))
                where = f"{each.run.folder.name}, seed {each.line.seed}, epoch {epoch}"
                self.bells[each].hear(alarms, where)
        for run in {each.run for each in members}:
            run.write()
            self.unsaved.add(run)
        return rows

    def _save(self, *, force: bool) -> None:
        """Save checkpoints if it is time, or if a run has just finished."""
        ended = any(each.finished() for each in self.unsaved)
        now = time.monotonic()
        due = force or ended or now - self.saved_at >= self.checkpoint_seconds
        if self.unsaved and due:
            self._fetch()
            for each in self.unsaved:
                each.save()
            self.unsaved, self.saved_at = set(), now
