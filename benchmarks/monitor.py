"""Claim: a monitor's update takes less than 20 microseconds of a jitted run on a CPU.

    python benchmarks/monitor.py [--json PATH] [--repeats 10] [--steps 10000]

A run of `--steps` steps with its LAR and training loss at every step and a baseline of two runs, as
one scan: with the monitor's update, and with a running mean in its place. Time of the difference
per step, mean over the run. No transfer to the host takes part in either.
"""

from typing import Any

import _bench as bench
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlar.monitor import Baseline, Monitor

Columns = tuple[Float[Array, "steps"], ...]
Carry = tuple[Monitor, Baseline]


def monitored(carry: Carry, columns: Columns) -> Carry:
    """The monitor after all rows."""

    def update(carry: Carry, at: Any) -> Any:
        (monitor, baseline), (step, lar, loss) = carry, at
        return (monitor.update(step, lar, loss=loss, baseline=baseline), baseline), None

    return jax.lax.scan(update, carry, columns)[0]


def mean(total: Float[Array, ""], columns: Columns) -> Float[Array, ""]:
    """What a scan over the same rows takes by itself."""
    return jax.lax.scan(lambda total, at: (total + sum(at), None), total, columns)[0]


def main() -> None:
    """Run the benchmark."""
    args = bench.options(__doc__ or "", steps=10_000)
    steps = np.arange(1.0, args.steps + 1)
    rng = np.random.default_rng(0)
    lars = 0.6 + 0.002 * rng.standard_normal((3, args.steps))
    loss = 5 * steps**-0.2
    baseline = Baseline.from_runs([(steps, lar, loss) for lar in lars[1:]])
    columns = tuple(jnp.asarray(each, jnp.float32) for each in (steps, lars[0], loss))
    figures: dict[str, Any] = {"steps": args.steps, "repeats": args.repeats}
    figures["state_numbers"] = sum(x.size for x in jax.tree.leaves(Monitor.init()))
    sides = {
        "monitor": (monitored, (Monitor.init(n=4096), baseline)),
        "none": (mean, jnp.zeros(())),
    }
    calls = {}
    for side, (function, start) in sides.items():
        run, costs = bench.compiled(function, start, columns)
        calls[side] = lambda run=run, start=start: run(start, columns)
        figures[f"{side}_compile_ms"] = costs["compile_ms"]
    times = bench.alternate(calls, args.repeats)
    pairs = zip(times["monitor"], times["none"], strict=True)
    figures["microseconds"] = bench.spread([1e6 * (a - b) / args.steps for a, b in pairs])
    bench.report(figures, args.json)
    assert figures["microseconds"]["median"] < 20, "an update takes over 20 microseconds"


if __name__ == "__main__":
    main()
