"""The documents of a corpus: files of text, lines of JSONL, rows of Parquet, also compressed."""

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import Refusal

PIECE = 65_536  # bytes of a piece of a single file, which has no documents
LARGE = 2**26  # bytes of a file in a folder from which it is cut like a single one
LONGEST_LINE = 2**20  # bytes of a line from which it is cut
NAMED = 10  # files that are no text, in one line
PACKAGES = ("site-packages", "dist-packages")
NAMES = ("stdlib", "site-packages")  # of what comes with Python
Say = Callable[[str], None]


def documents(corpus: str, say: Say | None = None, field: str = "text") -> Iterator[bytes]:
    """Every different text of the corpus once, in the order of the paths.

    Args:
        say: is told, in one line, which files of a folder are no text.
        field: that has the text of a document in JSONL and Parquet.

    Raises:
        Refusal: there is no such corpus, or its only file is no text.
    """
    seen, left_out = set(), []
    for path in files(corpus):
        try:
            for text in _documents(path, field, cut=Path(corpus).is_file()):
                digest = hashlib.sha256(text).digest()
                if text and digest not in seen:
                    seen.add(digest)
                    yield text
        except ValueError as error:
            if Path(corpus).is_file():
                raise Refusal(f"corpus {path} is not text: {error}") from None
            left_out.append(f"{path} ({error})")
    if say and left_out:
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        say(f"left out, being no text: {', '.join(left_out[:NAMED])}{more}")


def files(corpus: str) -> Iterator[Path]:
    """The files of the corpus in order; hidden ones are not."""
    root, suffix, skip = Path(corpus), "", ()
    if corpus == "stdlib":
        root, suffix, skip = Path(sysconfig.get_path("stdlib")), ".py", PACKAGES
    elif corpus == "site-packages":
        root, suffix = Path(sysconfig.get_path("purelib")), ".py"
    elif not (root.is_dir() or root.is_file()):
        raise Refusal(
            f"corpus must be stdlib, site-packages, or an existing file or folder; got {corpus}"
        )
    if root.is_file():
        yield root
    for here, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        for name in sorted(files):
            path = Path(here) / name
            if name.endswith(suffix) and not name.startswith(".") and path.is_file():
                yield path


def _documents(path: Path, field: str, *, cut: bool) -> Iterator[bytes]:
    """The documents of a file: a line of JSONL, a row of Parquet, else the file or its pieces.

    Raises:
        ValueError: what comes next cannot be read, or is no text.
        Refusal: it is Parquet, and polars is not installed.
    """
    kinds = [each.lower() for each in path.suffixes]
    zipped = kinds[-1:] == [".gz"]
    kind = "".join(kinds[-2:-1] if zipped else kinds[-1:])
    if kind == ".parquet":
        yield from _rows(path, field)
        return
    with gzip.open(path) if zipped else path.open("rb") as file:
        try:
            if kind in (".jsonl", ".ndjson"):
                yield from _lines(file, field)
            else:
                size = LARGE + 1 if zipped else os.fstat(file.fileno()).st_size
                yield from _pieces(file, whole=not cut and size <= LARGE)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"no gzip: {error}") from None


def _lines(file: Any, field: str) -> Iterator[bytes]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"line {number} is no JSON with {field!r} (--field)") from None
            yield _document(text, f"line {number}", field)


def _rows(path: Path, field: str) -> Iterator[bytes]:
    try:
        import polars
    except ImportError:
        raise Refusal(f'{path} is Parquet, read with polars: pip install "jlar[logs]"') from None
    try:
        column = polars.read_parquet(path, columns=[field])[field]
    except (polars.exceptions.PolarsError, polars.exceptions.PanicException) as error:
        raise ValueError(f"no Parquet with {field!r} (--field): {str(error)[:80]}") from None
    for number, text in enumerate(column, start=1):
        yield _document(text, f"row {number}", field)


def _document(text: object, where: str, field: str) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"{where}: {field!r} is no text (--field)")
    try:
        return _checked(text.encode(), 0)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _pieces(file: Any, *, whole: bool) -> Iterator[bytes]:
    """The text of a file, whole or cut into pieces at line ends; a very large one always is.

    Raises:
        ValueError: the piece that comes next is not UTF-8, or holds a NUL, which ends documents.
    """
    if whole:
        yield _checked(file.read(), 0)
        return
    piece, start, end = [], 0, 0
    while line := file.readline(LONGEST_LINE):
        for _ in range(3):  # bytes that a character may go on for where a line is cut
            if file.peek(1)[:1] and file.peek(1)[0] & 0xC0 == 0x80:
                line += file.read(1)
        if piece and (end + len(line)) // PIECE > end // PIECE:
            yield _checked(b"".join(piece), start)
            piece, start = [], end
        piece.append(line)
        end += len(line)
    yield _checked(b"".join(piece), start)


def _checked(text: bytes, start: int) -> bytes:
    """The text; ValueError tells what is wrong with it, `start` bytes into its file."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {start + error.start}") from None
    if (place := text.find(b"\0")) >= 0:
        raise ValueError(f"a NUL at byte {start + place}")
    return text
