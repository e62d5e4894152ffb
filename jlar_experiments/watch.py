"""The command `jlar watch`: what LAR says of a log, anybody's, finished or growing."""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from .options import Parser, printable

POLL = 1.0  # seconds between looks at a growing log

DESCRIPTION = """\
Say what the log-alignment ratio (LAR) says of a training run, from its log alone:
alarm since step N, no alarm, or that it cannot be told, and why.

LOG has a step and a LAR, and the training loss if there is one, in a form that a
tracker or a trainer writes: separated values; JSON, as lines, an array, columns or a
trainer_state.json; log lines with names and numbers; all these also as .gz; Parquet,
TensorBoard event files and W&B's .wandb (pip install 'jlar[logs]'); a run's folder,
also of W&B or MLflow; - for standard input. Columns are found by their usual names;
which were read, and what was left out, is said.

An alarm is a sign of overfitting, and says what LAR did and since when. On small models
it is no better than the same alarm on the training loss, and worse without a baseline,
since LAR may decline there without overfitting. It is a sum, over doublings of the
step, of what is beyond the noise. The noise is that of the log's points (default); for
small models, whose seeds differ by more, give two baselines or more, or the step of the
second epoch. Grokking, which is told too (with --n), is good news and no alarm."""

EPILOG = """\
exit code: 0 no alarm, 3 alarm, 4 cannot tell, 2 the log or an option cannot be used

  jlar watch run.csv --baseline long-run.csv --n 4096
  jlar watch runs/now/metrics.jsonl --follow || stop-the-run
  jlar watch wandb-export.csv --lar-column "my-run - lar" --plot lar.png"""


