"""Monitor: alarms out of the log-alignment ratio, while a run trains or from its log afterwards."""

import math
from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ._checks import check_width
from ._trend import Window

# Doublings that a run may be behind its baseline while LAR rises. At equal steps the difference
# that this makes outlives the rise, and dies out as 1 / step.
BEHIND, BEHIND_AT_LOSS = 0.2, 0.1
ALIGNED = 0.53  # a run that has not been above it is initialisation: nothing is said
MEMORISED = 0.05  # of the largest training loss
STEEP = 1.6  # times the allowed decline: a run that falls less steeply now starts no alarm
EARLY = 1.2  # times what the run lost in the first doubling after its peak is allowed from there on
LEVEL, PEAK, SLOPE = 1 / 8, 1 / 2, 1 / 2  # doublings that the means and the slope are over
CONFIRMATIONS = 2  # consecutive points it takes to start or to end an alarm


@dataclass(frozen=True)
class Thresholds:
    """What runs that do not overfit may do, in LAR.

    The defaults are those at which fewer than one in a hundred such runs alarm, by the procedure of
    `python -m jlar_experiments.monitoring.calibration`; its result is in
    jlar_experiments/log/monitor.md.
    """

    deviation: float = 0.0072
    """LAR below the baseline."""
    decline: float = 0.0038
    """LAR lost beyond what is allowed."""
    allowed: float = 0.0075
    """LAR lost per doubling of steps, however the run itself began its decline."""
    noises: float = 1.2
    """Standard deviations of the run's noise on top of `deviation` and of `decline`."""
    grokked: float = 0.4
    """Of the effective dimension k at memorisation: below it, `grokking` rings."""


class Signal(eqx.Module):
    """One alarm: its level, its threshold, and when it first rang.

    It starts when the level has exceeded the threshold at `CONFIRMATIONS` consecutive points of the
    window, and ends when it has been below half of it as often.
    """

    level: Float[Array, "*runs"]
    """In LAR, the larger the worse (grokking: the better); nan while there is nothing to say."""
    threshold: Float[Array, "*runs"]
    noise: Float[Array, "*runs"]
    """Standard deviation of a point about its trend, estimated from the run, in LAR."""
    alarm: Bool[Array, "*runs"]
    """Whether it rings now."""
    first_alarm_step: Float[Array, "*runs"]
    """When it first rang, whether or not it still does; nan if it never did."""
    streak: Int[Array, "*runs"]
    """Consecutive points that contradict `alarm`."""

    @classmethod
    def silent(cls, *shape: int) -> "Signal":
        """Nothing seen, nothing rung."""
        nan = jnp.full(shape, jnp.nan, jnp.float32)
        return cls(nan, nan, nan, jnp.zeros(shape, bool), nan, jnp.zeros(shape, jnp.int32))

    def __getitem__(self, i: int) -> "Signal":
        """One of a stack: stacks are along the last axis."""
        return jax.tree.map(lambda a: a[..., i], self)

    @property
    def rang(self) -> Bool[Array, "*runs"]:
        """Whether it rings or ever did."""
        return jnp.isfinite(self.first_alarm_step)

    def update(self, step: Array, heard: Array, level: Array, threshold: Array, noise: Array):
        """The signal after a point, if one was `heard`."""
        contradicts = jnp.where(self.alarm, level < threshold / 2, level > threshold)
        streak = jnp.where(contradicts, self.streak + 1, 0)
        flips = streak >= CONFIRMATIONS
        first = jnp.where(flips & ~self.rang, step, self.first_alarm_step)
        streak = jnp.where(flips, 0, streak)
        new = Signal(level, threshold, noise, self.alarm ^ flips, first, streak)
        return jax.tree.map(lambda a, b: jnp.where(heard, a, b), new, self)


