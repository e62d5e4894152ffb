"""The command `jlar watch`: what LAR says of a log, anybody's, finished or growing."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from .options import Parser

POLL = 1.0  # seconds between looks at a growing log

DESCRIPTION = """\
Say what the log-alignment ratio (LAR) says of a training run, from its log alone:
rising, settled, declining, or deviating from a baseline since step N.

LOG is CSV or JSONL, one row per logged step, with columns for the step and for LAR
(and for the training loss, if there is one). The names that jlar, W&B and
TensorBoard give to them in what they export are found without being named.

An alarm is a sign of overfitting:
  deviation     LAR is below the baseline's at the same step
  matched_loss  LAR is below the baseline's at the same training loss
  decline       LAR falls faster, after its peak, than 3B runs that do not overfit;
                small models may do so without overfitting: give them a baseline
Each has to exceed its threshold at two consecutive points; the thresholds are
calibrated and grow with the noise of the log. The signal `grokking` (the effective
dimension falls after memorisation; needs --n) is good news and no alarm."""

EPILOG = """\
exit code: 0 no alarm, 3 alarm, 2 the log or an option cannot be used

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
    parser.add_argument("log", type=Path, metavar="LOG", help="the run's log: CSV or JSONL")
    parser.add_argument("--baseline", type=Path, metavar="LOG", help="log of a run to compare with")
    parser.add_argument(
        "--n",
        type=int,
        metavar="WIDTH",
        help="input width of the layer, for grokking [from LAR and k, if logged]",
    )
    columns = parser.add_argument_group("columns, where they have other names")
    columns.add_argument("--step-column", metavar="NAME", help="step [step, Step, _step, ...]")
    columns.add_argument("--lar-column", metavar="NAME", help="LAR [lar, RUN - lar, Value]")
    columns.add_argument("--loss-column", metavar="NAME", help="training loss [train_loss, ...]")
    columns.add_argument(
        "--baseline-column", metavar="NAME", help="LAR in the baseline's log [as in LOG]"
    )
    columns.add_argument(
        "--only", type=_condition, metavar="COLUMN=VALUE", help="leave out all other rows"
    )
    output = parser.add_argument_group("what to do")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--plot", type=Path, metavar="PNG", help="draw LAR, deviation and slope")
    output.add_argument(
        "--follow",
        action="store_true",
        help="go on while the log grows, until an alarm (exit code 3) or Ctrl-C",
    )


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not COLUMN=VALUE")
    return column, value


def watch(arguments: argparse.Namespace) -> int:
    """`jlar watch`: read, judge, say."""
    from .monitoring import logs

    parser: Parser = arguments.parser
    if arguments.n is not None and arguments.n < 2:
        parser.error(f"--n is the input width of the layer and at least 2; got {arguments.n}")
    try:
        found = _follow(arguments) if arguments.follow else _once(arguments)
    except (logs.Unusable, OSError) as error:
        parser.error(str(error))
    return 3 if found["alarm"] else 0


def _once(arguments: argparse.Namespace) -> dict[str, Any]:
    log, baseline = _read(arguments), _baseline(arguments)
    found = _judged(arguments, log, baseline)
    _say(arguments, found)
    return found


def _follow(arguments: argparse.Namespace) -> dict[str, Any]:
    """Judge the whole log again whenever it has grown: no state but the file, so none to lose."""
    from .monitoring.logs import Unusable

    baseline, size, found, said = _baseline(arguments), -1, None, None
    while not (found and found["alarm"]):
        try:
            if (now := arguments.log.stat().st_size) != size:
                size = now
                try:
                    found = _judged(arguments, _read(arguments), baseline)
                except Unusable:
                    if found is not None or b"\n" in arguments.log.read_bytes()[:-1]:
                        raise  # not merely a log that has just begun
                    continue
                if not arguments.json and found["says"] != said:
                    said = found["says"]
                    print(f"step {found['step']}: {said}, LAR {found['lar']:.3f}", file=sys.stderr)
                continue
            time.sleep(POLL)
        except KeyboardInterrupt:
            break
    if found is None:
        raise Unusable(f"{arguments.log} holds no rows yet")
    _say(arguments, found)
    return found


def _read(arguments: argparse.Namespace) -> Any:
    from .monitoring import logs

    return logs.read(
        arguments.log,
        step=arguments.step_column,
        lar=arguments.lar_column,
        train_loss=arguments.loss_column,
        only=arguments.only,
        growing=arguments.follow,
    )


def _baseline(arguments: argparse.Namespace) -> Any:
    """The baseline; its columns are those named if it has them, and the usual ones if not."""
    if arguments.baseline is None:
        return None
    import numpy as np

    import jlar

    from .monitoring import logs

    wanted = {
        "step": arguments.step_column,
        "lar": arguments.baseline_column or arguments.lar_column,
        "train_loss": arguments.loss_column,
    }
    there = logs.names(arguments.baseline)
    if arguments.baseline_column is not None:
        there.append(arguments.baseline_column)  # asked for: if it is missing, reading says so
    named: dict[str, Any] = {
        column: name if name in there else None for column, name in wanted.items()
    }
    only = arguments.only if arguments.only and arguments.only[0] in there else None
    log = logs.read(arguments.baseline, only=only, **named)
    loss = log.train_loss if np.isfinite(log.train_loss).any() else None
    try:
        return jlar.Baseline.from_points(log.step, log.lar, loss)
    except ValueError as error:
        raise logs.Unusable(f"{arguments.baseline}: {error}") from None


def _judged(arguments: argparse.Namespace, log: Any, baseline: Any) -> dict[str, Any]:
    import jlar

    from .monitoring.verdict import verdict, watched

    monitor = jlar.Monitor.init(n=arguments.n or log.width)
    monitor, points = watched(monitor, log, baseline)
    found = verdict(monitor, log, baseline)
    if arguments.plot is not None:
        from .monitoring.figure import draw

        draw(arguments.plot, arguments.log.name, log, points, found)
    return found


def _say(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    from .monitoring.verdict import paragraph

    print(json.dumps({"log": str(arguments.log)} | found) if arguments.json else paragraph(found))
