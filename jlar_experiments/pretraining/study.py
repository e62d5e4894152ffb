"""One pre-training run from its first step, or its last checkpoint, to its end."""

import dataclasses
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jlar.monitor import Baseline

from .. import folder as folders
from .. import hosts, records
from ..checkpoint import Checkpoints, Foreign
from ..errors import Stopped
from ..monitoring import live
from ..progress import Steps, say
from ..signals import stops
from . import corpus, data, sharding, train
from .config import PretrainConfig

# Peak bf16 FLOP/s of one device, by a part of its name: the vendors' data sheets, dense.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "TPU v5p": 459e12, "TPU v5": 459e12,
         "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v6": 918e12, "TPU v4": 275e12}  # fmt: skip


FREE = ("tensor", "checkpoint_every")  # these change no number beyond rounding


def opened(
    config: PretrainConfig, preset: str, folder: Path, tokens: Path, *, fresh: bool = False
) -> AbstractContextManager[None]:
    """The folder of this run, made ready and closed to other processes; see `folder.opened`.

    Of several hosts the first has it.
    """
    data = corpus.sidecar(tokens).sha256
    rate = ", with the learning rate that the longer cosine has from here on"
    if jax.process_index() > 0:
        return nullcontext()
    return folders.opened(
        folder,
        "pretrain",
        config,
        fresh=fresh,
        longer={"steps": rate if config.schedule == "cosine" else ""},
        free=FREE,
        preset=preset,
        data=data,
    )


class Study:
    """The run in a folder: its state, its data, its records and where it stands."""

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        tokens: Path,
        baseline: Baseline | None = None,
    ):
        self.config, self.folder = config, folder
        self.iterator = data.batches(config, tokens, 0)
        self.program = _program(
            dataclasses.replace(config, seed=0, unique_tokens=config.length, corpus="")
        )
        mesh = self.program.mesh
        validation = data.validation(config, tokens)
        place = NamedSharding(mesh, PartitionSpec(None, *sharding.BATCH))
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.baseline = jax.device_put(jax.tree.map(np.asarray, baseline), self.everywhere)
        self.validation = jax.make_array_from_callback(
            validation.shape, place, lambda part: validation[part]
        )
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.writes = jax.process_index() == 0
        self.pending: tuple[int, train.Metrics, jax.Array | None] | None = None
        self.rows: list[records.Row] = []
        self.val_loss: dict[int, float] = {}
        self.clock = time.perf_counter()
        kind = jax.devices()[0].device_kind
        peaks = [PEAKS[name] for name in sorted(PEAKS, key=len) if name.lower() in kind.lower()]
        self.peak = peaks[-1] * jax.device_count() if peaks else None

    def resume(self) -> None:
        """Take up the newest checkpoint and forget the records after it; or start anew."""
        position = jax.ShapeDtypeStruct((), jnp.int32, sharding=self.everywhere)
        like = (self.program.abstract_state, position)
        try:
            found = self.checkpoints.newest(like, say)
        except Foreign:
            rows = records.read(self.folder / "metrics.jsonl")
            if not rows or rows[-1]["step"] != self.config.steps - 1:
                raise
            self.step = self.config.steps
            return
        self.step = found[0] if found else 0
        if found:
            self.state, position = found[1]
            self.iterator.set_state({"next_index": int(position)})
            say(f"continuing from step {self.step}")
        else:
            self.state = self.program.initial(self.config.seed)
        self.bell = None if self.state.monitor is None else live.Bell(self.state.monitor)
        with hosts.together():
            if self.writes:
                self._keep_records()

    def _keep_records(self) -> None:
        steps, last, every = range(self.step), self.config.steps - 1, self.config.inspect_every
        inspected = [step for step in steps if step % every == 0 or step == last]
        for name, due in (("metrics.jsonl", steps), ("inspections.jsonl", inspected)):
            records.keep(
                self.folder / name,
                # A run that ended, and now goes on, would not have inspected its last step.
                lambda row, due=due: row["step"] < self.step and row["step"] in due,
                passed=lambda row: row["step"] < self.step,
                place=lambda row: (None, row["step"]),
                due={None: due},
            )

    def advance(self) -> None:
        """One training step, with what its cadence asks for before it."""
        config, step = self.config, self.step
        local = next(self.iterator)
        batch = jax.make_array_from_process_local_data(self.program.batch_place, local)
        last = step == config.steps - 1
        validates = step % config.validate_every == 0 or last
        inspects = step % config.inspect_every == 0 or last
        if validates or inspects:
            self.read()  # so that its time is not taken for training
            if validates:
                loss = self.program.validation(self.state.model, self.validation)
                self.val_loss[step] = records.number(jax.device_get(loss))
            if inspects:
                self.inspect(batch)
            self.clock = time.perf_counter()
        self.state, metrics = self.program.step(self.state, batch)
        rings = self.watch(metrics)
        self.read()  # the step before: the device has this one to do meanwhile
        self.pending = (step, metrics, rings)
        self.step = step + 1

    def watch(self, metrics: train.Metrics) -> jax.Array | None:
        """Let the monitor see this step; returns which signals ring, to be read like metrics."""
        if self.state.monitor is None:
            return None
        at = metrics.step, metrics.lars["unembedding"], metrics.loss
        monitor, rings = live.watch(self.state.monitor, *at, self.baseline)
        self.state = self.state._replace(monitor=monitor)
        return rings

    def read(self) -> None:
        """Turn the metrics of the last step that was started into a row."""
        if self.pending is None:
            return
        (step, *arrays), self.pending = self.pending, None
        metrics, rings = jax.device_get(arrays)
        now = time.perf_counter()
        speed, self.clock = self.config.tokens_per_step / (now - self.clock), now
        tokens = (step + 1) * self.config.tokens_per_step
        row: records.Row = {
            "step": step,
            "tokens": tokens,
            "epoch": round(tokens / self.config.length / self.config.sequences, 4),
            "train_loss": records.number(metrics.loss),
            "gradient_norm": records.number(metrics.gradient_norm),
        }
        if "unembedding" in metrics.lars:
            head = metrics.energies["unembedding"]
            row["lar"] = records.number(metrics.lars["unembedding"])
            row |= {name: records.number(getattr(head, name)) for name in "yxw"}
            row["keep_rate"] = records.number(metrics.keep_rates["unembedding"])
        if len(metrics.lars) > 1:
            row["lars"] = _numbers(metrics.lars)
        if self.bell is not None:
            alarms = live.names(rings)
            row["alarms"] = list(alarms)
            if self.writes:
                self.bell.hear(alarms, f"step {step}")
        if step in self.val_loss:
            row["val_loss"] = self.val_loss.pop(step)
        row["tokens_per_second"] = round(speed, 1)
        if self.peak:
            row["mfu"] = round(speed * self.config.flops_per_token / self.peak, 4)
        self.rows.append(row)
        self.latest = row

    def inspect(self, batch: jax.Array) -> None:
        """Spectra and the LAR of every matrix, on the batch about to be trained on."""
        seen = jax.device_get(self.program.inspection(self.state.model, batch))
        row: records.Row = {
            "step": self.step,
            "lars": _numbers(seen.lars),
            **_numbers(seen.statistics),
            **_numbers({"p": seen.spectra.p, "q": seen.spectra.q}),
        }
        if self.writes:
            records.append(self.folder / "inspections.jsonl", [row])

    def write(self) -> None:
        """Put the rows so far on the disk."""
        if self.writes and self.rows:
            records.append(self.folder / "metrics.jsonl", self.rows)
        self.rows = []

    def save(self) -> None:
        """Start a checkpoint; the rows of its steps are on the disk before it."""
        self.read()
        self.write()
        position = jax.device_put(np.int32(data.position(self.iterator)), self.everywhere)
        self.checkpoints.save(self.step, (self.state, position))


