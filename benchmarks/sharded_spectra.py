"""Claim: spectra at n = 4,096, W split over a mesh: n x n sums in an all-reduce, one eigh, right.

    python benchmarks/sharded_spectra.py [--json PATH] [--repeats 3] [--devices 2]
        [--outputs 128256] [--width 4096] [--tokens 8192]

Fake CPU devices stand for the mesh: outputs of W and tokens of X are split over them, as with
tensor and sequence parallelism. p, q and LAR are compared with NumPy in float64. Of the time, what
is not the Grams' is the eigh, which every device does for itself.
"""

import re

import _bench as bench
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jlar


def reference(W: np.ndarray, X: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """p, q and LAR in float64, by the definition."""
    W, X = W.astype(np.float64), X.astype(np.float64)
    sigma2, V = np.linalg.eigh(W.T @ W)
    projected = np.einsum("ni,ni->i", V, X.T @ (X @ V))
    p, q = sigma2[::-1] / sigma2.sum(), projected[::-1] / projected.sum()
    return p, q, 1 + 0.5 * np.log((p * q).sum()) / np.log(len(p))


def main() -> None:
    """Run the benchmark."""
    args = bench.options(__doc__ or "", devices=2, outputs=128_256, width=4096, tokens=8192)
    jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = jax.make_mesh((args.devices,), ("model",))
    held = NamedSharding(mesh, P("model"))
    keys = jax.random.split(jax.random.key(0), 3)
    # A power law, as trained unembeddings have, turned out of the axes.
    scale = jnp.arange(1, args.width + 1) ** -0.5
    basis = jnp.linalg.qr(jax.random.normal(keys[0], (args.width, args.width)))[0]

    def drawn(key: jax.Array, rows: int) -> jax.Array:
        return (jax.random.normal(key, (rows, args.width)) * scale) @ basis.T

    W = jax.device_put(drawn(keys[1], args.outputs), held)
    X = jax.device_put(drawn(keys[2], args.tokens), held)
    specs = {"mesh": mesh, "W_spec": P("model"), "X_spec": P("model")}
    programs, costs = {}, {}
    for name in ("grams", "spectra"):
        function = jlar.sharded(getattr(jlar, name), **specs)
        programs[name], costs[name] = bench.compiled(function, W, X)
    text = programs["spectra"].as_text()
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    moved = re.findall(rf"= (.*?) ({names})(?:-start)?\(", text)
    calls = {name: lambda name=name: programs[name](W, X) for name in programs}
    times = bench.alternate(calls, args.repeats, warm_up=1)
    spectra = jax.device_get(programs["spectra"](W, X))
    p, q, lar = reference(np.asarray(W), np.asarray(X))
    errors = {
        "p": float(np.max(np.abs(spectra.p - p)) / p[0]),
        "q": float(np.max(np.abs(spectra.q - q)) / q.max()),
        "lar": abs(float(spectra.lar) - lar),
    }
    figures = {
        "shape": [args.outputs, args.width, args.tokens],
        "compiled": costs,
        "moved": moved,
        "eighs": len(re.findall(r"custom_call_target=\"\w*syevd\w*\"", text)),
        "time_grams_over_spectra": bench.ratios(times, "grams", "spectra"),
        "lar": lar,
        "largest_error_over_the_largest_entry": errors,
        "largest_relative_error_of_p": float(np.max(np.abs(spectra.p / p - 1))),
        "smallest_p_over_p_1": float(p[-1] / p[0]),
    }
    bench.report(figures, args.json)
    whole = f"[{args.width},{args.width}]"
    assert figures["eighs"] == 1 and [name for _, name in moved] == ["all-reduce"], moved
    assert moved[0][0].count("[") == moved[0][0].count(whole) == 2, moved
    # Backward stability of the eigh: p to some eps of p_1, hence its tail less well relatively; q
    # through directions that turn by eps over the gaps.
    assert errors["p"] <= 1e-5 and errors["q"] <= 1e-3 and errors["lar"] <= 1e-5


if __name__ == "__main__":
    main()
