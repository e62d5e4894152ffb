"""A table of named columns, put together from rows of any kind, at eight bytes a number."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress, islice
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

CHUNK = 20_000  # rows that are put into columns at once
MISSING = {"", "na", "n/a", "#n/a", "<na>", "none", "null", "nil", "-", "--"}
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
DECIMALS = re.compile(r"\s*[-+]?[\d.]*,\d+(e[-+]?\d+)?\s*", re.I)
GAP = re.compile(r"(?<=\d)[\s'\u2019](?=\d{3})")  # between thousands
PROGRESS = re.compile(r"([\d.,]+)\s*/\s*[\d.,]+")  # 50/10000

Chunk = tuple[Any, Any]  # rows; their cells: a list, or an array where all are numbers


class Unusable(ValueError):
    """A log that nothing can be read from, and why, in one line."""


def listed(names: Iterable[str]) -> str:
    """The first twenty names, quoted; what is no letter or sign is escaped."""
    first = [repr(name) for name in islice(names, 21)]
    return ", ".join(first[:20]) + (", ..." if len(first) > 20 else "")


def number(cell: Any, decimal_comma: bool = False) -> float:
    """The number in a cell: nan if it is empty, inf if it is a nan or infinite.

    Raises:
        ValueError: there is something else.
    """
    if isinstance(cell, str):
        text = cell.strip()
        if text.lower() in MISSING:
            return np.nan
        if progress := PROGRESS.fullmatch(text):
            text = progress[1]
        text = GAP.sub("", text)
        if "," in text:
            if not decimal_comma and not THOUSANDS.fullmatch(text):
                raise ValueError
            text = text.replace(".", "").replace(",", "." if decimal_comma else "")
    else:
        text = cell
    try:
        value = float(text)
    except (TypeError, OverflowError):
        raise ValueError from None
    return value if np.isfinite(value) else np.inf


class Column:
    """The cells of one name: numbers where all of a chunk are, and as they were written where not.

    A number that is not finite is kept as inf, an empty cell as nan.
    """

    def __init__(self, chunks: Iterable[Chunk] = (), where: Bool[np.ndarray, "rows"] | None = None):
        self._chunks = list(chunks)
        self._where = where  # the rows that count, if not all

    def add(self, rows: Sequence[int] | np.ndarray, cells: Sequence[Any]) -> None:
        """The cells of these rows."""
        given = [cell is not None and cell != "" for cell in cells]
        try:
            numbers = np.array([float(cell) for cell in compress(cells, given)])
        except (TypeError, ValueError, OverflowError):
            self._chunks.append((rows, cells))
            return
        packed = np.full(len(cells), np.nan)
        packed[given] = np.where(np.isfinite(numbers), numbers, np.inf)
        self._chunks.append((rows, packed))

    def part(self, where: Bool[np.ndarray, "rows"]) -> "Column":
        """The cells of the rows where this holds."""
        return Column(self._chunks, where)

    def _texts(self) -> Iterator[tuple[int, Any]]:
        """Row and cell of the chunks that are not all numbers."""
        for rows, cells in self._chunks:
            if not isinstance(cells, np.ndarray):
                for row, cell in zip(rows, cells, strict=True):
                    if cell is not None and (self._where is None or self._where[row]):
                        yield row, cell

    @property
    def decimal_comma(self) -> bool:
        """Whether a comma stands before decimals somewhere, and not between thousands."""
        return any(
            "," in cell and DECIMALS.fullmatch(cell) and not THOUSANDS.fullmatch(cell.strip())
            for _, cell in self._texts()
            if isinstance(cell, str)
        )

    def numbers(
        self, rows: int, decimal_comma: bool | None = None
    ) -> tuple[Float[np.ndarray, "rows"], dict[int, Any]]:
        """A number for each row, nan where there is none, and the cells that cannot be read.

        Whether a comma stands before decimals is told by this column, unless another has.
        """
        values, strange = np.full(rows, np.nan), {}
        decimal_comma = self.decimal_comma if decimal_comma is None else decimal_comma
        for at, cells in self._chunks:
            if isinstance(cells, np.ndarray):
                values[at] = cells
        if self._where is not None:
            values[~self._where] = np.nan
        for row, cell in self._texts():
            try:
                values[row] = number(cell, decimal_comma)
            except ValueError:
                strange[row] = cell
        return values, strange

    def texts(self, rows: int) -> list[str]:
        """What each row has, as text: whole numbers without a point, and nothing as ''."""
        values = [""] * rows
        for at, cells in self._chunks:
            if isinstance(cells, np.ndarray):
                for row, cell in zip(at, cells.tolist(), strict=True):
                    values[row] = "" if cell != cell else f"{cell:.12g}"
        for row, cell in self._texts():
            values[row] = str(cell).strip()
        return values


class Table:
    """Columns by name, all of the same number of rows, and what was left out in reading them."""

    def __init__(self, kind: str):
        self.kind = kind
        self.rows = 0
        self.columns: dict[str, Column] = {}
        self.notes: list[str] = []

    def add(self, cells: Mapping[str, Sequence[Any]], count: int) -> None:
        """The next rows, column by column."""
        for name, each in cells.items():
            self.columns.setdefault(name, Column()).add(range(self.rows, self.rows + count), each)
        self.rows += count

    def add_rows(self, rows: Iterable[dict[str, Any]]) -> "Table":
        """The next rows, each with the names it has; returns the table."""
        rows = iter(rows)
        while chunk := list(islice(rows, CHUNK)):
            names = list(chunk[0])
            if all(list(row) == names for row in chunk):
                columns = zip(*map(dict.values, chunk), strict=True)
                self.add(dict(zip(names, columns, strict=True)), len(chunk))
                continue
            found = defaultdict(lambda: ([], []))
            for at, row in enumerate(chunk, self.rows):
                for name, cell in row.items():
                    rows_of, cells = found[name]
                    rows_of.append(at)
                    cells.append(cell)
            whole = range(self.rows, self.rows + len(chunk))
            for name, (at, cells) in found.items():
                at = whole if len(at) == len(chunk) else np.array(at)
                self.columns.setdefault(name, Column()).add(at, cells)
            self.rows += len(chunk)
        return self
