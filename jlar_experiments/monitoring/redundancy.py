"""Does LAR say anything about the generalisation gap that the training loss does not?

    python -m jlar_experiments.monitoring.redundancy FOLDER [--tokens FOLDER]

A decoder of the size of `bytes-tiny` on text that is repeated 1, 4, 16 and 40 times, five ways of
training, two seeds: forty runs. The gap (validation less training loss) at each validation after
step 100 is predicted from log step, training loss and its difference from that of the run of the
same seed whose text is new, by a cubic polynomial; then with LAR and its difference as well. The
error is of configurations (repetition and way) that are left out of the fit, one at a time.
Criterion (log/pretraining.md): LAR adds something if the error falls by 20% or more and the 95%
interval of the fall, by a bootstrap over configurations, leaves out 0.
"""

import argparse
import gzip
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from . import suite

SEQUENCES = 8000
REPETITIONS = (1, 4, 16, 40)
PLAIN = suite.Recipe("judge", SEQUENCES, norm="both", steps=1000)
WAYS = {
    "plain": PLAIN,
    "dropout": replace(PLAIN, dropout=0.1),
    "decay": replace(PLAIN, decay=1.0),
    "noise": replace(PLAIN, noise=0.1),
    "half-rate": replace(PLAIN, lr=PLAIN.lr / 2),
}
FIRST, SEEDS = 100, 2
DEGREE, RIDGE, DRAWS = 3, 1e-3, 2000


def read(folder: Path) -> dict[tuple[str, int], dict[str, Float[np.ndarray, "rows"]]]:
    """By way and repetition, the columns of the validated rows of all seeds."""
    found = {}
    for way, times in itertools.product(WAYS, REPETITIONS):
        path = folder / f"{way}-{SEQUENCES // times}.jsonl.gz"
        rows = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
        rows = [r for r in rows if r["seed"] < SEEDS and r["step"] > FIRST and "val_loss" in r]
        found[way, times] = {key: np.array([r[key] for r in rows], float) for key in rows[0]}
    return found


def features(
    run: dict[str, np.ndarray], base: dict[str, np.ndarray], *, lar: bool
) -> Float[np.ndarray, "rows features"]:
    """What the gap is predicted from."""
    columns = [np.log2(run["step"]), run["train_loss"], base["train_loss"] - run["train_loss"]]
    if lar:
        columns += [run["lar"], base["lar"] - run["lar"]]
    return np.stack(columns, axis=1)


def polynomial(x: Float[np.ndarray, "rows k"]) -> Float[np.ndarray, "rows terms"]:
    """All products of up to three features."""
    chosen = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(range(x.shape[1]), d) for d in range(DEGREE + 1)
    )
    return np.stack([np.prod(x[:, list(each)], axis=1) for each in chosen], axis=1)


def error(
    x: dict[Any, Float[np.ndarray, "rows k"]], gap: dict[Any, Float[np.ndarray, "rows"]], out: Any
) -> float:
    """Root mean square error on one configuration of the fit on all others."""
    rest = np.concatenate([each for key, each in x.items() if key != out])
    mean, spread = rest.mean(axis=0), rest.std(axis=0)
    A = polynomial((rest - mean) / spread)
    y = np.concatenate([each for key, each in gap.items() if key != out])
    ridge = RIDGE * len(y) * np.eye(A.shape[1])
    weights = np.linalg.solve(A.T @ A + ridge, A.T @ y)
    predicted = polynomial((x[out] - mean) / spread) @ weights
    return float(np.sqrt(np.mean((predicted - gap[out]) ** 2)))


def analysis(folder: Path) -> dict[str, Any]:
    """Errors without and with LAR by configuration, the fall of their mean and its interval."""
    runs = read(folder)
    gap = {key: run["val_loss"] - run["train_loss"] for key, run in runs.items()}
    errors = {}
    for lar in (False, True):
        x = {key: features(run, runs[key[0], 1], lar=lar) for key, run in runs.items()}
        errors[lar] = np.array([error(x, gap, key) for key in runs])
    rng = np.random.default_rng(0)
    draws = rng.integers(len(runs), size=(DRAWS, len(runs)))
    falls = 1 - errors[True][draws].mean(axis=1) / errors[False][draws].mean(axis=1)
    fall = float(1 - errors[True].mean() / errors[False].mean())
    low, high = map(float, np.quantile(falls, [0.025, 0.975]))
    return {
        "configurations": {
            f"{way} x {times}": {"without": float(a), "with": float(b), "gap": float(each[-1])}
            for (way, times), a, b, each in zip(
                runs, errors[False], errors[True], gap.values(), strict=True
            )
        },
        "mean error without LAR": float(errors[False].mean()),
        "mean error with LAR": float(errors[True].mean()),
        "fall": fall,
        "interval": [low, high],
        "outcome": "LAR adds" if fall >= 0.2 and low > 0 else "redundant at this size",
    }


def main() -> None:
    """Train what is not there yet, and print the analysis."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the logs")
    parser.add_argument("--tokens", type=Path, default=Path("runs/data"), help="of token files")
    arguments = parser.parse_args()
    counts = tuple(SEQUENCES // times for times in REPETITIONS)
    suite.run(WAYS, dict.fromkeys(WAYS, counts), arguments.folder, arguments.tokens)
    print(json.dumps(analysis(arguments.folder), indent=1))


if __name__ == "__main__":
    main()
