"""Baseline: LAR of runs that did not overfit, at any step and at any training loss."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ._checks import need

KNOTS = 256
POOLED = 1 / 16  # doublings of steps: points closer than this are averaged
GAP = 1 / 4  # doublings: nothing is known of what is before the last gap longer than this
BEHIND = 0.2  # doublings that a run may be later than the baseline, while LAR rises

Points = Float[np.ndarray, "points"] | Int[np.ndarray, "points"]


class Expected(NamedTuple):
    """What a baseline has at one step or loss."""

    lar: Float[Array, "*at"]  # mean of its runs
    spread: Float[Array, "*at"]  # standard deviation of one more run about it; 0 for one run
    known: Bool[Array, "*at"]  # whether all runs have been there; if not, it is the nearest end


class Curve(eqx.Module):
    """Mean and spread over increasing knots, linear between them."""

    knots: Float[Array, "knots"]
    mean: Float[Array, "knots"]
    spread: Float[Array, "knots"]

    def __call__(self, at: Float[Array, "*at"]) -> Expected:
        """Mean and spread there, by comparing with all knots: no loop in a training step."""
        right = jnp.searchsorted(self.knots, at, method="compare_all")
        right = jnp.clip(right, 1, KNOTS - 1)
        low, high = self.knots[right - 1], self.knots[right]
        part = jnp.clip((at - low) / (high - low), 0, 1)
        lar, spread = (y[right - 1] * (1 - part) + y[right] * part for y in (self.mean, self.spread))
        slack = 1e-5  # of the rounding of log2
        known = (at >= self.knots[0] - slack) & (at <= self.knots[-1] + slack)
        return Expected(lar, spread, known)


class Baseline(eqx.Module):
    """Runs to compare with that do not overfit, as small arrays that can be used inside jit.

    Points closer than a sixteenth of a doubling of steps are averaged, after a running median of
    five; LAR is the lesser of that and what it was a fifth of a doubling before, since a healthy
    run may be so much later. As a function of the loss a run counts where its loss is lower than
    ever before. Several runs also have a spread: how far one may be away without overfitting.

    Example:
        >>> import numpy as np
        >>> from jlar.monitor import Baseline
        >>> steps = np.arange(10, 1000, 10)
        >>> runs = [(steps, lar - steps / 10_000, 5 - steps / 1000) for lar in (0.69, 0.71)]
        >>> baseline = Baseline.from_runs(runs)
        >>> lar, spread, known = baseline.at_step(500)
        >>> print(f"{lar:.3f} {spread:.3f} {known}; {baseline.at_loss(4.5).lar:.3f}")
        0.650 0.017 True; 0.650
        >>> print(baseline.at_step(2000).known, baseline.at_loss(1.0).known)
        False False
    """

    by_step: Curve  # over log2 of the step
    by_loss: Curve | None  # None if there is no loss that all runs have had
    runs: int = eqx.field(static=True)

    @classmethod
    def from_runs(cls, runs: Sequence[tuple[Points, Points, Points | None]]) -> "Baseline":
        """A baseline of the logs of one or more runs, as (steps, LARs, training losses or None).

        Points may be in any order; those with a nan or a step <= 0 are left out.

        Raises:
            ValueError: a run has LAR at fewer than two steps, or the runs have no steps in common.
        """
        pooled = [_pooled(*run) for run in runs]
        first, last = max(u[0] for u, _, _ in pooled), min(u[-1] for u, _, _ in pooled)
        need(bool(first < last), "the runs of a baseline have no steps in common")
        by_step = _curve([(u, lar) for u, lar, _ in pooled], np.linspace(first, last, KNOTS))
        curves = [_by_loss(lar, loss) for _, lar, loss in pooled]
        losses = np.unique(np.concatenate([loss for loss, _ in curves]))
        had = [(losses >= x.min(initial=np.inf)) & (losses <= x.max(initial=0)) for x, _ in curves]
        if len(losses := losses[np.all(had, axis=0)]) < 2:
            return cls(by_step, None, len(runs))
        place = np.linspace(0, len(losses) - 1, KNOTS)  # so that every baseline has one shape
        knots = np.interp(place, np.arange(len(losses)), losses)
        return cls(by_step, _curve(curves, knots), len(runs))

    def at_step(self, step: Float[ArrayLike, "*at"] | Int[ArrayLike, "*at"]) -> Expected:
        """LAR at a step, which is positive."""
        return self.by_step(jnp.log2(jnp.asarray(step).astype(jnp.float32)))

    def at_loss(self, loss: Float[ArrayLike, "*at"]) -> Expected:
        """LAR when the training loss was this; not known below the least that it ever was."""
        loss = jnp.asarray(loss).astype(jnp.float32)
        if self.by_loss is not None:
            return self.by_loss(loss)
        return Expected(jnp.zeros_like(loss), jnp.zeros_like(loss), jnp.zeros(loss.shape, bool))


def _pooled(
    steps: Points, lar: Points, loss: Points | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log2(step), LAR and loss, averaged over each sixteenth of a doubling."""
    log = np.array([steps, lar, np.full(len(steps), np.nan) if loss is None else loss], float)
    log = log[:, (log[0] > 0) & np.isfinite(log[0] + log[1])]
    log = log[:, np.argsort(log[0], kind="stable")]
    message = f"a baseline needs LAR at two or more different steps above 0; got {log[0]}"
    need(len(np.unique(log[0])) > 1, f"{message} (the steps come first, then the LARs)")
    u = np.log2(log[0])
    bins = np.floor((u - u[0]) / POOLED) if u[-1] - u[0] >= POOLED else u
    bins = np.unique(bins, return_inverse=True)[1]
    columns = [u, _median_of_five(log[1]), _median_of_five(log[2])]
    means = np.stack([np.bincount(bins, each) / np.bincount(bins) for each in columns])
    # On to the last step, along the line through the last two means.
    before, last = means[:, -2], means[:, -1]
    end = last + (u[-1] - last[0]) / (last[0] - before[0]) * (last - before)
    means = np.column_stack([means, end])
    start = np.flatnonzero(np.append(True, np.diff(means[0]) > GAP))[-1]
    u, lar, loss = means[:, min(start, means.shape[1] - 2) :]
    return u, np.minimum(lar, np.interp(u - BEHIND, u, lar)), loss


def _median_of_five(values: np.ndarray) -> np.ndarray:
    padded = np.pad(values, 2, "edge")
    return np.median([padded[i : len(values) + i] for i in range(5)], axis=0)


def _by_loss(lar: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    loss = np.where(np.isfinite(loss), loss, np.inf)
    lower = loss < np.append(np.inf, np.minimum.accumulate(loss)[:-1])
    return loss[lower][::-1], lar[lower][::-1]


def _curve(runs: list[tuple[np.ndarray, np.ndarray]], knots: np.ndarray) -> Curve:
    lars, spread = np.stack([np.interp(knots, *run) for run in runs]), np.zeros(KNOTS)
    if (n := len(runs)) > 1:
        # Few runs tell their variance badly: it is averaged over a quarter of the knots.
        width = KNOTS // 4 + 1
        variance = np.pad(lars.var(axis=0, ddof=1), width // 2, "edge")
        variance = np.convolve(variance, np.full(width, 1 / width), "valid")
        spread = np.sqrt(variance * (1 + 1 / n))
    return Curve(*(jnp.asarray(each, jnp.float32) for each in (knots, lars.mean(axis=0), spread)))
