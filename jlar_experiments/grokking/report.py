"""The page of one run of `jlar grok` or several, from their files alone: nothing here trains."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import page
from ..ending import RULE, median, moved, number, spike
from ..panels import COLOURS, GREY, Curve, Dash, Panel
from ..report import names
from . import analysis
from .analysis import POINTS, Run, Timeline, title

Shown = tuple[str, str, Run]  # a name, a colour, the run

LAR = (
    "LAR, the log-alignment ratio of the unembedding (the last matrix) on the whole training set, "
    "says how far the data lies where the matrix is strong: near 1/2 where the two have nothing to "
    "do with each other, as at initialisation, and more as structure is learnt; it needs no "
    "validation data. A run has memorised at the first log with training accuracy above 99% and "
    "validation accuracy below 50%, and generalises (it has grokked) from the first with both "
    "above 99%."
)
LAR_CAPTION = (
    "LAR of the training data. Circle: memorised; star: generalises. A triangle is the monitor's "
    "first signal, which sees LAR and the training loss and nothing of the validation."
)
DIMENSIONS = (
    "k, the effective dimension n^(2(1-LAR)), is how many directions the data and the matrix share "
    "(n is the width); dotted: k95, the principal components that hold 95% of the variance of the "
    "data."
)
AGREEMENT = (
    "k95 against k at memorised (circle), grokked (star) and the last log (cross); grey: the "
    "paper's points at the same three. On the line they are equal."
)
SPECTRA = (
    "p, the share of the matrix's energy in each of its singular directions (line), and q, the "
    "share of the data's in the same direction (dotted): {}, seed {} of {}."
)
MARKS = {"memorised": "circle-open", "grokked": "star", "final": "x"}


def report(folders: Sequence[Path]) -> page.Report:
    """The report on the runs in these folders, in the same panels."""
    runs = [analysis.read(folder) for folder in folders]
    shown = list(zip(names(folders), itertools.cycle(COLOURS), runs, strict=False))
    lines = [line for run in runs for line in run.seeds.values()]
    made = page.Report(
        f"jlar grok: {title(runs[0].config)}" if len(runs) == 1 else f"jlar grok: {len(runs)} runs",
        _sentence(verdict(lines, runs)),
        "",
        finished=all(run.finished for run in runs),
    )
    made.add(page.paragraph(LAR))
    if len(runs) > 1:
        made.add(page.run_list([(colour, name, run_verdict(run)) for name, colour, run in shown]))
    ends = seeds_table(shown)
    made.add(page.table(ends), page.note(RULE))
    made.draw(_panels(shown))
    made.text = "\n".join(
        [page.wrapped(made.verdict), "", page.text(ends, below=[ends[0].index("val acc")])]
    )
    for name, _, run in shown:
        source, table = analysis.summary(run)
        note = f"The paper's columns are its mean (range) over its points: {source}."
        made.add(page.heading(f"The paper's points beside {name}'s"), page.table(table))
        made.add(page.note(note))
        if len(runs) == 1:
            made.text += f"\n\n{page.text(table, below=[6])}\n{page.wrapped(note)}"
    made.add(page.heading("Settings"), page.settings([_settings(run) for run in runs]))
    return made


def run_verdict(run: Run) -> str:
    """What is said of one run."""
    return verdict(list(run.seeds.values()), [run])


def verdict(lines: Sequence[Timeline], runs: Sequence[Run]) -> str:
    """In words: memorised when, generalises from when, and where LAR went."""
    lines = [line for line in lines if line.rows]
    said: list[str] = []
    memorised = [line.memorised for line in lines if line.memorised is not None]
    grokked = [line.grokked for line in lines if line.grokked is not None]
    end = max((line.epoch for line in lines), default=0)
    if memorised:
        said.append(f"{_of(memorised, lines)}memorised at epoch {_range(memorised)}")
    if grokked:
        without = "" if memorised else " without having memorised before"
        verb = "generalises" if len(lines) == 1 else "generalise"
        said.append(f"{_of(grokked, lines)}{verb} from {_range(grokked)}{without}")
    elif memorised:
        said.append(f"not generalising up to epoch {end}")
    else:
        said.append(f"the training pairs are not learnt by epoch {end}")
    words = ("" if len(lines) == 1 else f"{len(lines)} seeds: ") + ", ".join(said)
    if lines:
        starts = [row["lar"] for line in lines if (row := line.at("memorised") or line.rows[0])]
        words += "; " + moved(_middle(starts), _middle([end_of(line, "lar") for line in lines]))
    words += _spikes(lines)
    if not all(run.finished for run in runs):
        words += f"; not finished: epoch {end} of at most {max(r.config.epochs for r in runs)}"
    return words


def _spikes(lines: Sequence[Timeline]) -> str:
    """That seeds end on a loss spike, and of a single one how far it is above the median."""
    found = [line for line in lines if spike([row["train_loss"] for row in line.rows])]
    if not found:
        return ""
    if len(lines) > 1:
        return f"; {len(found)} of them end{'s' if len(found) == 1 else ''} on a loss spike"
    last, usual = found[0].rows[-1]["train_loss"], end_of(found[0], "train_loss")
    return (
        f"; ends on a loss spike: training loss {number(last)}, median of the last five logs "
        f"{number(usual)}"
    )


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _of(some: Sequence[int], all_of: Sequence[Timeline]) -> str:
    return "" if len(some) == len(all_of) else f"{len(some)} "


def _range(epochs: Sequence[int]) -> str:
    low, high = min(epochs), max(epochs)
    return str(low) if low == high else f"{low} to {high}"


def _middle(values: Sequence[float | None]) -> float:
    there = [np.nan if each is None else each for each in values]
    return float(np.median(there))


def end_of(line: Timeline, name: str) -> float:
    """The median of the last five logs."""
    return median([row[name] for row in line.rows])


def seeds_table(shown: Sequence[Shown]) -> list[list[str]]:
    """One line per seed: when it learnt, and how it ends: last log, median of the last five."""
    table = [["run", "seed", "memorised", "generalises", "train loss", "median of 5", "val acc",
              "median of 5", "LAR", "median of 5", "ends on a spike", "monitor"]]  # fmt: skip
    for name, _, run in shown:
        for seed, line in run.seeds.items():
            if line.rows:
                cells = [name, str(seed)]
                cells += ["-" if e is None else str(e) for e in (line.memorised, line.grokked)]
                for quantity in ("train_loss", "val_acc", "lar"):
                    cells += [number(line.rows[-1][quantity]), number(end_of(line, quantity))]
                losses = [row["train_loss"] for row in line.rows]
                heard = (f"{signal} {epoch}" for signal, epoch in analysis.rang(line).items())
                table.append([*cells, "yes" if spike(losses) else "no", ", ".join(heard) or "-"])
    return table if len(shown) > 1 else [row[1:] for row in table]


def _panels(shown: Sequence[Shown]) -> list[Panel]:
    both: dict[str, Dash] = {"val": "solid", "train": "dot"}
    words = "Full line: validation; dotted: training."
    return [
        Panel("LAR", LAR_CAPTION, "epoch", "LAR", [*_over(shown, "lar"), *_marked(shown)]),
        *(
            Panel(
                name.capitalize(),
                words,
                "epoch",
                name,
                [c for part, dash in both.items() for c in _over(shown, f"{part}_{short}", dash)],
                log=log,
            )
            for name, short, log in (("accuracy", "acc", ""), ("loss, nats", "loss", "y"))
        ),
        Panel(
            "Dimensions",
            DIMENSIONS,
            "epoch",
            "directions",
            [*_over(shown, "k_pred"), *_over(shown, "k95", "dot")],
            log="y",
        ),
        _agreement(shown),
        *_spectra(*shown[0]),
    ]


def _over(shown: Sequence[Shown], quantity: str, dash: Dash = "solid") -> list[Curve]:
    """A quantity of every seed over the epochs, in the colour of its run."""
    words = {"val_acc": "validation", "val_loss": "validation", "train_acc": "training",
             "train_loss": "training", "k_pred": "k", "k95": "k95", "lar": "LAR"}  # fmt: skip
    return [
        Curve(
            f"{words[quantity]}, {_named(shown, name, run, line)}",
            colour,
            [row["epoch"] for row in line.rows],
            [np.nan if row[quantity] is None else row[quantity] for row in line.rows],
            dash,
        )
        for name, colour, run in shown
        for line in run.seeds.values()
    ]


def _named(shown: Sequence[Shown], name: str, run: Run, line: Timeline) -> str:
    seed = f"seed {line.seed}"
    return seed if len(shown) == 1 else name if len(run.seeds) == 1 else f"{name} {seed}"


def _marked(shown: Sequence[Shown]) -> list[Curve]:
    """Where each seed memorised, generalised, and the monitor first said something."""
    curves = []
    for name, colour, run in shown:
        for line in run.seeds.values():
            points = {p: row for p in ("memorised", "grokked") if (row := line.at(p))}
            marks = {MARKS[point]: (point, row) for point, row in points.items()}
            for signal, epoch in list(analysis.rang(line).items())[:1]:
                row = next(row for row in line.rows if row["epoch"] == epoch)
                marks["triangle-down"] = (f"monitor: {signal}", row)
            for mark, (words, row) in marks.items():
                label = f"{words}, {_named(shown, name, run, line)}"
                curves.append(Curve(label, colour, [row["epoch"]], [row["lar"]], mark=mark))
    return curves


def _agreement(shown: Sequence[Shown]) -> Panel:
    ends = [5, max(run.config.width for _, _, run in shown)]
    curves = [Curve("equal", GREY, ends, ends, width=1)]
    for point, mark in MARKS.items():
        kind = analysis.paper_point(point, any(run.grokked for _, _, run in shown))
        _, points = analysis.reference(shown[0][2].config)
        rows = [each for each in points if each["checkpoint"] == kind]
        k_pred, k95 = ([float(each[name]) for each in rows] for name in ("k_pred", "k95"))
        curves.append(Curve(f"paper, {kind.replace('_', ' ')}", GREY, k_pred, k95, mark=mark))
    for name, colour, run in shown:
        for point, mark in MARKS.items():
            rows = [row for line in run.seeds.values() if (row := line.at(point))]
            k_pred, k95 = (
                [np.nan if r[of] is None else r[of] for r in rows] for of in ("k_pred", "k95")
            )
            curves.append(Curve(f"{point}, {name}", colour, k_pred, k95, mark=mark))
    return Panel("k95 against k", AGREEMENT, "k", "k95", curves, log="xy", together=False)


def _spectra(name: str, colour: str, run: Run) -> list[Panel]:
    """p and q of the first seed at each point."""
    found = []
    rows = [row for row in run.spectra if row["point"] in POINTS]
    for row in (each for each in rows if each["seed"] == rows[0]["seed"]):
        index = np.arange(1, len(row["p"]) + 1)
        # The null space has no place on a logarithmic axis.
        p, q = (np.where(np.array(row[of]) > 1e-7, row[of], np.nan) for of in "pq")
        curves = [Curve("p, weights", colour, index, p), Curve("q, data", colour, index, q, "dot")]
        words = SPECTRA.format(f"{row['point']}, epoch {row['epoch']}", row["seed"], name)
        label = f"Spectra: {row['point']}"
        found.append(Panel(label, words, "direction i", "share of energy", curves, log="y"))
    return found


def _settings(run: Run) -> dict[str, object]:
    """What this run was trained with, and on what."""
    environment = {name: run.environment[name] for name in run.environment if name != "study"}
    return {**vars(run.config), **environment.pop("versions", {}), **environment}
