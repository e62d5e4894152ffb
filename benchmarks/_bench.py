"""What the benchmarks share: alternating two sides in one process, and reporting what was seen."""

import argparse
import gc
import json
import pathlib
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Kernels = dict[str, tuple[int, float]]
"""By kind: executions, and seconds of all of them."""

# Where others share the machine, wall time measures them as well; the CPU time of this process,
# over all its threads, does so much less.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(call: Callable[[], Any], clock: str = "wall") -> float:
    """Time of one call by this clock, its results awaited."""
    gc.collect()  # else the garbage of other calls may be collected in this one's time
    start = CLOCKS[clock]()
    jax.block_until_ready(call())
    return CLOCKS[clock]() - start


def spread(values: list[float]) -> dict[str, float]:
    """Median, its 95% interval by bootstrap, and range."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    middle = {"median": statistics.median(values), "low": float(low), "high": float(high)}
    return {**middle, "min": min(values), "max": max(values)}


def alternate(
    sides: dict[str, Callable[[], Any]], repeats: int = 10, warm_up: int = 2, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of each side, called in turn (a machine whose speed drifts slows both)."""
    for call in sides.values():
        for _ in range(warm_up):
            jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        # Whoever goes first finds the other's data in the cache: take turns at that as well.
        for name in list(sides)[:: 1 if repeat % 2 else -1]:
            times[name].append(seconds(sides[name], clock))
    return times


def ratios(times: dict[str, list[float]], over: str, under: str) -> dict[str, float]:
    """Spread of the ratio over / under, pair by pair."""
    return spread([a / b for a, b in zip(times[over], times[under], strict=True)])


def compiled(function: Callable, *args: Any) -> tuple[Any, dict[str, float]]:
    """The compiled function and its compile time, FLOPs and temporary bytes."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    elapsed = time.perf_counter() - start
    memory, cost = program.memory_analysis(), program.cost_analysis()
    figures = {
        "compile_ms": 1e3 * elapsed,
        "flops": cost.get("flops", float("nan")) if cost else float("nan"),
        "temporary_bytes": memory.temp_size_in_bytes if memory else float("nan"),
    }
    return program, figures


def kernels(program: Any, call: Callable[[], Any]) -> Kernels:
    """Executions and seconds of each kind of kernel in one call, from JAX's profiler (CPU only).

    A kind is a kernel's result and its last JAX operation, and whether that is in a loop and of the
    backward pass: the names of layers and the numbers that XLA gives do not count.
    """
    instruction = re.compile(
        r"%(?P<name>\S+) = (?P<result>\w+\[[\d,]*\])\S* (?!call|conditional)[\w-]+\("
        r'(?:.*op_name="(?P<operation>[^"]*)")?'
    )
    kinds = {}
    for found in instruction.finditer(program.as_text()):
        operation = found["operation"] or "copy"
        places = [place for place in ("transpose(jvp", "while") if place in operation]
        kinds[found["name"]] = " ".join([*places, operation.split("/")[-1], found["result"]])
    seen: Kernels = defaultdict(lambda: (0, 0.0))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        path = next(pathlib.Path(folder).rglob("*.xplane.pb"))
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events if line.name != "python" else ():
                    if event.name in kinds:
                        count, total = seen[kinds[event.name]]
                        seen[kinds[event.name]] = count + 1, total + event.duration_ns / 1e9
    return dict(seen)


def options(doc: str, **defaults: int) -> argparse.Namespace:
    """--json PATH, --repeats, --clock and the benchmark's own integer options."""
    parser = argparse.ArgumentParser(description=doc.strip().splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each side")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what is timed [wall]")
    for name, default in defaults.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=default, help=f"default {default}")
    return parser.parse_args()


def report(figures: dict[str, Any], path: pathlib.Path | None) -> None:
    """Print the figures with device and versions, and write them as JSON."""
    figures = {
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "jax": jax.__version__,
        **figures,
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if path is not None:
        path.write_text(text + "\n")
