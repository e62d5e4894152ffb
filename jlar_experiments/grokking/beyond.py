"""Past the paper, as tables from records alone: which k, dating, comparators, where it holds."""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from ..records import Row
from .analysis import SHARE, Run, Timeline
from .config import GrokConfig
from .dating import KINDS, Kind, Rule, chosen, crossing, score, series
from .plan import SMALL_P
from .plates import cells, label, lines

Table = list[list[str]]
CANDIDATES = ("k95", "logits_rank99", "fourier_k99", "logits_pr")
WEIGHTS = ("stable_rank", "effective_rank", "pr_p", "weight_norm", "alpha")
MEASURES = ("k_pred", "pr_q", "k95", "logits_pr", "logits_rank99", *WEIGHTS)
OTHERS = ("k_pred", "k_pred/k95", "pr_q/pr_p", "q_in_top95", "k95", "effective_rank")


def tables(runs: Sequence[Run]) -> dict[str, tuple[str, str, Table]]:
    """Name -> title, caption and rows; a table without records has its header only."""
    small = [run for run in runs if run.config.p == SMALL_P]
    mlp = [run for run in runs if run.config.model == "mlp"]
    dated = [run for run in small if _is_default(run.config)]
    where = [run for run in small if run not in mlp and _plain_task(run.config)]
    first, second = halves(dated)
    changed = lines(run for run in where if not _is_default(run.config))
    rules = tuple(chosen(first, "k_pred", kind, falls=True) for kind in KINDS)
    readings = comparators(first, changed, OTHERS, KINDS)
    return {
        "which_k": ("Which definition of the effective dimension k predicts", WHICH, which_k(runs)),
        "dating": ("Dating without validation data", DATING, dating(dated, rules)),
        "comparators": ("Comparators, by the same rule", COMPARED, comparators(first, second)),
        "where": ("Where it holds: x+y mod 31", WHERE, where_it_holds(where, rules)),
        "readings": ("Other readings in these set-ups", READINGS, readings),
        "mlp": ("The one-hot MLP, without a bottleneck", MLP, where_it_holds(mlp, rules)),
    }


WHICH = (
    "At the final point of every run that grokked: geometric mean of candidate / k (standard "
    "deviation of its logarithm). fourier_k99: the irreducible components of functions of the "
    "answer, for integers 2 per frequency, that hold 99% of the logits' power."
)
DATING = (
    "Thresholds chosen on the first half of the runs alone. Epochs of 50% and 95% validation "
    "accuracy are interpolated; the alarm counts from memorisation (training accuracy above 99%)."
)
COMPARED = (
    "Rule and threshold of each measure are chosen on the first half in the same way and judged on "
    "the second. lag: alarm minus the epoch of 95% validation accuracy."
)
WHERE = (
    "Means over seeds, from the first log with training accuracy above 99% to the end; spread is "
    "the participation ratio. dated: runs whose 95% was dated to within 25% by the rules of the "
    "dating table, ratio and slope."
)
READINGS = (
    "As the table of the comparators, with rules of both kinds and of either direction; the second "
    "half is the set-ups above other than the default. a/b: the ratio of two measures."
)
MLP = "Columns as above, dated by the rules of the smaller relative."


def halves(runs: Iterable[Run]) -> tuple[list[Timeline], list[Timeline]]:
    """Runs to choose thresholds on, and runs to judge them on."""
    first, second = [], []
    for run in runs:
        same = run.config.train_fraction == 0.6 and not run.config.shuffled_labels
        half = first if same and run.config.task in ("x+y", "x/y") else second
        half.extend(lines([run]))
    return first, second


def which_k(runs: Sequence[Run]) -> Table:
    """Candidate over k, and over k times the share of q in W's top-95% space."""
    table = [["candidate", "default set-up: / k", "/ (k x share)", "n", "other: / k", "n"]]
    own = [run for run in runs if run.config.model == "transformer"]
    plain = [run for run in own if _is_default(run.config)]
    others = [run for run in own if not _is_default(run.config)]
    for name in CANDIDATES:
        one, two = _ratios(plain, name, False), _ratios(plain, name, True)
        more = _ratios(others, name, False)
        cells = [_geometric(one), _geometric(two), str(len(one)), _geometric(more), str(len(more))]
        table.append([name, *cells])
    return table if any(row[3] != "0" for row in table[1:]) else table[:1]


def _is_default(config: GrokConfig) -> bool:
    changed = ("model", "norm", "embedding_scale", "tied", "decay_gains")
    return all(getattr(config, name) == getattr(GrokConfig, name) for name in changed)


def _plain_task(config: GrokConfig) -> bool:
    plain = config.task == "x+y" and config.weight_decay and not config.shuffled_labels
    return bool(plain) and config.train_fraction == 0.6


