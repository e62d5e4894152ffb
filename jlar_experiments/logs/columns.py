"""Which column is the step, which LAR, which the training loss: by the names of the field."""

import re
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Float

from .table import Table, Unusable, listed

STEPS = """global_step step train_step training_step optimizer_step iteration iterations
    train_iter iter it num_updates update updates _step epoch""".split()
LAR = ("lar", "log_alignment_ratio")
WIDTHS = ("n", "width")
DIMENSIONS = ("k_pred", "effective_dimension", "k")
TRAINING = set("train training learning trainer learner".split())
HELD_OUT = set("val valid validation eval evaluation test testing dev held".split())
LOSSES = set("loss nll ce xent entropy".split())
BESIDE_LOSS = TRAINING | LOSSES | set("cross step lm batch mean avg total metrics main".split())
TAGS = ("tag", "metric", "metric_name", "name", "key", "variable", "series")
VALUES = ("value", "metric_value")
RUNS = """run run_id run_name run_uuid seed experiment experiment_id trial trial_id
    layer site matrix module parameter""".split()
SPLITS = "split phase mode stage subset".split()  # of runs, only if one of them is held out


def words(name: str) -> list[str]:
    """The words of a name in lower case, without the run that W&B puts before " - "."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.rpartition(" - ")[2])
    return re.findall(r"[a-z]+|\d+", name.lower())


def _run(name: str) -> str:
    return name.rpartition(" - ")[0]


def _bound(name: str) -> bool:
    """Whether W&B has exported it beside the column itself."""
    return name.lower().endswith(("__min", "__max"))


def last(name: str) -> str:
    """The last part of a path, in snake case."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", re.split(r"[/.:]| - ", name.strip())[-1])
    return re.sub(r"#\d+$", "", name).strip().lower().replace(" ", "_")


def unpivoted(table: Table, lar: str | None) -> bool:
    """Make of a table with one value a row, and its name beside it, one with columns.

    Whether it was one: then the rows of a name are in order, but not those of several.
    """
    tags = [name for name in table.columns if last(name) in TAGS]
    values = [name for name in table.columns if last(name) in VALUES]
    if len(values) != 1 or not tags or lar in table.columns or _alignments(table.columns):
        return False
    texts = np.array(table.texts(tags[0]), object)
    names = sorted({text for text in texts.tolist() if text})
    if len(names) == 1 and not _alignments(names) and lar is None:
        return False
    value = table.columns.pop(values[0])
    for name in names:
        table.columns.setdefault(name, value.part(texts == name))  # a metric may be called step
    return True


def _missing(what: str, option: str, table: Table) -> Unusable:
    there = listed(name for name in table.columns if not _bound(name))
    return Unusable(f"has no column {what!r}; it has {there}: name it by {option}")


def _best(names: Iterable[str], rank: Callable[[str], tuple[int, ...]], option: str) -> str | None:
    """The name of least rank."""
    names = list(names)
    least = min(map(rank, names), default=())
    best = [name for name in names if rank(name) == least]
    if len(best) > 1:
        one = "that of the unembedding" if option == "--lar-column" else "one"
        raise Unusable(f"has several columns for {option}: {listed(best)}: name {one} by {option}")
    return best[0] if best else None


def _alignments(names: Iterable[str]) -> list[str]:
    return [
        name for name in names if not _bound(name) and ("lar" in words(name) or last(name) in LAR)
    ]


def alignment(table: Table) -> str:
    """LAR: a column that is called so and no more, or whose last part is; else a single `value`."""

    def rank(name: str) -> tuple[int, ...]:
        there = set(words(name))
        return len(HELD_OUT & there), len(there - TRAINING) > 1, last(name) not in LAR

    found = _best(_alignments(table.columns), rank, "--lar-column")
    values = [name for name in table.columns if last(name) in VALUES]
    if found is None and len(values) != 1:
        raise _missing("lar", "--lar-column", table)
    return found or values[0]


