"""Claim: `import jlar` takes less than 1.5x the time of `import equinox`.

python benchmarks/import_time.py [--json PATH] [--repeats 10]
"""

import subprocess
import sys

import _bench as bench


def main() -> None:
    """Run the benchmark: each import in a process of its own, in turn."""
    args = bench.options(__doc__ or "")
    sides = {
        name: lambda name=name: subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
        for name in ("jlar", "equinox")
    }
    times = bench.alternate(sides, args.repeats, warm_up=1)
    ratio = bench.ratios(times, "jlar", "equinox")
    bench.report({"repeats": args.repeats, "time_jlar_over_equinox": ratio}, args.json)
    assert ratio["median"] < 1.5, "import jlar takes more than 1.5x as long as import equinox"


if __name__ == "__main__":
    main()
