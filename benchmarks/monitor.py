"""Claim: a monitor's update takes less than 20 microseconds of a jitted run on a CPU.

    python benchmarks/monitor.py [--json PATH] [--repeats 10] [--steps 10000]

A run of `--steps` steps with its LAR, training loss and a baseline at every step, as one scan: with
the monitor's update, and with a running mean in its place. Time of the difference per step, mean
over the run; beside it that of the costliest update, at which a point enters each window (a log of
one point per 64th of a doubling has no others). No transfer to the host takes part in either.
"""

from typing import Any

import _bench as bench
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import jlar

Columns = tuple[Float[Array, "steps"], ...]


def monitored(monitor: jlar.Monitor, columns: Columns) -> jlar.Monitor:
    """The monitor after all rows."""

    def update(monitor: jlar.Monitor, at: Any) -> Any:
        step, lar, loss, at_step, at_loss = at
        return monitor.update(
            step, lar, train_loss=loss, baseline_lar=at_step, baseline_at_loss=at_loss
        ), None

    return jax.lax.scan(update, monitor, columns)[0]


def mean(total: Float[Array, ""], columns: Columns) -> Float[Array, ""]:
    """What a scan over the same rows takes by itself."""
    return jax.lax.scan(lambda total, at: (total + sum(at), None), total, columns)[0]


def main() -> None:
    """Run the benchmark."""
    args = bench.options(__doc__ or "", steps=10_000)
    every = jnp.arange(1.0, args.steps + 1)
    spread = 2 ** (10 + jnp.arange(1.0, args.steps + 1) / 60)  # each one enters the windows
    figures: dict[str, Any] = {"steps": args.steps, "repeats": args.repeats}
    figures["state_numbers"] = sum(x.size for x in jax.tree.leaves(jlar.Monitor.init()))
    for name, steps in (("every_step", every), ("costliest", spread)):
        lar = 0.6 + 0.002 * jax.random.normal(jax.random.key(0), steps.shape)
        columns = (steps, lar, 1 + 0 * lar, lar + 0.001, lar + 0.002)
        calls, costs = {}, {}
        sides = {"monitor": (monitored, jlar.Monitor.init(n=4096)), "none": (mean, jnp.zeros(()))}
        for side, (function, start) in sides.items():
            run, costs[side] = bench.compiled(function, start, columns)
            calls[side] = lambda run=run, start=start, columns=columns: run(start, columns)
        times = bench.alternate(calls, args.repeats)
        pairs = zip(times["monitor"], times["none"], strict=True)
        figures[f"{name}_compile_ms"] = costs["monitor"]["compile_ms"]
        figures[f"{name}_microseconds"] = bench.spread(
            [1e6 * (a - b) / args.steps for a, b in pairs]
        )
    bench.report(figures, args.json)
    assert figures["costliest_microseconds"]["median"] < 20, "an update takes over 20 microseconds"


if __name__ == "__main__":
    main()
