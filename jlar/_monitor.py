"""Monitor: alarms out of the log-alignment ratio, while a run trains or from its log afterwards."""

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ._baseline import Baseline, Expected
from ._checks import check_width, need, real_array

ALIGNED = 0.53  # LAR is 1/2 at initialisation: a run that has not risen above this says nothing
MEMORISED = 0.05  # training loss, of its largest
SMOOTH = 1 / 8  # doublings of steps that means of LAR and of the loss are over
LONGEST = 1 / 4  # doublings that a point may stand for; a signal without one for longer starts anew
NOISELESS = 0.003  # LAR: what a point may add to a noise of 0


@dataclass(frozen=True)
class Thresholds:
    """What runs that do not overfit may do, in LAR. Chosen in jlar_experiments/log/monitor.md."""

    allowance: float = 0.006  # what is never counted
    noises: float = 2.5  # the same in multiples of the noise, where that is more
    hold: float = (
        0.05  # doublings of steps at twice the allowance after which one of overfitting rings
    )
    decline: float = 0.0075  # what a run may lose per doubling of steps after its peak
    grokked: float = 0.4  # of the effective dimension at memorisation: below it, `grokking` rings


class Signal(eqx.Module):
    r"""A CUSUM over u = log2(step), $S \leftarrow \max(0, S + (x - allowance) du)$, of each signal.

    A value says by how much LAR does what `meaning` tells; x is the median of the last three, so
    that one outlier moves nothing. The signal rings when S exceeds its limit.
    """

    meaning: ClassVar[dict[str, str]] = {
        "deviation": "LAR is below the baseline's at the same step",
        "matched_loss": "LAR is below the baseline's at the same training loss",
        "decline": "LAR has lost more since its peak than runs lose that do not overfit",
        "grokking": "the effective dimension is at two fifths of what it was at memorisation",
    }

    level: Float[Array, "*signals"]  # x
    allowance: Float[Array, "*signals"]  # the x that runs which do not overfit have as well
    limit: Float[Array, "*signals"]  # 0 until it is in force
    settled_S: Float[Array, "*signals"]  # S up to the last value but one, which changes no more
    jitter: Float[Array, "*signals"]  # mean distance of a value from the line of its neighbours
    noise: Float[Array, "*signals"]  # root mean square of x in the first epoch
    first_alarm_step: Float[Array, "*signals"]  # 0 if it never rang
    step_before: Float[Array, "*signals"]  # the last before the first alarm at which S was 0
    heard: Float[
        Array, "*signals"
    ]  # values since the last pause of more than a quarter of a doubling
    doublings: Float[Array, "*signals"]  # log2 of the step of the last value
    width: Float[Array, "*signals"]  # of the last value in doublings, at most a quarter of one
    recent: Float[Array, "*signals"]
    earlier: Float[Array, "*signals"]

    @property
    def S(self) -> Float[Array, "*signals"]:
        """At most twice the limit, so that an alarm ends soon after its cause."""
        x = jnp.minimum(self.recent, self.earlier)  # the last may yet prove an outlier
        return jnp.clip(self.settled_S + (x - self.allowance) * self.width, 0, 2 * self.limit)

    @property
    def alarm(self) -> Bool[Array, "*signals"]:
        """Whether it rings now."""
        return self.S > self.limit


SIGNALS = tuple(Signal.meaning)
OVERFITTING = SIGNALS[:3]  # the last is good news, and no alarm


