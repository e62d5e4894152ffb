"""Monitor: alarms out of the log-alignment ratio, while a run trains or from its log afterwards."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ._baseline import Baseline, Expected
from ._checks import check_width

SIGNALS = ("deviation", "matched_loss", "decline", "grokking")
ALIGNED = 0.53  # LAR is 1/2 at initialisation: a run that has not risen above this says nothing
MEMORISED = 0.05  # training loss, of its largest
SMOOTH = 1 / 8  # doublings of steps that means of LAR and of the loss are over
LONGEST = 1 / 4  # doublings that one point may stand for, and that a signal may be without one
NOISELESS = 0.003  # LAR: what a point may add to a noise of 0
LATEST = 3e38  # later than any step


@dataclass(frozen=True)
class Thresholds:
    """What runs that do not overfit may do, in LAR. Chosen in jlar_experiments/log/monitor.md."""

    allowance: float = 0.006
    """Level that is never counted."""
    noises: float = 2.5
    """The same in multiples of the noise, where that is more."""
    hold: float = 0.05
    """Doublings of steps that a signal of overfitting may be at twice the allowance."""
    decline: float = 0.0075
    """LAR that a run may lose per doubling of steps after its peak."""
    grokked: float = 0.4
    """Of the effective dimension k at memorisation: below it, `grokking` rings."""


class Signal(eqx.Module):
    r"""A one-sided CUSUM over u = log2(step): $S \leftarrow \max(0, S + (x - allowance) du)$.

    x is the median of its last three values, so that one outlier moves nothing.
    """

    level: Float[Array, "*signals"]
    """x, in LAR."""
    allowance: Float[Array, "*signals"]
    """The x that runs which do not overfit have as well."""
    S: Float[Array, "*signals"]
    """LAR times doublings; at most twice the limit, so that an alarm ends soon after its cause."""
    known_S: Float[Array, "*signals"]
    """S without the last interval, whose end the next point may show to be an outlier."""
    limit: Float[Array, "*signals"]
    jitter: Float[Array, "*signals"]
    """Mean distance of x from the middle of its neighbours, about its standard deviation."""
    noise: Float[Array, "*signals"]
    """Root mean square of x in the first epoch, in which each doubling of steps has half of the
    weight that the later ones leave; 0 before LAR has risen, and if no first epoch is told."""
    since: Float[Array, "*signals"]
    """Step from which it has been in force without a pause; 0 if it is not in force."""
    calm_step: Float[Array, "*signals"]
    """The last step at which S was 0."""
    first_alarm_step: Float[Array, "*signals"]
    """0 if it never rang."""
    step_before: Float[Array, "*signals"]
    """The last step before S began to rise to its first alarm: go back to a checkpoint up to it."""
    heard: Int[Array, "*signals"]
    """Points with an x since the last pause: points without one for a quarter of a doubling."""
    doublings: Float[Array, "*signals"]
    """log2 of the step of the last point with an x."""
    width: Float[Array, "*signals"]
    """log2 of that step over the one before."""
    recent: Float[Array, "*signals"]
    earlier: Float[Array, "*signals"]

    @property
    def alarm(self) -> Bool[Array, "*signals"]:
        """Whether it rings now."""
        return self.S > self.limit


class Monitor(eqx.Module):
    r"""Alarms out of a run's LAR, without validation data: a pytree that a training step carries.

    On small models its alarm is no better than the same alarm on the training loss, and worse if
    there is no baseline (jlar_experiments/results): give it one of several seeds.

    Three signals of overfitting, and one of generalisation, which is good news and no `alarm`. Each
    is a CUSUM over u = log2(step), $S \leftarrow \max(0, S + (x - allowance) du)$, and rings when S
    exceeds its limit. Time is counted in doublings, so it does not matter how often LAR is logged.

    * `deviation`: x is how far LAR is below the baseline's at the same step.
    * `matched_loss`: x is how far it is below the baseline's at the same training loss.
    * `decline`: x is what LAR has lost since its peak beyond .0075 per doubling of steps; if there
      is a baseline, at most how far LAR is below it, so that a decline which both share counts not.
    * `grokking`: x is how much LAR has risen since memorisation (training loss below a twentieth of
      its largest); $k = n^{2(1-LAR)}$ is $n^{-2x}$ of what it was, and two fifths ring. Needs n.

    The allowance is .006 or 2.5 times the noise, whichever is more. The noise is the largest of
    three: of a point of the log about its neighbours, of the spread of a baseline of several runs
    (not for `decline`), and of x in the run's first epoch, which cannot overfit, if `second_epoch`
    is told. Small models differ by more than .006 between seeds: they need one of the last two.

    **When it rings**: look at the validation loss, if there is one. If not, stop, or go back to the
    last checkpoint at or before the signal's `step_before`, after which S rose, and go on with more
    data or with more weight decay. An alarm is a sign of overfitting, no proof.

    No field is ever nan or infinite: a step of 0 stands for never. State: 77 numbers. Cost: a few
    microseconds of one CPU core per update (`benchmarks/monitor.py`).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jlar.monitor import Monitor
        >>> steps = jnp.arange(50, 10_001, 50)
        >>> lar = 0.68 - 0.002 * (steps / 1000)  # the slow decline of a long run
        >>> falling = lar - 0.01 * jnp.maximum(steps / 1000 - 4, 0)  # overfitting from step 4000
        >>> @jax.vmap
        ... def final(lar):
        ...     watch = lambda monitor, at: (monitor.update(*at), None)
        ...     return jax.lax.scan(watch, Monitor.init(n=4096), (steps, lar))[0]
        >>> monitor = final(jnp.stack([lar, falling]))
        >>> print(monitor.alarm, monitor.first_alarm_step, monitor["decline"].step_before)
        [False  True] [   0. 5000.] [   0. 4600.]
    """

    step: Float[Array, "*runs"]
    """The largest step so far."""
    points: Int[Array, "*runs"]
    """Updates that counted: those with a finite LAR and a step greater than all before."""
    second_epoch: Float[Array, "*runs"]
    signals: Signal
    """Stacked along the last axis, in the order above; `monitor["decline"]` is one of them."""
    mean_lar: Float[Array, "*runs"]
    """Over an eighth of a doubling, as `mean_loss`."""
    mean_loss: Float[Array, "*runs"]
    peak_lar: Float[Array, "*runs"]
    """The largest mean."""
    ceiling: Float[Array, "*runs"]
    """The largest sum of the mean and the decline that is allowed until then."""
    memorised_lar: Float[Array, "*runs"]
    """LAR at memorisation; 0 before."""
    largest_loss: Float[Array, "*runs"]
    recent: Float[Array, "*runs"]
    earlier: Float[Array, "*runs"]
    recent_loss: Float[Array, "*runs"]
    earlier_loss: Float[Array, "*runs"]
    n: int | None = eqx.field(static=True)
    thresholds: Thresholds = eqx.field(static=True)

    @classmethod
    def init(
        cls,
        *,
        n: int | None = None,
        second_epoch: Float[ArrayLike, ""] | Int[ArrayLike, ""] | None = None,
        thresholds: Thresholds = Thresholds(),
    ) -> "Monitor":
        """A monitor that has seen nothing.

        Args:
            n: input width of the layer, the base of the logarithm, for `grokking`.
            second_epoch: step at which the data begins to repeat (tokens of the data set over
                tokens per step): before it the noise is learnt, and no signal of overfitting rings.
            thresholds: when to ring.

        Raises:
            ValueError: n < 2.
        """
        if n is not None:
            check_width(n, "the argument n")

        def zeros(kind: type, *shape: int) -> dict[str, Any]:
            counts = {"points", "heard"}
            names = [field.name for field in fields(kind)]
            return {a: jnp.zeros(shape, jnp.int32 if a in counts else jnp.float32) for a in names}

        state = zeros(cls) | {
            "second_epoch": jnp.asarray(0 if second_epoch is None else second_epoch, jnp.float32),
            "signals": Signal(**zeros(Signal, len(SIGNALS))),
        }
        return cls(**state | {"n": n, "thresholds": thresholds})

    def __getitem__(self, name: str) -> Signal:
        """One of the signals."""
        return jax.tree.map(lambda a: a[..., SIGNALS.index(name)], self.signals)

    @property
    def alarm(self) -> Bool[Array, "*runs"]:
        """Whether a signal of overfitting rings now."""
        return jnp.any(self.signals.alarm[..., :3], axis=-1)

    @property
    def first_alarm_step(self) -> Float[Array, "*runs"]:
        """When a signal of overfitting first rang; 0 if none ever did."""
        first = self.signals.first_alarm_step[..., :3]
        first = jnp.min(jnp.where(first > 0, first, LATEST), axis=-1)
        return jnp.where(first < LATEST, first, 0)

    def update(
        self,
        step: Float[ArrayLike, ""] | Int[ArrayLike, ""],
        lar: Float[ArrayLike, ""],
        *,
        loss: Float[ArrayLike, ""] | None = None,
        baseline: Baseline | None = None,
    ) -> "Monitor":
        """The monitor after one more step. Pure: keep what it returns.

        Args:
            step: of the run, in any unit, at any distance. One that is not greater than all before
                is a restart that replays what is known: it changes nothing, as does step 0.
            lar: of the training data. What is not finite changes nothing.
            loss: of the training data, for `matched_loss` and `grokking`; 0 or less is none.
            baseline: what to compare with, for `deviation` and `matched_loss`.

        Returns:
            A monitor of the same structure, shapes and dtypes.
        """
        step, lar, loss = _scalar(step), _scalar(lar), _scalar(0 if loss is None else loss)
        counts = jnp.isfinite(step) & jnp.isfinite(lar) & (step > self.step)
        loss = jnp.where(jnp.isfinite(loss), loss, 0)  # a loss of 0 stands for none
        new = self._averaged(jnp.where(counts, step, 1), jnp.where(counts, lar, 0), loss)
        new = replace(new, signals=new._summed(*new._levels(loss > 0, baseline)))
        return jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, self)

    def _averaged(self, step: Array, lar: Array, loss: Array) -> "Monitor":
        """All but the signals, after a point that counts."""
        u, before = jnp.log2(step), jnp.log2(jnp.maximum(self.step, 1))
        share = jnp.where(self.points > 0, jnp.minimum((u - before) / SMOOTH, 1), 1)
        enough = self.points > 1
        middle = jnp.where(enough, _median(lar, self.recent, self.earlier), lar)
        mean_lar = self.mean_lar + share * (middle - self.mean_lar)
        lossy = loss > 0
        middle = _median(loss, self.recent_loss, self.earlier_loss)
        middle = jnp.where(self.earlier_loss > 0, middle, loss)
        mean_loss = self.mean_loss + jnp.where(self.mean_loss > 0, share, 1) * (
            middle - self.mean_loss
        )
        largest_loss = jnp.maximum(self.largest_loss, loss)
        memorised = lossy & (loss < MEMORISED * largest_loss) & (self.memorised_lar == 0)
        return replace(
            self,
            step=step,
            points=self.points + 1,
            mean_lar=mean_lar,
            mean_loss=jnp.where(lossy, mean_loss, self.mean_loss),
            peak_lar=jnp.maximum(self.peak_lar, mean_lar),
            ceiling=jnp.maximum(self.ceiling, mean_lar + self.thresholds.decline * u),
            memorised_lar=jnp.where(memorised, lar, self.memorised_lar),
            largest_loss=largest_loss,
            recent=lar,
            earlier=self.recent,
            recent_loss=jnp.where(lossy, loss, self.recent_loss),
            earlier_loss=jnp.where(lossy, self.recent_loss, self.earlier_loss),
        )

    def _levels(self, lossy: Array, baseline: Baseline | None) -> tuple[Array, Array, Array]:
        """x of the signals at this point, which of them are known, and the baseline's spread."""
        lar, zero, no = self.recent, jnp.zeros((), jnp.float32), jnp.zeros((), bool)
        at_step = at_loss = Expected(zero, zero, no)
        if baseline is not None:
            at_step, at_loss = baseline.at_step(self.step), baseline.at_loss(self.mean_loss)
        apart = at_step.lar - lar
        lost = self.ceiling - self.thresholds.decline * jnp.log2(self.step) - lar
        lost = jnp.where(at_step.known, jnp.minimum(lost, apart), lost)
        x = [apart, at_loss.lar - self.mean_lar, lost, lar - self.memorised_lar]
        memorised = (self.memorised_lar > 0) & (self.n is not None)
        known = [at_step.known, at_loss.known & lossy, ~no, memorised]
        return (
            jnp.stack(x),
            jnp.stack(known),
            jnp.stack([at_step.spread, at_loss.spread, zero, zero]),
        )

    def _summed(self, x: Array, known: Array, spread: Array) -> Signal:
        """The signals after these x; where x is not known only a pause can begin."""
        old, limits, u = self.signals, self.thresholds, jnp.log2(self.step)
        overfitting = jnp.arange(len(SIGNALS)) < 3
        aligned, first_epoch = self.peak_lar > ALIGNED, self.step < self.second_epoch
        pauses = ~known & (u - old.doublings > LONGEST)
        heard = jnp.where(pauses, 0, old.heard + known.astype(jnp.int32))
        # An interval counts once the point after it shows that its end is no outlier.
        enough = heard > 2
        du, level = jnp.where(enough, old.width, 0), _median(x, old.recent, old.earlier)
        judges = (aligned & ~first_epoch | ~overfitting) & enough

        width = jnp.minimum(u - old.doublings, LONGEST)
        part = width / jnp.maximum(width + old.width, 1e-6)
        bend = jnp.abs(old.recent - part * old.earlier - (1 - part) * x)
        bend = jnp.minimum(bend, 4 * old.jitter + NOISELESS)  # an outlier is forgotten soon
        weight = jnp.maximum(width + old.width, 1 / jnp.maximum(heard - 2, 1).astype(jnp.float32))
        weight = jnp.minimum(weight, 1)
        jitter = jnp.where(enough, old.jitter + weight * (bend - old.jitter), old.jitter)
        share = jnp.where(aligned & first_epoch & overfitting, 1 - jnp.exp2(-du), 0)
        noise = jnp.sqrt((1 - share) * jnp.square(old.noise) + share * jnp.square(level))
        # The means that `matched_loss` compares hide the noise that the other two show.
        point = jnp.max(jitter[..., :3])
        least = limits.noises * jnp.maximum(point, jnp.maximum(spread, noise))
        least = jnp.maximum(limits.allowance, least)
        rise = 0.5 * math.log(1 / limits.grokked) / math.log(self.n or 2)
        allowance = jnp.where(overfitting, least, rise)
        limit = limits.hold * least

        known_S = jnp.clip(old.known_S + (level - allowance) * du, 0, 2 * limit)
        known_S = jnp.where(judges, known_S, 0)
        S = jnp.clip(known_S + (jnp.minimum(x, old.recent) - allowance) * width, 0, 2 * limit)
        S = jnp.where(judges, S, 0)
        first = (S > limit) & (old.first_alarm_step == 0)
        new = Signal(
            level=level,
            allowance=allowance,
            S=S,
            known_S=known_S,
            limit=limit,
            jitter=jitter,
            noise=noise,
            since=jnp.where(judges, jnp.where(old.since > 0, old.since, self.step), 0),
            calm_step=jnp.where(S > 0, old.calm_step, self.step),
            first_alarm_step=jnp.where(first, self.step, old.first_alarm_step),
            step_before=jnp.where(first, old.calm_step, old.step_before),
            heard=heard,
            doublings=jnp.full_like(x, u),
            width=width,
            recent=x,
            earlier=old.recent,
        )
        old = replace(old, heard=heard, since=jnp.where(pauses, 0, old.since))
        return jax.tree.map(lambda a, b: jnp.where(known, a, b), new, old)


def _median(a: Array, b: Array, c: Array) -> Array:
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def _scalar(value: ArrayLike) -> Float[Array, ""]:
    value = jnp.asarray(value)
    if value.ndim:
        raise ValueError(
            f"Monitor.update takes scalars; got shape {value.shape}. For several layers or runs "
            "keep a stack of monitors and use jax.vmap."
        )
    return jax.lax.stop_gradient(value.astype(jnp.float32))
