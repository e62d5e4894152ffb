"""Sequences out of token files: nested random subsets, shuffled anew in each epoch by grain."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, SupportsIndex

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from ..errors import Refusal
from ..progress import say
from . import corpus
from .config import PretrainConfig
from .corpus import FILES

SCANNED = 2**30  # tokens; of longer files the sidecar's word is taken
READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)


class Sequences:
    """Disjoint pieces of length + 1 tokens, in a random order that all sizes share.

    A smaller set is a prefix of a larger one. The order does not depend on the run's seed.
    """

    def __init__(self, config: PretrainConfig, folder: Path, part: str, count: int):
        stored, path = corpus.sidecar(folder), folder / FILES[part]
        self._tokens = np.memmap(path, dtype=stored.dtype, mode="r")
        self._length = config.length + 1
        there = len(self._tokens) // self._length
        if there == 0:
            raise Refusal(
                f"{path} has {len(self._tokens)} tokens, fewer than one sequence of "
                f"{config.length} and its last label"
            )
        if count > there:
            name = "unique_tokens" if part == "train" else "validation_tokens"
            raise Refusal(
                f"{name} must be at most {there * config.length}, which {path} holds in whole "
                f"sequences; got {getattr(config, name)}"
            )
        largest = stored.largest_id
        if len(self._tokens) <= SCANNED:
            largest = max(largest, int(self._tokens.max()))
        if largest >= config.vocabulary:
            raise Refusal(
                f"vocabulary must exceed every id in {path}, the largest of which is {largest}; "
                f"got {config.vocabulary}"
            )
        self._order = np.random.default_rng(0).permutation(there)[:count]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: SupportsIndex) -> Int[np.ndarray, " t1"]:
        start = int(self._order[index]) * self._length
        return self._tokens[start : start + self._length].astype(np.int32)


def batches(config: PretrainConfig, folder: Path, start: int) -> Any:
    """An endless grain iterator over this host's rows of each batch, from batch `start` on.

    Each epoch is a new order of the same sequences; a batch may hold the end of one epoch and the
    beginning of the next. All hosts together see what one host would.
    """
    sequences = Sequences(config, folder, "train", config.sequences)
    order = grain.MapDataset.source(sequences).seed(config.seed).shuffle().repeat()
    hosts = jax.process_count()
    own = order[jax.process_index() :: hosts].batch(config.batch // hosts)
    iterator = iter(own.to_iter_dataset(READING))
    iterator.set_state({"next_index": start})
    return iterator


def position(iterator: Any) -> int:
    """How many batches have been taken out of this iterator."""
    return iterator.get_state()["next_index"]


def validation(config: PretrainConfig, folder: Path) -> Int[np.ndarray, "k b t1"]:
    """The held-out sequences of every validation, whole batches of them."""
    count = max(1, config.validation_tokens // config.tokens_per_step) * config.batch
    sequences = Sequences(config, folder, "validation", count)
    rows = np.stack([sequences[i] for i in range(count)])
    return rows.reshape(-1, config.batch, config.length + 1)


def fitted(config: PretrainConfig, folder: Path, *, given: Collection[str] = ()) -> PretrainConfig:
    """The settings with no more unique and validation tokens than the files in the folder hold.

    Settings that were given are left as they are, to be refused where they ask for more.
    """
    there = {part: n // (config.length + 1) for part, n in corpus.sidecar(folder).tokens.items()}
    most = {
        "unique_tokens": there["train"] * config.length,
        "validation_tokens": there["validation"] // config.batch * config.tokens_per_step,
    }
    less = {
        name: count
        for name, count in most.items()
        if name not in given and 0 < count < getattr(config, name)
    }
    for name, count in less.items():
        say(f"{name} {count:,}, all that {folder} holds, not {getattr(config, name):,}")
    return dataclasses.replace(config, **less)


def check(config: PretrainConfig, mesh: Mesh) -> None:
    """ValueError, before anything is compiled, where the sizes do not fit the devices."""
    parts, tensor, hosts = mesh.shape["data"], mesh.shape["tensor"], jax.process_count()
    local = jax.local_device_count()
    rules = [
        ("batch", parts, "the devices that share it"),
        ("batch", hosts, "the hosts that read it"),
        ("width", parts, "the devices that share the batch, and a part of each matrix"),
        ("width", tensor, "tensor"),
        ("hidden", tensor, "tensor"),
        ("vocabulary", tensor, "tensor"),
    ]
    for name, divisor, what in rules:
        value = getattr(config, name)
        if value % divisor:
            raise ValueError(f"{name} must be a multiple of {divisor}, {what}; got {value}")
    if local % tensor:
        raise ValueError(f"tensor must divide the devices of one host ({local}); got {tensor}")