def _ratios(runs: Iterable[Run], name: str, share: bool) -> list[float]:
    found = []
    for run in runs:
        for line in run.seeds.values():
            row = line.at("final")
            # A run that ended with its epochs may have been stopped within the transition.
            long = line.grokked is not None and line.epoch >= line.grokked + run.config.after_grok
            if long and row and row.get(name):
                found.append(row[name] / row["k_pred"] / (row["q_in_top95"] if share else 1))
    return found


def _geometric(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    logs = np.log(ratios)
    return (
        f"{math.exp(logs.mean()):.2f} ({logs.std(ddof=1):.2f})"
        if len(logs) > 1
        else f"{math.exp(logs[0]):.2f}"
    )


def dating(runs: Sequence[Run], rules: Sequence[Rule]) -> Table:
    """One line per run: when it generalised, and when each rule said so."""
    table = [["half", "run", "memorised", "50%", "95%", *(f"k {rule.text}" for rule in rules)]]
    for name, half in zip(("first", "second"), halves(runs), strict=True):
        for run in runs:
            for line in (each for each in run.seeds.values() if any(each is one for one in half)):
                dates = [crossing(line, 0.5), crossing(line, 0.95)]
                memorised = next((r["epoch"] for r in line.rows if r["train_acc"] > 0.99), None)
                alarms = [rule.alarm(line) for rule in rules]
                cells = [_epoch(each) for each in (memorised, *dates, *alarms)]
                table.append([name, label(run.config), *cells])
    return table


def _epoch(epoch: float | None) -> str:
    return "-" if epoch is None else f"{epoch:.0f}"


def comparators(
    first: Sequence[Timeline],
    second: Sequence[Timeline],
    measures: Sequence[str] = MEASURES,
    kinds: Sequence[Kind] = ("ratio",),
) -> Table:
    """One line per measure and kind: its rule, and how it did on runs it was not chosen on."""
    header: list[str] = [
        "measure",
        "rule",
        "first half: misses, false alarms",
        "second half: within 25%",
        "misses",
    ]
    table = [[*header, "false alarms", "median lag"]]
    for name, kind in itertools.product(measures, kinds):
        if not any(np.isfinite(series(line, name)[1]).any() for line in first):
            continue
        rule = chosen(first, name, kind)
        was, now = score(rule, first), score(rule, second)
        lags = [
            alarm - truth
            for line in second
            if (alarm := rule.alarm(line)) and (truth := crossing(line, 0.95))
        ]
        table.append(
            [
                name,
                rule.text,
                f"{was.misses} of {was.grokking}, {was.false_alarms} of {was.controls}",
                f"{now.near} of {now.grokking}",
                f"{now.misses} of {now.grokking}",
                f"{now.false_alarms} of {now.controls}",
                f"{np.median(lags):+.0f} epochs" if lags else "-",
            ]
        )
    return table


def where_it_holds(runs: Sequence[Run], rules: Sequence[Rule]) -> Table:
    """One line per set-up, means over seeds: from memorised (-> training accuracy) to the end."""
    table: Table = [
        ["set-up", "n", "95% at", "LAR", "k", "k95", "k/k95", "spread of p", "spread of q", "dated"]
    ]
    for name, own in cells(runs).items():
        members = lines(own)
        dates = [crossing(line, 0.95) for line in members]
        ends = [(_known(line), line.rows[-1]) for line in members]
        row = [name.partition("% of pairs, ")[2] or "default", str(len(members))]
        row.append(_mean([date for date in dates if date is not None], 0, of=len(members)))
        for measure, digits in (("lar", 3), ("k_pred", 1), ("k95", 0)):
            row.append(_change(ends, measure, digits))
        row.append(_mean([last["k_pred"] / last["k95"] for _, last in ends], 2))
        row += [_change(ends, measure, 1) for measure in ("pr_p", "pr_q")]
        near = [score(rule, members).near for rule in rules]
        table.append([*row, " ".join(str(each) for each in near)])
    return table


def _known(line: Timeline) -> Row:
    """The first log at which the training set was learnt, or the first log."""
    return next((row for row in line.rows if row["train_acc"] > SHARE), line.rows[0])


def _change(ends: Sequence[tuple[Row, Row]], name: str, digits: int) -> str:
    before, after = (_mean([pair[i][name] for pair in ends], digits) for i in (0, 1))
    return f"{before} -> {after}"


def _mean(values: Sequence[float], digits: int, of: int | None = None) -> str:
    """The mean, and how many of `of` there are if some are missing."""
    missing = f" ({len(values)} of {of})" if of is not None and len(values) < of else ""
    return f"{np.mean(values):.{digits}f}{missing}" if values else "-"
