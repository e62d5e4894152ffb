"""The tables and the page over all runs of a preset, from records alone."""

import dataclasses
from pathlib import Path

import numpy as np

from .. import page
from ..errors import Refusal
from . import figures
from .analysis import Pair, Run, declines, floors, pairs, paper_declines, pearson, short, spearman
from .config import TOP

PAPER_PEAKS = {"adam": ".676", "muon": ".688"}  # of LAR, section 5
NOTE = (
    "D is LAR of the baseline (most data, same optimiser and seed where it was run) less LAR of "
    "the run, at the steps validated in both after the first tenth; 'end' is a mean over the last "
    "tenth. loss: the training loss of the baseline less that of the run, a comparator that needs "
    "no LAR. matched: D against the baseline when its training loss was the same, its mean over "
    "all steps where there was such a time, and their share."
)
TABLE_2 = (
    "Rate of decline of LAR, times 10^-4 per tenth of the run, in the tenths after the first (the "
    "paper's table 2 is per 1000 of its 10,000 steps); - before LAR's peak, * up to three tenths "
    "that end at overfitting. The paper's model has 3B parameters."
)
LEADING = (
    "Of the unembedding on the last training batch: ratios of neighbouring singular values s and "
    "shares p and q of the first two directions, the top-k split LAR = L_k + D_k, Pearson's "
    "correlation of p and q. The paper's line is what its text says of its runs after step 2000."
)
# Section 5 and appendix C of arXiv 2605.28975; what it does not say is "-".
PAPER_LEADING = {
    "s1/s2": "about 3",
    "p1": ".04-.07",
    "q1": "near .04, less if overfitting",
    "q1/q2": "1.1-4.0, median 2.3",
    "corr": "above .9",
    "stable rank": "15-20",
}


def write(folder: Path) -> str:
    """Draw the figures and report.html of the runs in this folder; returns the table as text."""
    runs = figures_runs(folder)
    with page.figures(folder) as drafts:
        drawn = figures.draw(runs, drafts)
    compared, table = comparison(runs), overview(runs)
    blocks = [page.table(table)]
    if len(compared) > 1:
        blocks += [page.heading("The differential and its controls"), page.table(compared)]
        blocks.append(page.note(NOTE))
    blocks += [page.figure(name, caption) for name, caption in drawn.items()]
    blocks += [page.heading("Rate of decline"), page.table(decline_table(runs))]
    blocks.append(page.note(TABLE_2))
    if len(leading := leading_table(runs)) > 2:
        blocks += [page.heading("The leading directions, at the end"), page.table(leading)]
        blocks.append(page.note(LEADING))
    blocks += [page.heading("Settings"), page.table(_settings(runs))]
    path = page.write(folder, f"jlar pretrain: {runs[0].preset}", blocks)
    said = [page.text(table)]
    if len(compared) > 1:
        said += ["", page.text(compared), NOTE]
    return "\n".join([*said, f"Written to {path}"])


def figures_runs(folder: Path) -> list[Run]:
    """The runs of the folder; `Refusal` if there is none to report on."""
    from .analysis import read

    runs = read(folder)
    if not runs:
        raise Refusal(f"{folder} holds no records of a run with two steps or more")
    return runs


def overview(runs: list[Run]) -> list[list[str]]:
    """One line per run: what it saw, where LAR peaked and ended, and when it overfitted."""
    header = ["run", "seed", "epochs", "steps", "LAR start", "peak", "at step", "end", "paper peak",
              "train loss", "val loss", "lowest val", "at step", "alarm", "tokens/s"]  # fmt: skip
    table = [header]
    for run in runs:
        losses, end = run.curve("val_loss")[run.validated], len(run.lar) // 10 or 1
        peak = int(np.argmax(run.lar))
        table.append(
            [
                run.label,
                str(run.config.seed),
                f"{run.config.epochs:.3g}",
                str(len(run.rows)),
                f"{run.lar[0]:.3f}",
                f"{run.lar[peak]:.3f}",
                str(peak),
                f"{run.lar[-end:].mean():.3f}",
                PAPER_PEAKS.get(run.config.optimiser, "-"),
                f"{run.train_loss[-1]:.3f}",
                f"{losses[-1]:.3f}",
                f"{losses.min():.3f}",
                f"{run.overfitting_step}{'' if run.overfits else ' (no overfitting)'}",
                run.alarm,
                f"{np.median(run.curve('tokens_per_second')):,.0f}",
            ]
        )
    return table


