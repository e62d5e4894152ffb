"""What a path holds - a file of any kind, a run's folder, standard input - as a table."""

import gzip
import io
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import text, trackers
from .table import Table, Unusable, listed

EVENTS = "*tfevents*"
USUAL = ("metrics.jsonl", "metrics.csv", "trainer_state.json", "mlflow.db")
"""Ours, Lightning's, Hugging Face's, MLflow's."""
ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".csv.gz", ".jsonl.gz", ".wandb")


def table(path: Path | str, **options: Any) -> Table:
    """The table that a path holds; `options` are those of `text.table`.

    Raises:
        Unusable: it is of a kind that cannot be read, or that needs an extra.
        OSError: as reading raises it.
    """
    if str(path) == "-":
        return _of(sys.stdin.buffer.read(), options)
    path = Path(path)
    logs = _logs(path) if path.is_dir() else [path]
    if len(logs) > 1:
        return trackers.events(log.read_bytes() for log in logs)
    if logs[0].is_dir():
        found = trackers.mlflow(logs[0], options["growing"])
    else:
        found = _of(logs[0].read_bytes(), options)
    if logs[0] != path:
        found.kind = f"{logs[0].relative_to(path)}, {found.kind}"
    return found


def _logs(folder: Path) -> list[Path]:
    """The log of the run in a folder: a file, MLflow's metrics, or event files, oldest first."""
    if _of_mlflow(folder):
        return [folder]
    for name in USUAL:
        if (folder / name).is_file():
            return [folder / name]
    if events := _files(folder.glob(EVENTS)):
        return events
    logs = _files(path for path in folder.iterdir() if path.name.endswith(ENDINGS))
    logs += filter(_of_mlflow, folder.glob("metrics"))
    if len(logs) > 1:
        raise Unusable(f"holds several logs, {listed(path.name for path in logs)}: name one")
    if logs:
        return logs
    below = [path for pattern in (EVENTS, "*.wandb", "metrics") for path in folder.rglob(pattern)]
    runs = sorted({path.parent for path in below if path.is_file() or _of_mlflow(path)})
    runs = [run for run in runs if not run.is_symlink()]  # W&B's to the latest
    if len(runs) > 1:
        names = listed(str(run.relative_to(folder)) for run in runs)
        raise Unusable(f"holds several runs, {names}: name one")
    if not runs:
        raise Unusable(f"holds no log: no {', '.join((*USUAL, *ENDINGS))}, event file or metrics")
    return _logs(runs[0])


def _of_mlflow(folder: Path) -> bool:
    """Whether it holds the metrics of a run, and not those of a model that the run has logged."""
    name, run = folder.resolve().name, folder.resolve().parent
    return name == "metrics" and (run / "meta.yaml").is_file() and run.parent.name != "models"


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
        return trackers.parquet(data)
    if b"brain.Event:" in data[:100]:
        return trackers.events([data])
    if data[:4] == b":W&B":
        return trackers.wandb(data)
    if data.startswith(b"SQLite format 3"):
        return trackers.database(data)
    if data.startswith(b"PK\3\4"):
        raise Unusable("is a zip file, as spreadsheets are: export a CSV")
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
