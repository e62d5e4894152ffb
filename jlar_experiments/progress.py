"""What a run shows while it trains: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

import numpy as np
from tqdm import tqdm

from .records import Row

SECONDS_BETWEEN_LINES = 10
COMPILING = "compiling; how long it will take is said after the first logs"


class _Bar:
    """The bar, and how often there is a line instead."""

    def __init__(self, total: int, first: int, unit: str, left: str):
        self._terminal = sys.stderr.isatty()
        self._spoken = -float("inf")
        self._bar = tqdm(
            total=total,
            initial=first,
            unit=unit,
            disable=not self._terminal,
            dynamic_ncols=True,
            bar_format="{desc}",
            desc=COMPILING,
        )
        self._format, self._left = "{n_fmt}/{total_fmt} " + unit + "s |{bar}| {desc}", left
        self._start: tuple[float, int] | None = None
        if not self._terminal:
            print(COMPILING, file=sys.stderr, flush=True)

    def _tell(self, at: int, end: int, line: str, text: str) -> None:
        text += self._time(at, end)
        if self._terminal:
            self._bar.bar_format = self._format
            self._bar.total = end
            self._bar.set_description_str(text, refresh=False)
            self._bar.n = at
            self._bar.refresh()
        elif at >= end or time.monotonic() - self._spoken >= SECONDS_BETWEEN_LINES:
            self._spoken = time.monotonic()
            print(f"{line}: {text}", file=sys.stderr, flush=True)

    def _time(self, at: int, end: int) -> str:
        """How long it will take from here, by the time since the first logs, without compiling."""
        now = time.monotonic()
        if self._start is None:
            self._start = now, at
        since, first = self._start
        if at <= first or at >= end:
            return ""
        seconds = (now - since) / (at - first) * (end - at)
        return f" · {tqdm.format_interval(seconds)} {self._left}"

    def close(self) -> None:
        """Leave the bar as it is and free the line."""
        self._bar.close()


class Progress(_Bar):
    """A bar over epochs; until all seeds have grokked, the time left is an upper bound."""

    def __init__(self, epochs: int, first: int):
        super().__init__(epochs, first, "epoch", "left at most")

    def show(self, epoch: int, rows: list[Row], end: int) -> None:
        """Tell of the logs of this epoch; the run lasts until `end` at most."""
        mean = {
            name: np.nanmean([np.nan if row[name] is None else row[name] for row in rows])
            for name in ("train_acc", "val_acc", "lar", "k_pred")
        }
        text = (
            f"train {mean['train_acc']:.1%} val {mean['val_acc']:.1%} "
            f"LAR {mean['lar']:.3f} k {mean['k_pred']:.1f}" + _ringing(rows)
        )
        self._tell(epoch, end, f"epoch {epoch} of at most {end}", text)


class Steps(_Bar):
    """A bar over the steps of one run."""

    def __init__(self, steps: int, first: int):
        super().__init__(steps, first, "step", "left")
        self._steps = steps

    def show(self, step: int, row: Row) -> None:
        """Tell of this row, the last one read."""
        text = f"loss {row['train_loss']:.3f}"
        if row.get("lar") is not None:
            text += f" LAR {row['lar']:.3f}"
        text += f" · {row['tokens_per_second']:,.0f} tokens/s" + _ringing([row])
        self._tell(step, self._steps, f"step {step} of {self._steps}", text)


def _ringing(rows: list[Row]) -> str:
    names = dict.fromkeys(name for row in rows for name in row.get("alarms", ()))
    return " · " + ", ".join(names) if names else ""


def say(text: str) -> None:
    """Print a line without breaking a bar."""
    tqdm.write(text, file=sys.stderr)
