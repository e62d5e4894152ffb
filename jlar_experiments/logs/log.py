"""`read`: from a path to the steps, LARs and losses of one run, and what was left out and why."""

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jlar.monitor import Baseline

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
            of log lines with names and numbers, also compressed by gzip; a Parquet, TensorBoard
            event or .wandb file (extra `logs`); a run's folder, also MLflow's, or its mlflow.db;
            "-" for standard input.
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
    apart = columns.unpivoted(table, wanted["lar"])
    wanted = {
        what: None if what in optional and name not in table.columns else name
        for what, name in wanted.items()
    }
    for name, value in only:
        if name in table.columns or "only" not in optional:
            _keep_only(table, name, value)
    lar_name = wanted["lar"] or columns.alignment(table)
    table.decimal_comma = table.named(lar_name).decimal_comma
    lar = _lars(table, lar_name, apart)
    there = np.isfinite(lar)
    columns.one_run(table, there, () if apart else columns.TAGS)
    step_name = wanted["step"] or columns.steps(table, lar_name, there)
    step = table.numbers(step_name)
    if count := int((there & ~np.isfinite(step)).sum()):
        table.notes.append(f"rows with a LAR and no step in {step_name!r}: {count}")
    columns.goes_on(table, step_name, step, there)
    loss_name = wanted["loss"] or columns.losses(table, lar_name)
    loss, strange = table.read(loss_name) if loss_name else (np.full(len(lar), np.nan), {})
    if strange:
        table.notes.append(f"cells of {loss_name!r} that are no number: {len(strange)}")
    n, n_name = columns.width(table, lar)
    steps, lars, losses = series.by_step(step, lar, loss, apart, table.notes)
    if not len(steps):
        raise Unusable(f"has no row with both a step in {step_name!r} and a LAR in {lar_name!r}")
    said = f"training loss {loss_name!r}" if loss_name else "no training loss"
    said += f", n from {n_name!r}" if n else ""
    said = f"step {step_name!r}, LAR {lar_name!r}, {said}; {len(steps)} rows"
    return Log(steps, lars, losses, n, (f"read as {table.kind}: {said}", *table.notes))


def _keep_only(table: Table, name: str, value: str) -> None:
    same = {value}
    with contextlib.suppress(ValueError):
        same.add(f"{float(value):.12g}")
    use = np.array([text in same for text in table.texts(name)], bool)
    table.use = use if table.use is None else use & table.use
    if not table.use.any():
        raise Unusable(f"has no row with {name!r} = {value!r}")


def _lars(table: Table, name: str, apart: bool) -> Float[np.ndarray, "rows"]:
    """The numbers in the column of LAR.

    Raises:
        Unusable: these cannot be LARs, or too many of the cells cannot be read.
    """
    lar, strange = table.read(name)
    there = np.flatnonzero(np.isfinite(lar))
    if len(strange) > (len(there) + len(strange)) / 10:
        row, cell = next(iter(strange.items()))
        raise Unusable(
            f"has {len(strange)} of {len(there) + len(strange)} cells of {name!r} that are no "
            f"number, the first in row {row + 1}: {str(cell)[:40]!r}"
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
    infinite, empty = int(np.isinf(lar).sum()), 0
    if not apart:
        asked = table.rows if table.use is None else int(table.use.sum())
        empty = asked - len(there) - len(strange) - infinite
    counts = {"nan or infinite": infinite, "no number": len(strange), "empty": empty}
    for what, count in counts.items():
        if count:
            table.notes.append(f"cells of {name!r} that are {what}, left out: {count}")
    return lar


def baseline(paths: Sequence[Path | str], **options: Any) -> Baseline:
    """Finished runs to compare with; options and errors are those of `read`."""
    read_runs = [read(path, **options) for path in paths]
    try:
        return Baseline.from_runs([(log.step, log.lar, log.loss) for log in read_runs])
    except ValueError as error:
        raise Unusable(f"{', '.join(map(str, paths))}: {error}") from None
