"""The page and tables of `jlar paper grokking`, from the records of its runs alone.

    python -m jlar_experiments.grokking.results FOLDER

packs the logs of all runs in FOLDER into one file there, `runs.jsonl.gz`, which can stand in for
the folders of those runs, except for their spectra and timings.
"""

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .. import errors, options, page
from ..errors import Refusal
from ..folder import unused
from ..progress import say
from ..records import Row, draft, read_packed, write_packed, write_whole
from . import analysis, beyond, plates
from .analysis import REFERENCE, Run, Timeline
from .config import GrokConfig
from .plan import folder_name

PACKED = "runs.jsonl.gz"
TIMES = ("step", "training_seconds", "evaluation_seconds")  # not packed: of no table
RESAMPLES = 10_000
FEWEST = 5  # runs, of which an interval says something
COLUMNS = ("memorised", "grokked", "final_grokked", "final_not_grokked")
NAMES = ("memorised", "grokked", "final (grokked)", "final (no grok)")

Table = list[list[str]]
Pair = tuple[float, float]  # k_pred, k95


def report(folders: Sequence[Path]) -> page.Report:
    """The page on the runs in this folder; its figures and tables are put there as files too."""
    if len(folders) > 1:
        raise Refusal("a folder of `jlar paper grokking` is reported on by itself")
    [folder] = folders
    runs = read(folder)
    table, note = table1(runs), _note(runs)
    said = f"{page.text(table)}\n{page.wrapped(note)}"
    made = page.Report("jlar paper grokking", _verdict(runs), said)
    made.add(page.heading("Table 1: RMSE between k_pred and k95"), page.table(table))
    made.add(page.note(note), page.heading("The runs"), page.table(plates.runs_table(runs)))
    _write_csv(folder / "table1.csv", table)
    _write_csv(folder / "runs.csv", plates.runs_table(runs))
    _write_csv(folder / "logs.csv", logs_table(runs))
    with page.figures(folder, plates.FILES) as drafts:
        figures = plates.draw(runs, drafts)
    made.add(*(page.figure(folder / "figures" / f"{n}.svg", said) for n, said in figures.items()))
    for name, (title, caption, rows) in beyond.tables(runs).items():
        if len(rows) > 1:
            made.add(page.heading(title), page.table(rows), page.note(caption))
            _write_csv(folder / f"{name}.csv", rows)
    return made


def _verdict(runs: Sequence[Run]) -> str:
    """How many runs learnt and generalised, and how well LAR predicts the dimension."""
    lines = [line for run in runs for line in run.seeds.values()]
    grokked = sum(line.grokked is not None for line in lines)
    error = rmse(pairs(runs, "final_grokked"))
    words = f"{grokked} of {len(lines)} runs generalise"
    if np.isfinite(error):
        words += (
            "; at their end k, the dimension that LAR (the log-alignment ratio) predicts, differs "
            f"by {error:.1f} (root mean square) from k95, the one of the data's principal "
            "components"
        )
    return words


def read(folder: Path) -> list[Run]:
    """Every run in the folder that has a log; one that is only packed there has no spectra.

    Of one that is there both ways, the one with more rows; of as many, that of its folder.
    """
    found = packed(folder)
    for each in sorted(folder.iterdir()):
        if (each / "metrics.jsonl").exists() and (each / "config.json").exists():
            run = analysis.read(each)
            name = folder_name(run.config)
            if run.logs and run.logs >= (found[name].logs if name in found else 0):
                found[name] = run
    # As the paper numbers its tasks, most pairs first.
    return sorted(found.values(), key=_place)


def packed(folder: Path) -> dict[str, Run]:
    """The runs that are packed in the folder, by the names of the folders that they had."""
    runs = [_unpacked(row, folder / PACKED) for row in read_packed(folder / PACKED)]
    return {folder_name(run.config): run for run in runs}


def pack(folder: Path) -> None:
    """Put the logs of all runs in the folder into one file.

    One that is there and holds other rows too is kept under another name.
    """
    path, runs = folder / PACKED, read(folder)
    if _keys(packed(folder).values()) - _keys(runs):
        aside = unused(folder / f"earlier-{PACKED}")
        with draft(aside) as file:
            file.write(path.read_bytes())
        say(f"{path} held rows that are not in it any more; it is kept as {aside}")
    write_packed(
        path, [{"settings": dataclasses.asdict(run.config), "rows": _rows(run)} for run in runs]
    )


def _rows(run: Run) -> list[Row]:
    """What is packed of a run."""
    lines = [row for line in run.seeds.values() for row in line.rows]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in lines]


def _keys(runs: Iterable[Run]) -> set[str]:
    """Every row of every run, as text with the name of its run."""
    return {f"{folder_name(run.config)} {json.dumps(row)}" for run in runs for row in _rows(run)}


def _unpacked(stored: Row, path: Path) -> Run:
    try:
        config = options.stored(stored["settings"], GrokConfig)
        return Run(config, {}, analysis.timelines(config, stored["rows"], path), [])
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(f"{path} holds no runs of this version ({errors.line(error)})") from error


def _place(run: Run) -> tuple[float, int, int]:
    return -run.config.train_fraction, run.config.operation.number, run.config.seed


