"""Baseline: LAR of runs that did not overfit, at any step and at any training loss."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ._checks import need, real_array

KNOTS = 256
POOLED = 1 / 16  # doublings of steps: points closer than this are averaged
GAP = 1 / 4  # doublings: nothing is known of what is before the last gap longer than this
BEHIND = 0.2  # doublings that a healthy run may be later than the baseline while LAR rises

Points = Float[np.ndarray, "points"] | Int[np.ndarray, "points"]


class Expected(NamedTuple):
    """What a baseline has at one step or loss."""

    lar: Float[Array, "*at"]  # mean of its runs
    spread: Float[Array, "*at"]  # standard deviation of one more run about it; 0 for one run
    known: Bool[Array, "*at"]  # whether all runs have been there; if not, it is the nearest end


class Baseline(eqx.Module):
    """Runs to compare with that do not overfit, as small arrays that can be used inside jit.

    LAR is averaged over sixteenths of a doubling of steps, after a running median of five, and is
    at most what it was a fifth of a doubling before, since a healthy run may be so much later. As a
    function of the loss a run counts where its loss is lower than ever before.

    Example:
        >>> steps = np.arange(10, 1000, 10)
        >>> runs = [(steps, lar - steps / 10_000, 5 - steps / 1000) for lar in (0.69, 0.71)]
        >>> baseline = Baseline.from_runs(runs)
        >>> lar, spread, known = baseline.at_step(500)
        >>> print(f"{lar:.3f} {spread:.3f} {known}; {baseline.at_loss(4.5).lar:.3f}")
        0.650 0.017 True; 0.650
    """

    knots: Float[Array, "2 knots"]  # log2 of the step, and training loss, which is negative if none
    mean: Float[Array, "2 knots"]
    spread: Float[Array, "2 knots"]
    runs: int = eqx.field(static=True)

    @classmethod
    def from_runs(cls, runs: Sequence[tuple[Points, Points, Points | None]]) -> "Baseline":
        """A baseline of the logs of one or more runs, as (steps, LARs, training losses or None).

        Points may be in any order; those with a nan or a step <= 0 are left out.

        Raises:
            ValueError: a run has LAR at fewer than two steps, or the runs have no steps in common.
        """
        pooled = [_pooled(*run) for run in runs]
        by_step, by_loss = [run[:2] for run in pooled], [_by_loss(*run[1:]) for run in pooled]
        steps, losses = _shared(by_step), _shared(by_loss)
        need(len(steps) > 1, "the runs of a baseline have no steps in common")
        curves = np.zeros((3, 2, KNOTS))
        curves[:, 0] = _curve(by_step, np.linspace(steps[0], steps[-1], KNOTS))
        curves[0, 1] = np.linspace(-2, -1, KNOTS)
        if len(losses) > 1:
            place = np.linspace(0, len(losses) - 1, KNOTS)
            curves[:, 1] = _curve(by_loss, np.interp(place, np.arange(len(losses)), losses))
        knots, mean, spread = jnp.asarray(curves, jnp.float32)
        return cls(knots, mean, spread, len(runs))

    def at_step(self, step: Float[ArrayLike, "*at"] | Int[ArrayLike, "*at"]) -> Expected:
        """LAR at a step, which is positive."""
        return self._at(0, jnp.log2(real_array(step, "step").astype(jnp.float32)))

    def at_loss(self, loss: Float[ArrayLike, "*at"]) -> Expected:
        """LAR when the training loss was this; not known below the least that it ever was."""
        return self._at(1, real_array(loss, "loss").astype(jnp.float32))

    def _at(self, row: int, at: Float[Array, "*at"]) -> Expected:
        """Between the knots of row 0, log2 of steps, or of row 1, losses, along a line.

        Compared with all knots, because a binary search would be a loop in the training step.
        """
        knots, slack = self.knots[row], 1e-5  # for rounding, that of log2 above all
        right = jnp.clip(jnp.searchsorted(knots, at, method="compare_all"), 1, KNOTS - 1)
        part = jnp.clip((at - knots[right - 1]) / (knots[right] - knots[right - 1]), 0, 1)
        lar, spread = (
            y[row, right - 1] * (1 - part) + y[row, right] * part for y in (self.mean, self.spread)
        )
        return Expected(lar, spread, (at >= knots[0] - slack) & (at <= knots[-1] + slack))


def _pooled(steps: Points, lar: Points, loss: Points | None) -> np.ndarray:
    """log2(step), LAR and loss, averaged over each sixteenth of a doubling."""
    log = np.array([steps, lar, np.full(len(steps), np.nan) if loss is None else loss], float)
    log = log[:, (log[0] > 0) & np.isfinite(log[0] + log[1])]
    log = log[:, np.argsort(log[0], kind="stable")]
    count = len(np.unique(log[0]))
    message = f"a baseline needs LAR at two or more different steps above 0; got {count}"
    need(count > 1, f"{message} in {len(steps)} points (the steps come first, then the LARs)")
    u = np.log2(log[0])
    columns = np.stack([u, *map(_median_of_five, log[1:])])
    bins = np.floor((u - u[0]) / POOLED) if u[-1] - u[0] >= POOLED else u
    binned = np.split(columns, 1 + np.flatnonzero(np.diff(bins)), axis=1)
    means = np.stack([points.mean(axis=1) for points in binned], axis=1)
    # On to the last step, along the line through the last two means.
    before, last = means[:, -2], means[:, -1]
    end = last + (u[-1] - last[0]) / (last[0] - before[0]) * (last - before)
    means = np.column_stack([means, end])
    start = np.flatnonzero(np.append(True, np.diff(means[0]) > GAP))[-1]
    means = means[:, min(start, means.shape[1] - 2) :]
    means[1] = np.minimum(means[1], np.interp(means[0] - BEHIND, *means[:2]))
    return means


def _median_of_five(values: np.ndarray) -> np.ndarray:
    padded = np.pad(values, 2, "edge")
    return np.median([padded[i : len(values) + i] for i in range(5)], axis=0)


def _by_loss(lar: np.ndarray, loss: np.ndarray) -> np.ndarray:
    loss = np.where(np.isfinite(loss), loss, np.inf)
    lower = loss < np.append(np.inf, np.minimum.accumulate(loss)[:-1])
    return np.stack([loss, lar])[:, lower][:, ::-1]


def _shared(curves: list[np.ndarray]) -> np.ndarray:
    """The steps or losses of all curves together, ascending, that lie within the range of each."""
    first = max(at.min(initial=np.inf) for at, _ in curves)
    last = min(at.max(initial=-np.inf) for at, _ in curves)
    places = np.unique(np.concatenate([at for at, _ in curves]))
    return places[(places >= first) & (places <= last)]


def _curve(curves: list[np.ndarray], knots: np.ndarray) -> np.ndarray:
    """The knots, and there the mean of the curves and their spread."""
    lars, spread = np.stack([np.interp(knots, *each) for each in curves]), np.zeros(KNOTS)
    if (n := len(curves)) > 1:
        # The variance of few runs is noisy, so it is averaged over a quarter of the knots.
        variance = np.pad(lars.var(axis=0, ddof=1), KNOTS // 8, "edge")
        variance = np.convolve(variance, np.full(KNOTS // 4 + 1, 4 / (KNOTS + 4)), "valid")
        spread = np.sqrt(variance * (1 + 1 / n))
    return np.stack([knots, lars.mean(axis=0), spread])
