"""Figures, table and page of a run of `jlar grok`, from its files alone: nothing here trains."""

from pathlib import Path

from .. import page
from . import analysis
from .figures import draw, title


def write(folder: Path) -> str:
    """Draw the figures and report.html of the run in this folder; returns the table as text."""
    run = analysis.read(folder)
    with page.figures(folder) as drafts:
        figures = draw(run, drafts)
    source, table = analysis.summary(run)
    note = f"The columns on the right are the paper's mean (range) over its points: {source}."
    described = {**run.environment.pop("versions"), **run.environment}
    settings = [["setting", "value"]]
    settings += [[name, str(value)] for name, value in {**vars(run.config), **described}.items()]
    what = "The log-alignment ratio (LAR) of the unembedding over the whole training set"
    blocks = [page.paragraph(f"{what}, n = {run.config.width}."), page.table(table)]
    blocks += [page.note(note), *(page.figure(*each) for each in figures.items())]
    blocks += [page.heading("Settings"), page.table(settings)]
    if heard := analysis.heard(run):
        blocks.insert(2, page.paragraph(f"The monitor, from LAR and the training loss: {heard}."))
    path = page.write(folder, f"jlar grok: {title(run.config)}", blocks)
    return f"{page.text(table, bar=6)}\n{note}\nWritten to {folder}; open {path}"
