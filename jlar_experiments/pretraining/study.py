"""One pre-training run from its first step, or its last checkpoint, to its end."""

import dataclasses
import functools
import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import jlar

from .. import logs, records
from ..checkpoint import Checkpoints, Foreign
from ..monitoring import live
from ..progress import Steps, say
from . import corpus, data, sharding, train
from .config import PretrainConfig

# Peak bf16 FLOP/s of one device, by a part of its name: the vendors' data sheets, dense.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "TPU v5p": 459e12, "TPU v5": 459e12,
         "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v6": 918e12, "TPU v4": 275e12}  # fmt: skip


class Refused(Exception):
    """The folder holds something that this run would spoil; the message is one line."""


class Terminated(Exception):
    """SIGTERM came, and the run was saved."""


def prepare(config: PretrainConfig, preset: str, folder: Path, *, fresh: bool) -> None:
    """Make the folder ready for this run: new, to be continued, or emptied if `fresh`."""
    path = folder / "config.json"
    if folder.exists() and not path.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} exists and is not a run's folder; choose another with --out")
    if path.exists():
        stored = read_config(folder)
        if not fresh:
            _check_same(stored, config, folder)
            return
        for name in ("metrics.jsonl", "inspections.jsonl", "report.html"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "study": "pretrain",
        "preset": preset,
        "settings": dataclasses.asdict(config),
        **records.environment(),
    }
    records.write_whole(path, json.dumps(described, indent=2) + "\n")


def prepare_all(preset: str, folder: Path) -> None:
    """Make the folder that holds the runs of a preset, for `jlar report`."""
    path = folder / "config.json"
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            known = stored["study"] == "pretrain" and "settings" not in stored
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise Refused(f"{folder} holds something else; choose another with --out")
        return
    folder.mkdir(parents=True, exist_ok=True)
    records.write_whole(path, json.dumps({"study": "pretrain", "preset": preset}) + "\n")


def read_config(folder: Path) -> PretrainConfig:
    """The settings of the run in this folder."""
    path = folder / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["study"] == "pretrain":
            return PretrainConfig(**stored["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise Refused(f"{path} is not that of a run of `jlar pretrain`; choose another folder")


def _check_same(stored: PretrainConfig, config: PretrainConfig, folder: Path) -> None:
    free = ("tensor", "checkpoint_every")  # these change no number beyond rounding
    there, here = dataclasses.asdict(stored), dataclasses.asdict(config)
    different = [name for name in here if there[name] != here[name] and name not in free]
    if different:
        listed = ", ".join(f"{name} {there[name]}, not {here[name]}" for name in different)
        raise Refused(f"{folder} holds a run with {listed}; choose --fresh or another --out")


class Study:
    """The run in a folder: its state, its data, its records and where it stands."""

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        tokens: Path,
        baseline: jlar.Baseline | None = None,
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
        if self.writes:
            for name in ("metrics.jsonl", "inspections.jsonl"):
                records.keep(self.folder / name, lambda row: row["step"] < self.step)

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
            row["alarms"] = live.names(rings)
            if self.writes:
                self.bell.hear(row["alarms"], f"step {step}")
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
    config: PretrainConfig, folder: Path, tokens: Path, baseline: jlar.Baseline | None = None
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


def _train(study: Study, progress: Steps, stops: Any) -> None:
    config, written = study.config, time.monotonic()
    while study.step < config.steps:
        study.advance()
        done = study.step == config.steps
        if stop := stops(study.step):
            say(f"SIGTERM: saving step {study.step}")
        if done or stop or study.step % config.checkpoint_every == 0:
            study.save()
        elif time.monotonic() - written > 2:
            study.write()
            written = time.monotonic()
        if stop and not done:
            raise Terminated
        if study.rows or done:
            progress.show(study.step, study.latest)


@contextmanager
def _stops() -> Iterator[Any]:
    """A function that says whether SIGTERM came; on several hosts they agree on the step."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def check(config: PretrainConfig, tokens: Path) -> None:
    """ValueError or `Unusable`, in one line, before a folder is made or anything is compiled."""
    data.check(config, sharding.mesh(config.tensor))
    data.batches(config, tokens, 0).close()
    data.validation(config, tokens)


def baseline(folder: Path) -> jlar.Baseline:
    """The run in a folder as a baseline; `Refused` if there is none to compare with."""
    try:
        return logs.baseline(folder)
    except (OSError, logs.Unusable) as error:
        raise Refused(f"there is no run to compare with: {error}") from error


def tokens(config: PretrainConfig, root: Path) -> Path:
    """The folder of this run's token files; the first host makes them, if hosts share the disk."""
    folder = corpus.folder(config.corpus, config.tokenizer, config.vocabulary, root)
    if jax.process_index() == 0:
        corpus.prepare(config.corpus, config.tokenizer, config.vocabulary, folder, say)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("token files")
        corpus.prepare(config.corpus, config.tokenizer, config.vocabulary, folder, say)
    return folder
