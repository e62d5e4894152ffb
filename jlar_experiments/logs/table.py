"""A table of named columns, put together from rows of any kind, at eight bytes a number."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress, islice
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ..errors import Refusal

CHUNK = 20_000  # rows that are put into columns at once
MISSING = {"", "na", "n/a", "#n/a", "<na>", "none", "null", "nil", "-", "--"}
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
DECIMALS = re.compile(r"\s*[-+]?[\d.]*,\d+(e[-+]?\d+)?\s*", re.IGNORECASE)
GAP = re.compile(r"(?<=\d)[\s'\u2019](?=\d{3})")  # between thousands
PROGRESS = re.compile(r"([\d.,]+)\s*/\s*[\d.,]+")  # 50/10000


class Unusable(Refusal):
    """A log that nothing can be read from, and why, in one line."""


def listed(names: Iterable[str]) -> str:
    """The first twenty names, quoted; what is no letter or sign is escaped."""
    first = [repr(name) for name in islice(names, 21)]
    return ", ".join(first[:20]) + (", ..." if len(first) > 20 else "")


def number(cell: Any, decimal_comma: bool) -> float:
    """The number in a cell: nan if it is empty, inf if it is a nan or infinite.

    Raises:
        ValueError: there is something else.
    """
    if isinstance(cell, str):
        cell = cell.strip()
        if cell.lower() in MISSING:
            return np.nan
        if progress := PROGRESS.fullmatch(cell):
            cell = progress[1]
        cell = GAP.sub("", cell)
        if "," in cell:
            if not decimal_comma and not THOUSANDS.fullmatch(cell):
                raise ValueError
            cell = (
                cell.replace(".", "").replace(",", ".") if decimal_comma else cell.replace(",", "")
            )
    try:
        value = float(cell)
    except (TypeError, OverflowError):
        raise ValueError from None
    return value if np.isfinite(value) else np.inf


class Column:
    """The cells of one name: numbers where all of a chunk are, and as they were written where not.

    A number that is not finite is kept as inf, an empty cell as nan.
    """

    def __init__(self):
        self._chunks: list[tuple[Any, Any]] = []  # rows; their cells, as a list or an array
        self._where: np.ndarray | None = None  # the rows that count, if not all

    def add(self, rows: Sequence[int] | np.ndarray, cells: Sequence[Any]) -> None:
        """The cells of these rows."""
        packed, given = np.full(len(cells), np.nan), [True] * len(cells)
        if "" in cells or None in cells:
            given = [cell is not None and cell != "" for cell in cells]
        try:
            numbers = [*map(float, compress(cells, given))]
        except (TypeError, ValueError, OverflowError):
            self._chunks.append((rows, cells))
            return
        packed[given] = np.nan_to_num(numbers, nan=np.inf, neginf=np.inf, posinf=np.inf)
        self._chunks.append((rows, packed))

    def part(self, where: Bool[np.ndarray, "rows"]) -> "Column":
        """The cells of the rows where this holds."""
        part = Column()
        part._chunks, part._where = self._chunks, where
        return part

    def packed(self, rows: int) -> Float[np.ndarray, "rows"]:
        """The numbers of the chunks that hold nothing else, nan in other rows."""
        values = np.full(rows, np.nan)
        for at, cells in self._chunks:
            if isinstance(cells, np.ndarray):
                values[at] = cells
        return values if self._where is None else np.where(self._where, values, np.nan)

    def others(self) -> Iterator[tuple[int, Any]]:
        """Row and cell of the other chunks."""
        for rows, cells in self._chunks:
            if not isinstance(cells, np.ndarray):
                for row, cell in zip(rows, cells, strict=True):
                    if cell is not None and (self._where is None or self._where[row]):
                        yield row, cell

    @property
    def decimal_comma(self) -> bool:
        """Whether a comma stands before decimals somewhere, and not between thousands."""
        texts = (cell for _, cell in self.others() if isinstance(cell, str) and "," in cell)
        return any(DECIMALS.fullmatch(t) and not THOUSANDS.fullmatch(t.strip()) for t in texts)


class Table:
    """Columns by name, all of the same number of rows, and what was left out in reading them."""

    def __init__(self, kind: str):
        self.kind = kind
        self.rows = 0
        self.columns: dict[str, Column] = {}
        self.notes: list[str] = []
        self.use: np.ndarray | None = None  # the rows that were asked for, if not all
        self.decimal_comma = False

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
                    found[name][0].append(at)
                    found[name][1].append(cell)
            for name, (at, cells) in found.items():
                self.columns.setdefault(name, Column()).add(np.array(at), cells)
            self.rows += len(chunk)
        return self

    def named(self, name: str) -> Column:
        """The column of this name.

        Raises:
            Unusable: there is none.
        """
        if name not in self.columns:
            raise Unusable(f"has no column {name!r}; it has {listed(self.columns)}")
        return self.columns[name]

    def read(self, name: str) -> tuple[Float[np.ndarray, "rows"], dict[int, Any]]:
        """A number for each row, nan where there is none, and the cells that cannot be read."""
        column, strange = self.named(name), {}
        values, decimal_comma = column.packed(self.rows), self.decimal_comma or column.decimal_comma
        for row, cell in column.others():
            try:
                values[row] = number(cell, decimal_comma)
            except ValueError:
                if self.use is None or self.use[row]:
                    strange[row] = cell
        return values if self.use is None else np.where(self.use, values, np.nan), strange

    def numbers(self, name: str) -> Float[np.ndarray, "rows"]:
        """A number for each row, nan where there is none."""
        return self.read(name)[0]

    def texts(self, name: str) -> list[str]:
        """What each row has, as text: whole numbers without a point, and nothing as ''."""
        column = self.named(name)
        texts = ["" if x != x else f"{x:.12g}" for x in column.packed(self.rows).tolist()]
        for row, cell in column.others():
            texts[row] = str(cell).strip()
        return texts
