"""Runs of the command `jlar` in forked processes: what is imported once serves all of them."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import jax
import optax  # noqa: F401
from orbax.checkpoint.experimental import v1  # noqa: F401

from jlar_experiments import cli, report
from jlar_experiments.grokking import ensemble  # noqa: F401
from jlar_experiments.pretraining import study  # noqa: F401


def child(arguments: list[str], log: Path) -> int:
    """The process that runs the command; no backend of JAX is there before."""
    if pid := os.fork():
        return pid
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    report.write = lambda folder: "not drawn"
    code = 99
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = int(str(stop.code))
    finally:
        os._exit(code)


def main(kills: int, folder: Path, arguments: list[str]) -> None:
    """Kill the command so often, each time at a random moment, then let it come to its end."""
    chance, rows = random.Random(0), folder / "metrics.jsonl"
    for _ in range(kills):
        pid, lines = child(arguments, folder.with_suffix(".log")), _lines(rows)
        # After a few more rows, or without any: while it starts, compiles or resumes.
        more = chance.choice((0, 1, 1, 2, 3))
        until = time.monotonic() + (chance.uniform(0, 4) if more == 0 else 60)
        while time.monotonic() < until and os.waitpid(pid, os.WNOHANG) == (0, 0):
            if more and _lines(rows) >= lines + more:
                time.sleep(chance.uniform(0, 0.1))
                break
            time.sleep(0.002)
        else:
            if time.monotonic() < until:
                continue  # it has come to its end
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    _, status = os.waitpid(child(arguments, folder.with_suffix(".log")), 0)
    sys.exit(os.waitstatus_to_exitcode(status))


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
