"""Run folders: JSON files written so that a kill at any moment leaves them readable."""

import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PACKAGES = ("jlar", "jax", "jaxlib", "equinox", "optax", "orbax-checkpoint", "numpy")


def write_whole(path: Path, text: str) -> None:
    """Put the text there at once: readers see the old file or the new one, never a part."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add one line per row; on the disk when this returns."""
    lines = "".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """All rows; a last line that was torn by a kill does not count, nor does a missing file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # after the last newline: nothing, or torn


def keep(path: Path, wanted: Callable[[Row], bool]) -> list[Row]:
    """Drop the rows that are not wanted, and a torn last line; the rest stays byte for byte."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    kept = [line for line in lines if wanted(json.loads(line))]
    write_whole(path, "".join(line + "\n" for line in kept))
    return [json.loads(line) for line in kept]


def number(value: Any) -> float:
    """The shortest decimal that is this float32."""
    return float(str(value))


def _plain(value: Any) -> Any:
    """JSON has no nan: null stands for it."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> Row:
    """What the numbers may depend on besides the settings."""
    import jax

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = jax.devices()[0]
    return {
        "versions": versions,
        "device": f"{device.platform}: {device.device_kind} x {jax.device_count()}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of this file's repository, marked if files were changed since; else None."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
