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
BEHIND = 0.2  # doublings that a run may be later than the baseline

Points = Float[np.ndarray, "points"] | Int[np.ndarray, "points"]


class Expected(NamedTuple):
    """What a baseline has at one step or loss."""

    lar: Float[Array, "*at"]
    """Mean of its runs, each at the lesser of its LAR here and a fifth of a doubling of steps
    before, since a healthy run may be so much later while LAR rises."""
    spread: Float[Array, "*at"]
    """Standard deviation of one more run about that mean; 0 for a baseline of one run."""
    known: Bool[Array, "*at"]
    """Whether the runs have been there; if not, the other two are those of the nearest end."""


class Curve(eqx.Module):
    """Mean and spread over increasing knots, linear between them."""

    knots: Float[Array, "knots"]
    mean: Float[Array, "knots"]
    spread: Float[Array, "knots"]

    def __call__(self, at: Float[Array, "*at"]) -> Expected:
        """Mean and spread there, by comparing with all knots: no loop in a training step."""
        right = jnp.searchsorted(self.knots, at, method="compare_all")
        right = jnp.clip(right, 1, self.knots.size - 1)
        low, high = self.knots[right - 1], self.knots[right]
        part = jnp.clip((at - low) / (high - low), 0, 1)
        lar, spread = (
            a[right - 1] * (1 - part) + a[right] * part for a in (self.mean, self.spread)
        )
        slack = jnp.float32(1e-5)  # of the rounding of log2
        known = (at >= self.knots[0] - slack) & (at <= self.knots[-1] + slack)
        return Expected(lar, spread, known)


class Baseline(eqx.Module):
    """Runs to compare with that do not overfit, as small arrays that can be used inside jit.

    Points closer than a sixteenth of a doubling of steps are averaged, after a running median of
    five. As a function of the loss a run counts where its loss is lower than ever before. Of
    several runs the mean is taken, and their spread, which is how far a run may be away without
    overfitting; a single run says nothing about that.

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

    by_step: Curve
    """Over log2 of the step."""
    by_loss: Curve | None
    """Over the training loss; None if a run has none."""
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
        by_loss, curves = None, [_by_loss(lar, loss) for _, lar, loss in pooled]
        if all(len(loss) for loss, _ in curves):
            first, last = max(loss[0] for loss, _ in curves), min(loss[-1] for loss, _ in curves)
            knots = np.unique(np.concatenate([loss for loss, _ in curves]))
            knots = knots[(knots >= first) & (knots <= last)]
            if len(knots) > 1:
                use = np.linspace(0, len(knots) - 1, KNOTS)  # so that every baseline has one shape
                by_loss = _curve(curves, np.interp(use, np.arange(len(knots)), knots))
        return cls(by_step, by_loss, len(pooled))

    def at_step(self, step: Float[ArrayLike, "*at"] | Int[ArrayLike, "*at"]) -> Expected:
        """LAR at a step, which is positive."""
        return self.by_step(jnp.log2(jnp.asarray(step).astype(jnp.float32)))

    def at_loss(self, loss: Float[ArrayLike, "*at"]) -> Expected:
        """LAR when the training loss was this; not known below the least that it ever was."""
        loss = jnp.asarray(loss).astype(jnp.float32)
        if self.by_loss is not None:
            return self.by_loss(loss)
        zero = jnp.zeros_like(loss)
        return Expected(zero, zero, jnp.zeros(loss.shape, bool))


def _pooled(
    steps: Points, lar: Points, loss: Points | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log2(step), LAR and loss, averaged over each sixteenth of a doubling."""
    steps, lar = np.asarray(steps, np.float64), np.asarray(lar, np.float64)
    loss = np.full(len(steps), np.nan) if loss is None else np.asarray(loss, np.float64)
    order = np.argsort(steps, kind="stable")
    order = order[(steps > 0)[order] & np.isfinite(steps + lar)[order]]
    count = len(np.unique(steps[order]))
    message = f"a baseline needs LAR at two or more different steps above 0; got {count}"
    need(count > 1, f"{message} in {len(steps)} points (the steps come first, then the LARs)")
    u = np.log2(steps[order])
    bins = np.unique(np.floor((u - u[0]) / POOLED), return_inverse=True)[1]
    if bins[-1] == 0:
        bins = np.unique(u, return_inverse=True)[1]
    columns = [u, _median_of_five(lar[order]), _median_of_five(loss[order])]
    means = np.stack([np.bincount(bins, each) / np.bincount(bins) for each in columns])
    # On to the last step, along the line through the last two means.
    before, last = means[:, -2], means[:, -1]
    end = last + (u[-1] - last[0]) / (last[0] - before[0]) * (last - before)
    means = np.column_stack([means, end])
    start = np.flatnonzero(np.append(True, np.diff(means[0]) > GAP))[-1]
    means = means[:, min(start, means.shape[1] - 2) :]
    u, lar = means[:2]
    return u, np.minimum(lar, np.interp(u - BEHIND, u, lar)), means[2]


def _median_of_five(values: np.ndarray) -> np.ndarray:
    return np.median(np.lib.stride_tricks.sliding_window_view(np.pad(values, 2, "edge"), 5), axis=1)


def _by_loss(lar: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    loss = np.where(np.isfinite(loss), loss, np.inf)
    lowest = np.append(np.inf, np.minimum.accumulate(loss)[:-1])
    lower = loss < lowest
    return loss[lower][::-1], lar[lower][::-1]


def _curve(runs: list[tuple[np.ndarray, np.ndarray]], knots: np.ndarray) -> Curve:
    lars, spread = np.stack([np.interp(knots, *run) for run in runs]), np.zeros(len(knots))
    if (n := len(runs)) > 1:
        # Few runs tell their variance badly: it is averaged over a quarter of the knots.
        variance = np.pad(lars.var(axis=0, ddof=1), KNOTS // 8, "edge")
        windows = np.lib.stride_tricks.sliding_window_view(variance, 2 * (KNOTS // 8) + 1)
        spread = np.sqrt(windows.mean(axis=1) * (1 + 1 / n))
    return Curve(*(jnp.asarray(each, jnp.float32) for each in (knots, lars.mean(axis=0), spread)))
