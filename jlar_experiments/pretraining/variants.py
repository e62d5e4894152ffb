"""Variants of `bytes-tiny`: widths 64, 160 and 384, and the checks of the paper's appendix D.

    python -m jlar_experiments.pretraining.variants [--train FOLDER]

Without an option it prints both tables from the committed records. With one it trains the runs that
are not in FOLDER yet, by `jlar paper pretraining`, and makes the records anew. Criteria, written
before the runs: log/pretraining.md. D is the LAR of the run on all of the text (1.02M tokens once)
less that of a run of the same seed that repeats a part of it; the gap, validation less training
loss, is that of the run that repeats.
"""

import argparse
import csv
import gzip
import itertools
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from .. import cli, records
from . import analysis, beyond_loss
from .presets import PRESETS

RECORDS = beyond_loss.RESULTS / "variants"
ALL, TEN_TIMES, FORTY_TIMES = 1_024_000, 102_400, 25_600  # tokens
Settings = Mapping[str, Any]
PLAIN: Settings = MappingProxyType({})
SCALES: dict[str, Settings] = {
    "width-64": PLAIN,
    "width-160": {"width": 160, "hidden": 640, "lr": 0.00126},
    "width-384": {"width": 384, "hidden": 1536, "heads": 6, "lr": 0.00082},
}
CHECKS: dict[str, Settings] = {
    "no-warm-up": {"warm_up": 0},
    "cosine": {"schedule": "cosine"},
    "tied": {"tied": True},
    "no-decay": {"weight_decay": 0.0},
}
SEEDS = {"width-160": 2, "width-384": 2}  # of the others 3
KEPT = ("step", "train_loss", "lar", "val_loss")
LARGEST = 3.2e9  # parameters of the paper's model


def train(folder: Path) -> None:
    """Train what is not there yet, and make the records of it."""
    RECORDS.mkdir(exist_ok=True)
    for name, settings in {**CHECKS, **SCALES}.items():
        sizes = (ALL, TEN_TIMES, FORTY_TIMES) if name in SCALES else (ALL, FORTY_TIMES)
        seeds = SEEDS.get(name, 3)
        options = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        options = ["--tied" if option == "--tied=True" else option for option in options]
        command = ["paper", "pretraining", "--preset", "bytes-tiny", "--out", str(folder / name)]
        command += ["--sizes", ",".join(map(str, sizes)), "--seeds", str(seeds), *options]
        if code := cli.main(command):
            sys.exit(code)
        rows = [
            {
                "unique_tokens": run.config.unique_tokens,
                "seed": run.config.seed,
                **{key: row[key] for key in KEPT if key in row},
            }
            for run in analysis.read(folder / name)
            for row in run.rows
        ]
        records.write_packed(RECORDS / f"{name}.jsonl.gz", rows)


def read(name: str) -> list[analysis.Run]:
    """The runs of one variant, from its record."""
    preset, rows = PRESETS["bytes-tiny"], {}
    with gzip.open(RECORDS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            rows.setdefault((row["unique_tokens"], row["seed"]), []).append(row)
    settings = {**SCALES, **CHECKS}[name]
    return [
        analysis.Run(
            preset.config(**settings, unique_tokens=tokens, seed=seed), "bytes-tiny", {}, own, []
        )
        for (tokens, seed), own in rows.items()
    ]


class Said(NamedTuple):
    """What the appendix's checks compare, of one run that repeats its text and its baseline."""

    peak: float  # of the run's LAR, a mean of 14 steps
    peak_step: int
    baseline: float  # LAR, at the end
    D: float  # at the end
    r: float  # of D and the gap


def said(pair: analysis.Pair) -> Said:
    """The numbers of one pair of a run and its baseline."""
    lar = analysis.smoothed(pair.run.lar, analysis.SMOOTHED)
    peak, base = int(np.argmax(lar)), pair.base.lar[pair.steps]
    return Said(
        float(lar[peak]), peak, pair.final(base), pair.final(pair.D),
        analysis.pearson(pair.D, pair.gap),
    )  # fmt: skip


def checks() -> list[list[str]]:
    """The table of appendix D: means and ranges over the seeds."""
    names = (
        "peak of LAR",
        "at step",
        "baseline's LAR at the end",
        "D at the end",
        "r of D and gap",
    )
    table = [["change", *names, "n"]]
    for name in ("width-64", *CHECKS):
        pairs = [p for p in analysis.pairs(read(name)) if p.run.config.unique_tokens == FORTY_TIMES]
        columns = zip(*map(said, pairs), strict=True)
        cells = [_cell(values, 0 if i == 1 else 3) for i, values in enumerate(columns)]
        table.append(["none" if name == "width-64" else name, *cells, str(len(pairs))])
    return table


def _cell(values: tuple[float, ...], digits: int) -> str:
    mean, low, high = (f"{f(values):.{digits}f}" for f in (np.mean, min, max))
    return re.sub(r"\b0\.", ".", f"{mean} ({low} to {high})")


class Point(NamedTuple):
    """The partial correlation of D and the gap of one run, given a cubic in the losses."""

    parameters: int
    repeats: int  # How often the text is seen
    seed: int
    r: float
    low: float
    high: float
    D: float  # At the end, as the gap
    gap: float


def points() -> list[Point]:
    """Of every run of `SCALES` that repeats its text, seeds 0 and 1."""
    found = []
    for pair in itertools.chain(*(analysis.pairs(read(name)) for name in SCALES)):
        config = pair.run.config
        if config.seed < 2:
            r, low, high, _ = beyond_loss.partial(pair.D, pair.gap, pair.loss_difference)
            repeats, D, gap = ALL // config.unique_tokens, pair.final(pair.D), pair.final(pair.gap)
            found.append(Point(config.parameters, repeats, config.seed, r, low, high, D, gap))
    return found


def scale() -> list[list[str]]:
    """The table of sizes: D and gap at the end, r with its interval."""
    table = [["parameters", "text is repeated", "seed", "D", "gap", "r given the losses"]]
    for size, repeats, seed, r, low, high, D, gap in points():
        cells = f"{size / 1e6:.2g}M", f"{repeats} times", str(seed), f"{D:.3f}", f"{gap:.2f}"
        table.append([*cells, f"{r:.2f} ({low:.2f} to {high:.2f})"])
    return table


def predicted(found: list[Point]) -> list[float]:
    """r at the paper's size by a line of its Fisher z in log parameters, and its 95% interval."""
    x, at = np.log10([point.parameters for point in found]), math.log10(LARGEST)
    z = np.arctanh([point.r for point in found])
    slope, start = np.polyfit(x, z, 1)
    spread = np.sqrt(np.sum((z - start - slope * x) ** 2) / (len(x) - 2))
    off = (at - x.mean()) ** 2 / np.sum((x - x.mean()) ** 2)
    reach = stats.t.ppf(0.975, len(x) - 2) * spread * np.sqrt(1 / len(x) + off)
    return [float(np.tanh(start + slope * at + side * reach)) for side in (0, -1, 1)]


def main() -> None:
    """Train if asked to, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=Path, metavar="FOLDER", help="of the runs")
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train)
    csv.writer(sys.stdout).writerows(scale())
    print("r at 3.2B parameters: {:.2f} ({:.2f} to {:.2f})".format(*predicted(points())))
    csv.writer(sys.stdout).writerows(checks())


if __name__ == "__main__":
    main()
