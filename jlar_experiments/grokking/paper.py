"""The command `jlar paper grokking`: the runs of section 4, those that are left to do, and more."""

import argparse
import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import report
from ..errors import Locked
from ..options import add_settings, duration, settings
from .config import GrokConfig
from .plan import SETS, PaperConfig, folder_name

STUDY = "paper grokking"
Planned = tuple[GrokConfig, Path]


def register_paper(studies: Any) -> None:
    """Add `grokking` to the studies."""
    sets = "\n".join(f"  {name:7}{what}" for name, what in SETS.items())
    parser = studies.add_parser(
        "grokking",
        help="section 4: table 1, its figures, and past the paper",
        description=f"""\
Train the runs of the paper's section 4, or go on where an earlier call was
interrupted, and report on all that is in the folder: calls with other options,
and folders of runs copied from other machines, add up. Sets of runs:

{sets}""",
    )
    parser.set_defaults(command=grokking, parser=parser)
    add_settings(parser.add_argument_group("what is trained"), PaperConfig)
    folder = parser.add_argument_group("where it goes, and when")
    folder.add_argument(
        "--out",
        type=Path,
        default=Path("runs/paper-grokking"),
        metavar="FOLDER",
        help="folder of the runs [runs/paper-grokking]",
    )
    folder.add_argument(
        "--minutes",
        type=duration,
        default=math.inf,
        metavar="X",
        help="stop at the next log after so many minutes; the same command goes on",
    )
    folder.add_argument(
        "--checkpoint-seconds",
        type=duration,
        default=60.0,
        metavar="SECONDS",
        help="time between checkpoints; changes no number [60.0]",
    )


def grokking(arguments: argparse.Namespace) -> int:
    """Train what is left to do, and report."""
    paper = settings(arguments, PaperConfig)
    until = time.monotonic() + 60 * arguments.minutes
    from .. import folder, records

    folder.collection(arguments.out, STUDY, **records.environment())
    _train(paper, arguments.out, until, arguments.checkpoint_seconds)
    # A call whose time was up before its first log has nothing to draw.
    if any(any(arguments.out.glob(each)) for each in ("*/metrics.jsonl", "runs.jsonl.gz")):
        print(report.write(arguments.out))
    return 0


def _train(paper: PaperConfig, out: Path, until: float, checkpoint_seconds: float) -> None:
    """Every run that is not finished; one that is there and longer stays as long."""
    from .. import checkpoint
    from ..progress import say
    from . import ensemble, results, study

    checkpoint.hush()

    packed = results.packed(out)
    folders = [
        (each, out / name)
        for each in paper.runs()
        if not ((name := folder_name(each)) in packed and packed[name].ended(each))
    ]
    planned = [(study.longest(each, folder), folder) for each, folder in folders]
    groups = list(_groups(planned))
    for number, group in enumerate(groups, start=1):
        if time.monotonic() >= until:
            say("the time is up; the same command goes on")
            return
        say(f"{number} of {len(groups)}: {', '.join(folder.name for _, folder in group)}")
        with contextlib.ExitStack() as stack:
            own = []
            for config, folder in group:
                try:
                    stack.enter_context(study.opened(config, folder))
                    own.append((config, folder))
                except Locked as error:
                    say(f"{error}, and left to it")
            if own:
                ensemble.together(own, checkpoint_seconds=checkpoint_seconds, until=until)


def _groups(planned: Sequence[Planned]) -> Iterator[list[Planned]]:
    """Runs that train together; on a single CPU each alone: it costs the same and ends sooner."""
    import jax

    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        yield from ([each] for each in planned)
        return
    by_program: dict[GrokConfig, list[Planned]] = {}
    for config, folder in planned:
        by_program.setdefault(config.program, []).append((config, folder))
    yield from by_program.values()
