"""SIGINT and SIGTERM while a run trains: they stop it between two steps, so that it is saved."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_raised = [False]  # whether an interrupt has been raised, which some module may have swallowed


def interrupt(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt, but a tenth of a second later while a module is being imported.

    Compiled modules swallow one that comes while they are imported, or crash.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            return
        frame = frame.f_back
    _raised[0] = True
    raise KeyboardInterrupt


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
