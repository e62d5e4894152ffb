"""Claim: spectra by method="gram" at 32,000 x 1,024 float32 is >= 5x as fast as by SVD, p to 1e-3.

python benchmarks/spectra.py [--json PATH] [--repeats 10] [--outputs 32000] [--width 1024]
"""

import functools

import _bench as bench
import jax
import jax.numpy as jnp
import numpy as np

import jlar


def main() -> None:
    """Run the benchmark."""
    args = bench.options(__doc__ or "", outputs=32_000, width=1024, tokens=4096)
    keys = jax.random.split(jax.random.key(0), 3)
    # A trained unembedding's shape of spectrum: a power law over three decades of p.
    scale = jnp.arange(1, args.width + 1) ** -0.5
    basis = jnp.linalg.qr(jax.random.normal(keys[0], (args.width, args.width)))[0]
    W = (jax.random.normal(keys[1], (args.outputs, args.width)) * scale) @ basis.T
    X = (jax.random.normal(keys[2], (args.tokens, args.width)) * scale) @ basis.T
    methods = ("svd", "gram")
    programs, costs = {}, {}
    for method in methods:
        spectra = functools.partial(jlar.spectra, method=method)
        programs[method], costs[method] = bench.compiled(spectra, W, X)
    times = bench.alternate(
        {m: lambda m=m: programs[m](W, X) for m in methods}, args.repeats, warm_up=1
    )
    svd, gram = (np.asarray(programs[m](W, X).p, np.float64) for m in methods)
    speed, error = bench.ratios(times, "svd", "gram"), np.max(np.abs(gram / svd - 1))
    figures = {
        "shape": [args.outputs, args.width, args.tokens],
        "repeats": args.repeats,
        "seconds": {m: bench.spread(times[m]) for m in methods},
        **{f"{m}_{name}": value for m in methods for name, value in costs[m].items()},
        "speed_ratio_svd_over_gram": speed,
        "largest_relative_error_of_p": float(error),
        "smallest_p_over_p_1": float(svd[-1] / svd[0]),
    }
    bench.report(figures, args.json)
    assert speed["median"] >= 5, "the gram method is not 5x as fast as the SVD"
    assert error <= 1e-3, "the tail of p differs by more than 1e-3"


if __name__ == "__main__":
    main()
