"""The command `jlar report`: figures, tables and page of a run, from its files alone."""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

# By "study" in config.json; modules with write(folder), which returns the table as text.
STUDIES = {
    "grok": ".grokking.report",
    "paper grokking": ".grokking.results",
    "pretrain": ".pretraining.report",
}


def register(commands: Any) -> None:
    """Add `report` to the commands."""
    parser = commands.add_parser(
        "report",
        help="draw a run's report again, from its records",
        description="Draw the figures and report.html of a run, or of all runs of a study, again\n"
        "from the records in its folder. Nothing is trained, and the table is printed.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.set_defaults(command=report, parser=parser)


def report(arguments: argparse.Namespace) -> int:
    """`jlar report RUN`: draw the figures and the report from the records."""
    if study(arguments.run) is None or not any(arguments.run.rglob("metrics.jsonl")):
        arguments.parser.error(f"{arguments.run} holds no records of a run")
    print(write(arguments.run))
    return 0


def study(folder: Path) -> str | None:
    """The study that this folder is a run of; None if it is none."""
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return stored["study"] if stored["study"] in STUDIES else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(folder: Path) -> str:
    """Draw the figures and report.html of the run in this folder; returns the table as text."""
    module = importlib.import_module(STUDIES[study(folder) or ""], __package__)
    return module.write(folder)