class Monitor(eqx.Module):
    """Alarms out of a run's LAR, without validation data: a pytree that a training step carries.

    On small models its alarm is no better than the same alarm on the training loss, and worse
    without a baseline (jlar_experiments/results): give it one of several seeds.

    `Signal` says what the signals are: three of overfitting, and `grokking`, which is good news and
    no `alarm`. Time is counted in doublings of the step, so how often LAR is logged matters not.
    The allowance of the three is .006 or 2.5 times the noise, whichever is more: that of a point
    about its neighbours, that between the runs of a baseline, and that of x in the first epoch,
    which cannot overfit, if `second_epoch` is told. Small models differ by more than .006 between
    seeds.

    No field is ever nan or infinite. State: 64 numbers. An update takes a few microseconds of a
    CPU core (benchmarks/monitor.py). For an example and what to do when it rings see the READMEs of
    the repository and of jlar_experiments/recipes.
    """

    signals: Signal  # stacked along the last axis; `monitor["decline"]` is one of them
    step: Float[Array, "*runs"]  # the largest so far
    second_epoch: Float[Array, "*runs"]
    recent: Float[Array, "*runs 2"]  # LAR and training loss; a loss of 0 is none
    earlier: Float[Array, "*runs 2"]
    mean: Float[Array, "*runs 2"]  # over an eighth of a doubling
    peak_lar: Float[Array, "*runs"]  # the largest mean
    ceiling: Float[Array, "*runs"]  # the largest sum of the mean and the decline allowed until then
    memorised_lar: Float[Array, "*runs"]  # LAR at memorisation; 0 before
    largest_loss: Float[Array, "*runs"]
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
            n: input width of the layer, the base of the logarithm, for `grokking`; at least 2.
            second_epoch: step at which the data begins to repeat (tokens of the data set over
                tokens per step): before it the noise is learnt, and no signal of overfitting rings.
            thresholds: when to ring.
        """
        if n is not None:
            check_width(n, "the argument n")
        zeros, pairs = partial(jnp.zeros, dtype=jnp.float32), {"recent": 2, "earlier": 2, "mean": 2}
        state: dict[str, Any] = {each.name: zeros(pairs.get(each.name, ())) for each in fields(cls)}
        state["signals"] = Signal(*(zeros(len(SIGNALS)) for _ in fields(Signal)))
        second_epoch = 0 if second_epoch is None else second_epoch
        state["second_epoch"] = jnp.asarray(second_epoch, jnp.float32)
        return cls(**state | {"n": n, "thresholds": thresholds})

    def __getitem__(self, name: str) -> Signal:
        """One of the signals."""
        return jax.tree.map(lambda a: a[..., SIGNALS.index(name)], self.signals)

    @property
    def alarm(self) -> Bool[Array, "*runs"]:
        """Whether a signal of overfitting rings now."""
        return jnp.any(self.signals.alarm[..., : len(OVERFITTING)], axis=-1)

    @property
    def first_alarm_step(self) -> Float[Array, "*runs"]:
        """When a signal of overfitting first rang; 0 if none ever did."""
        first = self.signals.first_alarm_step[..., : len(OVERFITTING)]
        last = jnp.max(first, axis=-1, keepdims=True)
        return jnp.min(jnp.where(first > 0, first, last), axis=-1)

    def update(
        self,
        step: Float[ArrayLike, ""] | Int[ArrayLike, ""],
        lar: Float[ArrayLike, ""],
        *,
        loss: Float[ArrayLike, ""] | None = None,
        baseline: Baseline | None = None,
    ) -> "Monitor":
        """The monitor after one more step, of the same structure. Pure: keep what it returns.

        Args:
            step: of the run, in any unit, at any distance; one that is not greater than all before,
                as in a restart, changes nothing, nor does step 0. Held as float32: two steps within
                1e-7 of each other are one.
            lar: of the training data; one that is not finite, or beyond 1e9, changes nothing.
            loss: of the training data, for `matched_loss` and `grokking`; 0 or less is none.
            baseline: what to compare with, for `deviation` and `matched_loss`.
        """
        given = {"step": step, "lar": lar, "loss": 0 if loss is None else loss}
        step, lar, loss = (_scalar(value, name) for name, value in given.items())
        counts = jnp.isfinite(step) & (jnp.abs(lar) < 1e9) & (step > self.step)
        has_loss = jnp.isfinite(loss) & (loss > 0)
        loss = jnp.where(has_loss, loss, self.recent[1])
        # What does not count is replaced by something finite, and the result dropped below.
        new = self._averaged(jnp.where(counts, step, 1), jnp.where(counts, lar, 0), loss)
        new = replace(new, signals=new._signals_after(*new._values(has_loss, baseline)))
        return jax.tree.map(partial(jnp.where, counts), new, self)

    def _averaged(self, step: Array, lar: Array, loss: Array) -> "Monitor":
        """All but the signals, after a point that counts."""
        u, seen = jnp.log2(step), jnp.stack([lar, loss])
        middle = jnp.where(self.earlier != 0, _median(seen, self.recent, self.earlier), seen)
        before = jnp.log2(jnp.where(self.step > 0, self.step, step))
        share = jnp.minimum((u - before) / SMOOTH, 1)
        mean = self.mean + jnp.where(self.mean != 0, share, 1) * (middle - self.mean)
        memorised = (loss < MEMORISED * self.largest_loss) & (self.memorised_lar == 0)
        return replace(
            self,
            step=step,
            recent=seen,
            earlier=self.recent,
            mean=mean,
            peak_lar=jnp.maximum(self.peak_lar, mean[0]),
            ceiling=jnp.maximum(self.ceiling, mean[0] + self.thresholds.decline * u),
            memorised_lar=jnp.where(memorised, lar, self.memorised_lar),
            largest_loss=jnp.maximum(self.largest_loss, loss),
        )

    def _values(self, has_loss: Array, baseline: Baseline | None) -> tuple[Array, Array, Array]:
        """The signals' values at this point, which are known, and the baseline's spread."""
        (lar, _), (mean_lar, mean_loss), u = self.recent, self.mean, jnp.log2(self.step)
        zero, no = jnp.zeros((), jnp.float32), jnp.zeros((), bool)
        at_step = at_loss = Expected(zero, zero, no)
        if baseline is not None:
            at_step, at_loss = baseline.at_step(self.step), baseline.at_loss(mean_loss)
        below, lost = at_step.lar - lar, self.ceiling - self.thresholds.decline * u - lar
        # A decline that the baseline shares counts not.
        lost = jnp.where(at_step.known, jnp.minimum(lost, below), lost)
        values = jnp.stack([below, at_loss.lar - mean_lar, lost, lar - self.memorised_lar])
        memorised = (self.memorised_lar > 0) & (self.n is not None)
        known = jnp.stack([at_step.known, at_loss.known & has_loss, ~no, memorised])
        return values, known, jnp.stack([at_step.spread, at_loss.spread, zero, zero])

    def _signals_after(self, values: Array, known: Array, spread: Array) -> Signal:
        """The signals after these values, of which some may not be known.

        The noise sets the allowance, the allowance the limit, and S above the limit rings. A signal
        without a value stays as it was, but starts anew after a pause.
        """
        old, rule, u = self.signals, self.thresholds, jnp.log2(self.step)
        overfitting = jnp.arange(len(SIGNALS)) < len(OVERFITTING)
        aligned, first_epoch = self.peak_lar > ALIGNED, self.step < self.second_epoch
        paused = ~known & (u - old.doublings > LONGEST)
        old = replace(old, heard=jnp.where(paused, 0, old.heard))
        new = _heard(old, u, values, aligned & first_epoch & overfitting)
        # The means that `matched_loss` compares hide the noise that the other two show.
        jitter = jnp.where(known, new.jitter, old.jitter)[: len(OVERFITTING)]
        noise = jnp.maximum(jnp.max(jitter), jnp.maximum(spread, new.noise))
        least = jnp.maximum(rule.allowance, rule.noises * noise)
        # LAR rises by this when the effective dimension falls to `grokked` of itself.
        rise = 0.5 * math.log(1 / rule.grokked) / math.log(self.n or 2)
        allowance = jnp.where(overfitting, least, rise)
        # A median takes three values.
        in_force = (aligned & ~first_epoch | ~overfitting) & (new.heard > 2)
        limit = jnp.where(in_force, rule.hold * least, 0)
        # The median stands for the middle one of three values, the last but one: for its width.
        settled_S = jnp.clip(old.settled_S + (new.level - allowance) * old.width, 0, 2 * limit)
        new = replace(new, allowance=allowance, limit=limit, settled_S=settled_S)
        rang = old.first_alarm_step > 0
        new = replace(
            new,
            first_alarm_step=jnp.where(new.alarm & ~rang, self.step, old.first_alarm_step),
            step_before=jnp.where((new.S > 0) | rang, old.step_before, self.step),
        )
        return jax.tree.map(partial(jnp.where, known), new, old)


def _heard(old: Signal, u: Array, value: Array, only_noise: Array) -> Signal:
    """The signals after one more value: their history, level and jitter, and their noise.

    Args:
        only_noise: which signals are noise as yet: those of overfitting, in the first epoch, once
            LAR has risen.
    """
    enough, width = old.heard > 1, jnp.minimum(u - old.doublings, LONGEST)
    span, level = width + old.width, _median(value, old.recent, old.earlier)
    # How far the middle one of three values is from the straight line between the others.
    toward_earlier = width / jnp.maximum(span, 1e-6)
    off_line = jnp.abs(old.recent - toward_earlier * old.earlier - (1 - toward_earlier) * value)
    off_line = jnp.minimum(off_line, 4 * old.jitter + NOISELESS)  # one outlier adds little
    # A plain mean at first; then each value weighs two of its widths: a mean over a doubling.
    weight = jnp.clip(span, 1 / jnp.maximum(old.heard - 1, 1), 1)
    # Of all steps up to `recent`, the share after `earlier`: noise is a mean over steps, and
    # `level` stands for `recent`.
    share = jnp.where(enough & only_noise, 1 - jnp.exp2(-old.width), 0)
    return replace(
        old,
        level=level,
        jitter=old.jitter + jnp.where(enough, weight, 0) * (off_line - old.jitter),
        noise=jnp.sqrt((1 - share) * jnp.square(old.noise) + share * jnp.square(level)),
        heard=old.heard + 1,
        doublings=jnp.full_like(value, u),
        width=width,
        recent=value,
        earlier=old.recent,
    )


def _median(a: Array, b: Array, c: Array) -> Array:
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def _scalar(value: ArrayLike, name: str) -> Float[Array, ""]:
    value = real_array(value, name)
    stack = "for several layers or runs keep a stack of monitors and use jax.vmap."
    need(value.ndim == 0, f"{name} must be a scalar; got shape {value.shape}: {stack}")
    return jax.lax.stop_gradient(value.astype(jnp.float32))
