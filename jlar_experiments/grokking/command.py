"""The command `jlar grok`."""

import argparse
import textwrap
from pathlib import Path
from typing import Any

from .. import report
from ..options import add_settings, duration, settings
from .config import GrokConfig
from .tasks import TASKS


def register(commands: Any) -> None:
    """Add `grok` to the commands."""
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
    add_settings(parser.add_argument_group("what is trained"), GrokConfig)
    folder = parser.add_argument_group("where it goes")
    folder.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder of the run [runs/<its settings>]"
    )
    again = folder.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="continue what is in the folder (the default)"
    )
    again.add_argument(
        "--fresh",
        action="store_true",
        help="begin again; what is in the folder moves to FOLDER/earlier",
    )
    folder.add_argument(
        "--checkpoint-seconds",
        type=duration,
        default=15.0,
        metavar="SECONDS",
        help="time between checkpoints; changes no number [15.0]",
    )


def grok(arguments: argparse.Namespace) -> int:
    """`jlar grok`: train, or continue, and report."""
    config = settings(arguments, GrokConfig)
    from .. import checkpoint
    from . import ensemble, study

    checkpoint.hush()
    folder = arguments.out or Path("runs") / config.name
    with study.opened(config, folder, fresh=arguments.fresh):
        if not ensemble.run(config, folder, checkpoint_seconds=arguments.checkpoint_seconds):
            print(f"{folder} is finished; drawing its report again")
        print(report.write(folder))
    return 0
