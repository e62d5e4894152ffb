"""WeightWatcher's alpha of the unembedding at every recorded spectrum of a run, and what it costs.

    pip install weightwatcher torch   # in an environment of its own: neither is a dependency
    python benchmarks/alpha.py RUN [RUN ...]

Alpha is a fit to the squared singular values, so a diagonal matrix with the recorded spectrum p has
the alpha of the weights. Writes alpha.jsonl into the folder of each run, where `jlar paper` finds
it; `--spectra-every` says how often there is a spectrum. The package prints a good deal.
"""

import json
import pathlib
import sys
import time
import warnings

import numpy as np
import torch  # pyright: ignore[reportMissingImports]  (not a dependency)
import weightwatcher  # pyright: ignore[reportMissingImports]  (not a dependency)

from jlar_experiments import records


def alpha(p: np.ndarray) -> float:
    """The package's alpha of a layer with this weight spectrum."""
    values = np.sqrt(p[p > 0] * len(p)).astype("float32")
    layer = torch.nn.Linear(len(values), len(values), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.from_numpy(values)))
    watcher = weightwatcher.WeightWatcher(model=torch.nn.Sequential(layer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(watcher.analyze(min_evals=1)["alpha"].iloc[0])


def main() -> None:
    """Write alpha.jsonl for every run named."""
    for folder in map(pathlib.Path, sys.argv[1:]):
        rows, started = [], time.perf_counter()
        for row in records.read(folder / "spectra.jsonl"):
            if row["point"] == "between":
                value = alpha(np.array(row["p"]))
                rows.append({"epoch": row["epoch"], "seed": row["seed"], "alpha": value})
        records.write_whole(folder / "alpha.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        each = (time.perf_counter() - started) / max(1, len(rows))
        print(f"{folder.name}: {len(rows)} values, {each:.3f} s each", file=sys.stderr)


if __name__ == "__main__":
    main()
