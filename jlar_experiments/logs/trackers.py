"""Tables out of what trackers write that is no text: Parquet, TensorBoard, W&B, MLflow."""

import contextlib
import io
import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .table import CHUNK, Table, Unusable
from .text import flat

BLOCK = 32768  # bytes that W&B divides its file into
HISTORY = {  # of W&B's messages, the fields that lead to what was logged: number, name, message
    "Record": [(2, "history", "History")],
    "History": [(1, "item", "Item")],
    "Item": [(1, "key", None), (2, "nested_key", None), (16, "value_json", None)],
}


# What is Unusable is told after the path, which log.py puts before it.
def _missing(kind: str, module: str) -> NoReturn:
    message = f"is {kind}, which is read with {module}: pip install 'jlar[logs]'"
    raise Unusable(message) from None


def parquet(data: bytes) -> Table:
    """The table of a Parquet file."""
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
    for start in range(0, len(frame), CHUNK):
        chunk = frame.slice(start, CHUNK)
        found.add({column.name: column.to_list() for column in chunk}, len(chunk))
    return found


def events(contents: Iterable[bytes]) -> Table:
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
    # TensorFlow's numbers of float and double.
    kinds = {1: ("<f4", value.tensor.float_val), 2: ("<f8", value.tensor.double_val)}
    if not value.HasField("tensor") or value.tensor.dtype not in kinds:
        return None
    kind, listed_values = kinds[value.tensor.dtype]
    values = np.frombuffer(value.tensor.tensor_content, kind).tolist() or list(listed_values)
    return values[0] if len(values) == 1 else None


def wandb(data: bytes) -> Table:
    """What a run has logged, of the file that W&B writes on its machine.

    W&B has no reader in Python: the records lie in blocks, as in LevelDB's logs, and are protobuf.
    """
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
    except ImportError:
        _missing("a W&B run file", "protobuf")
    file = descriptor_pb2.FileDescriptorProto(name="history", syntax="proto3")
    for name, fields in HISTORY.items():
        kind = file.message_type.add(name=name)
        # Each may be repeated (label 3), and is a message (type 11) or a text (type 9).
        for number, field, of in fields:
            kind.field.add(name=field, number=number, label=3, type=11 if of else 9, type_name=of)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    record: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName("Record"))
    found = Table("W&B run file")

    def rows() -> Iterator[dict[str, Any]]:
        try:
            for content in _records(data):
                for history in record.FromString(content).history:
                    names = [".".join([*item.key, *item.nested_key]) for item in history.item]
                    values = [json.loads(item.value_json[-1]) for item in history.item]
                    yield flat(dict(zip(names, values, strict=True)))
        except (message.DecodeError, ValueError, IndexError, RecursionError):
            found.notes.append("the W&B run file is torn: what follows is not read")

    return found.add_rows(rows())


def _records(data: bytes) -> Iterator[bytes]:
    """The records in the blocks after W&B's mark of seven bytes.

    Raises:
        ValueError: the last record is not whole.
    """
    at, parts = 7, b""
    while at < len(data):
        left = BLOCK - at % BLOCK
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6 : at + 7]
        if left < 7 or kind == b"\0":  # a block is filled with zeros
            at += left
            continue
        parts += data[at + 7 : at + 7 + size]  # after the checksum, the size and the kind
        at += 7 + size
        if at > len(data):
            raise ValueError
        if kind in b"\1\4":  # a whole record, or the last part of one
            yield parts
            parts = b""
    if parts:
        raise ValueError


def mlflow(metrics: Path, growing: bool) -> Table:
    """The metrics of an MLflow run: a file for each, with lines of time, value and step.

    Of one that is growing a last line without an end is left out.
    """

    def rows() -> Iterator[dict[str, Any]]:
        for file in sorted(path for path in metrics.rglob("*") if path.is_file()):
            name = file.relative_to(metrics).as_posix()
            for line in file.read_text("utf-8", "replace").splitlines(keepends=True):
                if line.endswith("\n") or not growing:
                    _, value, step, *_ = [*line.split(), "", "", ""]  # a torn line has fewer
                    yield {"metric": name, "value": value, "step": step}

    return Table("MLflow metrics").add_rows(rows())


def database(data: bytes) -> Table:
    """The metrics of all runs in MLflow's default store, an SQLite database."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        try:
            connection.deserialize(data)
            rows = connection.execute(
                "SELECT run_uuid, key, CASE WHEN is_nan THEN NULL ELSE value END, step FROM metrics"
            ).fetchall()
        except sqlite3.Error as error:
            message = f"is an SQLite database, but none of MLflow's ({error}): export a CSV of it"
            raise Unusable(message) from None
    names = ("run_uuid", "metric", "value", "step")
    return Table("MLflow database").add_rows(dict(zip(names, row, strict=True)) for row in rows)
