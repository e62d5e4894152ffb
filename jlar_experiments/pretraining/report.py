"""The page of one run of `jlar pretrain` or several, from records alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jlar.monitor import Monitor

from .. import page
from ..ending import RULE, median, moved, number, share, spike
from ..errors import Refusal
from ..logs import Log
from ..monitoring.verdict import verdict as heard
from ..monitoring.verdict import watched
from .analysis import (
    Pair,
    Run,
    declines,
    floors,
    pairs,
    paper_declines,
    pearson,
    read,
    spearman,
)
from .config import TOP
from .curves import coloured, panels

PAPER_PEAKS = {"adam": ".676", "muon": ".688"}  # of LAR, section 5
LAR = (
    "LAR, the log-alignment ratio of the unembedding (the last matrix) on each training batch, "
    "says how far the data lies where the matrix is strong: near 1/2 at initialisation, more as "
    "structure is learnt, and less again, against a run whose data does not repeat, where it "
    "overfits. It needs no validation data. A run overfits where the mean of five validation "
    "losses ends 2% above the lowest such mean, from the step of its lowest validation loss. The "
    "monitor, which hears LAR alone, is on small models no better an alarm than the same on the "
    "training loss, and worse without a baseline."
)
NOTE = (
    "D is LAR of the baseline (most data, same optimiser and seed where it was run) less LAR of "
    "the run, at the steps validated in both after the first tenth; r and rho are its correlations "
    "with the gap, validation less training loss, over n logs; 'end' is a mean over the last "
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


def report(folders: Sequence[Path]) -> page.Report:
    """The report on the runs that these folders are or hold, in the same panels."""
    runs = read(*folders)
    if not runs:
        raise Refusal(f"{folders[0]} holds no records of a run with two steps or more")
    one, colours = len(runs) == 1, coloured(runs)
    made = page.Report(
        f"jlar pretrain: {runs[0].name if one else f'{len(runs)} runs'}",
        verdict(runs),
        "",
        finished=all(run.finished for run in runs),
    )
    made.add(page.paragraph(LAR))
    if not one:
        made.add(page.run_list([(colours[run.name], run.name, said(run)) for run in runs]))
    table, compared = overview(runs), comparison(runs)
    made.add(page.table(table), page.note(RULE))
    made.draw(panels(runs))
    blocks = [("The differential D and its controls", compared, NOTE)] * (len(compared) > 1)
    blocks += [("Rate of decline", decline_table(runs), TABLE_2)]
    if len(leading := leading_table(runs)) > 2:
        blocks += [("The leading directions, at the end", leading, LEADING)]
    for title, rows, note in blocks:
        made.add(page.heading(title), page.table(rows), page.note(note))
    made.add(page.heading("Settings"), page.settings([_settings(run) for run in runs]))
    made.text = f"{page.wrapped(made.verdict)}\n\n{page.text(table)}"
    if len(compared) > 1:
        made.text += f"\n\n{page.text(compared)}\n{page.wrapped(NOTE)}"
    return made


def verdict(runs: Sequence[Run]) -> str:
    """In words: which runs overfit and since when."""
    if len(runs) == 1:
        words = said(runs[0])
        return words[:1].upper() + words[1:]
    steps = [run.overfitting_step for run in runs if run.overfits]
    words = f"{len(steps)} of {len(runs)} runs overfit"
    if steps:
        low, high = min(steps), max(steps)
        words += f", from step {low}" + (f" to {high}" if high > low else "")
    rang = [run for run in runs if run.alarms]
    if any(run.alarm != "not watched" for run in runs):
        right = sum(run.overfits for run in rang)
        words += f"; the monitor rang in {right} of these and in {len(rang) - right} others"
        if unknown := sum(monitored(run).startswith("cannot tell") for run in runs):
            words += f", and cannot tell of {unknown}"
    if spikes := sum(spike(_losses(run)) for run in runs):
        words += f"; {spikes} end on a loss spike"
    if left := sum(not run.finished for run in runs):
        words += f"; {left} are not finished"
    return words


def said(run: Run) -> str:
    """What is said of one run: overfitting by its validation loss, then the monitor and LAR."""
    last = run.rows[-1]["step"]
    losses = run.curve("val_loss")[run.validated]
    if run.overfits:
        words = (
            f"overfits from step {run.overfitting_step}: the validation loss goes from "
            f"{losses.min():.2f} to {losses[-1]:.2f}"
        )
    else:
        words = f"no overfitting up to step {last}: the validation loss ends at {losses[-1]:.2f}"
    if run.alarm != "not watched":
        words += f"; the monitor, which sees no validation loss, {monitored(run)}"
    if not np.isnan(run.lar).all():
        peak, end = np.nanmax(run.lar), median(run.lar.tolist())
        words += f"; {moved(run.lar[0], peak)}"
        words += f" and ends at {share(end)}" if peak - end >= 0.01 else ""
    if spike(_losses(run)):
        words += (
            f"; ends on a loss spike: training loss {number(_losses(run)[-1])}, median of the last "
            f"five logs {number(median(_losses(run)))}"
        )
    if not np.isfinite(run.curve("train_loss")[-1]):
        words += "; the training loss ends as no number"
    if not run.finished:
        words += f"; not finished: step {last + 1} of {run.config.steps}"
    return words


def monitored(run: Run) -> str:
    """What the monitor says of a run: whether it rang while it trained, and if it did not, whether
    that says anything, by what `jlar watch` says of the run alone.
    """
    if run.alarms:
        return f"rang at step {run.alarm}"
    there = np.isfinite(run.lar)
    step, loss = run.curve("step")[there], run.curve("train_loss")[there]
    log = Log(step, run.lar[there], loss)
    if not len(log.step):
        return "cannot tell: LAR was never a number"
    start = Monitor.init(n=run.config.width, second_epoch=run.config.sequences / run.config.batch)
    why = heard(*watched(start, log, None), log, None)["cannot_tell_because"]
    return f"cannot tell: {'; '.join(why)}" if why else "did not ring"


def _losses(run: Run) -> list[float]:
    return run.curve("train_loss").tolist()


def overview(runs: Sequence[Run]) -> list[list[str]]:
    """One line per run: what it saw, where LAR peaked and ended, and when it overfitted."""
    table = [["run", "epochs", "train loss", "median of 5", "val loss", "lowest",
              "overfits from", "alarm", "LAR peak", "at step", "end", "paper peak",
              "tokens/s"]]  # fmt: skip
    for run in runs:
        losses, lars, end = run.curve("val_loss")[run.validated], run.lar, len(run.lar) // 10 or 1
        peak = None if np.isnan(lars).all() else int(np.nanargmax(lars))
        table.append(
            [
                run.name,
                f"{run.config.epochs:.3g}",
                number(_losses(run)[-1]),
                number(median(_losses(run))),
                f"{losses[-1]:.3f}",
                f"{losses.min():.3f}",
                str(run.overfitting_step) if run.overfits else "-",
                run.alarm,
                "-" if peak is None else number(lars[peak]),
                "-" if peak is None else str(peak),
                number(float(lars[-end:].mean())),
                PAPER_PEAKS.get(run.config.optimiser, "-"),
                f"{np.median(run.curve('tokens_per_second')):,.0f}",
            ]
        )
    return table


def comparison(runs: Sequence[Run]) -> list[list[str]]:
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


def decline_table(runs: Sequence[Run]) -> list[list[str]]:
    """Table 2: one line per run of the first seed, then the paper's."""
    first = min(run.config.seed for run in runs)
    lines = {r.label: declines(r) for r in runs if r.config.seed == first}
    lines |= {f"paper {name.replace('_', ' ')}": cells for name, cells in paper_declines().items()}
    table = [["tenth of the run", *(str(tenth) for tenth in range(2, 11))]]
    for name, cells in lines.items():
        shown = ("-" if np.isnan(v) else f"{1e4 * v:.0f}{'*' * leads}" for v, leads in cells)
        table.append([name, *shown])
    return table


def leading_table(runs: Sequence[Run]) -> list[list[str]]:
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


def _settings(run: Run) -> dict[str, object]:
    """What this run was trained with, and on what."""
    environment = {name: run.environment[name] for name in run.environment if name != "study"}
    return {**vars(run.config), **environment.pop("versions", {}), **environment}