def register(commands: Any) -> None:
    """Add `watch` to the commands."""
    parser = commands.add_parser(
        "watch",
        help="say whether the LAR in a run's log is a sign of overfitting",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.set_defaults(command=watch, parser=parser)
    parser.add_argument("log", type=Path, metavar="LOG", help="the run's log, or its folder")
    parser.add_argument(
        "--baseline",
        type=Path,
        action="append",
        metavar="LOG",
        help="log of a run to compare with, that does not overfit; give several to learn the noise",
    )
    parser.add_argument(
        "--second-epoch",
        type=float,
        metavar="STEP",
        help="step at which the data begins to repeat (tokens of the data set over tokens per "
        "step): the noise is learnt before it",
    )
    parser.add_argument(
        "--n",
        type=int,
        metavar="WIDTH",
        help="input width of the layer, for grokking [from LAR and k, if logged]",
    )
    columns = parser.add_argument_group("columns, where they have other names")
    columns.add_argument("--step-column", metavar="NAME", help="step [global_step, step, ...]")
    columns.add_argument("--lar-column", metavar="NAME", help="LAR [lar, RUN - lar, Value, ...]")
    columns.add_argument("--loss-column", metavar="NAME", help="training loss [train_loss, ...]")
    columns.add_argument(
        "--baseline-column", metavar="NAME", help="LAR in the baseline's log [as in LOG]"
    )
    columns.add_argument(
        "--only",
        type=_condition,
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="leave out all other rows; may be given again",
    )
    columns.add_argument(
        "--pattern",
        metavar="REGEX",
        help="of log lines: a regular expression with groups (?P<step>...), (?P<lar>...), "
        "(?P<loss>...)",
    )
    output = parser.add_argument_group("what to do")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--plot", type=Path, metavar="PNG", help="draw LAR and the evidence")
    output.add_argument(
        "--follow",
        action="store_true",
        help="go on while the log grows, until an alarm (exit code 3) or Ctrl-C; it may be missing "
        "or unreadable for a while",
    )


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not COLUMN=VALUE")
    return column, value


def watch(arguments: argparse.Namespace) -> int:
    """`jlar watch`: read, judge, say."""
    from . import logs

    parser: Parser = arguments.parser
    if arguments.n is not None and arguments.n < 2:
        parser.error(f"--n is the input width of the layer and at least 2; got {arguments.n}")
    if arguments.second_epoch is not None and not arguments.second_epoch > 0:
        parser.error(f"--second-epoch is a step above 0; got {arguments.second_epoch}")
    if arguments.follow and str(arguments.log) == "-":
        parser.error("--follow needs a file: standard input is read to its end")
    try:
        found = _follow(arguments) if arguments.follow else _once(arguments)
    except (logs.Unusable, OSError) as error:
        parser.error(str(error))
    return {"no alarm": 0, "alarm": 3, "cannot tell": 4}[found["verdict"]]


def _once(arguments: argparse.Namespace) -> dict[str, Any]:
    log, baseline = _read(arguments), _baseline(arguments)
    found = _judged(arguments, log, baseline)
    _say(arguments, found)
    return found


def _follow(arguments: argparse.Namespace) -> dict[str, Any]:
    """Judge the whole log again whenever it has changed: no state but the file, so none to lose.

    A log that cannot be read now may be in the next moment: it is missing, has just begun, or is
    being written anew. Why not is said, and waited for.
    """
    from .logs import Unusable

    baseline, seen, found, said = _baseline(arguments), None, None, None
    while not (found and found["rang"]):
        try:
            if (now := _state(arguments.log)) == seen:
                time.sleep(POLL)
                continue
            seen = now
            try:
                found = _judged(arguments, _read(arguments), baseline)
                says, more = found["says"], f"step {found['step']}: {found['says']}, "
                more += f"LAR {found['lar']:.3f}"
            except (Unusable, OSError) as error:
                says = more = f"waiting: {error}"
            if not arguments.json and says != said:
                said = says
                print(printable(more), file=sys.stderr)
        except KeyboardInterrupt:
            break
    if found is None:
        raise Unusable(said or f"{arguments.log} was not read")
    _say(arguments, found)
    return found


def _state(log: Path) -> list[Any]:
    """What changes when a file or a folder is written to."""
    paths = [log, *log.rglob("*")] if log.is_dir() else [log]
    with contextlib.suppress(OSError):
        each = [path.stat() for path in paths]
        return [(at.st_ino, at.st_size, at.st_mtime_ns) for at in each]
    return ["missing"]


def _read(arguments: argparse.Namespace) -> Any:
    from . import logs

    return logs.read(arguments.log, growing=arguments.follow, **_columns(arguments))


def _columns(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "step": arguments.step_column,
        "lar": arguments.lar_column,
        "loss": arguments.loss_column,
        "only": arguments.only,
        "pattern": arguments.pattern,
    }


def _baseline(arguments: argparse.Namespace) -> Any:
    """The baseline; its columns are those named if it has them, and the usual ones if not."""
    if arguments.baseline is None:
        return None
    from . import logs

    options, optional = _columns(arguments), {"step", "lar", "loss", "only", "pattern"}
    if arguments.baseline_column is None:
        for path in arguments.baseline:
            if path.exists() and arguments.log.exists() and path.samefile(arguments.log):
                raise logs.Unusable(f"--baseline {path} is the log itself: name another run's")
    else:
        options["lar"] = arguments.baseline_column
        optional.remove("lar")
    return logs.baseline(arguments.baseline, optional=optional, **options)


def _judged(arguments: argparse.Namespace, log: Any, baseline: Any) -> dict[str, Any]:
    from jlar.monitor import Monitor

    from .monitoring.verdict import thinned, verdict, watched

    log, rows = thinned(log), len(log.step)
    monitor = Monitor.init(n=arguments.n or log.n, second_epoch=arguments.second_epoch)
    monitor, points = watched(monitor, log, baseline)
    found = verdict(monitor, points, log, baseline)
    if arguments.plot is not None:
        from .monitoring.figure import draw

        draw(arguments.plot, arguments.log.name, log, baseline, points, found)
    fewer = [f"judged at {len(log.step)} of them"] if len(log.step) < rows else []
    return found | {"log": str(arguments.log), "notes": [*log.notes, *fewer]}


def _say(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    from .monitoring.verdict import paragraph

    if arguments.json:
        print(json.dumps(found))
    else:
        print(printable(paragraph(found)))
        notes = [*found["notes"]]
        if arguments.baseline:
            notes.append(f"compared with {', '.join(map(str, arguments.baseline))}")
        print(printable(f"{found['log']} was {'; '.join(notes)}."))
