"""Where curves end: the last log beside the median of the last five, and whether it is a spike."""

from collections.abc import Sequence

import numpy as np

LOGS = 5
FACTOR, AT_LEAST = 1.5, 0.01  # nats
RULE = (
    f"A run ends on a loss spike where its last training loss is more than {FACTOR:g} times the "
    f"median of its last {LOGS}, and more than {AT_LEAST:g} above it."
)


def median(values: Sequence[float | None]) -> float:
    """Of the last five that were measured; nan for none."""
    there = [each for each in values[-LOGS:] if each is not None and not np.isnan(each)]
    return float(np.median(there)) if there else float("nan")


def spike(losses: Sequence[float | None]) -> bool:
    """Whether the training loss ends on a spike, by the rule above."""
    usual = median(losses)
    if len(losses) < LOGS or losses[-1] is None:
        return False
    return losses[-1] > FACTOR * usual and losses[-1] > usual + AT_LEAST


def number(value: float | None, digits: int = 3) -> str:
    """A number of a table, - for none."""
    return "-" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def share(value: float) -> str:
    """A LAR in a sentence: .72."""
    return f"{value:.2f}".replace("0.", ".", 1)


def moved(first: float, last: float) -> str:
    """How LAR went, in words."""
    if abs(last - first) < 0.01:
        return f"LAR stayed near {share(last)}"
    return f"LAR {'rose' if last > first else 'fell'} from {share(first)} to {share(last)}"
