"""Tables out of text: separated values, JSON of any shape, and lines as trainers print them."""

import csv
import io
import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from .table import CHUNK, Table, Unusable, listed

csv.field_size_limit(2**31 - 1)  # fields of any length
LOOKAHEAD = 1000  # lines that one quoted field may have
BETWEEN = re.compile(r"[\s,\]]*")  # JSON values; the end of an array is of no interest
COLOURS = re.compile(r"\x1b\[[\d;]*m")
PAIR = re.compile(
    r"""((?:(?:lm|train|training|val|valid|validation|eval|evaluation|test|global)\ )?
        [a-z_][\w/.@-]*)["']?(?:\s*[:=]\s*|\ +)["']?
        ([-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d*)?(?:e[-+]?\d+)?(?<=[\d.])|nan\b|-?inf\b)""",
    re.IGNORECASE | re.VERBOSE,
)


def encoding(data: bytes) -> str:
    """UTF-16 by its mark or by every other byte being zero; UTF-8 otherwise."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    for name, zeros in (("utf-16-le", data[1:200:2]), ("utf-16-be", data[:200:2])):
        if len(zeros) > 1 and zeros.count(0) > 0.8 * len(zeros):
            return name
    return "utf-8-sig"


def table(data: bytes, *, lar: str | None, pattern: str | None, growing: bool) -> Table:
    """The table in a text; a last line of a growing one that has no end yet is left out."""

    def lines() -> Iterator[str]:
        text = io.TextIOWrapper(io.BytesIO(data), encoding(data), "replace")
        return (line for line in text if not growing or line.endswith("\n"))

    if pattern is not None:
        return Table("log lines").add_rows(_matches(lines(), pattern))
    head = next((line for line in lines() if _content(line)), "").lstrip()
    if head[:1] in ("{", "["):  # as some log lines begin
        text = io.TextIOWrapper(io.BytesIO(data), encoding(data), "replace").read()
        found = _json(text, text.find(head[0], max(text.find("\n" + head), 0)), growing)
        if found.rows:
            return found
    name = re.escape(lar or "") or r"(?:[\w/.-]*[/._-])?lar(?:[/._-][\w/.-]*)?"
    said = re.compile(rf"\b{name}[\"']?(?:\s*[:=]\s*| +)[-+]?[\d.]", re.IGNORECASE)
    if any(said.search(line) for line in islice(lines(), CHUNK)):
        return Table("log lines").add_rows(_pairs(lines()))
    return _separated(lines())


def _content(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#")


def _matches(lines: Iterable[str], pattern: str) -> Iterator[dict[str, Any]]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise Unusable(f"cannot be read by --pattern {pattern!r}: {error}") from None
    if not {"step", "lar"} <= set(compiled.groupindex):
        raise Unusable(f"--pattern {pattern!r} has no groups (?P<step>...) and (?P<lar>...)")
    return (found.groupdict() for line in lines if (found := compiled.search(line)))


def _pairs(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The numbers in each line by the words before them."""
    for line in lines:
        row = dict(PAIR.findall(COLOURS.sub("", line)))
        if len(row) > 1:
            yield row


def _json(text: str, at: int, growing: bool) -> Table:
    """One row per object, on a line or in an array; or one object of columns or with a table."""
    bad = Counter[str]()

    def values(at: int) -> Iterator[dict[str, Any]]:
        decode = json.JSONDecoder(strict=False).raw_decode
        while at < len(text):
            try:
                value, at = decode(text, at)
            except (ValueError, RecursionError):
                end = text.find("\n", at)
                if end < 0 and growing:
                    return  # the line is still being written
                value, at = None, len(text) if end < 0 else end
            if isinstance(value, dict):
                yield value
            else:
                bad["lines"] += 1
            at = BETWEEN.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]

    if text[at] == "[":
        at = BETWEEN.match(text, at + 1).end()  # pyright: ignore[reportOptionalMemberAccess]
    objects = values(at)
    first = list(islice(objects, 2))
    table = Table("JSON")
    if len(first) == 1 and not bad:
        _object(table, first[0])
    else:
        table.add_rows(map(_flat, first)).add_rows(map(_flat, objects))
    if bad["lines"]:
        table.notes.append(f"{bad['lines']} lines are no JSON object; they were left out")
    return table