def comparison(runs: list[Run]) -> list[list[str]]:
    """One line per pair of a run and its baseline, then baselines with each other."""
    table = [["run", "seed", "n logs", "gap end", "D end", "D: r", "rho", "loss: r", "rho",
              "matched D", "share"]]  # fmt: skip
    return table + [_line(p, p.run.label) for p in pairs(runs)] + [
        _line(p, f"baseline of seed {p.base.config.seed} less this") for p in floors(runs)
    ]  # fmt: skip


def _line(pair: Pair, label: str) -> list[str]:
    there = ~np.isnan(pair.matched)
    return [
        label,
        str(pair.run.config.seed),
        str(len(pair.steps)),
        f"{pair.final(pair.gap):.3f}",
        f"{pair.final(pair.D):.4f}",
        *(f"{measure(pair.D, pair.gap):.3f}" for measure in (pearson, spearman)),
        *(f"{measure(pair.loss_difference, pair.gap):.3f}" for measure in (pearson, spearman)),
        f"{pair.matched[there].mean():.4f}" if there.any() else "-",
        f"{there.mean():.0%}",
    ]


def decline_table(runs: list[Run]) -> list[list[str]]:
    """Table 2: ours, one column per run of the first seed, and the paper's beside."""
    first = min(run.config.seed for run in runs)
    ours = {r.label: declines(r) for r in runs if r.config.seed == first}
    paper = {f"paper {name.replace('_', ' ')}": cells for name, cells in paper_declines().items()}
    columns = {**ours, **paper}
    table = [["tenth of the run", *columns]]
    for window in range(9):
        cells = [column[window] for column in columns.values()]
        shown = [
            "-" if np.isnan(value) else f"{1e4 * value:.0f}{'*' if leads else ''}"
            for value, leads in cells
        ]
        table.append([str(window + 2), *shown])
    return table


def leading_table(runs: list[Run]) -> list[list[str]]:
    """One line per run: the first directions of its last inspection; then the paper's."""
    split = [f"{letter}{k}" for k in TOP for letter in "LD"]
    header = ["run", "seed", "s1/s2", "p1", "q1", "q1/q2", "corr", "stable rank", *split]
    table = [header]
    for run in runs:
        if run.inspections:
            row = run.inspections[-1]
            (p1, p2), (q1, q2) = row["p"][:2], row["q"][:2]
            cells = [(p1 / p2) ** 0.5, p1, q1, q1 / q2, row["corr"], row["stable_rank"]]
            cells += [row.get(name, np.nan) for name in split]
            table.append([run.label, str(run.config.seed), *(f"{each:.3f}" for each in cells)])
    return [*table, ["the paper's", "-", *(PAPER_LEADING.get(name, "-") for name in header[2:])]]


def _settings(runs: list[Run]) -> list[list[str]]:
    """What all runs share, and the machine of the first."""
    table = [["setting", "value"]]
    for each in dataclasses.fields(runs[0].config):
        values = list(dict.fromkeys(str(getattr(run.config, each.name)) for run in runs))
        if each.name == "unique_tokens":
            values = [short(int(value)) for value in values]
        table.append([each.name, ", ".join(values)])
    environment = dict(runs[0].environment)
    versions = environment.pop("versions", {})
    table += [[name, str(value)] for name, value in {**versions, **environment}.items()]
    return table
