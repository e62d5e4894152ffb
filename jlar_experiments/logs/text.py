"""Tables out of text: JSON of any shape, lines as trainers print them, and separated values."""

import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

from . import separated
from .table import CHUNK, Table, Unusable, listed

BEFORE = re.compile(r"(?:#[^\n]*\n|\s)*\[?")  # the first JSON value: comments, an array's bracket
BETWEEN = re.compile(r"[\s,\]]*")
DEEPEST = 20  # objects in objects
COLOURS = re.compile(r"\x1b\[[\d;]*m")
PAIR = re.compile(  # a name and a number; some words before a name belong to it
    r"""(?<![\w/.@-])
        ((?:(?:lm|[Tt]rain(?:ing)?|[Vv]al(?:id(?:ation)?)?|[Ee]val(?:uation)?|[Tt]est|global)\ )?
        [A-Za-z_][\w/.@-]*)["']?(?:\s*[:=]\s*|\ +)["']?
        ([-+]?(?:\d[\d,]*\d|\d)?(?:\.\d*)?(?:[eE][-+]?\d+)?(?<=[\d.])|[Nn]a[Nn]\b|-?inf\b)""",
    re.VERBOSE,
)
PROGRESS = re.compile(r"(\d+)/\d+ \[")  # as tqdm writes it


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
    head = next(filter(separated.content, lines()), "").lstrip()
    if head.startswith(("{", "[")):  # as some log lines begin
        bad: list[int] = []
        if _whole(head):
            found = _json(_in_lines(lines(), bad), bad)
        else:
            head = ""  # which may be all of it
            whole = data.decode(encoding(data), "replace")
            start = next(BEFORE.finditer(whole)).end()
            found = _json(_objects(whole, bad, growing, start), bad)
        if found.rows:
            return found
    name = re.escape(lar) if lar else r"lar(?![a-z])[\w/.-]*"
    said = re.compile(rf"(?<![a-z]){name}[\"']?(?:\s*[:=]\s*| +)[\"']?[-+]?[\d.]", re.IGNORECASE)
    if any(said.search(line) for line in islice(lines(), CHUNK)):
        return Table("log lines").add_rows(_pairs(lines()))
    return separated.table(lines())


def _matches(lines: Iterable[str], pattern: str) -> Iterator[dict[str, Any]]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise Unusable(f"cannot be read by --pattern {pattern!r}: {error}") from None
    if not {"step", "lar"} <= set(compiled.groupindex):
        raise Unusable(f"needs groups (?P<step>...) and (?P<lar>...) in --pattern {pattern!r}")
    return (found.groupdict() for line in lines if (found := compiled.search(line)))


def _pairs(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The numbers in each line by the words before them."""
    for line in lines:
        row = dict(PAIR.findall(COLOURS.sub("", line) if "\x1b" in line else line))
        if "[" in line and (done := PROGRESS.search(line)):
            row.setdefault("step", done[1])
        if len(row) > 1:
            yield row


def _whole(line: str) -> bool:
    """Whether a line is one JSON object; a whole log in one list is not parsed for that."""
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json(objects: Iterator[dict[str, Any]], bad: list[int]) -> Table:
    """One row per object; or of a single one the columns or the table that it holds."""
    found, first = Table("JSON"), list(islice(objects, 2))
    if len(first) == 1 and not bad:
        _object(found, first[0])
    else:
        found.add_rows(map(flat, chain(first, objects)))
    if bad:
        found.notes.append(f"lines that are no JSON object, left out: {len(bad)}")
    return found


def _in_lines(lines: Iterator[str], bad: list[int]) -> Iterator[dict[str, Any]]:
    """The objects in lines of one each, many at once, or as they come where there are others."""
    while block := list(islice(lines, CHUNK)):
        try:
            values = json.loads(f"[{','.join(block)}]", strict=False)
        except (ValueError, RecursionError):
            values = []
        if len(values) == len(block) and set(map(type, values)) == {dict}:
            yield from values
            continue
        for line in block:
            yield from _objects(line.strip(), bad)


def _objects(
    text: str, bad: list[int], growing: bool = False, at: int = 0
) -> Iterator[dict[str, Any]]:
    """The objects in a text, one after another; where a line is something else goes to `bad`."""
    decode, first = json.JSONDecoder(strict=False).raw_decode, at
    while at < len(text):
        try:
            value, at = decode(text, at)
        except (ValueError, RecursionError):
            end = text.find("\n", at)
            if end < 0 and growing:
                break  # the line is still being written
            value, at = None, len(text) if end < 0 else end
        if isinstance(value, dict):
            yield value
        elif text[first] != "#":
            bad.append(at)
        at = next(BETWEEN.finditer(text, at)).end()


def _object(table: Table, value: dict[str, Any]) -> None:
    """The table in a single object: a list of rows, lists of numbers, or one row."""
    rows = {n: v for n, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    if len(rows) > 1 and "log_history" not in rows:
        raise Unusable(f"holds several tables, {listed(rows)}: put one in a file of its own")
    if rows:
        found = rows.get("log_history") or next(iter(rows.values()))
        table.add_rows(flat(row) for row in found if isinstance(row, dict))
        return
    columns = flat(value, lists=True)
    if value and all(isinstance(v, dict) and all(map(str.isdigit, v)) for v in value.values()):
        columns = {name: list(each.values()) for name, each in value.items()}  # by row number
    lists = {name: each for name, each in columns.items() if isinstance(each, list)}
    longest = max(map(len, lists.values()), default=0)
    if not longest:
        table.add_rows([columns])
        return
    whole = {name: [*map(_cell, v)] for name, v in lists.items() if len(v) == longest}
    table.add(whole, longest)
    if short := lists.keys() - whole.keys():
        table.notes.append(f"shorter than the other columns, left out: {listed(sorted(short))}")


def flat(row: dict[str, Any], *, lists: bool = False, depth: int = DEEPEST) -> dict[str, Any]:
    """Nested objects as dotted names; a list, unless it is asked for, is a cell without number."""
    kinds = set(map(type, row.values()))
    if dict not in kinds and list not in kinds:
        return row
    found = {}
    for name, value in row.items():
        if isinstance(value, dict) and depth:
            inner = flat(value, lists=lists, depth=depth - 1)
            found |= {f"{name}.{key}": each for key, each in inner.items()}
        else:
            found[name] = value if lists else _cell(value)
    return found


def _cell(value: Any) -> Any:
    return (
        "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else value
    )
