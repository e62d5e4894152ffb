"""Folders that are not whole yet; what a killed process leaves of them is removed by the next.

Removed is only what is provably jlar's own: a folder whose name has the form of these drafts, and
that holds nothing but files which belong in it.
"""

import fcntl
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from .records import DRAFT, is_draft, is_own_file, not_through_links

LOCK = "lock"


@contextmanager
def folder(place: Path, prefix: str, names: Collection[str]) -> Iterator[Path]:
    """A new folder that no other process removes; what is left under its name at the end is gone.

    Args:
        place: the folder that it is made in.
        prefix: of its name, and of those that killed processes may have left here.
        names: of the files that belong in it, besides its `LOCK`.
    """
    form = re.compile(rf"{re.escape(prefix)}[a-z0-9_]{{8}}{re.escape(DRAFT)}")  # as of mkdtemp
    for each in place.iterdir():
        if form.fullmatch(each.name):
            _remove(each, names)
    new, lock = _locked(place, prefix)
    with lock:
        try:
            yield new
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _locked(place: Path, prefix: str) -> tuple[Path, IO[bytes]]:
    """A new folder, and the open file that locks it."""
    while True:
        new = Path(tempfile.mkdtemp(prefix=prefix, suffix=DRAFT, dir=place))
        # Until it is locked, another process may take it for one that was left, and remove it.
        with suppress(FileNotFoundError):
            lock = (new / LOCK).open("xb")
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (new / LOCK).exists():
                return new, lock
            lock.close()


def _remove(draft: Path, names: Collection[str]) -> None:
    """Remove the draft of a process that was killed; one that is at work holds the lock."""
    with suppress(OSError), ExitStack() as stack:
        files = [] if draft.is_symlink() else list(draft.iterdir())
        if not all(is_own_file(each, (*names, LOCK)) or is_draft(each, names) for each in files):
            return
        if draft / LOCK in files:
            lock = open(draft / LOCK, "rb+", opener=not_through_links)
            fcntl.flock(stack.enter_context(lock), fcntl.LOCK_EX | fcntl.LOCK_NB)
        for each in files:
            each.unlink()
        draft.rmdir()
