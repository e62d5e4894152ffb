"""Several hosts that train together: what ends a command on one of them ends it on all."""

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


def start(**where: Any) -> None:
    """Join the other hosts; arguments as of `jax.distributed.initialize`."""
    jax.distributed.initialize(
        **where, heartbeat_timeout_seconds=SILENCE, shutdown_timeout_seconds=SILENCE
    )


def lines(own: str) -> list[str]:
    """A line from every host, in their order; all wait for all."""
    if jax.process_count() == 1:
        return [own]
    width = 4 * errors.LONGEST
    mine = np.frombuffer(own.encode()[:width].ljust(width, b"\0"), np.uint8)
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
    if own is not None:
        raise own
    if first:
        raise KINDS[first[0]](first[2:])
