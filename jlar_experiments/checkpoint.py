"""Checkpoints of a run, the last two of them; the only file that knows orbax."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from orbax.checkpoint.experimental import v1 as ocp

KEPT = 2


class Checkpoints:
    """Saves in the background; each appears under its epoch's number only once it is whole."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._checkpointer = ocp.training.Checkpointer(
            str(folder.resolve()),
            preservation_policy=cast(Any, ocp.training.preservation_policies.LatestN(KEPT)),
            cleanup_tmp_directories=True,
        )

    def save(self, epoch: int, state: Any) -> None:
        """Start to save; waits only for a save that is still under way."""
        # The training step donates its buffers, so what is written must be a copy. Without `force`
        # orbax skips a save while another is under way, and the last one must not be skipped.
        self._checkpointer.save_async(epoch, jax.tree.map(jnp.copy, state), force=True)

    def newest(self, like: Any, warn: Callable[[str], None]) -> tuple[int, Any] | None:
        """The newest readable epoch and state, or None; damaged checkpoints are removed.

        Args:
            like: a pytree of the shapes and dtypes of the state, as of `jax.eval_shape`.
            warn: is told of each damaged checkpoint.
        """
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), like)
        for epoch in sorted((each.step for each in self._checkpointer.checkpoints), reverse=True):
            try:
                return epoch, self._checkpointer.load(epoch, like)
            except Exception as error:  # orbax does not say what a damaged file may raise
                warn(f"checkpoint {epoch} is damaged ({type(error).__name__}) and was removed")
                shutil.rmtree(self._folder / str(epoch))
                self._checkpointer.reload()
        return None

    def close(self) -> None:
        """Wait until everything is on the disk."""
        self._checkpointer.close()
