"""The command `jlar paper`: all runs behind a section of the paper, and its figures and tables."""

from typing import Any

from .grokking import paper as grokking
from .pretraining import command as pretraining

STUDIES = (grokking, pretraining)  # modules with register_paper(studies)


def register(commands: Any) -> None:
    """Add `paper` to the commands."""
    parser = commands.add_parser(
        "paper", help="every run behind a section of the paper, and one report of them"
    )
    studies = parser.add_subparsers(title="studies", metavar="STUDY", required=True)
    for each in STUDIES:
        each.register_paper(studies)
