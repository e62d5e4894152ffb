"""`read`: from a path to the steps, LARs and losses of one run, and what was left out and why."""

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

import jlar

from . import columns, series, source
from .table import Table, Unusable

ROUNDING = 0.001  # above 1, that a LAR may be from sums in low precision


@dataclass(frozen=True)
class Log:
    """One LAR for each step, by increasing step, all finite."""

    step: Float[np.ndarray, "rows"]
    lar: Float[np.ndarray, "rows"]
    loss: Float[np.ndarray, "rows"]
    """The training loss that was last logged at this step or before; nan if there is none."""
    n: int | None = None
    """Input width of the layer: as logged, or from LAR and k = n^(2 (1 - LAR))."""
    notes: tuple[str, ...] = ()
    """Which columns were read, then what was left out, averaged or sorted; without final points."""


def read(
    path: Path | str,
    *,
    step: str | None = None,
    lar: str | None = None,
    loss: str | None = None,
    only: Sequence[tuple[str, str]] = (),
    pattern: str | None = None,
    growing: bool = False,
    optional: Collection[str] = (),
) -> Log:
    """The log of one run.

    Args:
        path: a file of separated values, of JSON (lines, array, columns, `trainer_state.json`) or
            of log lines with names and numbers, also compressed by gzip; a Parquet or TensorBoard
            event file (extra `logs`); a run's folder; "-" for standard input.
        step, lar, loss: names of the columns; without, the usual names are looked for.
        only: (column, value): rows with another value there are left out.
        pattern: of log lines, a regular expression with groups step, lar and, if logged, loss.
        growing: a last line without its end is still being written, and no line yet.
        optional: names of the arguments above whose columns are asked for only if they are there.

    Raises:
        Unusable: nothing can be read, or it can be read in several ways; in one line.
        OSError: as reading raises it.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.csv"
        >>> _ = path.write_text("Step,a - lar,a - train/loss\\n10,0.61,2.5\\n20,0.62,2.4\\n")
        >>> log = read(path)
        >>> log.step, log.lar, log.loss
        (array([10., 20.]), array([0.61, 0.62]), array([2.5, 2.4]))
        >>> print(log.notes[0].split(": ", 1)[1])
        step 'Step', LAR 'a - lar', training loss 'a - train/loss'; 2 rows
    """
    try:
        table = source.table(path, lar=lar, pattern=pattern, growing=growing)
        if not table.rows and "pattern" in optional:
            table = source.table(path, lar=lar, pattern=None, growing=growing)
        if not table.rows:
            raise Unusable(f"holds no rows{''.join('; ' + note for note in table.notes)}")
        return _log(table, {"step": step, "lar": lar, "loss": loss}, only, optional)
    except Unusable as error:
        raise Unusable(f"{path} {error}") from None


def _log(
    table: Table,
    wanted: dict[str, str | None],
    only: Sequence[tuple[str, str]],
    optional: Collection[str],
) -> Log:
    pivoted = columns.unpivoted(table, wanted["lar"])
    for what in optional:
        if what in wanted and wanted[what] not in table.columns:
            wanted[what] = None
    if "only" in optional:
        only = [(name, value) for name, value in only if name in table.columns]
    use, notes = _chosen(table, only), list(table.notes)
    lar_name = columns.named(wanted["lar"] or columns.alignment(table), table)
    commas = table.columns[lar_name].decimal_comma

    def numbers(name: str, *, say: bool = False) -> Float[np.ndarray, "rows"]:
        column = table.columns[columns.named(name, table)]
        values, strange = column.numbers(table.rows, commas or None)
        if say and (count := sum(use[row] for row in strange)):
            notes.append(f"cells of {name!r} that are no number and count as empty: {count}")
        return np.where(use, values, np.nan)

    lar = numbers(lar_name, say=True)
    _check(table, lar_name, lar, use)
    there = np.isfinite(lar)
    columns.one_run(table, there, () if pivoted else columns.TAGS)
    step_name = wanted["step"] or columns.steps(table, lar_name, there)
    step = table.columns[columns.named(step_name, table)].numbers(table.rows)[0]
    loss_name = wanted["loss"] or columns.losses(table, lar_name, numbers)
    loss = numbers(loss_name, say=True) if loss_name else np.full(table.rows, np.nan)
    n, n_from = _width(table, numbers, lar)
    for what, count in (
        (f"rows without a number in {lar_name!r}", (use & ~there).sum() * (not pivoted)),
        (f"cells of {lar_name!r} that are nan or infinite", np.isinf(lar).sum()),
        (f"rows with a LAR and no step in {step_name!r}", (there & ~np.isfinite(step)).sum()),
    ):
        if count:
            notes.append(f"{what}: {count}")
    epoch = next((e for e in table.columns if columns.last(e) == "epoch" and e != step_name), None)
    if epoch and not pivoted:
        rows = np.isfinite(step) & there
        series.check_epochs(step[rows], numbers(epoch)[rows], (step_name, epoch))
    steps, lars, losses = series.by_step(step, lar, loss, pivoted, notes)
    if not len(steps):
        raise Unusable(f"has no row with both a step in {step_name!r} and a LAR in {lar_name!r}")
    said = f"training loss {loss_name!r}" if loss_name else "no training loss"
    first = (
        f"read as {table.kind}: step {step_name!r}, LAR {lar_name!r}, {said}{n_from}; "
        f"{len(steps)} rows"
    )
    return Log(steps, lars, losses, n, (first, *notes))


