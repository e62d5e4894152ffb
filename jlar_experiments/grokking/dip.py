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
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

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
    """Means over seeds by step, and each run's dip by the share of the pairs that is in a batch."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    found: dict[tuple[int, int], dict[int, list[float]]] = {}
    for batch, pairs, seed, _, lar in rows:
        found.setdefault((batch, pairs), {}).setdefault(seed, []).append(lar)
    ordered = sorted(found.items(), key=lambda each: min(1.0, each[0][0] / each[0][1]))
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(ordered)))
    for ((batch, pairs), seeds), colour in zip(ordered, colours, strict=True):
        share = min(1.0, batch / pairs)
        named = f"{share:.2f}: {min(batch, pairs)} of {pairs}"
        left.plot(np.mean(list(seeds.values()), axis=0), color=colour, label=named)
        for lars in seeds.values():
            right.plot(share, dip(lars), "o", color=colour, markersize=4)
    left.set(xlabel="step", ylabel="LAR of the training data")
    right.set(xlabel="share of the training pairs in a batch", ylabel="dip of LAR", xscale="log")
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
