"""How a command ends before its time: the kinds of errors, each told in one line."""

import os
import re
import signal
from collections.abc import Iterator
from importlib import metadata

from .options import printable

LONGEST = 400  # characters of a line that tells an error

# Of tensorstore and XLA, whose errors have no class of their own: the machine failed, not the file.
_TROUBLES = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "PERMISSION_DENIED", "DEADLINE_EXCEEDED",
             "ABORTED", "Too many open files", "No space left", "Input/output error",
             "Gloo", "NCCL", "oordination service")  # of other hosts  # fmt: skip
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class Told(Exception):
    """An error whose message is one line, written for users."""

    everywhere = False  # whether each of several hosts that train together has it


class Refusal(Told):
    """The user must change something first; the message is one line, the exit code 2."""


class Locked(Refusal):
    """Another process is at work in the folder."""


class Trouble(Told):
    """The machine failed (a full disk, no memory); the message is one line, the exit code 1."""


class Stopped(Told):
    """A signal came, and what was computed is saved; the message says up to where."""

    everywhere = True

    def __init__(self, number: int, saved: str):
        super().__init__(f"{signal.Signals(number).name}: {saved}")
        self.exit_code = 128 + number


def line(error: BaseException) -> str:
    """The error in one line, with its kind unless it is one of those that are written for users."""
    words = printable(str(error))
    if not isinstance(error, Told | OSError):
        words = f"{type(error).__name__}: {words}"
    return words if len(words) <= LONGEST else words[: LONGEST - 3] + "..."


def code(error: BaseException) -> int:
    """The exit code of a command that ends with this error."""
    if isinstance(error, Stopped):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 2 if isinstance(error, Refusal) else 1


def trouble(error: BaseException) -> Trouble | None:
    """The failure of the machine behind an error, if it is one.

    A file that is missing, or a folder where a file should be, is not the machine's failure.
    """
    for each in _chain(error):
        if isinstance(each, Trouble):
            return each
        each = _of_system(each)
        failed = isinstance(each, MemoryError | OSError) and not isinstance(each, _MISSING)
        if failed or any(name in str(each) for name in _TROUBLES):
            return Trouble(line(each))
    return None


def _of_system(error: BaseException) -> BaseException:
    """An error of tensorstore that names the code of the system's as what Python raises for it."""
    if (code := re.search(r"os_error_code='(\d+)'", str(error))) is None:
        return error
    path = re.search(r'"(/[^"]*)"', str(error))
    return OSError(int(code[1]), os.strerror(int(code[1])), path and path[1])


def missing(error: ModuleNotFoundError) -> str | None:
    """In one line, how to install what a plain install lacks; None if no extra of jlar has it."""
    wanted = (error.name or "").split(".")[0].lower()
    try:
        needs = metadata.requires("jlar") or []
    except metadata.PackageNotFoundError:
        needs = []
    for each in needs:
        package, extra = re.match(r"[\w.-]+", each), re.search(r"extra == [\"'](\w+)", each)
        if package and extra and package[0].lower().split("-")[0] == wanted:
            return f'this needs {error.name}: pip install "jlar[{extra[1]}]"'
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                yield from _chain(each)
        error = error.__cause__ or error.__context__
