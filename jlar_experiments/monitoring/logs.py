"""Logs of anybody's runs: CSV and JSONL, W&B and TensorBoard exports, into columns of numbers."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

# What columns are called, compared in lower case; the last part of "run - lar" or "train/lar".
STEP = ("step", "_step", "global_step", "trainer/global_step", "iteration", "iter", "epoch")
LAR = ("lar", "value")  # value: the only series of a TensorBoard export
LOSS = ("train_loss", "train/loss", "training_loss", "loss")
DIMENSION = ("k_pred", "k", "effective_dimension")
BOUNDS = ("__min", "__max")  # that W&B exports beside each column


class Unusable(ValueError):
    """A log that nothing can be read from, and why."""


@dataclass(frozen=True)
class Log:
    """The columns of a log, of equal length, by increasing step; nan where a row has no value."""

    step: Float[np.ndarray, "rows"]
    lar: Float[np.ndarray, "rows"]
    train_loss: Float[np.ndarray, "rows"]
    k: Float[np.ndarray, "rows"]
    """Effective dimension, if logged: it tells the width."""
    unreadable: int
    """Lines that are no row of the log."""

    @property
    def width(self) -> int | None:
        """The base of the logarithm, where k = n^(2 (1 - LAR)) is logged as well."""
        use = np.isfinite(self.k) & (self.k > 1) & (np.abs(self.lar - 1) > 0.05)
        if not use.any():
            return None
        n = np.exp(np.log(self.k[use]) / (2 * (1 - self.lar[use])))
        return round(float(np.median(n))) if np.ptp(n) < 0.05 * np.median(n) else None


def read(
    path: Path,
    *,
    step: str | None = None,
    lar: str | None = None,
    train_loss: str | None = None,
    only: tuple[str, str] | None = None,
    growing: bool = False,
) -> Log:
    """The log at this path; columns that are not named are looked for under their usual names.

    Args:
        path: a file of comma-, semicolon- or tab-separated values with a header, of one JSON object
            per line, or of one JSON array of objects.
        step, lar, train_loss: names of the columns.
        only: (column, value): leave out rows with another value there.
        growing: a last line without its end is still being written, and no line yet.

    Raises:
        Unusable: no rows, no such column, or the rows of several runs in one file.
        OSError: as reading raises it.
    """
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if growing and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
    rows, unreadable = _rows(text)
    if not rows:
        raise Unusable(f"{path} holds no rows ({unreadable} unreadable lines)")
    there = list(dict.fromkeys(name for row in rows for name in row))
    if only is not None:
        _named(only[0], there, path)
        rows = [row for row in rows if _same(row.get(only[0]), only[1])]
        if not rows:
            raise Unusable(f"no row of {path} has {only[0]} = {only[1]}")
    seeds = {row["seed"] for row in rows if row.get("seed") not in (None, "")}
    if len(seeds) > 1:
        raise Unusable(f"{path} holds {len(seeds)} seeds: choose one with --only seed={min(seeds)}")
    chosen: dict[str, str | None] = {
        "step": _column(step, STEP, there, path, "--step-column"),
        "lar": _column(lar, LAR, there, path, "--lar-column"),
        "train_loss": _column(train_loss, LOSS, there, path, None),
        "k": _column(None, DIMENSION, there, path, None),
    }
    columns, bad = _numbers(rows, chosen)
    if not np.isfinite(columns["lar"]).any():
        raise Unusable(f"column {chosen['lar']!r} of {path} holds no number")
    order = np.argsort(columns["step"], kind="stable")  # of equal steps the first in the file leads
    columns = {key: column[order] for key, column in columns.items()}
    return Log(**columns, unreadable=unreadable + bad)


def names(path: Path) -> list[str]:
    """The columns of the log at this path."""
    rows, _ = _rows(path.read_text(encoding="utf-8-sig", errors="replace"))
    return list(dict.fromkeys(name for row in rows for name in row))


def _rows(text: str) -> tuple[list[dict[str, Any]], int]:
    start = text.lstrip()[:1]
    if start == "[":
        try:
            values = json.loads(text)
        except ValueError:
            return [], 1
        rows = [row for row in values if isinstance(row, dict)]
        return rows, len(values) - len(rows)
    lines = [line for line in text.splitlines() if line.strip()]
    if start == "{":
        rows = [row for row in map(_object, lines) if row is not None]
        return rows, len(lines) - len(rows)
    header = lines[0] if lines else ""
    delimiter = max(",;\t", key=header.count)
    records = list(csv.reader(lines, delimiter=delimiter))
    whole = [record for record in records[1:] if len(record) == len(records[0])]
    names = [name.strip() for name in records[0]] if records else []
    return [dict(zip(names, record, strict=True)) for record in whole], max(
        0, len(records) - 1 - len(whole)
    )


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _column(
    name: str | None, usual: tuple[str, ...], names: list[str], path: Path, option: str | None
) -> str | None:
    """The column meant; None if it is not named, not found, and has no option that must be met."""
    if name is not None:
        return _named(name, names, path)
    there = [each for each in names if not each.lower().endswith(BOUNDS)]
    for match in (str.lower, _last):
        for wanted in usual:
            found = [each for each in there if match(each) == wanted]
            if len(found) > 1 and option is not None:
                raise Unusable(f"{path} has several columns for {option}: {_list(found)}")
            if len(found) == 1:
                return found[0]
    if option is None:
        return None
    raise Unusable(f"{path} has no column {usual[0]!r}; it has {_list(names)}: name it by {option}")


def _last(name: str) -> str:
    return name.lower().replace(" - ", "/").split("/")[-1].strip()


def _named(name: str, names: list[str], path: Path) -> str:
    if name not in names:
        raise Unusable(f"{path} has no column {name!r}; it has {_list(names)}")
    return name


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")


def _same(value: Any, wanted: str) -> bool:
    try:
        return float(value) == float(wanted)
    except (TypeError, ValueError):
        return str(value) == wanted


def _numbers(
    rows: list[dict[str, Any]], chosen: dict[str, str | None]
) -> tuple[dict[str, Float[np.ndarray, "rows"]], int]:
    """The chosen columns, and how many rows have something there that is no number.

    Rows without a LAR do not count, but a loss from one of them is the loss of the next that has.
    """
    table, bad, loss, lar = [], 0, math.nan, chosen["lar"] or ""
    for row in rows:
        try:
            values = {key: _number(row.get(name or "")) for key, name in chosen.items()}
        except (TypeError, ValueError):
            bad += 1
            continue
        if not math.isnan(values["train_loss"]):
            loss = values["train_loss"]
        # A LAR that was logged as nan stays, so that it is counted; one not logged does not.
        if row.get(lar) not in (None, "") and not math.isnan(values["step"]):
            table.append([values["step"], values["lar"], loss, values["k"]])
    array = np.array(table, np.float64).reshape(-1, 4)
    return dict(zip(("step", "lar", "train_loss", "k"), array.T, strict=True)), bad


def _number(value: Any) -> float:
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    return float(value)
