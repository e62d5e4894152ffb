"""Claim: on 64 TPU chips LAR costs a 3B training step next to nothing, by the TPU compiler itself.

    pip install -e ".[experiments,tpu]"
    python benchmarks/tpu.py [--topology v5:4x4x4] [--tensor 4] [--groups] [--json PATH]
        [--sides off unembedding every fused] [--times N]

No TPU is needed: libtpu compiles for a topology on any Linux CPU. The program is the training step
of the preset `3b` of `jlar pretrain` (8 layers, width 4,096, V = 128,256, full remat, FSDP x tensor
parallel), one sequence of 8,192 tokens per chip, or, for chips of 16 GB (v5e), one per group of
`tensor` chips with --groups: without LAR, with the unembedding's, with every matrix's, and with the
fused loss, which includes the unembedding's. XLA counts a scanned body once, so FLOPs, bytes,
seconds and collectives are extrapolated to 8 layers from programs of two and three unrolled ones
(of a single one XLA undoes the remat); peak memory is that of the scanned program of 8. Seconds are
the compiler's estimate (for v5e it gives negative ones: it has none there).

With --times the scanned step is compiled N times with every matrix's LAR and N times without, in
turns; what is compared then is the compiler's CPU time, which other work on the machine disturbs
less, and LAR may add a tenth.

A compilation takes a minute or more. With --json each is kept as soon as it is done, and what is
there is not compiled again. Topologies: v5:2x2x2 to v5:4x8x8 are v5p, v5e:2x4 to v5e:16x16 v5e.
"""

import argparse
import json
import math
import os
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu looks for the metadata of a cloud host
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jlar_experiments.pretraining import train
from jlar_experiments.pretraining.presets import PRESETS

SIDES = {
    "off": {"lar": "off", "loss": "plain"},
    "unembedding": {"lar": "unembedding", "loss": "plain"},
    "every": {"lar": "every", "loss": "plain"},
    "fused": {"lar": "unembedding", "loss": "fused"},
}
LAYERS = 8
# What the unembedding's LAR and every matrix's may add at 64 chips, as ratios.
LIMITS = {
    "unembedding": {"flops": 1.001, "seconds": 1.005, "peak_bytes": 1.005},
    "every": {"flops": 1.0003, "seconds": 1.004, "peak_bytes": 1.005},
}
MOST_TIME = 1.1  # of compiling, with every matrix's LAR
BITS = {"pred": 8, "s32": 32, "u32": 32, "f32": 32, "bf16": 16}
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collectives(text: str) -> tuple[int, float]:
    """How many collectives the program has, and the bytes of all their results."""
    found = re.findall(rf"= (.*?) (?:{COLLECTIVES})(?:-start)?\(", text)
    shapes = [each for result in found for each in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", result)]
    size = sum(
        BITS.get(dtype, 32) / 8 * math.prod(map(int, filter(None, dimensions.split(","))))
        for dtype, dimensions in shapes
    )
    return len(found), size


def compiled(
    topology: str, tensor: int, groups: bool, side: str, layers: int, unroll: int
) -> dict[str, float]:
    """What the compiler says of one training step."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    grid = np.array(devices).reshape(-1, tensor)
    mesh = Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    batch = len(grid) if groups else len(devices)
    config = PRESETS["3b"].config(
        layers=layers, unroll=unroll, tensor=tensor, batch=batch, **SIDES[side]
    )
    program = train.Program(config, mesh)
    jax.clear_caches()
    start = time.process_time()
    step = program.step.lower(program.abstract_state, program.abstract_batch).compile()
    cost, memory = step.cost_analysis(), step.memory_analysis()
    count, size = collectives(step.as_text())
    return {
        "compile_seconds": time.process_time() - start,
        "chips": len(devices),
        "sequences": batch,
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "seconds": cost["optimal_seconds"],
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "collectives": count,
        "collective_bytes": size,
    }


def whole(programs: dict[str, dict[str, float]]) -> dict[str, float]:
    """The step of 8 layers: memory as compiled, the rest from two and three layers."""
    two, three = ({k: v for k, v in programs[d].items() if k != "compile_seconds"} for d in "23")
    figures = {name: two[name] + (LAYERS - 2) * (three[name] - two[name]) for name in two}
    return {**figures, "peak_bytes": programs["scanned"]["peak_bytes"]}


def compile_times(topology: str, tensor: int, groups: bool, count: int) -> dict[str, Any]:
    """CPU seconds of compiling the scanned step without LAR and with that of every matrix."""
    seconds: dict[str, list[float]] = {"off": [], "every": []}
    for _ in range(count):
        for side, own in seconds.items():
            figures = compiled(topology, tensor, groups, side, LAYERS, 1)
            own.append(figures["compile_seconds"])
            print(f"{topology} {side}: compiled in {own[-1]:.1f} s of CPU time", flush=True)
    ratios = [a / b for a, b in zip(seconds["every"], seconds["off"], strict=True)]
    spread = {"median": float(np.median(ratios)), "least": min(ratios), "most": max(ratios)}
    return {"cpu_seconds": seconds, "ratio": spread}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", nargs="+", default=["v5:4x4x4"])
    parser.add_argument("--tensor", type=int, default=4, help="chips per matrix product")
    parser.add_argument(
        "--groups", action="store_true", help="one sequence per --tensor chips, not per chip"
    )
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--times", type=int, default=0, help="compare how long compiling takes")
    parser.add_argument("--json", type=Path, help="keep the figures here, and go on from them")
    args = parser.parse_args()
    kept: dict[str, Any] = {}
    if args.json and args.json.exists():
        kept = json.loads(args.json.read_text())
    versions = {"jax": jax.__version__, "libtpu": metadata.version("libtpu")}
    described = {"versions": versions, "tensor": args.tensor, "groups": args.groups}
    if kept and described != {name: kept.get(name, False) for name in described}:
        parser.error(f"{args.json} is not of {described}; choose another")
    kept = {**described, **kept}
    depths = {"2": (2, 2), "3": (3, 3), "scanned": (LAYERS, 1)}
    missed = []
    for topology in args.topology:
        for side in args.sides:
            programs = kept.setdefault(topology, {}).setdefault(side, {})
            for name, (layers, unroll) in depths.items():
                if name not in programs:
                    programs[name] = compiled(
                        topology, args.tensor, args.groups, side, layers, unroll
                    )
                    print(topology, side, name, json.dumps(programs[name]), flush=True)
                    if args.json:
                        args.json.write_text(json.dumps(kept, indent=1) + "\n")
        base = whole(kept[topology]["off"])
        print(f"{topology}: {base['chips']:.0f} chips, without LAR: {json.dumps(base)}")
        for side in args.sides:
            figures = whole(kept[topology][side])
            ratios = {name: figures[name] / base[name] for name in base if base[name]}
            print(f"{side:12s}", {name: round(ratio, 5) for name, ratio in ratios.items()})
            limits = LIMITS.get(side, {}) if base["chips"] == 64 else {}
            missed += [f"{side} {name}" for name, most in limits.items() if ratios[name] > most]
        if args.times:
            times = compile_times(topology, args.tensor, args.groups, args.times)
            kept[topology]["compile_times"] = times
            print(f"{topology}, compiling with every matrix over without: {times['ratio']}")
            missed += ["compile time"] if times["ratio"]["median"] > MOST_TIME else []
            if args.json:
                args.json.write_text(json.dumps(kept, indent=1) + "\n")
    assert not missed, f"missed: {missed}"


if __name__ == "__main__":
    main()
