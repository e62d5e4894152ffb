"""The page report.html: headings, tables and figures; and tables as plain text."""

import html
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import records
from .errors import Refusal

Table = Sequence[Sequence[str]]  # rows of cells, the header first

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }}
td:first-child, th:first-child {{ text-align: left; }}
figure {{ margin: 2.5rem 0; }}
figure img {{ max-width: 100%; }}
figcaption, .note {{ color: #555; font-size: .9rem; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def write(folder: Path, title: str, blocks: Sequence[str]) -> Path:
    """Put report.html into the folder: the title, then the blocks of HTML, one after another."""
    path = folder / "report.html"
    records.write_whole(path, PAGE.format(title=html.escape(title), body="\n".join(blocks)))
    return path


@contextmanager
def figures(folder: Path) -> Iterator[Path]:
    """An empty folder for drawings; when the block ends, each takes its place in figures/."""
    with tempfile.TemporaryDirectory(suffix=records.DRAFT, dir=folder) as drafts:
        yield Path(drafts)
        place = folder / "figures"
        place.mkdir(exist_ok=True)
        if place.is_symlink():
            raise Refusal(f"{place} is a link; move it out of there")
        for each in sorted(Path(drafts).iterdir()):
            each.replace(place / each.name)


def heading(words: str) -> str:
    """A section's heading as HTML."""
    return f"<h2>{html.escape(words)}</h2>"


def paragraph(words: str) -> str:
    """A paragraph as HTML."""
    return f"<p>{html.escape(words)}</p>"


def note(words: str) -> str:
    """A paragraph in small type as HTML."""
    return f'<p class="note">{html.escape(words)}</p>'


def figure(name: str, caption: str) -> str:
    """figures/<name>.svg with its caption as HTML."""
    return (
        f'<figure><img src="figures/{name}.svg" alt="{name}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def table(rows: Table) -> str:
    """The table as HTML."""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    lines[0] = lines[0].replace("td>", "th>")
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def text(rows: Table, bar: int = 0) -> str:
    """The table as lines of text, with a bar before the column of this number, if any."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        if bar:
            cells.insert(bar, "|")
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
