"""Separated values: a header, then fields, with what people and crashed writers do to them."""

import csv
import io
import re
from collections import Counter, deque
from collections.abc import Iterator
from itertools import chain

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
    found, broken, count, chunk = Table("separated values"), 0, 0, []

    def keep() -> None:
        if chunk:
            found.add(dict(zip(names, zip(*chunk, strict=True), strict=True)), len(chunk))
            chunk.clear()

    for fields in _records(chain(first, lines), delimiter, len(names)):
        count += 1
        if fields[0] == names[0] != "":
            keep()
            names = _unique(fields)
        elif len(fields) == len(names):
            chunk.append(fields)
        elif any(field.strip() for field in fields[len(names) :]):
            broken += 1
        else:
            chunk.append((fields + [""] * len(names))[: len(names)])
        if len(chunk) == CHUNK:
            keep()
    keep()
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
    fields = _quoted(line, delimiter) if delimiter and '"' in line else None
    return fields or [field.strip('" ') for field in line.strip(" ").split(delimiter)]


def _records(lines: Iterator[str], delimiter: str | None, width: int) -> Iterator[list[str]]:
    """The fields of each record, which goes over several lines if a field with quotes does.

    Not if a quote is never closed, or only by making one field of what are rows by themselves.
    """
    ahead: deque[str] = deque()
    while line := ahead.popleft() if ahead else next(lines, ""):
        if not content(line):
            continue
        if '"' not in line:
            yield line.rstrip("\n").split(delimiter)
            continue
        taken, odd = [line], line.count('"') % 2
        while delimiter and odd and len(taken) <= LOOKAHEAD:
            if not (more := ahead.popleft() if ahead else next(lines, "")):
                break
            taken.append(more)
            odd ^= more.count('"') % 2
        fields = _quoted("".join(taken), delimiter) if delimiter and len(taken) > 1 else None
        if fields is None or any(len(each.split(delimiter)) == width for each in taken[1:]):
            ahead.extendleft(taken[:0:-1])
            fields = _split(line, delimiter)
        yield fields


def _quoted(text: str, delimiter: str) -> list[str] | None:
    """The fields of one record; None if its quotes are not those of separated values."""
    try:
        [fields] = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    except (csv.Error, ValueError):
        return None
    return fields
