"""Figures, table and page of a run, from its files alone: nothing here trains."""

import html
from pathlib import Path

from . import records
from .grokking import analysis
from .grokking.figures import draw, title

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
<p>The log-alignment ratio (LAR) of the unembedding over the whole training set, n = {width}.</p>
{table}
<p class="note">{note}</p>
{figures}
<h2>Settings</h2>
{settings}
</html>
"""


def write(folder: Path) -> str:
    """Draw the figures and report.html of the run in this folder; returns the table as text."""
    run = analysis.read(folder)
    (folder / "figures").mkdir(exist_ok=True)
    blocks = []
    for name, caption in draw(run, folder / "figures").items():
        blocks.append(
            f'<figure><img src="figures/{name}.svg" alt="{name}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    source, table = analysis.summary(run)
    note = f"The columns on the right are the paper's mean (range) over its points: {source}."
    described = {**run.environment.pop("versions"), **run.environment}
    settings = [["setting", "value"], *([k, str(v)] for k, v in vars(run.config).items())]
    settings += [[name, str(value)] for name, value in described.items()]
    page = PAGE.format(
        title=html.escape(f"jlar grok: {title(run.config)}"),
        width=run.config.width,
        table=_html(table),
        note=html.escape(note),
        figures="\n".join(blocks),
        settings=_html(settings),
    )
    records.write_whole(folder / "report.html", page)
    return f"{_text(table)}\n{note}\nWritten to {folder}; open {folder / 'report.html'}"


def _html(table: list[list[str]]) -> str:
    rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table]
    rows[0] = rows[0].replace("td>", "th>")
    return "<table>" + "".join(f"<tr>{row}</tr>\n" for row in rows) + "</table>"


def _text(table: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ours, paper = cells[:5], cells[5:]
        lines.append(f"{row[0]:{widths[0]}}  {'  '.join(ours)}  |  {'  '.join(paper)}")
    return "\n".join(lines)
