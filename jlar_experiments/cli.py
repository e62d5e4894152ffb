"""The command `jlar`: each study registers its commands, and loads what it needs when called."""

import io
import os
import signal
import sys
from typing import Any

from . import errors, signals


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is the exit code.

    0: done. 1: the machine failed. 2: something must be changed first. 130, 143: interrupted.
    3: `jlar watch` has an alarm. 4: it cannot tell.
    """
    program, again = "jlar", "the same command continues"
    try:
        parser = _parser()
        chosen, unknown = parser.parse_known_args(arguments)
        program = chosen.parser.prog
        if unknown:
            chosen.parser.error(f"unknown: {' '.join(unknown)}")
        if getattr(chosen, "fresh", False):
            again = "the same command without --fresh continues"
        return chosen.command(chosen)
    except errors.Refusal as error:
        return _told(f"{program}: error: {errors.line(error)}", error)
    except errors.Stopped as error:
        return _told(f"{program}: {error}; {again}", error)
    except KeyboardInterrupt as error:
        return _told(f"{program}: interrupted; {again}", error)
    except ModuleNotFoundError as error:
        if (told := errors.missing(error)) is None:
            raise
        return _told(f"{program}: error: {told}", errors.Refusal())
    except Exception as error:
        trouble = errors.trouble(error) or (error if isinstance(error, OSError) else None)
        if trouble is None:
            raise
        return _told(f"{program}: error: {errors.line(trouble)}", error)


def _parser() -> Any:
    from . import paper, report, watch
    from .grokking import command as grokking
    from .options import Parser
    from .pretraining import command as pretraining

    parser = Parser(
        prog="jlar",
        description="Studies of the log-alignment ratio (LAR), arXiv 2605.28975.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each in (grokking, pretraining, paper, report, watch):  # modules with register(commands)
        each.register(commands)
    return parser


def _told(line: str, error: BaseException) -> int:
    print(line, file=sys.stderr, flush=True)
    return errors.code(error)


def command() -> int:
    """What the installed command runs: once all is done and told, it ignores Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of folders may be in no encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    with signals.heeded():
        code = main()
    if code == 128 + signal.SIGINT:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads that still compile would crash at the usual end
    return code


if __name__ == "__main__":
    sys.exit(command())
