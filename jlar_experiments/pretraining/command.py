"""The commands `jlar data`, `jlar pretrain` and `jlar paper pretraining`."""

import argparse
import contextlib
import dataclasses
import inspect
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import options, report
from ..errors import Refusal
from ..options import Parser
from .config import PretrainConfig
from .presets import PRESETS, Preset

CHOICE = "model, data and optimisers; `jlar pretrain --help` ends with each [bytes-tiny]"

RUNS = Path("runs")


def register(commands: Any) -> None:
    """Add `data` and `pretrain` to the commands."""
    _data_parser(commands)
    described = "\n\n".join(
        f"{name}: {inspect.cleandoc(type(each).__doc__ or '')}" for name, each in PRESETS.items()
    )
    parser = commands.add_parser(
        "pretrain",
        help="train a language model, once or again and again on the same data",
        description="Train a decoder on a corpus and watch the log-alignment ratio (LAR) of the\n"
        "training batches. A run that is killed continues with the same command.",
        epilog=described,
    )
    parser.set_defaults(command=pretrain, parser=parser)
    _where(parser, "folder of the run [runs/<preset>/<its settings>]")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FOLDER",
        help="a finished run that does not overfit, for the monitor to compare this one with",
    )
    settings = parser.add_argument_group("instead of the preset's setting")
    options.add_settings(settings, PretrainConfig, given_only=True)


