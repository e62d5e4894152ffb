"""The page report.html, which needs no other file; and tables as plain text."""

import base64
import html
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import drafts, panels, records
from .errors import Refusal

Table = Sequence[Sequence[str]]  # rows of cells, the header first

MARK = '<meta name="generator" content="jlar">'
RELOAD = 10  # seconds
WIDTH = 80  # characters of a line of text
SHORT, LONG = 12, 20  # characters of a cell on one line, of a word that is not broken
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
{mark}
<meta name="viewport" content="width=device-width, initial-scale=1">
{reload}<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #222; --faint: #666; --line: #ddd; --paper: #fff; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #ddd; --faint: #999; --line: #444; --paper: #181a1c; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto; padding: 1rem;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }}
h1 {{ font-size: 1.3rem; line-height: 1.35; }}
h2 {{ font-size: 1.15rem; margin-top: 2.5rem; }}
h3 {{ font-size: 1rem; margin: 0; }}
p, ul, figcaption {{ max-width: 48rem; }}
figure {{ margin: 0; min-width: 0; }}
figure img {{ max-width: 100%; background: #fff; }}
figcaption, .note {{ color: var(--faint); font-size: .9rem; }}
.panels {{ display: grid; gap: 2rem; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); }}
.plot {{ height: 320px; }}
.runs {{ list-style: none; padding: 0; }}
.swatch {{ display: inline-block; width: .8em; height: .8em; border-radius: 50%; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }}
td, th {{ padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }}
.words {{ overflow-wrap: normal; }}
td.short {{ white-space: nowrap; }}
td:first-child, th:first-child {{ text-align: left; padding-left: 0; }}
.wide {{ overflow-x: auto; }}
@media (max-width: 60rem) {{  /* each row is a block of lines: a column's name, the value */
  table, tbody, tr, td {{ display: block; }}
  thead {{ display: none; }}
  tr {{ border-bottom: 1px solid var(--line); padding: .4rem 0; }}
  td {{ display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: 0; }}
  td::before {{ content: attr(data-name); color: var(--faint); text-align: left; }}
  td:first-child {{ font-weight: bold; }}
}}
</style>
<h1>{verdict}</h1>
{body}
{script}
</html>
"""


@dataclass
class Report:
    """What a page says: its first line, the blocks of HTML below it, the plots in them.

    `text` is what the command prints; `finished` is false while a run may go on.
    """

    title: str
    verdict: str
    text: str
    finished: bool = True
    blocks: list[str] = field(default_factory=list)
    plots: dict[str, Any] = field(default_factory=dict)

    def add(self, *blocks: str) -> None:
        """Put these blocks of HTML at the end."""
        self.blocks += blocks

    def draw(self, shown: Sequence[panels.Panel]) -> None:
        """Put these panels at the end, side by side where there is room."""
        block, plots = panels.grid(shown, f"panels{len(self.blocks)}")
        self.blocks.append(block)
        self.plots |= plots

    def write(self, path: Path, *, reload: bool = False) -> None:
        """Put the page there, whole or not at all.

        Args:
            path: of the page; what is there is replaced.
            reload: the page loads itself anew every `RELOAD` seconds.
        """
        again = f'<meta http-equiv="refresh" content="{RELOAD}">\n' if reload else ""
        records.write_whole(
            path,
            PAGE.format(
                mark=MARK,
                reload=again,
                title=html.escape(self.title),
                verdict=html.escape(self.verdict),
                body="\n".join(self.blocks),
                script=panels.script(self.plots) if self.plots else "",
            ),
        )


def is_report(path: Path) -> bool:
    """Whether this file is a page written by jlar."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return MARK in file.read(500)


@contextmanager
def figures(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """A folder for drawings, files with these names, which then take their places in figures/."""
    with drafts.folder(folder, "tmp", names) as draft:
        yield draft
        place = folder / "figures"
        place.mkdir(exist_ok=True)
        if place.is_symlink():
            raise Refusal(f"{place} is a link; move it out of there")
        for name in names:
            if (draft / name).exists():
                (draft / name).replace(place / name)


def heading(words: str) -> str:
    """A section's heading as HTML."""
    return f"<h2>{html.escape(words)}</h2>"


def paragraph(words: str) -> str:
    """A paragraph as HTML."""
    return f"<p>{html.escape(words)}</p>"


def note(words: str) -> str:
    """A paragraph in small type as HTML."""
    return f'<p class="note">{html.escape(words)}</p>'


def run_list(lines: Sequence[tuple[str, str, str]]) -> str:
    """The runs as HTML: the colour of each, its name, and what is said of it."""
    items = "\n".join(
        f'<li><span class="swatch" style="background: {colour}"></span> '
        f"<b>{html.escape(name)}</b>: {html.escape(words)}</li>"
        for colour, name, words in lines
    )
    return f'<ul class="runs">\n{items}\n</ul>'


def figure(image: Path, caption: str) -> str:
    """An SVG with its caption as HTML; the image is in the page itself."""
    data = base64.b64encode(image.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{html.escape(image.stem)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def table(rows: Table) -> str:
    """The table as HTML."""
    header, *lines = rows
    head = "".join(f"<th{_breaks(name)}>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(map(_cell, header, row, range(len(row)))) + "</tr>\n" for row in lines
    )
    whole = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f'<div class="wide">{whole}</div>'


def settings(runs: Sequence[Mapping[str, object]]) -> str:
    """What was set in each run as a table in HTML; where runs differ, all values in their order."""
    rows = [["setting", "value"]]
    for name in dict.fromkeys(name for run in runs for name in run):
        values = dict.fromkeys(str(run.get(name, "-")) for run in runs)
        rows.append([name, ", ".join(values)])
    return table(rows)


def _cell(name: str, words: str, column: int) -> str:
    short = _breaks(words) if column else ""  # the first column gives way where there is no room
    return f'<td data-name="{html.escape(name)}"{short}>{html.escape(words)}</td>'


def _breaks(words: str) -> str:
    """Short cells stay on one line, words whole; only what is longer than a word is broken."""
    if len(words) <= SHORT:
        return ' class="short words"'
    return ' class="words"' if max(map(len, words.split())) <= LONG else ""


def text(rows: Table, below: Sequence[int] = ()) -> str:
    """The table as lines of text; columns that find no room go below, after the first again.

    Args:
        rows: of the table.
        below: numbers of columns that begin a new group below in any case.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    groups, taken = [[0]], widths[0]
    for column in range(1, len(widths)):
        full = taken + 2 + widths[column] > WIDTH and len(groups[-1]) > 1
        if full or column in below:
            groups.append([0])
            taken = widths[0]
        groups[-1].append(column)
        taken += 2 + widths[column]
    return "\n\n".join("\n".join(_line(row, group, widths) for row in rows) for group in groups)


def _line(row: Sequence[str], columns: Sequence[int], widths: Sequence[int]) -> str:
    first, *others = columns
    cells = [row[first].ljust(widths[first]), *(row[i].rjust(widths[i]) for i in others)]
    return "  ".join(cells).rstrip()


def wrapped(words: str) -> str:
    """A paragraph as lines of text."""
    return textwrap.fill(words, WIDTH, break_long_words=False, break_on_hyphens=False)
