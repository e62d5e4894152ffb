"""SIGINT and SIGTERM while a run trains: they stop it between two steps, so that it is saved."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_raised = [False]  # whether an interrupt has been raised, which some module may have swallowed


@contextmanager
def heeded() -> Iterator[None]:
    """Within the block a SIGINT interrupts, whatever runs; after it, a SIGINT is ignored."""
    # What a shell starts in the background ignores SIGINT, and goes on doing so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.unraisablehook = _unraisable
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)  # at its end Python no longer handles SIGALRM


def _interrupt(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt, but later while a module is being imported.

    Compiled modules swallow one that comes while they are imported, or crash.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return _again()
        frame = frame.f_back
    _raised[0] = True
    raise KeyboardInterrupt


def _unraisable(ignored: Any) -> None:
    """Of an error that Python can raise nowhere: an interrupt comes again, of others nothing.

    Threads of tensorstore have hundreds after one that is raised and told.
    """
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        _again()


def _again() -> None:
    """Another SIGINT a moment later, for the handler that there is then."""
    signal.setitimer(signal.ITIMER_REAL, 0.05)


@contextmanager
def stops(*numbers: int, then: Callable[[], None] = lambda: None) -> Iterator[Callable[[], int]]:
    """Within the block these signals are noted for the caller to ask; a second SIGINT interrupts.

    Yields a function that returns the number of the first signal that came, 0 if none has; `then`
    is called when it comes.
    """
    if _raised[0]:
        raise KeyboardInterrupt
    came: list[int] = []

    def note(number: int, _: object) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        then()

    # What a shell starts in the background ignores SIGINT, and goes on doing so.
    heeded = [each for each in numbers if signal.getsignal(each) != signal.SIG_IGN]
    before = {each: signal.signal(each, note) for each in heeded}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
