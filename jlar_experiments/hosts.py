"""Several hosts that train together: what ends a command on one of them ends it on all."""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from . import errors
from .errors import Refusal, Trouble

SILENCE = 15  # seconds after which a host that says nothing is dead
KINDS = {"1": Trouble, "2": Refusal}  # by exit code


@contextmanager
def joined(**where: Any) -> Iterator[None]:
    """One of several hosts until the block ends, or an error on any of them.

    Of an error that all have they end together. A host that alone has one, or is interrupted,
    leaves at once; the others end when they miss it, at most `SILENCE` seconds later.

    Args:
        where: as of `jax.distributed.initialize`.
    """
    jax.distributed.initialize(
        **where, heartbeat_timeout_seconds=SILENCE, shutdown_timeout_seconds=SILENCE
    )
    try:
        yield
    except BaseException as error:
        if not getattr(error, "everywhere", False):
            # JAX's own way out waits for hosts that do not know of it, and then aborts.
            atexit.register(_leave, errors.code(error))
            raise
        jax.distributed.shutdown()
        raise
    jax.distributed.shutdown()


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lines(own: str) -> list[str]:
    """A line from every host, in their order; all wait for all."""
    if jax.process_count() == 1:
        return [own]
    width = 4 * errors.LONGEST
    mine = np.frombuffer(
        own.encode(errors="backslashreplace")[:width].ljust(width, b"\0"), np.uint8
    )
    found = multihost_utils.process_allgather(mine)
    return [bytes(each).rstrip(b"\0").decode(errors="replace") for each in found]


@contextmanager
def together() -> Iterator[None]:
    """What one host refuses or fails in within this block, all of them refuse when they leave it.

    Raises:
        Refusal, Trouble: the host's own, or that of the first host that had one.
    """
    own = None
    try:
        yield
    except Refusal as error:
        own = error
    except Exception as error:
        own = errors.trouble(error)
        if own is None and jax.process_count() == 1:
            raise
        own = own or Trouble(errors.line(error))
    said = "" if own is None else ("2 " if isinstance(own, Refusal) else "1 ") + errors.line(own)
    first = next((each for each in lines(said) if each), "")
    if own is None and first:
        own = KINDS[first[0]](first[2:])
    if own is not None:
        own.everywhere = True
        raise own
