"""What the results page says is what the committed records give."""

import csv
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jlar_experiments.grokking import (
    analysis,
    beyond,
    dating,
    dip,
    intervention,
    plates,
    results,
)
from jlar_experiments.monitoring import redundancy
from jlar_experiments.pretraining import beyond_loss, variants

RESULTS = Path(beyond_loss.__file__).parents[1] / "results"
PAGE = (RESULTS / "README.md").read_text(encoding="utf-8")


def short(value: float) -> str:
    return f"{value:.3f}".lstrip("0")


def test_the_table_of_five_seeds():
    lines = (RESULTS / "grok-x+y-50-seeds" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    points: dict[str, list[tuple[float, ...]]] = {"memorised": [], "grokked": [], "final": []}
    for seed in range(5):
        own = [row for row in rows if row["seed"] == seed]
        known = [row for row in own if row["train_acc"] > 0.99]
        groks = [row for row in known if row["val_acc"] > 0.99]
        for name, row in zip(points, (known[0], groks[0], own[-1]), strict=True):
            points[name].append((row["epoch"], row["lar"], row["k_pred"], row["k95"]))
    for name, values in points.items():
        mean, spread = np.mean(values, axis=0), np.std(values, axis=0, ddof=1)
        cells = [f"{m:.0f} ± {s:.0f}" for m, s in zip(mean, spread, strict=True)]
        cells[1] = f"{short(mean[1])} ± {short(spread[1])}"
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {' | '.join(cells)} |" in line


def test_the_table_of_what_lar_says_beyond_the_loss():
    with beyond_loss.TABLE.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["against"] == "baseline"]
    for row in rows:
        partial = f"{row['r of D given the losses']} ({row['95% interval']})"
        cells = (f"{row['preset']}: {row['run']}", row["r of D"], row["r of losses"], partial)
        assert f"| {' | '.join(cells)} | {row['independent']} |" in PAGE


def test_the_checks_of_appendix_d():
    for cells in variants.checks()[1:]:
        assert f"| {' | '.join(cells)} |" in PAGE


def test_the_table_of_sizes():
    for cells in variants.scale()[1:]:
        assert f"| {' | '.join(cells)} |" in PAGE
    text = " ".join(PAGE.split())
    assert "{:.2f} ({:.2f} to {:.2f}, 95%".format(*variants.predicted(variants.points())) in text


def test_the_table_of_predicted_gaps():
    found = redundancy.analysis(RESULTS / "redundancy")
    errors = found["configurations"]
    for times in redundancy.REPETITIONS:
        own = [errors[f"{way} x {times}"] for way in redundancy.WAYS]
        less = sum(each["with"] < each["without"] for each in own)
        means = [np.mean([each[name] for each in own]) for name in ("without", "with")]
        cells = f"{short(means[0])} | {short(means[1])} | {less} of 5 |"
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| {times} time"))
        assert line.endswith(cells)
    low, high = found["interval"]
    said = f"falls by {found['fall']:.0%} (95% interval {100 * low:.0f} to {high:.0%}"
    assert said in " ".join(PAGE.split())


def test_the_tables_of_section_4():
    runs = results.read(RESULTS / "paper-grokking")
    page = PAGE.replace(r"x/y\|x-y", "x/y|x-y")  # in Markdown a bar ends a cell
    for cells in results.table1(runs)[1:]:
        assert f"| {' | '.join(cells)} |" in page
    for run in runs:
        if run.config.seed:  # the second table is of seed 0
            continue
        [line] = run.seeds.values()
        cells = [plates.label(run.config)]
        for row in map(line.at, analysis.POINTS):
            numbers = row and f"{row['k_pred']:.1f}, {row['k95']:.0f}"
            cells.append(f"{row['epoch']}, {short(row['lar'])}, {numbers}" if row else "-")
        rings = [row["epoch"] for row in line.rows if "grokking" in row["alarms"]]
        cells += [f"{line.rows[-1]['val_acc']:.0%}", str(rings[0] if rings else "never")]
        assert f"| {' | '.join(cells)} |" in page


def table(name: str) -> list[list[str]]:
    """A file of the small relative's tables, with its header."""
    with (RESULTS / "relative" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.reader(file))


def test_the_tables_of_the_small_relative():
    """Each file of the folder, to the digit, from the packed logs of its runs."""
    runs = results.read(RESULTS / "relative")
    tables = {name: rows for name, (_, _, rows) in beyond.tables(runs).items()}
    for name, rows in {**tables, "runs": plates.runs_table(runs)}.items():
        assert table(name) == rows


def test_the_table_of_where_it_holds():
    """A line is the range, over six set-ups, of the means that where.csv has of each."""
    header, *rows = table("where")
    groups = {"one-hot MLP, width 256": table("mlp")[1:]}
    groups["the default (post, untied, scale 1, decay)"] = [r for r in rows if r[0] == "default"]
    norms = {"pre-no-final": "pre, no final norm", "pre": "pre with a final norm"}
    for row in rows:
        words = row[0].split(", ")
        name = f"{norms.get(words[0], 'post')}, {'tied' if 'tied' in words else 'untied'}"
        groups.setdefault(name, []).append(row)
    for name, own in groups.items():
        cells = []
        for column in ("LAR", "k", "k95", "k/k95", "spread of p", "spread of q"):
            ends = (row[header.index(column)].split(" -> ") for row in own)
            digits = {"LAR": 3, "k/k95": 2}.get(column, 0)
            cells.append(" to ".join(span(values, digits) for values in zip(*ends, strict=True)))
        assert f"| {name} | {' | '.join(cells)} |" in PAGE.replace("**", "")