@functools.lru_cache(maxsize=2)
def _program(config: PretrainConfig) -> train.Program:
    """The runs of a preset differ in their data and seed: what one has compiled serves the next."""
    return train.Program(config, sharding.mesh(config.tensor))


def _numbers(arrays: dict[str, np.ndarray]) -> records.Row:
    """Numbers, and lists where an array has entries (one per layer, or a spectrum)."""
    return {
        name: [records.number(each) for each in array] if array.ndim else records.number(array)
        for name, array in arrays.items()
    }


def run(
    config: PretrainConfig, folder: Path, tokens: Path, baseline: Baseline | None = None
) -> bool:
    """Train, or continue, the run in this folder; False if there was nothing left to do."""
    study = Study(config, folder, tokens, baseline)
    try:
        study.resume()
        if study.step >= config.steps:
            return False
        progress = Steps(config.steps, study.step)
        try:
            with _stops() as stops:
                _train(study, progress, stops)
        finally:
            progress.close()
        return True
    finally:
        study.checkpoints.close()


def _train(study: Study, progress: Steps, stops: Callable[[int], int]) -> None:
    config, written = study.config, time.monotonic()
    while study.step < config.steps:
        study.advance()
        done = study.step == config.steps
        stop = stops(study.step)
        if done or stop or study.step % config.checkpoint_every == 0:
            study.save()
        elif time.monotonic() - written > 2:
            study.write()
            written = time.monotonic()
        if study.rows or done:
            progress.show(study.step, study.latest)
        if stop:
            study.checkpoints.wait()
            raise Stopped(stop, f"saved at step {study.step}")


@contextmanager
def _stops() -> Iterator[Callable[[int], int]]:
    """A function that says which signal came; several hosts agree on the step."""
    if jax.process_count() > 1:
        # JAX's agreement begins with a SIGTERM on any of them.
        reached = multihost_utils.reached_preemption_sync_point
        with stops(signal.SIGINT, then=lambda: os.kill(os.getpid(), signal.SIGTERM)) as stop:
            yield lambda step: (stop() or signal.SIGTERM) if reached(step) else 0
    else:
        with stops(signal.SIGINT, signal.SIGTERM) as stop:
            yield lambda step: stop()
