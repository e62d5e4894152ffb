"""The command `jlar`: options out of the dataclasses of config.py, errors in one line."""

import argparse
import dataclasses
import sys
import textwrap
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from .config import GrokConfig
from .grokking.tasks import TASKS

METAVARS = {int: "N", float: "X", str: "NAME"}


class Parser(argparse.ArgumentParser):
    """argparse without the usage text before an error, and without abbreviated options."""

    def __init__(self, **options: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        one_line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {one_line} (see {self.prog} --help)\n")


def _grok_parser(commands: Any) -> None:
    tasks = ", ".join(f"{each.number} {each.name}" for each in TASKS)
    description = f"""\
Train small transformers on a binary operation until they grok, and watch the
log-alignment ratio (LAR) of the training data announce it.

{textwrap.fill("Tasks: " + tasks + ".", 78)}
Tasks 1 to 9 are modulo p; 4 is x/y for odd y, x-y for even y; S5: permutations."""
    parser = commands.add_parser(
        "grok", help="train until grokking, and report", description=description
    )
    parser.set_defaults(command=grok, parser=parser)
    settings = parser.add_argument_group("what is trained")
    for name, annotation in get_type_hints(GrokConfig, include_extras=True).items():
        kind, explanation = get_args(annotation)
        default, choices = getattr(GrokConfig, name), get_args(kind)
        settings.add_argument(
            "--" + name.replace("_", "-"),
            type=str if choices else kind,
            default=default,
            choices=choices or None,
            metavar=None if choices else METAVARS[kind],
            help=f"{explanation} [{default}]",
        )
    folder = parser.add_argument_group("where it goes")
    folder.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder of the run [runs/<its settings>]"
    )
    again = folder.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="continue what is in the folder (the default)"
    )
    again.add_argument("--fresh", action="store_true", help="throw away what is in the folder")
    folder.add_argument(
        "--checkpoint-seconds",
        type=duration,
        default=15.0,
        metavar="SECONDS",
        help="time between checkpoints; changes no number [15.0]",
    )


def duration(text: str) -> float:
    """Seconds, zero or more."""
    if not float(text) >= 0:
        raise ValueError
    return float(text)


def grok(arguments: argparse.Namespace) -> int:
    """`jlar grok`: train, or continue, and report."""
    parser: Parser = arguments.parser
    names = [each.name for each in dataclasses.fields(GrokConfig)]
    try:
        config = GrokConfig(**{name: getattr(arguments, name) for name in names})
    except ValueError as error:
        parser.error(_as_options(str(error), names))
    from .grokking import study

    folder = arguments.out or Path("runs") / config.name
    try:
        study.prepare(config, folder, fresh=arguments.fresh)
    except (study.Refused, OSError) as error:
        parser.error(str(error))
    try:
        trained = study.run(config, folder, checkpoint_seconds=arguments.checkpoint_seconds)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command continues {folder}", file=sys.stderr)
        return 130
    if not trained:
        print(f"{folder} is finished; drawing its report again")
    return _report(folder)


def _as_options(message: str, names: list[str]) -> str:
    """The message with the settings written as on the command line."""
    for name in names:
        if message.startswith(name + " "):
            return "--" + name.replace("_", "-") + message[len(name) :]
    return message


def report(arguments: argparse.Namespace) -> int:
    """`jlar report RUN`: draw the figures and the report from the records."""
    if not (arguments.run / "metrics.jsonl").exists():
        arguments.parser.error(f"{arguments.run} holds no records of a run")
    return _report(arguments.run)


def _report(folder: Path) -> int:
    from . import report

    print(report.write(folder))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is the exit code."""
    parser = Parser(
        prog="jlar",
        description="Studies of the log-alignment ratio (LAR), arXiv 2605.28975.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _grok_parser(commands)
    drawing = commands.add_parser("report", help="draw a run's report again, from its records")
    drawing.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    drawing.set_defaults(command=report, parser=drawing)
    chosen, unknown = parser.parse_known_args(arguments)
    if unknown:
        chosen.parser.error(f"unknown: {' '.join(unknown)}")
    return chosen.command(chosen)


if __name__ == "__main__":
    sys.exit(main())
