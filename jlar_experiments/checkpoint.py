"""Checkpoints of a run, the last two of them; the only file that knows orbax."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

import jax
import jax.numpy as jnp
from orbax.checkpoint.experimental import v1 as ocp

KEPT = 2


class CheckpointError(Exception):
    """Something that the user must know of a checkpoint; the message is one line."""


class Unsaved(CheckpointError):
    """A checkpoint could not be written (the disk is full, say)."""


class Foreign(CheckpointError):
    """A checkpoint is whole, but of a state with other arrays than this version's."""


class Checkpoints:
    """Saves in the background; each appears under its step's number only once it is whole."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._checkpointer = ocp.training.Checkpointer(
            str(folder.resolve()),
            preservation_policy=cast(Any, ocp.training.preservation_policies.LatestN(KEPT)),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any) -> None:
        """Start to save; waits only for a save that is still under way.

        Raises:
            Unsaved: this save or the one before it failed.
        """
        # The training step donates its buffers, so what is written must be a copy. Without `force`
        # orbax skips a save while another is under way, and the last one must not be skipped.
        try:
            self._checkpointer.save_async(step, jax.tree.map(jnp.copy, state), force=True)
        except Exception as error:  # orbax does not say what a failed write may raise
            self._unsaved(error)

    def newest(self, like: Any, warn: Callable[[str], None]) -> tuple[int, Any] | None:
        """The newest readable step and state, or None; damaged checkpoints are removed.

        Args:
            like: a pytree of the shapes and dtypes of the state, as of `jax.eval_shape`. Arrays go
                to the sharding of their shape where it has one, which need not be that of the save.
            warn: is told of each damaged checkpoint, and when none is left.

        Raises:
            Foreign: another version saved it; nothing is removed.
        """
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=getattr(a, "sharding", None) or place
            ),
            like,
        )
        steps = sorted((each.step for each in self._checkpointer.checkpoints), reverse=True)
        for step in steps:
            try:
                return step, self._checkpointer.load(step, like)
            except Exception as error:  # orbax does not say what a damaged file may raise
                self._check_own(step, like)
                warn(f"checkpoint {step} is damaged ({type(error).__name__}) and was removed")
                shutil.rmtree(self._folder / str(step), ignore_errors=True)
                self._checkpointer.reload()
        if steps:
            warn(f"no checkpoint is left in {self._folder}; starting from the beginning")
        return None

    def _check_own(self, step: int, like: Any) -> None:
        """Raise `Foreign` if the checkpoint says that it holds other arrays than `like`."""
        try:
            there = _shapes(self._checkpointer.metadata(step).metadata)
        except Exception:  # what it holds cannot be read, either: it is damaged
            return
        odd = sorted(there.items() ^ _shapes(like).items())
        if there and odd:
            raise Foreign(
                f"{self._folder / str(step)} was saved by another version: its state differs in "
                f"{odd[0][0]}; continue with the version that config.json names, or train in "
                "another folder"
            )

    def close(self) -> None:
        """Wait until everything is on the disk; raises `Unsaved` as `save` does."""
        try:
            self._checkpointer.close()
        except Exception as error:
            self._unsaved(error)

    def _unsaved(self, error: Exception) -> NoReturn:
        whole = sorted(int(each.name) for each in self._folder.iterdir() if each.name.isdigit())
        left = f"the last good one is {whole[-1]}" if whole else "there is no other"
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise Unsaved(f"a checkpoint could not be written to {self._folder} ({why}); {left}") from (
            error
        )


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Every array's shape under the path that orbax stores it by."""
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): a.shape for path, a in leaves}