def pairs(runs: Iterable[Run], column: str) -> list[Pair]:
    """k_pred and k95 of every seed that has this column's point."""
    found = []
    for run in runs:
        for line in run.seeds.values():
            point, _, kind = column.partition("_")
            wanted = not kind or (kind == "grokked") == (line.grokked is not None)
            row = line.at(point) if wanted and _counts(run, line, point) else None
            if row and row["k_pred"] is not None and row["k95"] is not None:
                found.append((row["k_pred"], row["k95"]))
    return found


def _counts(run: Run, line: Timeline, point: str) -> bool:
    return point != "final" or line.finished(run.config)


def rmse(found: Sequence[Pair]) -> float:
    """Root of the mean square of k_pred - k95; nan for none."""
    errors = np.subtract(*np.transpose(found)) if found else np.array([np.nan])
    return float(np.sqrt(np.mean(np.square(errors))))


def half_interval(found: Sequence[Pair], *, seed: int = 0) -> float:
    """Half of the 95% percentile bootstrap interval of the RMSE over runs; nan for fewer than 5."""
    if len(found) < FEWEST:
        return float("nan")
    squares = np.square(np.subtract(*np.transpose(found)))
    drawn = np.random.default_rng(seed).integers(len(squares), size=(RESAMPLES, len(squares)))
    low, high = np.percentile(np.sqrt(np.mean(squares[drawn], axis=1)), [2.5, 97.5])
    return float(high - low) / 2


def table1(runs: Sequence[Run]) -> Table:
    """Ours and the paper's, with n: of each set, then of each task of A and each fraction of B."""
    with (REFERENCE / "table1_rmse.csv").open(encoding="utf-8") as file:
        theirs = {(row["set"], row["checkpoint"]): row for row in csv.DictReader(file)}
    table: Table = [["", *NAMES]]
    for name in ("A", "B"):
        paper = [theirs[name, column] for column in COLUMNS]
        ours = analysis.of_set(runs, name)
        table.append([f"set {name}, ours", *(_error(pairs(ours, column)) for column in COLUMNS)])
        table.append(
            [f"set {name}, paper", *(f"{row['rmse']} ± {row['half_ci95']}" for row in paper)]
        )
        for config in dict.fromkeys(_without_seed(run) for run in ours):
            same = [run for run in ours if _without_seed(run) == config]
            label = plates.label(config)
            table.append([label, *(_error(pairs(same, column)) for column in COLUMNS)])
            if name == "B":
                label, points = f"{label}, paper", analysis.reference(config)[1]
                table.append([label, *(_error(_of_paper(points, each)) for each in COLUMNS)])
    return table


def _without_seed(run: Run) -> GrokConfig:
    return dataclasses.replace(
        GrokConfig(), task=run.config.task, train_fraction=run.config.train_fraction
    )


def _error(found: Sequence[Pair]) -> str:
    """The RMSE, half of its interval and n."""
    half = half_interval(found)
    spread = f" ± {half:.2f}" if np.isfinite(half) else ""
    return f"{rmse(found):.2f}{spread} (n = {len(found)})" if found else "-"


def _of_paper(points: Sequence[dict[str, str]], column: str) -> list[Pair]:
    of = [each for each in points if each["checkpoint"] == column]
    return [(float(each["k_pred"]), float(each["k95"])) for each in of]


def _note(runs: Sequence[Run]) -> str:
    ours = [*analysis.of_set(runs, "A"), *analysis.of_set(runs, "B")]
    ends = sorted({run.config.after_grok for run in ours})
    return (
        "± is half of the 95% percentile bootstrap interval over runs (10,000 resamples), n the "
        "number of runs; with fewer than five there is no interval. The paper has 5 seeds of 12 "
        "tasks (set A) and of 4 fractions (set B) and ends 2,000 epochs after grokking or at "
        "50,000. Its rows of single fractions are made of the points in its figure 3, which do not "
        "tell the tasks of set A. Here runs end "
        f"{' or '.join(str(each) for each in ends) or '-'} epochs after grokking, or where the "
        "table of the runs says."
    )


def logs_table(runs: Sequence[Run]) -> Table:
    """Every log of every run, as far as the figures and tables use it."""
    names = ("epoch", "train_acc", "val_acc", "lar", "k_pred", "k95", "pr_p", "pr_q", "alpha")
    table: Table = [["run", "seed", *names]]
    for run in runs:
        for seed, line in run.seeds.items():
            for row in line.rows:
                values = (row.get(name) for name in names)
                cells = [_figures(value) for value in values]
                table.append([plates.label(run.config), str(seed), *cells])
    return table


def _figures(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(path, text.getvalue())


def main(folder: Path) -> int:
    """Pack the runs in the folder; errors are told in one line, and the result is the exit code."""
    try:
        if not (folder.is_dir() and read(folder)):
            raise Refusal(f"{folder} is no folder that holds runs of `jlar paper grokking`")
        pack(folder)
    except (errors.Told, OSError, KeyboardInterrupt) as error:
        print(errors.line(error), file=sys.stderr)
        return errors.code(error)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m jlar_experiments.grokking.results FOLDER")
    sys.exit(main(Path(sys.argv[1])))
