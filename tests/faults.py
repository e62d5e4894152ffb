"""Errors of files made to order: the n-th operation fails, whichever it is."""

import builtins
import contextlib
import errno
import io
import os


class Faulty:
    """Counts operations on files and lets one of them fail."""

    def __init__(self, fails, number=errno.ENOSPC):
        self.fails, self.number, self.count = fails, number, 0

    def step(self):
        self.count += 1
        if self.count == self.fails:
            raise OSError(self.number, os.strerror(self.number))

    def wrapped(self, function):
        def called(*arguments, **options):
            self.step()
            return function(*arguments, **options)

        return called

    def opened(self, function):
        def called(*arguments, **options):
            self.step()
            file = function(*arguments, **options)
            mode = arguments[1] if len(arguments) > 1 else options.get("mode", "r")
            return file if set(mode) <= set("rb") else _File(file, self)

        return called


class _File:
    """A file whose writes may fail after half of them."""

    def __init__(self, file, faulty):
        self._file, self._faulty = file, faulty

    def write(self, data):
        try:
            self._faulty.step()
        except OSError:
            self._file.write(data[: len(data) // 2])
            raise
        return self._file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


@contextlib.contextmanager
def failing(fails, number=errno.ENOSPC):
    """Within the block the operation of this number fails: open, write, rename, fsync, mkdir."""
    faulty = Faulty(fails, number)
    names = [(builtins, "open"), (io, "open")]
    names += [(os, name) for name in ("open", "replace", "rename", "fsync", "mkdir")]
    before = [(module, name, getattr(module, name)) for module, name in names]
    for module, name, function in before:
        wrap = faulty.opened if module is not os else faulty.wrapped
        setattr(module, name, wrap(function))
    try:
        yield faulty
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def each_fault(attempt, number=errno.ENOSPC):
    """Call `attempt` with one operation after the other failing; yields how each call ended.

    The last call, in which no operation is left to fail, is the last to be yielded.
    """
    for fails in range(1, 500):
        ended = None
        with failing(fails, number) as faulty:
            try:
                attempt()
            except Exception as error:
                ended = error
        yield ended
        if faulty.count < fails:
            assert ended is None
            return
    raise AssertionError("there is no end of operations")
