"""What a path holds - a file of any kind, a run's folder, standard input - as a table."""

import gzip
import io
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from . import text
from .table import Table, Unusable, listed

EVENTS = "*tfevents*"
USUAL = ("metrics.jsonl", "metrics.csv", "trainer_state.json")  # ours, Lightning's, Hugging Face's
ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".csv.gz", ".jsonl.gz")
NO_TEXT = {  # first bytes
    b":W&B": "a W&B run file, which no library reads: upload it with `wandb sync` and export a CSV",
    b"SQLite format 3": "an SQLite database: export the table of metrics as CSV",
    b"PK\3\4": "a zip file, as spreadsheets are: export a CSV",
}


def table(path: Path | str, **options: Any) -> Table:
    """The table that a path holds; `options` are those of `text.table`.

    Raises:
        Unusable: it is of a kind that cannot be read, or that needs an extra.
        OSError: as reading raises it.
    """
    if str(path) == "-":
        return _of(sys.stdin.buffer.read(), options)
    files = _in_folder(Path(path)) if Path(path).is_dir() else [Path(path)]
    contents = [file.read_bytes() for file in files]
    if len(files) > 1:
        return _events(contents)
    found = _of(contents[0], options)
    if files[0] != Path(path):
        found.kind = f"{files[0].relative_to(path)}, {found.kind}"
    return found


def _in_folder(folder: Path) -> list[Path]:
    """The log in a run's folder: one file, or the event files of one run, oldest first."""
    for name in USUAL:
        if (folder / name).is_file():
            return [folder / name]
    if events := _files(folder.glob(EVENTS)):
        return events
    logs = _files(path for path in folder.iterdir() if path.name.endswith(ENDINGS))
    if len(logs) > 1:
        raise Unusable(f"holds several logs, {listed(path.name for path in logs)}: name one")
    runs = sorted({path.parent for path in _files(folder.rglob(EVENTS))})
    if len(runs) > 1 and not logs:
        names = listed(str(run.relative_to(folder)) for run in runs)
        raise Unusable(f"holds several runs, {names}: name one")
    found = logs or [path for run in runs for path in _files(run.glob(EVENTS))]
    if not found and (offline := sorted(folder.glob("*.wandb"))):
        raise Unusable(f"holds {offline[0].name!r}, {NO_TEXT[b':W&B']}")
    if not found:
        raise Unusable("holds no log: no " + ", ".join((*USUAL, *ENDINGS, "event file")))
    return found


def _files(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_file())


def _of(data: bytes, options: dict[str, Any]) -> Table:
    if data[:2] == b"\x1f\x8b":
        data, whole = _unpacked(data)
        found = _of(data, options)
        if not whole:
            found.notes.append("the compressed file is torn: what follows is not read")
        return found
    if data[:4] == b"PAR1":
        return _parquet(data)
    if b"brain.Event:" in data[:100]:
        return _events([data])
    for start, what in NO_TEXT.items():
        if data.startswith(start):
            raise Unusable(f"is {what}")
    head = data[:1000].decode(text.encoding(data), "replace")
    strange = sum(each == "\ufffd" or (each < " " and each not in "\t\r\n\x1b") for each in head)
    if strange > len(head) / 10:
        raise Unusable("is a binary file of a kind that is not known here")
    return text.table(data, **options)


def _unpacked(data: bytes) -> tuple[bytes, bool]:
    """What can be read of a gzip file, and whether that is all."""
    parts = []
    try:
        with gzip.open(io.BytesIO(data)) as file:
            while part := file.read1(1 << 20):
                parts.append(part)
    except (EOFError, OSError, zlib.error):
        return b"".join(parts), False
    return b"".join(parts), True


def _missing(kind: str, module: str) -> NoReturn:
    message = f"is {kind}, which is read with {module}: pip install 'jlar[logs]'"
    raise Unusable(message) from None


def _parquet(data: bytes) -> Table:
    try:
        import polars
    except ImportError:
        _missing("a Parquet file", "polars")
    try:
        frame = polars.read_parquet(io.BytesIO(data))
    except (Exception, polars.exceptions.PanicException) as error:
        first = str(error).splitlines()[:1]
        raise Unusable(f"is no Parquet file that polars can read: {first}") from None
    found = Table("Parquet")
    for start in range(0, len(frame), text.CHUNK):
        chunk = frame.slice(start, text.CHUNK)
        found.add({column.name: column.to_list() for column in chunk}, len(chunk))
    return found


def _events(contents: Iterable[bytes]) -> Table:
    """The scalars of TensorBoard's event files, written one after another."""
    try:
        from google.protobuf.message import DecodeError
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        _missing("a TensorBoard event file", "tensorboardX")
    found = Table("TensorBoard events")

    def rows(data: bytes) -> Iterator[dict[str, Any]]:
        at = 0
        while size := int.from_bytes(data[at : at + 8], "little"):
            record = data[at + 12 : at + 12 + size]  # between checksums of four bytes
            at += 16 + size
            try:
                event = Event.FromString(record) if at <= len(data) else None
            except DecodeError:
                event = None
            if event is None:
                found.notes.append("an event file is torn: what follows is not read")
                return
            for value in event.summary.value:
                if (scalar := _scalar(value)) is not None:
                    yield {value.tag: scalar, "step": event.step}

    for data in contents:
        found.add_rows(rows(data))
    return found


def _scalar(value: Any) -> float | None:
    if value.HasField("simple_value"):
        return value.simple_value
    kinds = {1: ("<f4", value.tensor.float_val), 2: ("<f8", value.tensor.double_val)}
    if not value.HasField("tensor") or value.tensor.dtype not in kinds:
        return None
    kind, listed_values = kinds[value.tensor.dtype]
    values = np.frombuffer(value.tensor.tensor_content, kind).tolist() or list(listed_values)
    return values[0] if len(values) == 1 else None
