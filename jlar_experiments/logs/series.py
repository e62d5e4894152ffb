"""One LAR and one loss for each step: restarts, several rows of a step, and rows in no order."""

import numpy as np
from jaxtyping import Bool, Float, Int


def in_order(
    step: Float[np.ndarray, "rows"],
) -> tuple[Int[np.ndarray, "kept"], str | None]:
    """The rows that count, by increasing step, and what was done to the others.

    A log that goes back to a step was restarted there: rows from that step on that were written
    before are those of the abandoned branch, as in TensorBoard. One that goes back all the time is
    in no order, and every row counts.
    """
    order = np.arange(len(step))
    starts = np.flatnonzero(np.diff(step, prepend=np.nan) != 0)  # of rows with one step
    passes = step[starts]
    back = np.flatnonzero(np.diff(passes) < 0) + 1
    if not len(back):
        return order, None
    if 3 * len(back) > len(passes):
        return np.argsort(step, kind="stable"), "the rows are in no order of steps: sorted"
    later = np.minimum.accumulate(passes[::-1])[::-1]  # the least step from here on
    keep = np.append(passes[:-1] < later[1:], True)
    rows = order[np.repeat(keep, np.diff(starts, append=len(step)))]
    times = "once" if len(back) == 1 else f"{len(back)} times"
    return rows, (
        f"the log goes back {times}, at last to step {passes[back[-1]]:.12g}; rows from there on "
        f"that were written before, left out: {len(step) - len(rows)}"
    )


def means(
    step: Float[np.ndarray, "rows"], values: Float[np.ndarray, "rows"]
) -> tuple[Float[np.ndarray, "steps"], Float[np.ndarray, "steps"]]:
    """The steps that have a value, increasing, and the mean of their values."""
    there = np.isfinite(values)
    steps, at = np.unique(step[there], return_inverse=True)
    return steps, np.bincount(at, values[there], len(steps)) / np.bincount(at, None, len(steps))


def by_step(
    step: Float[np.ndarray, "rows"],
    lar: Float[np.ndarray, "rows"],
    loss: Float[np.ndarray, "rows"],
    apart: bool,
    notes: list[str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps with their LAR and the last loss; `apart`: rows of LAR and of loss are in no order."""

    def kept(use: Bool[np.ndarray, "rows"]) -> np.ndarray:
        rows = np.flatnonzero(use & np.isfinite(step))
        order, note = in_order(step[rows])
        if note and note not in notes:
            notes.append(note)
        return rows[order]

    with_lar, with_loss = np.isfinite(lar), np.isfinite(loss)
    rows = kept(with_lar if apart else with_lar | with_loss)
    of_loss = kept(with_loss) if apart else rows
    steps, lars = means(step[rows], lar[rows])
    if len(steps) < (count := int(with_lar[rows].sum())):
        notes.append(f"rows with a LAR {count}, different steps {len(steps)}: averaged")
    at, losses = means(step[of_loss], loss[of_loss])
    last = np.searchsorted(at, steps, "right")
    return steps, lars, np.append(np.nan, losses)[last]
