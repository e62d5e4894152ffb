"""The dip of LAR in the first steps of grokking, as in the paper's figure 9: LAR after every step.

    python -m jlar_experiments.grokking.dip FOLDER [--steps 40] [--seeds 3]

x + y mod 97: half of the pairs in batches of 128 to all of them, and fewer pairs in batches of 512.
Writes FOLDER/dip.csv, LAR of the unembedding over the training set before the first step and after
each, and FOLDER/dip.png. A few minutes on two cores.
"""

import argparse
import csv
import io
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

import jlar

from .. import records
from . import train
from .config import GrokConfig
from .figures import STYLE

COLUMNS = ("batch size", "training pairs", "seed", "step", "LAR")
Row = tuple[int, int, int, int, float]


def configs() -> list[GrokConfig]:
    """Every batch size and every size of the training set."""
    sizes = [GrokConfig(batch_size=size) for size in (128, 512, 2048, 4704)]
    return sizes + [GrokConfig(train_fraction=share) for share in (0.05, 0.1, 0.2, 0.3)]


def first_steps(config: GrokConfig, steps: int) -> Iterator[Row]:
    """LAR before the first step and after each, in the batches that `jlar grok` takes."""
    state, data = train.member((train.initial(config), train.data(config)), 0)
    step, lar = jax.jit(train.stepping(config)), jax.jit(_lar)
    trained = state.model, state.optimiser
    for number, rows in zip(range(steps + 1), _batches(config, data), strict=False):
        if number:
            trained, _ = step(trained, rows)
        value = float(lar(trained[0], data.train))
        yield config.batch_size, config.train_pairs, config.seed, number, value


def _batches(config: GrokConfig, data: train.Data) -> Iterator[jax.Array | None]:
    """Nothing for the state before any step, then the batches of one epoch after the other."""
    yield None
    for epoch in itertools.count():
        rows = train.in_order(data, epoch)
        for start in range(0, len(rows), config.batch_size):
            yield rows[start : start + config.batch_size]


def drawn(rows: Sequence[Row]) -> Figure:
    """Means over seeds by step; each run's dip, by the size of its batches or of its set."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    found: dict[tuple[int, int], dict[int, list[float]]] = {}
    for batch, pairs, seed, _, lar in rows:
        found.setdefault((pairs, batch), {}).setdefault(seed, []).append(lar)
    most, usual = max(found)[0], GrokConfig.batch_size
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(found)))
    for ((pairs, batch), seeds), colour in zip(sorted(found.items()), colours, strict=True):
        named = f"{min(batch, pairs)} of {pairs}"
        left.plot(np.mean(list(seeds.values()), axis=0), color=colour, label=named)
        for lars in seeds.values():
            if pairs == most:
                right.plot(batch, dip(lars), "o", color=colour, markersize=5)
            if batch == usual:
                right.plot(pairs, dip(lars), "s", color=colour, markersize=5, fillstyle="none")
    left.set(xlabel="step", ylabel="LAR of the training data")
    words = f"dots: pairs in a batch, of {most}; squares: training pairs, batches of {usual}"
    right.set(ylabel="dip of LAR", xscale="log", xlabel=textwrap.fill(words, 42), ylim=(0, None))
    right.set_xticks([128, 512, 2048], ["128", "512", "2,048"], minor=False)
    right.xaxis.set_minor_locator(NullLocator())
    figure.legend(fontsize=8, title="batch of training pairs", loc="outside right upper")
    return figure


def dip(lars: Sequence[float]) -> float:
    """How far LAR falls below its initial value."""
    return lars[0] - min(lars)


def read(folder: Path) -> list[Row]:
    """What an earlier call has written."""
    with (folder / "dip.csv").open(encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    return [(*map(int, counts), float(lar)) for *counts, lar in rows]  # pyright: ignore[reportReturnType]


def _lar(model: train.Model, rows: jax.Array) -> jax.Array:
    return jlar.lar(model.unembedding, model.activations(rows[:, 0], rows[:, 1]))


def main() -> None:
    """Train, write and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where dip.csv and dip.png go")
    parser.add_argument("--steps", type=int, default=40, help="steps of each run [40]")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting [3]")
    given = parser.parse_args()
    if given.steps < 1 or given.seeds < 1:
        parser.error("--steps and --seeds must be at least 1")
    if (given.folder / "dip.csv").exists():
        parser.error(f"{given.folder} holds the dip.csv of an earlier call: name another folder")
    given.folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for config in configs():
        for seed in range(given.seeds):
            own = GrokConfig(
                train_fraction=config.train_fraction, batch_size=config.batch_size, seed=seed
            )
            rows += first_steps(own, given.steps)
            print(f"{own.name}: dip {dip([row[-1] for row in rows[-given.steps - 1 :]]):.3f}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *((*row, f"{lar:.5f}") for *row, lar in rows)])
    records.write_whole(given.folder / "dip.csv", text.getvalue())
    with matplotlib.rc_context(STYLE):
        drawn(rows).savefig(given.folder / "dip.png")


if __name__ == "__main__":
    main()
