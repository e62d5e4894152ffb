"""Checkpoints of a run, the last two of them; the only file that knows orbax."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32
from orbax.checkpoint.experimental import v1 as ocp

from . import errors, hosts
from .errors import Refusal, Trouble
from .folder import unused

KEPT = 2
DESCRIPTORS = 12  # that an event loop takes at most


class Foreign(Refusal):
    """A checkpoint is whole, but of a state with other arrays than this version's."""


class Checkpoints:
    """Saves in the background; each appears under its step's number only once it is whole."""

    def __init__(self, folder: Path):
        folder.mkdir(exist_ok=True)
        self._folder = folder
        with ExitStack() as stack:  # without free descriptors uvloop, orbax's loop, aborts
            for _ in range(DESCRIPTORS):
                stack.enter_context(open(os.devnull))

    @cached_property
    def _checkpointer(self) -> ocp.training.Checkpointer:
        """Opened only after `newest` has moved damaged ones aside, since orbax fails at any."""
        context = ocp.Context()
        # Made in the background, a folder that cannot be made is waited for, 20 minutes long.
        context.asynchronous.create_directories_asynchronously = False
        return ocp.training.Checkpointer(
            str(self._folder.resolve()),
            context=context,
            preservation_policy=cast(Any, ocp.training.preservation_policies.LatestN(KEPT)),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any) -> None:
        """Start to save; waits only for a save that is still under way.

        Raises:
            Trouble: this save or the one before it failed.
        """
        # The training step donates its buffers, so what is written must be a copy. Without `force`
        # orbax skips a save while another is under way, and the last one must not be skipped.
        with self._unsaved():
            described: Any = {"digest": digest(state, step)}
            self._checkpointer.save_async(
                step, jax.tree.map(jnp.copy, state), force=True, custom_metadata=described
            )

    def newest(self, like: Any, warn: Callable[[str], None]) -> tuple[int, Any] | None:
        """The newest step and state that are as they were saved, or None.

        What is no such checkpoint is renamed <step>.damaged, so that nothing here deletes it.

        Args:
            like: a pytree of the shapes and dtypes of the state, as of `jax.eval_shape`. Arrays go
                to the sharding of their shape where it has one, which need not be that of the save.
            warn: is told of each damaged checkpoint, and when none is left.

        Raises:
            Foreign: another version saved it; nothing is renamed.
            Trouble: the machine failed (too many open files, no memory); nothing is renamed.
        """
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=getattr(a, "sharding", None) or place
            ),
            like,
        )
        steps = sorted(map(int, self._numbered()), reverse=True)
        found = None
        for step in steps:
            # Of the older ones too: orbax deletes what has a number when there are newer ones.
            digested, why = _attempt(lambda step=step: self._digested(step))
            if not (why or found):
                state, why = _attempt(lambda step=step: self._loaded(step, like))
                if not why and digest(state, step) != digested:
                    why = "its arrays are not those that were saved"
                found = None if why else (step, state)
            if why:
                aside = unused(self._folder / f"{step}.damaged")
                with hosts.together():
                    if jax.process_index() == 0:
                        (self._folder / str(step)).rename(aside)
                warn(f"checkpoint {step} is damaged ({why}); it is now {aside.name}")
        if steps and not found:
            warn(f"no checkpoint is left in {self._folder}; starting from the beginning")
        return found

    def _numbered(self) -> list[str]:
        """The steps as orbax names them; 007, or a digit of another script, is somebody else's."""
        names = (each.name for each in self._folder.iterdir())
        return [name for name in names if name.isdecimal() and name == str(int(name))]

    def _digested(self, step: int) -> int:
        """The digest that was saved with the state, if orbax can read what it reads of it."""
        path = self._folder.resolve() / str(step)
        # Orbax deletes through no link, and would wait at a pipe without end.
        odd = [each for each in path.rglob("*") if not (each.is_file() or each.is_dir())]
        if odd or path.is_symlink():
            raise ValueError(f"{next(iter(odd), path)} is no file or folder of its own")
        # Of an error of the machine orbax would tell as of a file that is not there.
        raw = (path / "_CHECKPOINT_METADATA").read_bytes()
        ocp.metadata(str(path))
        return int(json.loads(raw)["custom_metadata"]["digest"])

    def _loaded(self, step: int, like: Any) -> Any:
        path = str(self._folder.resolve() / str(step))
        try:
            return ocp.load(path, like)
        except Exception as error:
            if not errors.trouble(error):
                _check_own(path, like)
            raise

    def wait(self) -> None:
        """Until everything is on the disk; raises `Trouble` as `save` does."""
        with self._unsaved():
            if "_checkpointer" in vars(self):
                self._checkpointer.wait()

    def close(self) -> None:
        """The same, and no more is saved; raises `Trouble` as `save` does."""
        with self._unsaved():
            if "_checkpointer" in vars(self):
                self._checkpointer.close()

    @contextmanager
    def _unsaved(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax does not say what a failed write may raise
            whole = sorted(map(int, self._numbered()))
            left = f"the last good one is {whole[-1]}" if whole else "there is no other"
            why = errors.line(errors.trouble(error) or _deepest(error))
            raise Trouble(
                f"a checkpoint could not be written to {self._folder} ({why[:200]}); {left}"
            ) from error


def _check_own(path: str, like: Any) -> None:
    """Raise `Foreign` if the checkpoint says that it holds other arrays than `like`."""
    try:
        there = _shapes(ocp.metadata(path).metadata)
    except Exception:  # what it holds cannot be read, either: it is damaged
        return
    odd = sorted(there.items() ^ _shapes(like).items())
    if there and odd:
        raise Foreign(
            f"{path} was saved by another version: its state differs in {odd[0][0]}; continue with "
            "the version that config.json names, or train in another folder"
        )


def _attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """What the function returns, and the first line of the errors that it has on any host.

    Raises:
        Refusal, Trouble: on all hosts, if one of them has it.
    """
    result, why = None, ""
    with hosts.together():
        try:
            result = function()
        except Refusal:
            raise
        except Exception as error:  # neither orbax nor JSON say what a damaged file may raise
            if trouble := errors.trouble(error):
                raise trouble from error
            why = errors.line(_deepest(error))
    return result, next(filter(None, hosts.lines(why)), "")


def digest(state: Any, step: int) -> int:
    """A number that any change within one entry of the state changes, and others all but surely.

    The sum over all entries of their bits, mixed with their place by the finaliser of MurmurHash3,
    modulo 2^32: the same on any mesh, and no collective carries more than one number.
    """
    leaves = enumerate(jax.tree.leaves(state), start=1)
    # One after the other: many collectives under way at once may wait for each other on CPUs.
    return (step + sum(int(_digest_of_leaf(leaf, number)) for number, leaf in leaves)) % 2**32


@jax.jit  # leaf by leaf: equal shapes compile once, in a third of the time of one program for all
def _digest_of_leaf(leaf: Array, number: int) -> UInt32[Array, ""]:
    width = 8 * leaf.dtype.itemsize
    if leaf.dtype != bool:
        leaf = jax.lax.bitcast_convert_type(leaf, f"uint{min(width, 32)}")
    place = jnp.full(leaf.shape, number, jnp.uint32)
    for axis in range(leaf.ndim):
        place = _mixed(place) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(_mixed(_mixed(place) ^ leaf.astype(jnp.uint32)), dtype=jnp.uint32)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))


def _deepest(error: BaseException) -> BaseException:
    """Where it began: orbax wraps an error in others that say less."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return error


def hush() -> None:
    """Let orbax log nothing: what a command tells in one line takes it hundreds.

    For the rest of the process, since orbax's threads and tasks go on after an error is raised.
    """
    for name in ("absl", "asyncio", "orbax"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _shapes(state: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Every array's shape and dtype under the path that orbax stores it by."""
    leaves = jax.tree.leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (a.shape, str(a.dtype))
        for path, a in leaves
    }
