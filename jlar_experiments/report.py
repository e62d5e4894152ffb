"""The command `jlar report`: the page of one run or several, from their files alone."""

import argparse
import importlib
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import errors
from .errors import Refusal

# By "study" in config.json; modules with report(folders), which returns a page.Report.
STUDIES = {
    "grok": ".grokking.report",
    "paper grokking": ".grokking.results",
    "pretrain": ".pretraining.report",
}
POLL = 2.0  # seconds between looks at the records of a run that goes on


def register(commands: Any) -> None:
    """Add `report` to the commands."""
    parser = commands.add_parser(
        "report",
        help="write a run's report again, or one of several runs",
        description="Write report.html from the records in the folders of runs: one file that can\n"
        "be mailed, with the verdict first. Several runs, or the folder of a study, are\n"
        "compared in the same panels. Nothing is trained, and the table is printed.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page [RUN/report.html; of several runs: report.html beside the first]",
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="write it anew while the run goes on, and let the page reload itself, until the run "
        "has finished or Ctrl-C",
    )
    parser.set_defaults(command=report, parser=parser)


def report(arguments: argparse.Namespace) -> int:
    """`jlar report RUN [RUN ...]`: write the report from the records."""
    if arguments.follow:
        _follow(arguments.runs, arguments.out)
    print(write(*arguments.runs, out=arguments.out))
    return 0


def _follow(folders: Sequence[Path], out: Path | None) -> None:
    """Write the page whenever the records have grown, until the runs have finished."""
    from .progress import say

    seen = None
    try:
        while True:
            now = [path.stat().st_mtime_ns for each in folders for path in each.rglob("*.jsonl")]
            if now != seen:
                seen, made, path = now, *_made(folders, out)
                if made.finished:
                    return
                made.write(path, reload=True)
                say(f"{made.verdict}; open {path}")
            time.sleep(POLL)
    except KeyboardInterrupt:
        return


def study(folder: Path) -> str | None:
    """The study that this folder is a run of; None if it is none."""
    from .folder import read

    try:
        stored = read(folder)
    except (Refusal, OSError):
        return None
    return stored["study"] if stored and stored["study"] in STUDIES else None


def names(folders: Sequence[Path]) -> list[str]:
    """What runs are called beside each other: their folders' names, or paths where two agree."""
    short = [folder.resolve().name for folder in folders]
    return [
        name if short.count(name) == 1 else str(folder)
        for name, folder in zip(short, folders, strict=True)
    ]


def write(*folders: Path, out: Path | None = None) -> str:
    """Write the page of the runs in these folders; returns what the command prints.

    Raises:
        Refusal: a folder holds no records of a run, or such as nothing can be drawn of.
    """
    made, path = _made(folders, out)
    made.write(path)
    return f"{made.text}\nWritten to {path}"


def _made(folders: Sequence[Path], out: Path | None) -> tuple[Any, Path]:
    """The report and where it belongs."""
    studies = {_study(folder): folder for folder in folders}
    if len(studies) > 1:
        (one, here), (other, there), *_ = studies.items()
        raise Refusal(
            f"{here} is of `jlar {one}`, {there} of `jlar {other}`: report on each by itself"
        )
    [name] = studies
    path = _place(folders, out)
    module = importlib.import_module(STUDIES[name], __package__)
    try:
        return module.report(list(folders)), path
    except Refusal:
        raise
    except Exception as error:  # of records that somebody else has written
        if errors.trouble(error) or isinstance(error, ImportError):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(at.filename).name} line {at.lineno}"
        raise Refusal(f"{folders[0]} cannot be drawn ({errors.line(error)}, {where})") from error


def _place(folders: Sequence[Path], out: Path | None) -> Path:
    """Where the page belongs; `Refusal` if what is there outside a run's folder is not jlar's."""
    from . import page, records

    if out is None and len(folders) == 1:
        return folders[0] / "report.html"
    path = out or folders[0].resolve().parent / "report.html"
    if records.regular(path) and not page.is_report(path):
        raise Refusal(f"{path} is not a report of jlar's; choose another with --out")
    if not path.parent.is_dir():
        raise Refusal(f"there is no folder {path.parent} for the report; choose another with --out")
    return path


def _study(folder: Path) -> str:
    from .folder import read

    name = (read(folder) or {}).get("study")
    recorded = ("metrics.jsonl", "*/metrics.jsonl", "runs.jsonl.gz")
    if name not in STUDIES or not any(any(folder.glob(each)) for each in recorded):
        raise Refusal(f"{folder} holds no records of a run")
    return name
