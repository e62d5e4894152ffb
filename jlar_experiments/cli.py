"""The command `jlar`: each study registers its commands, and loads what it needs when called."""

import sys

from . import paper, report, watch
from .grokking import command as grokking
from .options import Parser
from .pretraining import command as pretraining

COMMANDS = (grokking, pretraining, paper, report, watch)  # modules with register(commands)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is the exit code."""
    parser = Parser(
        prog="jlar",
        description="Studies of the log-alignment ratio (LAR), arXiv 2605.28975.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each in COMMANDS:
        each.register(commands)
    chosen, unknown = parser.parse_known_args(arguments)
    if unknown:
        chosen.parser.error(f"unknown: {' '.join(unknown)}")
    return chosen.command(chosen)


if __name__ == "__main__":
    sys.exit(main())
