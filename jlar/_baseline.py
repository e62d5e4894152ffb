"""Baseline: a finished run's LAR as a function of the step and of the training loss."""

import json
import pathlib

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

KNOTS = 256
REACH = 1 / 16  # doublings to either side that a knot is fitted to
FEWEST = 7  # points that a knot is fitted to, at least


class Baseline(eqx.Module):
    """A run to compare with: its LAR, smoothed, at any step and at any training loss.

    At most 256 knots, spread evenly over the logarithm of the step, each the local straight line
    through the log's points within a sixteenth of a doubling, outliers clipped; linear
    interpolation between. As a function of the loss, the knots are those where the smoothed loss is
    lower than ever before. Small arrays, usable inside jit: O(log 256) per look-up.

    Example:
        >>> import equinox as eqx, jlar, numpy as np
        >>> steps = np.arange(10, 1000, 10)
        >>> baseline = jlar.Baseline.from_points(steps, 0.5 + steps / 10_000, 5 - steps / 1000)
        >>> print(f"{eqx.filter_jit(baseline.at_step)(500):.3f} {baseline.at_loss(4.5):.3f}")
        0.550 0.550
        >>> print(baseline.at_step(2000), baseline.at_loss(1.0))  # it says nothing about these
        nan nan
    """

    doublings: Float[Array, "knots"]
    """log2 of the step, increasing."""
    lar: Float[Array, "knots"]
    loss: Float[Array, "lows"]
    """Training loss, increasing; empty if the record has none."""
    lar_at_loss: Float[Array, "lows"]

    @classmethod
    def from_points(
        cls,
        steps: Float[np.ndarray, "points"] | Int[np.ndarray, "points"],
        lar: Float[np.ndarray, "points"],
        train_loss: Float[np.ndarray, "points"] | None = None,
    ) -> "Baseline":
        """A baseline from a run's log, in any order; points with a nan or a step <= 0 are left out.

        Raises:
            ValueError: fewer than two different steps are left.
        """
        steps, lar = np.asarray(steps, np.float64), np.asarray(lar, np.float64)
        doublings, smooth = _smooth(steps, lar)
        if len(doublings) < 2:
            raise ValueError(
                f"a baseline needs LAR at two or more different steps above 0; got {len(doublings)}"
                f" of {len(steps)} points. The steps come first, then the LARs."
            )
        low = low_lar = np.zeros(0)
        if train_loss is not None:
            at, loss = _smooth(steps, np.asarray(train_loss, np.float64))
            lower = np.flatnonzero(np.diff(np.minimum.accumulate(loss), prepend=np.inf) < 0)[::-1]
            low, low_lar = loss[lower], np.interp(at[lower], doublings, smooth)
        return cls(
            doublings=jnp.asarray(doublings, jnp.float32),
            lar=jnp.asarray(smooth, jnp.float32),
            loss=jnp.asarray(low, jnp.float32),
            lar_at_loss=jnp.asarray(low_lar, jnp.float32),
        )

    @classmethod
    def from_jsonl(
        cls,
        path: str | pathlib.Path,
        *,
        step: str = "step",
        lar: str = "lar",
        train_loss: str = "train_loss",
    ) -> "Baseline":
        """A baseline from a record of one JSON object per line; the names are those of its fields.

        Raises:
            ValueError: no line has the fields of the step and of LAR (that of the loss may be
                missing), or too few do.
        """
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        rows = [row for row in rows if step in row and lar in row]
        if not rows:
            raise ValueError(f"no line of {path} has both {step!r} and {lar!r}.")
        steps, lars, losses = (
            np.array([np.nan if row.get(name) is None else row[name] for row in rows], np.float64)
            for name in (step, lar, train_loss)
        )
        return cls.from_points(steps, lars, losses if np.isfinite(losses).any() else None)

    def save(self, path: str | pathlib.Path) -> None:
        """Write it as one JSON object, of a few kilobytes."""
        knots = {name: [float(str(x)) for x in np.asarray(a)] for name, a in vars(self).items()}
        pathlib.Path(path).write_text(json.dumps(knots) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Baseline":
        """What `save` wrote."""
        knots = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        return cls(**{name: jnp.asarray(values, jnp.float32) for name, values in knots.items()})

    def at_step(self, step: Float[ArrayLike, "*runs"] | Int[ArrayLike, "*runs"]) -> Array:
        """LAR at a step, float32; nan outside the steps of the record."""
        u = jnp.log2(jnp.asarray(step).astype(jnp.float32))
        slack = jnp.float32(1e-5)  # of the rounding of log2
        inside = (u >= self.doublings[0] - slack) & (u <= self.doublings[-1] + slack)
        return jnp.where(inside, jnp.interp(u, self.doublings, self.lar), jnp.nan)

    def at_loss(self, train_loss: Float[ArrayLike, "*runs"]) -> Array:
        """LAR when the training loss was this, float32; nan outside the losses of the record.

        For a run that has come below the last loss of the baseline there is nothing to compare with
        at equal loss: nan, and `Monitor.matched_loss` keeps its last level.
        """
        loss = jnp.asarray(train_loss).astype(jnp.float32)
        if self.loss.size == 0:
            return jnp.full_like(loss, jnp.nan)
        inside = (loss >= self.loss[0]) & (loss <= self.loss[-1])
        return jnp.where(inside, jnp.interp(loss, self.loss, self.lar_at_loss), jnp.nan)


def _smooth(
    steps: Float[np.ndarray, "points"], values: Float[np.ndarray, "points"]
) -> tuple[Float[np.ndarray, "knots"], Float[np.ndarray, "knots"]]:
    """Knots in log2(step) and the local lines through the values there."""
    with np.errstate(invalid="ignore", divide="ignore"):
        u = np.log2(steps)
    keep = np.isfinite(u) & np.isfinite(values)
    order = np.argsort(u[keep], kind="stable")
    u, y = u[keep][order], values[keep][order]
    if len(u) == 0:
        return u, y
    y = _without_outliers(y)
    wanted = np.linspace(u[0], u[-1], KNOTS)
    knots = np.unique(u[np.clip(np.searchsorted(u, wanted), 0, len(u) - 1)])
    return knots, np.array([_line(u, y, at) for at in knots])


def _line(u: np.ndarray, y: np.ndarray, at: float) -> float:
    reach = max(
        REACH, np.partition(np.abs(u - at), min(FEWEST, len(u)) - 1)[min(FEWEST, len(u)) - 1]
    )
    near = np.abs(u - at) <= reach
    u, y = u[near] - at, y[near]
    spread = np.sum((u - u.mean()) ** 2)
    slope = np.sum((u - u.mean()) * y) / spread if spread > 0 else 0.0
    return float(y.mean() - slope * u.mean())


def _without_outliers(y: np.ndarray) -> np.ndarray:
    """Points further than four deviations from the median of seven around them, put there."""
    if len(y) < FEWEST:
        return y
    padded = np.pad(y, FEWEST // 2, mode="reflect")
    middle = np.median(np.lib.stride_tricks.sliding_window_view(padded, FEWEST), axis=1)
    limit = 4 * 1.4826 * np.median(np.abs(y - middle))
    return np.where(np.abs(y - middle) > max(limit, 1e-12), middle, y)