def steps(table: Table, lar: str, there: Bool[np.ndarray, "rows"]) -> str:
    """The step: the trainer's before the tracker's, if it is logged beside LAR."""

    def rank(name: str) -> tuple[int, ...]:
        return (_run(name) not in (_run(lar), ""), len(HELD_OUT & set(words(name))))

    names = [name for name in table.columns if name != lar and not _bound(name)]
    for wanted in STEPS:
        numbers = {}
        for name in names:
            if last(name) == wanted:
                values = table.numbers(name)[there]
                if np.isfinite(values).mean() >= 0.5:
                    numbers[name] = values
        first = next(iter(numbers.values()), None)
        if first is not None and all(np.array_equal(first, each) for each in numbers.values()):
            return next(iter(numbers))
        if best := _best(numbers, rank, "--step-column"):
            return best
    raise _missing("step", "--step-column", table)


def losses(table: Table, lar: str) -> str | None:
    """The training loss of the run that LAR is of, if there is one that is logged all along."""
    run, count = _run(lar), {}
    for name in table.columns:
        there, end = set(words(name)), set(words(last(name)))
        if there & LOSSES and end <= BESIDE_LOSS and not there & HELD_OUT:
            if _run(name) in (run, "") or not run:
                count[name] = int(np.isfinite(table.numbers(name)).sum())
    most = max(count.values(), default=0)
    return _best(
        (name for name in count if count[name] > most / 2),
        lambda name: (not TRAINING & set(words(name)), len(words(name))),
        "--loss-column",
    )


def goes_on(
    table: Table, name: str, step: Float[np.ndarray, "rows"], there: Bool[np.ndarray, "rows"]
) -> None:
    """Raises:
    Unusable: the step begins again with every epoch, so it is none of the run.
    """
    rows = np.flatnonzero(there & np.isfinite(step))
    back = np.flatnonzero(np.diff(step[rows]) < 0)
    for other in table.columns:
        if last(other) == "epoch" and other != name and len(back):
            epoch = table.numbers(other)[rows]
            if (epoch[back + 1] > epoch[back]).all():
                raise Unusable(
                    f"has a column {name!r} that begins again with each {other!r}: "
                    "name a step that goes on by --step-column"
                )


def one_run(table: Table, there: Bool[np.ndarray, "rows"], apart: tuple[str, ...]) -> None:
    """Raises:
    Unusable: the rows with LAR are of several runs, layers or parts of the data.
    """
    for name in table.columns:
        if last(name) not in (*RUNS, *SPLITS, *apart):
            continue
        texts = table.texts(name)
        found = sorted({text for text, use in zip(texts, there, strict=True) if use and text})
        if last(name) in SPLITS and not HELD_OUT & {word for text in found for word in words(text)}:
            continue
        if len(found) > 1:
            raise Unusable(
                f"holds {len(found)} different values of {name!r}, {listed(found)}: "
                f"choose one with --only {name}={found[0]}"
            )


def width(table: Table, lar: Float[np.ndarray, "rows"]) -> tuple[int | None, str]:
    """The base of the logarithm and the column that tells it; None where that is not one number.

    Either it is logged itself, or with LAR the effective dimension k = n^(2 (1 - LAR)) is.
    """
    for name in table.columns:
        if last(name) in (*WIDTHS, *DIMENSIONS):
            found = table.numbers(name)
            if last(name) in DIMENSIONS:
                telling = np.isfinite(lar) & (np.abs(lar - 1) > 0.05)
                with np.errstate(all="ignore"):
                    found = np.exp(np.log(found[telling]) / (2 * (1 - lar[telling])))
            found = found[np.isfinite(found)]
            middle = np.median(found) if len(found) else 0
            if 2 <= middle < 2**31 and np.ptp(found) < 0.05 * middle:
                return round(float(middle)), name
    return None, ""