def _chosen(table: Table, only: Sequence[tuple[str, str]]) -> Bool[np.ndarray, "rows"]:
    use = np.ones(table.rows, bool)
    for name, value in only:
        texts = table.columns[columns.named(name, table)].texts(table.rows)
        same = {value}
        with contextlib.suppress(ValueError):
            same.add(f"{float(value):.12g}")
        use &= np.array([text in same for text in texts], bool)
        if not use.any():
            raise Unusable(f"has no row with {name!r} = {value!r}")
    return use


def _check(
    table: Table, name: str, lar: Float[np.ndarray, "rows"], use: Bool[np.ndarray, "rows"]
) -> None:
    """Raises:
    Unusable: these cannot be LARs, or too many of them cannot be read.
    """
    strange = table.columns[name].numbers(table.rows)[1]
    strange = {row: str(cell) for row, cell in strange.items() if use[row]}
    there = np.flatnonzero(np.isfinite(lar))
    if len(strange) > (len(there) + len(strange)) / 10:
        row, cell = next(iter(strange.items()))
        raise Unusable(
            f"has {len(strange)} of {len(there) + len(strange)} cells of {name!r} that are no "
            f"number, the first in row {row + 1}: {cell[:40]!r}"
        )
    if not len(there):
        raise Unusable(f"has no number in column {name!r}")
    most = there[np.argmax(lar[there])]
    if lar[most] > 1 + ROUNDING:
        raise Unusable(
            f"has {lar[most]:.6g} in row {most + 1} of column {name!r}, and LAR is at most 1: "
            "name its column by --lar-column"
        )
    if not lar[there].any():
        raise Unusable(f"has zeros only in column {name!r}: name that of LAR by --lar-column")


def _width(
    table: Table,
    numbers: Callable[[str], Float[np.ndarray, "rows"]],
    lar: Float[np.ndarray, "rows"],
) -> tuple[int | None, str]:
    """The base of the logarithm and where it is from; None where that is not one number."""
    for name in table.columns:
        if columns.last(name) in columns.WIDTHS:
            found = numbers(name)
            found = np.unique(found[np.isfinite(found)])
            if len(found) == 1 and found[0] >= 2 and found[0] % 1 == 0:
                return int(found[0]), f", n {name!r}"
    for name in table.columns:
        if columns.last(name) in columns.DIMENSIONS:
            k = numbers(name)
            use = np.isfinite(k) & (k > 1) & np.isfinite(lar) & (np.abs(lar - 1) > 0.05)
            with np.errstate(over="ignore"):
                found = np.exp(np.log(k[use]) / (2 * (1 - lar[use])))
            if len(found) and np.ptp(found) < 0.05 * np.median(found):
                return round(float(np.median(found))), f", n from {name!r}"
    return None, ""


def baseline(path: Path | str, **options: Any) -> jlar.Baseline:
    """A finished run to compare with; options and errors are those of `read`."""
    log = read(path, **options)
    try:
        return jlar.Baseline.from_points(
            log.step, log.lar, log.loss if np.isfinite(log.loss).any() else None
        )
    except ValueError as error:
        raise Unusable(f"{path}: {error}") from None