def span(values: Sequence[str], digits: int) -> str:
    """The least and the greatest, or the one that there is."""
    ends = (f(float(value) for value in values) for f in (min, max))
    return "-".join(dict.fromkeys(f"{end:.{digits}f}".removeprefix("0") for end in ends))


def test_what_is_said_of_where_it_holds():
    own = [row for row in table("runs")[1:] if row[0].startswith("x+y mod 31, 60%")]
    own = [row for row in own if not any(w in row[0] for w in ("weight decay", "labels", "mlp"))]
    there = [row for row in own if float(row[-1]) > 0.95]
    text = " ".join(PAGE.split())
    assert f"In the {len(there)} of the {len(own)} runs that end above 95%" in text
    kinds = (True, "of k95 with post-norm or a final norm"), (False, "of it without")
    for final_norm, words in kinds:
        chosen = [row for row in there if ("pre-no-final" not in row[0]) is final_norm]
        ratios = [float(row[12]) / float(row[13]) for row in chosen]
        low, high, middle = (f"{f(ratios):.2f}".removeprefix("0") for f in (min, max, np.median))
        assert f"{low} to {high} {words} (median {middle}, n = {len(ratios)})" in text


def test_how_often_grokking_rings_in_the_small_relative():
    ratios, others, reaching = [], [], 0
    for run in results.read(RESULTS / "relative"):
        for line in run.seeds.values() if run.config.model == "transformer" else ():
            epochs = [row["epoch"] for row in line.rows if "grokking" in row["alarms"]]
            reached = dating.crossing(line, 0.95)
            if reached is None:
                others.append(bool(epochs))
            else:
                ratios += [epochs[0] / reached] if epochs else []
                reaching += 1
    low, high = (f"{f(ratios):.2f}".removeprefix("0") for f in (min, max))
    before, median = sum(ratio < 1 for ratio in ratios), np.median(ratios)
    text = " ".join(PAGE.split())
    assert f"{len(ratios)} of the {reaching} runs that reach 95%" in text
    assert f"{low} to {high} times the epoch of that (median {median:.2f}, {before} times" in text
    assert f"in {sum(others)} of the {len(others)} that do not" in text


def test_the_dips():
    found: dict[tuple[int, int], dict[int, list[float]]] = {}
    for batch, pairs, seed, _, lar in dip.read(RESULTS / "dip"):
        found.setdefault((pairs, batch), {}).setdefault(seed, []).append(lar)
    means = {key: np.mean([dip.dip(lars) for lars in own.values()]) for key, own in found.items()}
    of_batches = [f"{means[4704, size]:.2f}".lstrip("0") for size in (128, 512, 2048, 4704)]
    of_sets = [f"{means[size, 512]:.2f}".lstrip("0") for size in (470, 941, 1882, 2823, 4704)]
    text = " ".join(PAGE.split())
    for values in (of_batches, of_sets):
        assert f"({', '.join(values[:-1])} and {values[-1]} " in text


def test_the_table_of_pushing_lar():
    found = intervention.analysis(intervention.read(RESULTS / "intervention"))
    names = {"none": "no term", "lar": "LAR", "norm": "weight norm", "rank": "stable rank"}
    for arm, row in found.items():
        term, _, decay = arm.partition(", weight decay ")
        name = names.get(term.rstrip("+-"), "") + {"+": " up", "-": " down"}.get(term[-1], "")
        if decay == "0":
            assert row["reach 95%"] == 0
        elif not term.startswith("random"):
            line = next(line for line in PAGE.splitlines() if line.strip("| *").startswith(name))
            reach, ratio, p, *end = (cell.strip(" *") for cell in line.split("|")[2:-1])
            assert reach.startswith(f"{row['reach 95%']} of 10")
            wanted = f"{row['median ratio']:.2f}".lstrip("0") if ratio not in ("", "1") else ratio
            assert ratio.replace("*", "").split(" ")[0] == wanted
            assert term == "none" or p == short(row["sign test p"])
            assert end[0] == f"{row['LAR at the end']:.2f}".lstrip("0")
            accuracies = (row[f"{each} accuracy at the end"] for each in ("validation", "training"))
            assert end[1:] == [f"{each:.0%}" for each in accuracies]


def test_the_table_of_pushing_gently():
    found = intervention.analysis(intervention.read(RESULTS / "intervention-gentle"))
    names = {"none": "no term", "lar": "LAR", "norm": "weight norm", "rank": "stable rank"}
    names["random"] = "random direction"
    for arm, row in found.items():
        term = arm.partition(",")[0]
        name = names[term.rstrip("+-")] + {"+": " up", "-": " down"}.get(term[-1], "")
        ratio = f"{row['median ratio']:.2f}" if math.isfinite(row["median ratio"]) else "-"
        of_lar = f"{row['LAR at the end']:.2f}"
        accuracies = (
            f"{row[f'{each} accuracy at the end']:.0%}" for each in ("validation", "training")
        )
        cells = (
            f"{row['reach 95%']} of 10",
            ratio,
            f"{row['sign test p']:.3f}",
            of_lar,
            *accuracies,
        )
        line = f"| c = .3: {name} | {' | '.join(cells)} |"
        assert re.sub(r"(?<![0-9])0\.", ".", line) in PAGE.replace("**", "")


def test_the_table_of_alarms():
    found = json.loads((RESULTS / "monitor" / "judge.json").read_text(encoding="utf-8"))
    for half in ("judge", "study"):
        for name, row in found[half]["table"].items():
            cells = f"| {row['rings']} | {row['before the lowest']} |"
            lines = [line for line in PAGE.splitlines() if name.split(",")[-1] in line]
            regret = f"{row['regret']:.3f}" if row["regret"] < 1 else f"{row['regret']:.2f}"
            wanted = f"| {regret.removeprefix('0')} {cells}"
            assert any(wanted in line for line in lines), (half, name, wanted)