def register_paper(studies: Any) -> None:
    """Add `pretraining` to the studies of `jlar paper`."""
    parser = studies.add_parser(
        "pretraining",
        help="every data size with every optimiser, the baseline first, and one report",
        description="All runs of a preset and their common report: figures 4-8, 12, 13, 17-20 and\n"
        "tables 2-4 of the paper. Finished runs are kept, a killed one continues.",
    )
    parser.set_defaults(command=paper, parser=parser)
    _where(parser, "folder of the runs [runs/<preset>]")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds of every run [preset's]")
    parser.add_argument(
        "--sizes",
        type=sizes,
        metavar="N,N,...",
        help="unique tokens of each data set, the baseline's first [preset's]",
    )
    settings = parser.add_argument_group("instead of the preset's setting, in every run")
    options.add_settings(settings, PretrainConfig, given_only=True)


def _where(parser: Any, folder: str) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="bytes-tiny", help=CHOICE)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=folder)
    parser.add_argument(
        "--data",
        type=Path,
        default=RUNS / "data",
        metavar="FOLDER",
        help="where token files are made and looked for [runs/data]",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue (the default)")
    again.add_argument(
        "--fresh", action="store_true", help="begin again; what is there moves to earlier/"
    )
    parser.add_argument(
        "--distributed",
        nargs="?",
        type=processes,
        const={},
        metavar="HOST:PORT,N,I",
        help="one of several processes that train together; alone where jax finds the others (TPU "
        "pods, SLURM), else the address of the first, their number and the index of this one",
    )


def sizes(text: str) -> tuple[int, ...]:
    """Numbers of tokens, the largest first."""
    numbers = tuple(int(each) for each in text.split(","))
    if list(numbers) != sorted(set(numbers), reverse=True):
        raise argparse.ArgumentTypeError(f"write the largest first, each once; got {text}")
    return numbers


def processes(text: str) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize` in HOST:PORT,N,I."""
    address, count, index = text.split(",")
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}


def _data_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "data",
        help="make token files of text, for jlar pretrain",
        description="Turn text into token files: train.bin, validation.bin (a tenth of the\n"
        "documents) and tokens.json. `jlar pretrain --corpus FOLDER` reads them.",
    )
    parser.set_defaults(command=data, parser=parser)
    parser.add_argument(
        "corpus",
        nargs="?",
        default="stdlib",
        metavar="TEXT",
        help="a folder or file of text, JSONL (a document per line) or Parquet, also as .gz; "
        "stdlib (the sources of this Python's standard library) or site-packages (those of "
        "everything installed beside it) [stdlib]",
    )
    parser.add_argument(
        "--field", default="text", metavar="NAME", help="of JSONL and Parquet, the text [text]"
    )
    parser.add_argument("--tokenizer", choices=("bytes", "bpe"), default="bytes", help="[bytes]")
    parser.add_argument(
        "--vocabulary", type=int, default=2048, metavar="N", help="tokens of the BPE [2048]"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="[runs/data/<name>]")


def data(arguments: argparse.Namespace) -> int:
    """`jlar data`: make token files, or tell of those that are there."""
    parser: Parser = arguments.parser
    if arguments.tokenizer == "bpe" and not 257 <= arguments.vocabulary < 2**24:
        parser.error(f"--vocabulary must be from 257 to 2^24; got {arguments.vocabulary}")
    from . import corpus

    chosen = arguments.corpus, arguments.tokenizer, arguments.vocabulary
    folder = arguments.out or corpus.folder(*chosen, RUNS / "data", arguments.field)
    made = corpus.prepare(
        *chosen, folder, lambda text: print(text, file=sys.stderr), arguments.field
    )
    print(
        f"{folder}: {made.tokens['train']:,} tokens of {made.documents['train']:,} documents to "
        f"train on, {made.tokens['validation']:,} of {made.documents['validation']:,} held out; "
        f"vocabulary {made.vocabulary:,}\n"
        f"train on it: jlar pretrain --corpus {shlex.quote(str(folder))}"
    )
    return 0


def pretrain(arguments: argparse.Namespace) -> int:
    """`jlar pretrain`: train, or continue, one run and report on all of its preset."""
    from .. import hosts

    preset = PRESETS[arguments.preset]
    with _joined(arguments):
        # What a host refuses before it has joined, the others wait for.
        with hosts.together(), _named_as_options():
            from . import data as sequences
            from . import inputs

            config = _config(arguments, preset)
        with _named_as_options():
            tokens = inputs.tokens(config, arguments.data)
        with hosts.together():
            config = sequences.fitted(config, tokens, given=_given(arguments))
        folder = arguments.out or RUNS / arguments.preset / preset.name(config)
        root = None if arguments.out else folder.parent
        _trained(arguments, root, config, folder, arguments.baseline)
        return _report(folder if arguments.out else folder.parent)


def paper(arguments: argparse.Namespace) -> int:
    """`jlar paper pretraining`: every run of the preset that is not finished, and the report."""
    parser: Parser = arguments.parser
    if arguments.seeds is not None and arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {arguments.seeds}")
    preset, given = PRESETS[arguments.preset], _given(arguments)
    arms = preset.arms(sizes=arguments.sizes, seeds=arguments.seeds, **given)
    if swept := {"optimiser", "unique_tokens", "seed"} & given.keys():
        name = "--" + min(swept).replace("_", "-")
        parser.error(f"{name} differs between the runs; jlar pretrain takes it for one run")
    root = arguments.out or RUNS / arguments.preset
    try:
        folders = [(arm, root / preset.name(arm)) for arm in arms]
    except ValueError as error:
        parser.error(options.as_options(str(error), list(_settings())))
    first: dict[str, Path] = {}  # of each optimiser: what the others are compared with
    for arm, folder in folders:
        first.setdefault(arm.optimiser, folder)
    runs = [
        (arm, folder, None if folder == first[arm.optimiser] else first[arm.optimiser])
        for arm, folder in folders
    ]
    with _joined(arguments):
        for run in runs:
            _trained(arguments, root, *run)
        return _report(root)


def _joined(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """With the other processes, if there are any, before anything asks for the devices."""
    from .. import hosts

    if arguments.distributed is None:
        return contextlib.nullcontext()
    return hosts.joined(**arguments.distributed)


def _settings() -> set[str]:
    return {each.name for each in dataclasses.fields(PretrainConfig)}


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if name in _settings()}


def _config(arguments: argparse.Namespace, preset: Preset) -> PretrainConfig:
    given = _given(arguments)
    if "steps" in given:  # a short run warms up over all of its steps at most
        given.setdefault("warm_up", max(0, min(preset.run.warm_up, given["steps"])))
    corpus = Path(given.get("corpus", preset.run.corpus))
    if (corpus / "tokens.json").exists():
        from .corpus import sidecar

        there = sidecar(corpus)
        tensor = max(1, given.get("tensor", preset.run.tensor))
        given.setdefault("tokenizer", there.tokenizer)
        given.setdefault("vocabulary", -(-there.vocabulary // tensor) * tensor)
    return preset.config(**given)


def _trained(
    arguments: argparse.Namespace,
    root: Path | None,
    config: PretrainConfig,
    folder: Path,
    compared: Path | None,
) -> None:
    """Train a run in its folder, beside the baseline in another, if there is one.

    `root` is the folder of all runs, if they have one in common.
    """
    import jax

    from .. import checkpoint, hosts
    from .. import folder as folders
    from . import inputs, study

    checkpoint.hush()
    with contextlib.ExitStack() as stack:
        with hosts.together():
            baseline = None if compared is None else inputs.baseline(compared)
        with _named_as_options():
            tokens = inputs.tokens(config, arguments.data)
        with hosts.together():
            with _named_as_options():
                inputs.check(config, tokens)
            if root is not None and jax.process_index() == 0:
                folders.collection(root, "pretrain", preset=arguments.preset)
            stack.enter_context(
                study.opened(config, arguments.preset, folder, tokens, fresh=arguments.fresh)
            )
        print(f"{folder.name}: {config.epochs:.3g} epochs", file=sys.stderr)
        if not study.run(config, folder, tokens, baseline):
            print(f"{folder} is finished", file=sys.stderr)


@contextlib.contextmanager
def _named_as_options() -> Iterator[None]:
    try:
        yield
    except Refusal as error:
        error.args = (options.as_options(str(error), list(_settings())),)
        raise
    except ValueError as error:
        raise Refusal(options.as_options(str(error), list(_settings()))) from error


def _report(folder: Path) -> int:
    import jax

    if jax.process_index() == 0:
        print(report.write(folder))
    return 0