def _object(table: Table, value: dict[str, Any]) -> None:
    """The table in a single object: a list of rows, lists of numbers, or one row."""
    rows = {n: v for n, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    if "log_history" in rows or len(rows) == 1:
        found = rows.get("log_history") or next(iter(rows.values()))
        table.add_rows(_flat(row) for row in found if isinstance(row, dict))
        return
    if rows:
        raise Unusable(f"it holds several tables, {listed(rows)}: put one in a file of its own")
    columns = _flat(value, lists=True)
    if value and all(isinstance(v, dict) and all(map(str.isdigit, v)) for v in value.values()):
        columns = {name: list(each.values()) for name, each in value.items()}  # by row number
    lists = {name: each for name, each in columns.items() if isinstance(each, list)}
    longest = max(map(len, lists.values()), default=0)
    if not longest:
        table.add_rows([columns])
        return
    short = [name for name, each in lists.items() if len(each) < longest]
    table.add({n: [*map(_plain, v)] for n, v in lists.items() if n not in short}, longest)
    if short:
        table.notes.append(f"shorter than the other columns and left out: {listed(short)}")


def _flat(row: dict[str, Any], *, lists: bool = False, depth: int = 20) -> dict[str, Any]:
    """Nested objects as dotted names; a list, unless it is asked for, is a cell without number."""
    if not any(isinstance(value, dict | list) for value in row.values()):
        return row
    flat = {}
    for name, value in row.items():
        if isinstance(value, dict) and depth:
            inner = _flat(value, lists=lists, depth=depth - 1)
            flat |= {f"{name}.{key}": each for key, each in inner.items()}
        else:
            flat[name] = value if lists else _plain(value)
    return flat


def _plain(cell: Any) -> Any:
    return "a list" if isinstance(cell, list) else "an object" if isinstance(cell, dict) else cell


def _separated(lines: Iterator[str]) -> Table:
    """Comma-, semicolon-, tab-, bar- or space-separated values under a header."""
    header, first = "", next(lines, "")
    while first and not _content(first):  # blank lines and comments; one may be the header
        header, first = first.lstrip("# ") if first.startswith("#") else "", next(lines, "")
    delimiter = max(",;\t|", key=first.count)
    delimiter = delimiter if delimiter in first else None
    width = len(_split(first, delimiter))
    if not header or len(_split(header, delimiter)) != width or not _numeric(first, delimiter):
        header, first = first, ""
    names = _unique(_split(header, delimiter))
    table, broken, count, chunk = Table("separated values"), 0, 0, []
    if header and _numeric(header, delimiter):
        raise Unusable("has no header: its first line holds numbers only; add one like step,lar")

    def keep() -> None:
        table.add(dict(zip(names, zip(*chunk, strict=True), strict=True)), len(chunk))
        chunk.clear()

    for fields in _records(_after(first, lines), delimiter, width):
        count += 1
        if count == 1 and len(fields) == len(names) + 1:
            names = ["", *names]  # row names, as R writes them
        if fields[0].strip() == names[0] != "":  # a restart wrote its header again, or another one
            keep() if chunk else None
            names = _unique(fields)
            continue
        if len(fields) > len(names) and any(field.strip() for field in fields[len(names) :]):
            broken += 1
            continue
        chunk.append((fields + [""] * (len(names) - len(fields)))[: len(names)])
        if len(chunk) == CHUNK:
            keep()
    keep() if chunk else None
    if broken:
        said = f"{broken} of {count} rows have more fields than the header ({len(names)})"
        if broken > count / 10:
            raise Unusable(f"cannot be read: {said}")
        table.notes.append(said + "; they were left out")
    return table


def _after(first: str, lines: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from lines


def _split(line: str, delimiter: str | None) -> list[str]:
    line = line.rstrip("\n")
    if delimiter is None:
        return re.split(r"\s+", line.strip())
    return next(csv.reader([line], delimiter=delimiter)) if '"' in line else line.split(delimiter)


def _numeric(line: str, delimiter: str | None) -> bool:
    return all(
        re.fullmatch(r"\s*[-+\d.,e]*\d[-+\d.,e]*\s*", each) for each in _split(line, delimiter)
    )


def _unique(names: list[str]) -> list[str]:
    """Names without blanks around them; of several that are equal, each with its number."""
    names = [name.strip() for name in names]
    count, seen = Counter(names), Counter()
    for at, name in enumerate(names):
        if count[name] > 1:
            seen[name] += 1
            names[at] = f"{name}#{seen[name]}"
    return names


def _records(lines: Iterator[str], delimiter: str | None, width: int) -> Iterator[list[str]]:
    """The fields of each record.

    A quote that is not closed, or only by making one field of what are rows by themselves, is a
    character like any other.
    """
    ahead: deque[str] = deque()
    while line := ahead.popleft() if ahead else next(lines, ""):
        if not _content(line):
            continue
        if '"' not in line or delimiter is None:
            yield _split(line.replace('"', ""), delimiter)
            continue
        taken, odd = [line], line.count('"') % 2
        while odd and len(taken) <= LOOKAHEAD:
            if not (more := ahead.popleft() if ahead else next(lines, "")):
                break
            taken.append(more)
            odd ^= more.count('"') % 2
        fields = _quoted("".join(taken), delimiter)
        if fields is None or any(len(each.split(delimiter)) == width for each in taken[1:]):
            ahead.extendleft(taken[:0:-1])
            fields = _quoted(line, delimiter) or [
                field.strip('" ') for field in line.rstrip("\n").split(delimiter)
            ]
        yield fields


def _quoted(text: str, delimiter: str) -> list[str] | None:
    """The fields of one record; None if its quotes are not those of separated values."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        [fields] = list(reader)
    except (csv.Error, ValueError):
        return None
    return fields
