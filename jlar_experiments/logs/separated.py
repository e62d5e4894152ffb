"""Separated values: a header, then fields, with what people and crashed writers do to them."""

import csv
import re
from collections import Counter, deque
from collections.abc import Iterator
from itertools import chain, islice

from .table import CHUNK, Table, Unusable

csv.field_size_limit(2**31 - 1)  # fields of any length
LOOKAHEAD = 1000  # lines that one quoted field may have
NUMBER = re.compile(r"\s*[-+.]?\d[-+\d.,e]*\s*")


def content(line: str) -> bool:
    """Whether a line is neither blank nor a comment."""
    return line[0] != "#" and not line.isspace()


def table(lines: Iterator[str]) -> Table:
    """Values between commas, semicolons, tabs, bars or blanks; by the names of the header.

    A row with fewer fields has nothing in the last columns, one with more is left out. Where a row
    begins with the name of the first column it is a new header.
    """
    header, first = _header(lines)
    delimiter = max(",;\t|", key=header.count)
    delimiter = delimiter if delimiter in header else None
    names = _unique(_split(header, delimiter))
    if header and all(map(NUMBER.fullmatch, names)):
        raise Unusable("has no header: its first line holds numbers only; add one like step,lar")
    found, broken, count = Table("separated values"), 0, 0
    records = _records(chain(first, lines), delimiter, len(names))
    while rows := list(islice(records, CHUNK)):
        count += len(rows)
        if set(map(len, rows)) == {len(names)} and names[0] not in {row[0] for row in rows}:
            found.add(dict(zip(names, zip(*rows, strict=True), strict=True)), len(rows))
            continue
        uneven = []
        for fields in rows:
            if fields[0] == names[0] != "":
                names = _unique(fields)
            elif any(field.strip() for field in fields[len(names) :]):
                broken += 1
            else:
                uneven.append(dict(zip(names, fields, strict=False)))
        found.add_rows(uneven)
    if broken > count / 10:
        raise Unusable(
            f"has {broken} of {count} rows with more fields than its header: quote text with commas"
        )
    if broken:
        found.notes.append(f"rows with more fields than the header, left out: {broken}")
    return found


def _header(lines: Iterator[str]) -> tuple[str, list[str]]:
    """The header, and the first row if that was read to know: a comment may be the header."""
    comment = ""
    for line in lines:
        if content(line) and not line.startswith("sep="):  # as Excel writes it
            delimiter = max(",;\t| ", key=line.count)
            fields, names = line.split(delimiter), comment.lstrip("# ").split(delimiter)
            if len(fields) == len(names) > 1 and all(map(NUMBER.fullmatch, fields)):
                return comment.lstrip("# "), [line]
            return line, []
        comment = line if line.startswith("#") else ""
    return "", []


def _unique(names: list[str]) -> list[str]:
    """Names without blanks around them; of several that are equal, each with its number."""
    names = [name.strip() for name in names]
    count, seen = Counter(names), Counter()
    for at, name in enumerate(names):
        if count[name] > 1:
            seen[name] += 1
            names[at] = f"{name}#{seen[name]}"
    return names


def _split(line: str, delimiter: str | None) -> list[str]:
    """The fields of a line; a quote that closes nothing is left out."""
    line = line.rstrip("\n")
    fields = _quoted([line], delimiter) if delimiter and '"' in line else None
    return fields or [field.strip('" ') for field in line.strip(" ").split(delimiter)]


def _records(lines: Iterator[str], delimiter: str | None, width: int) -> Iterator[list[str]]:
    """The fields of each record, which goes over several lines if a field with quotes does.

    Not if a quote is never closed, or only by making one field of what are rows by themselves.
    """
    for line in lines:
        if line[0] == "#" or line.isspace():
            continue
        if '"' not in line:
            yield line.rstrip("\n").split(delimiter)
            continue
        left = deque([line])
        while left:
            taken = [left.popleft()]
            odd = taken[0].count('"') % 2 if delimiter else 0
            while odd and len(taken) <= LOOKAHEAD:
                if not (more := left.popleft() if left else next(lines, "")):
                    break
                taken.append(more)
                odd ^= more.count('"') % 2
            fields = _quoted(taken, delimiter) if len(taken) > 1 and delimiter else None
            if fields is None or any(len(each.split(delimiter)) == width for each in taken[1:]):
                left.extendleft(taken[:0:-1])
                fields = _split(taken[0], delimiter) if content(taken[0]) else None
            if fields:
                yield fields


def _quoted(lines: list[str], delimiter: str) -> list[str] | None:
    """The fields of one record; None if its quotes are not those of separated values."""
    try:
        [fields] = csv.reader(lines, delimiter=delimiter, strict=True)
    except (csv.Error, ValueError):
        return None
    return fields