class Monitor(eqx.Module):
    r"""Alarms out of a run's LAR, without validation data: a pytree that a training step carries.

    Three signals of overfitting, `deviation`, `matched_loss` and `decline`, and one of
    generalisation, `grokking`, which is good news and no part of `alarm`:

    * `deviation`: how far LAR is below the baseline's at the same step.
    * `matched_loss`: how far it is below the baseline's at the same training loss.
    * `decline`: how much LAR has lost beyond what runs lose that do not overfit: per doubling of
      steps `Thresholds.allowed`, or 1.2 times what the run itself has lost in the first doubling
      after its peak, if that is more; before that doubling is over nothing is said. Silent where
      the baseline shares it.
    * `grokking`: how much LAR has risen since memorisation (training loss below a twentieth of its
      largest), so that $k = n^{2(1-LAR)}$ is $n^{-2 level}$ of what it was; it rings at two fifths.
      Needs n. Networks may generalise without it (small initialisation).

    Every mean is over a fraction of a doubling of steps, so nothing depends on how often LAR is
    logged or on what a step is; each threshold has a floor and a multiple of the noise, which is
    estimated from the run. State: at most 48 points per signal, float32; it can be carried
    through jit, scan, vmap and checkpoints. Cost: some 6 microseconds of one CPU core per update at
    every step, and 15 where each point is a window's own, as in sparse logs
    (`benchmarks/monitor.py`).

    Example:
        >>> import jax, jax.numpy as jnp, jlar
        >>> steps = jnp.arange(50, 10_001, 50)
        >>> lar = 0.68 - 0.002 * (steps / 1000)  # the slow decline of a long run
        >>> falling = lar - 0.01 * jnp.maximum(steps / 1000 - 4, 0)  # overfitting from step 4000
        >>> @jax.vmap
        ... def final(lar):
        ...     watch = lambda monitor, at: (monitor.update(*at), None)
        ...     return jax.lax.scan(watch, jlar.Monitor.init(n=4096), (steps, lar))[0]
        >>> monitor = final(jnp.stack([lar, falling]))
        >>> print(monitor.alarm, monitor.first_alarm_step)
        [False  True] [  nan 4750.]
    """

    step: Float[Array, "*runs"]
    """The largest step so far."""
    ignored: Int[Array, "*runs"]
    """Updates whose LAR was not finite."""
    replayed: Int[Array, "*runs"]
    """Updates whose step was not greater than all before: a restart replaying what is known."""
    overfitting: Signal
    """Three, as the windows: `decline`, `deviation` and `matched_loss`."""
    grokking: Signal
    peak_lar: Float[Array, "*runs"]
    """The largest LAR, a mean over half a doubling; nan before there is one."""
    peak_doublings: Float[Array, "*runs"]
    """log2 of the mean step of that mean."""
    early_decline: Float[Array, "*runs"]
    """LAR lost per doubling in the first doubling after the peak; nan before that is over."""
    counted_lar: Float[Array, "*runs"]
    """LAR where the decline is counted from."""
    counted_doublings: Float[Array, "*runs"]
    slope: Float[Array, "*runs"]
    """Change of LAR per doubling of steps, over the last half of a doubling."""
    steepest: Float[Array, "*runs"]
    """The largest slope so far, each multiplied by its step over the present one."""
    memorised_lar: Float[Array, "*runs"]
    """LAR at memorisation; nan before."""
    largest_loss: Float[Array, "*runs"]
    windows: Window
    """Three: of LAR, of its distance below the baseline at the same step, and at the same loss."""
    n: int | None = eqx.field(static=True)
    thresholds: Thresholds = eqx.field(static=True)

    @classmethod
    def init(cls, *, n: int | None = None, thresholds: Thresholds = Thresholds()) -> "Monitor":
        """A monitor that has seen nothing.

        Args:
            n: input width of the layer, the base of the logarithm, for `grokking`; None where it is
                not known.
            thresholds: when to ring; the defaults are calibrated.

        Raises:
            ValueError: n < 2.
        """
        if n is not None:
            check_width(n, "the argument n")
        nan, none = jnp.full((), jnp.nan, jnp.float32), jnp.zeros((), jnp.int32)
        before = jnp.full((), -jnp.inf, jnp.float32)
        return cls(
            step=before,
            ignored=none,
            replayed=none,
            overfitting=Signal.silent(3),
            grokking=Signal.silent(),
            peak_lar=nan,
            peak_doublings=nan,
            early_decline=nan,
            counted_lar=nan,
            counted_doublings=nan,
            slope=nan,
            steepest=jnp.zeros((), jnp.float32),
            memorised_lar=nan,
            largest_loss=before,
            windows=Window.empty(3),
            n=n,
            thresholds=thresholds,
        )

    @property
    def decline(self) -> Signal:
        """What LAR has lost beyond the allowed decline."""
        return self.overfitting[0]

    @property
    def deviation(self) -> Signal:
        """How far LAR is below the baseline's at the same step."""
        return self.overfitting[1]

    @property
    def matched_loss(self) -> Signal:
        """How far LAR is below the baseline's at the same training loss."""
        return self.overfitting[2]

    @property
    def alarm(self) -> Bool[Array, "*runs"]:
        """Whether a signal of overfitting rings now."""
        return jnp.any(self.overfitting.alarm, axis=-1)

    @property
    def first_alarm_step(self) -> Float[Array, "*runs"]:
        """When a signal of overfitting first rang; nan if none ever did."""
        return jnp.nanmin(self.overfitting.first_alarm_step, axis=-1)

    @property
    def peak_step(self) -> Float[Array, "*runs"]:
        """Where LAR was largest; nan before there is such a mean."""
        return jnp.exp2(self.peak_doublings)

    @property
    def slope_per_step(self) -> Float[Array, "*runs"]:
        """Change of LAR per step, over the last half of a doubling."""
        return self.slope / (self.step * math.log(2))

    def update(
        self,
        step: Float[ArrayLike, ""] | Int[ArrayLike, ""],
        lar: Float[ArrayLike, ""],
        *,
        train_loss: Float[ArrayLike, ""] | None = None,
        baseline_lar: Float[ArrayLike, ""] | None = None,
        baseline_at_loss: Float[ArrayLike, ""] | None = None,
    ) -> "Monitor":
        """The monitor after one more step. Pure: keep what it returns.

        Args:
            step: of the run, in any unit, at any distance. One that is not greater than all before
                is a restart that replays what is known: it changes nothing but `replayed`. Step 0
                has no logarithm and is passed over.
            lar: of the training data. What is not finite changes nothing but `ignored`.
            train_loss: for `grokking`.
            baseline_lar: the baseline's LAR at this step, as `jlar.Baseline.at_step` gives it, or
                that of a second run beside this one; nan where the baseline says nothing.
            baseline_at_loss: the baseline's LAR where its training loss was what this run's is now,
                as `jlar.Baseline.at_loss` gives it; nan outside the losses that it saw.

        Returns:
            A monitor of the same structure, shapes and dtypes.
        """
        step, lar, loss, at_step, at_loss = (
            _scalar(value) for value in (step, lar, train_loss, baseline_lar, baseline_at_loss)
        )
        known, finite = step <= self.step, jnp.isfinite(lar)
        lar = jnp.where(known, jnp.nan, lar)
        u, distances = jnp.log2(step), jnp.stack([lar, at_step - lar, at_loss - lar])
        windows, heard = jax.vmap(Window.push, (0, None, 0))(self.windows, u, distances)
        largest_loss = jnp.fmax(self.largest_loss, jnp.where(known, jnp.nan, loss))
        memorised_lar, grokking = self._grokking(step, lar, loss, largest_loss)
        seen = replace(
            self,
            step=jnp.fmax(step, self.step),
            ignored=self.ignored + (~finite & ~known).astype(jnp.int32),
            replayed=self.replayed + known.astype(jnp.int32),
            grokking=grokking,
            memorised_lar=memorised_lar,
            largest_loss=largest_loss,
            windows=windows,
        )
        # Most steps of a run that is logged at every step only add to a point that is pending.
        return jax.lax.cond(heard[0], Monitor._judged, _unchanged, seen, heard)

    def _judged(self, heard: Bool[Array, "3"]) -> "Monitor":
        """The signals after the points that have entered the windows."""
        limits = self.thresholds
        enough, single, noise, u, level = jax.vmap(_newest)(self.windows)
        level = jnp.where(enough, level, jnp.nan)
        run = jax.tree.map(lambda stacked: stacked[0], self.windows)
        slope = jnp.where(run.enough, run.slope(SLOPE), jnp.nan)
        noise = jnp.maximum(noise, run.resolution)  # a log of two decimals shows no other noise

        u_mean, lar_mean = run.level(PEAK, single[0])
        rising = run.enough & ~(lar_mean <= self.peak_lar)
        peak_lar = jnp.where(rising, lar_mean, self.peak_lar)
        peak_doublings = jnp.where(rising, u_mean, self.peak_doublings)
        doublings = u[0] - peak_doublings
        early = jnp.where(rising, jnp.nan, self.early_decline)
        ends = (doublings >= 1) & jnp.isnan(early)  # the first doubling after the peak
        early = jnp.where(ends, (peak_lar - level[0]) / doublings, early)
        allowed = jnp.fmax(limits.allowed, EARLY * early)

        def tilted(u: Array, lar: Array) -> Array:
            return lar + allowed * u  # constant along the decline that is allowed

        held = tilted(self.counted_doublings, self.counted_lar)
        higher = run.enough & ~(tilted(u_mean, lar_mean) <= held)
        counted_lar = jnp.where(higher, lar_mean, self.counted_lar)
        counted_doublings = jnp.where(higher, u_mean, self.counted_doublings)
        anew = ends & (allowed > limits.allowed)
        counted_lar = jnp.where(anew, level[0], counted_lar)
        counted_doublings = jnp.where(anew, u[0], counted_doublings)
        level = jnp.where(peak_lar >= ALIGNED, level, jnp.nan)

        passed = jnp.exp2(run.doublings[-2] - run.doublings[-1])  # last step over this one
        steepest = jnp.fmax(slope, self.steepest * passed)
        at_step = limits.deviation + BEHIND * steepest
        at_loss = limits.deviation + BEHIND_AT_LOSS * jnp.maximum(slope, 0)
        floor = jnp.stack([jnp.full_like(slope, limits.decline), at_step, at_loss])
        threshold = floor + limits.noises * noise

        old = self.overfitting
        near = jnp.where(heard, level < threshold / 2, old.level < old.threshold / 2)[1]
        compared = self.windows.doublings[0, -1] - self.windows.doublings[1, -1] < LEVEL
        # What the end of a warm-up has cost stays lost, but goes on no longer.
        over = (doublings < 1) | ~self.decline.alarm & (slope > -STEEP * limits.allowed)
        lost = tilted(counted_doublings, counted_lar) - tilted(u[0], level[0])
        lost = jnp.where(compared & near | over, jnp.minimum(lost, 0), lost)
        level = jnp.where(jnp.arange(3) == 0, lost, level)
        overfitting = old.update(self.step, heard, level, threshold, noise)
        return replace(
            self,
            overfitting=overfitting,
            peak_lar=peak_lar,
            peak_doublings=peak_doublings,
            early_decline=early,
            counted_lar=counted_lar,
            counted_doublings=counted_doublings,
            slope=slope,
            steepest=steepest,
        )

    def _grokking(
        self, step: Array, lar: Array, loss: Array, largest_loss: Array
    ) -> tuple[Array, Signal]:
        now = jnp.isnan(self.memorised_lar) & (loss < MEMORISED * largest_loss)
        memorised_lar = jnp.where(now, lar, self.memorised_lar)
        wanted = 1 / self.thresholds.grokked
        rise = math.inf if self.n is None else 0.5 * math.log(wanted) / math.log(self.n)
        level, heard = lar - memorised_lar, jnp.isfinite(lar)
        threshold = jnp.full((), rise, jnp.float32)
        signal = self.grokking.update(step, heard, level, threshold, self.grokking.noise)
        return memorised_lar, signal


def _unchanged(monitor: Monitor, heard: Array) -> Monitor:
    return monitor  # a function of its own, so that calls outside jit find it compiled


def _newest(window: Window) -> tuple[Array, ...]:
    single, noise = window.noise
    return window.enough, single, noise, *window.level(LEVEL, single)


def _scalar(value: ArrayLike | None) -> Float[Array, ""]:
    value = jnp.asarray(jnp.nan if value is None else value)
    if value.ndim:
        raise ValueError(
            f"Monitor.update takes scalars; got shape {value.shape}. For several layers or runs "
            "keep a stack of monitors and use jax.vmap."
        )
    return jax.lax.stop_gradient(value.astype(jnp.float32))
