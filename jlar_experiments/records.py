"""Records on the disk, written so that a kill or an error at any moment leaves them readable."""

import gzip
import json
import math
import os
import platform
import re
import secrets
import stat
import subprocess
import zlib
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from .errors import Refusal

Row = dict[str, Any]

PACKAGES = ("jlar", "jax", "jaxlib", "equinox", "optax", "orbax-checkpoint", "numpy")
SWITCHES = ("jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable",
            "jax_default_matmul_precision")  # fmt: skip
DRAFT = ".draft"  # how the names of files end that are not whole yet
RESTORE = "put back what was there, or begin again with --fresh, which keeps it under another name"


@contextmanager
def draft(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` when the block ends: whole, and on the disk.

    Its name cannot be foreseen and it is never opened through a link, nor is `path`.
    """
    name = path.with_name(f".{path.name}.{secrets.token_hex(8)}{DRAFT}")
    try:
        with name.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        name.replace(path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            name.unlink()
        raise


def is_draft(path: Path, names: Collection[str]) -> bool:
    """Whether this is a draft that a killed process has left of a file with one of these names."""
    found = re.fullmatch(rf"\.(.+)\.[0-9a-f]{{16}}{re.escape(DRAFT)}", path.name)
    return bool(found) and found[1] in names and is_own_file(path, (path.name,))


def is_own_file(path: Path, names: Collection[str]) -> bool:
    """Whether this is a file with one of these names, and no link."""
    return path.name in names and path.is_file() and not path.is_symlink()


def sync(folder: Path) -> None:
    """Put the names of the files in this folder on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_whole(path: Path, text: str) -> None:
    """Put the text there at once: readers see the old file or the new one, never a part."""
    with draft(path) as file:
        # Names may hold halves of characters, which have no encoding: they are shown escaped.
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, described: Row) -> None:
    """The same for a JSON file that people read."""
    write_whole(path, json.dumps(described, indent=2) + "\n")


def write_packed(path: Path, rows: Iterable[Row]) -> None:
    """The same for the rows of a finished run, as compressed JSONL: equal rows, equal bytes."""
    with draft(path) as file:
        file.write(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


def read_packed(path: Path) -> list[Row]:
    """The rows of such a file; `Refusal`, which names it, if it is not whole."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode() if regular(path) else ""
        rows = [json.loads(line) for line in lines.splitlines()]
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise Refusal(f"{path} is not whole ({type(error).__name__}: {error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise Refusal(f"{path} holds lines that are not records")
    return rows


def not_through_links(path: str, flags: int) -> int:
    """An `opener` for `open` that refuses a path whose last part is a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add one line per row, all of them or, if there is an error, none; on the disk on return."""
    lines = "".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows).encode()
    with open(path, "ab", buffering=0, opener=not_through_links) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(lines)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.truncate(before)
            raise


def regular(path: Path) -> bool:
    """Whether there is a file; `Refusal` if there is something that is none (a folder, a pipe)."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISREG(mode):
        raise Refusal(f"{path} is not a file")
    return True


def read(path: Path) -> list[Row]:
    """All rows; a last line that was torn by a kill does not count, nor does a missing file.

    Raises:
        Refusal: a line is not a record; the message names it.
    """
    return [row for _, row in _lines(path)]


def _lines(path: Path) -> list[tuple[bytes, Row]]:
    """Every line of the file as it is there, and its row."""
    found = []
    lines = path.read_bytes().split(b"\n") if regular(path) else [b""]
    for number, text in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or torn
        try:
            row = json.loads(text.decode())
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise Refusal(f"{path}, line {number} is not a record; {RESTORE}")
        found.append((text, row))
    return found


Place = tuple[Hashable, Any]  # a series of rows, and where in it a row is


def keep(
    path: Path,
    wanted: Callable[[Row], bool],
    *,
    place: Callable[[Row], Place],
    due: Mapping[Any, Iterable[Any]],
    passed: Callable[[Row], bool] | None = None,
) -> list[Row]:
    """Take out the rows that are not wanted, and a torn last line; the rest stays byte for byte.

    What is taken out goes to <name>.ahead.jsonl and stays there until the run has come past it.

    Args:
        wanted: whether a row is to stay.
        place: the series that a row belongs to and its place there.
        due: the places of each series that there have to be, in order.
        passed: whether the run has come past a row that was taken out; as `wanted` if not given.

    Raises:
        Refusal: other rows would stay than are due. The message names file and line; nothing is
            changed.
    """

    def judged(
        path: Path, lines: list[tuple[bytes, Row]], judge: Callable[[Row], Any]
    ) -> list[Any]:
        found = []
        for number, (_, row) in enumerate(lines, start=1):
            try:
                found.append(judge(row))
            except (KeyError, TypeError):
                raise Refusal(
                    f"{path}, line {number} is not a record of this run; {RESTORE}"
                ) from None
        return found

    lines, ahead = _lines(path), path.with_suffix(".ahead.jsonl")
    stay, places = judged(path, lines, wanted), judged(path, lines, place)
    _check(path, stay, places, due)
    out = [each for each, stays in zip(lines, stay, strict=True) if not stays]
    former = [*_lines(ahead), *out]
    gone = judged(ahead, former, passed or wanted)
    left = [each for each, past in zip(former, gone, strict=True) if not past]
    if out or regular(ahead):
        write_whole(ahead, "".join(f"{text.decode()}\n" for text in dict(left)))
    kept = [each for each, stays in zip(lines, stay, strict=True) if stays]
    if regular(path):
        write_whole(path, "".join(f"{text.decode()}\n" for text, _ in kept))
    return [row for _, row in kept]


def _check(
    path: Path, stay: list[bool], places: list[Place], due: Mapping[Any, Iterable[Any]]
) -> None:
    waiting = {series: iter(expected) for series, expected in due.items()}
    for number, (stays, (series, there)) in enumerate(zip(stay, places, strict=True), start=1):
        expected = next(waiting.get(series, iter(())), None) if stays else there
        if there != expected:
            raise Refusal(
                f"{path}, line {number}: {_shown(there)} is there where {_shown(expected)} is "
                f"due; {RESTORE}"
            )
    for rest in waiting.values():
        for missing in rest:
            raise Refusal(
                f"{path}, line {len(stay) + 1}: {_shown(missing)} is missing, which the "
                f"checkpoint has passed; {RESTORE}"
            )


def _shown(place: Any) -> str:
    return " ".join(str(each) for each in place) if isinstance(place, tuple) else str(place)


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


def numbers() -> Row:
    """The switches of JAX that make other numbers of the same settings."""
    import jax

    return {name: getattr(jax.config, name) for name in SWITCHES}


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
