"""The command `jlar report`: figures, tables and page of a run, from its files alone."""

import argparse
import importlib
import traceback
from pathlib import Path
from typing import Any

from . import errors
from .errors import Refusal

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
    print(write(arguments.run))
    return 0


def study(folder: Path) -> str | None:
    """The study that this folder is a run of; None if it is none."""
    from .folder import read

    try:
        stored = read(folder)
    except (Refusal, OSError):
        return None
    return stored["study"] if stored and stored["study"] in STUDIES else None


def write(folder: Path) -> str:
    """Draw the figures and report.html of the run in this folder; returns the table as text.

    Raises:
        Refusal: the folder holds no records of a run, or such as nothing can be drawn of.
    """
    from .folder import read

    name = (read(folder) or {}).get("study")
    if name not in STUDIES or not any(folder.glob("metrics.jsonl")) | any(
        folder.glob("*/metrics.jsonl")
    ):
        raise Refusal(f"{folder} holds no records of a run")
    module = importlib.import_module(STUDIES[name], __package__)
    try:
        return module.write(folder)
    except Refusal:
        raise
    except Exception as error:  # of records that somebody else has written
        if errors.trouble(error):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(at.filename).name} line {at.lineno}"
        raise Refusal(f"{folder} cannot be drawn ({errors.line(error)}, {where})") from error
