"""What a pre-training run is made of, before anything is compiled: token files and a baseline."""

from pathlib import Path

import jax

from jlar.monitor import Baseline

from .. import hosts, logs
from ..errors import Refusal
from ..progress import say
from . import corpus, data, sharding
from .config import PretrainConfig


def check(config: PretrainConfig, tokens: Path) -> None:
    """ValueError or `Refusal`, in one line, before a folder is made or anything is compiled."""
    data.check(config, sharding.mesh(config.tensor))
    data.batches(config, tokens, 0).close()
    data.validation(config, tokens)


def baseline(folder: Path) -> Baseline:
    """The run in a folder as a baseline; `Refusal` if there is none to compare with."""
    try:
        return logs.baseline([folder])
    except (OSError, logs.Unusable) as error:
        raise Refusal(f"there is no run to compare with: {error}") from error


def tokens(config: PretrainConfig, root: Path) -> Path:
    """The folder of this run's token files, which are as they were made.

    The first host makes them, and the others too where they have a disk of their own.
    """
    source = config.corpus, config.tokenizer, config.vocabulary
    with hosts.together():
        folder = corpus.folder(*source, root)
        if jax.process_index() == 0:
            corpus.prepare(*source, folder, say)
    with hosts.together():
        if jax.process_index() > 0 and not (folder / "tokens.json").exists():
            corpus.prepare(*source, folder, say)
        corpus.verify(folder)
        digests = str(corpus.sidecar(folder).sha256)
    same = len(set(hosts.lines(digests))) == 1
    with hosts.together():
        if not same:
            raise Refusal(f"the token files in {folder} are not the same on all hosts")
    return folder
