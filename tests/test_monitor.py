"""Monitor and Baseline: alarms on synthetic runs, cadence, transformations."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlar
from jlar._monitor import OVERFITTING
from jlar.monitor import Baseline, Monitor, Thresholds

STEPS = np.arange(50.0, 10_001, 50)


def curve(decline=0.001, extra=0.0, since=5000, noise=0.0, seed=0, steps=STEPS):
    """LAR that rises to .68 at step 800, loses `decline` per 1000 steps, and `extra` more later."""
    rise = 0.5 + 0.18 * (1 - np.clip(1 - steps / 800, 0, 1) ** 3)
    lost = decline * np.maximum(steps - 800, 0) + extra * np.maximum(steps - since, 0)
    return rise - lost / 1000 + noise * np.random.default_rng(seed).standard_normal(len(steps))


@eqx.filter_jit
def _watched(monitor, columns, real, baseline):
    def updated(monitor, at):
        (step, lar, loss), real = at
        new = monitor.update(step, lar, loss=loss, baseline=baseline)
        return jax.tree.map(lambda a, b: jnp.where(real, a, b), new, monitor), None

    return jax.lax.scan(updated, monitor, (columns, real))[0]


def watched(lar, steps=STEPS, loss=None, *, baseline=None, monitor=None, **options):
    """The monitor after a log; padded to one of a few lengths, as compiling is what takes time."""
    loss = np.full(len(steps), np.nan) if loss is None else loss
    columns = [np.pad(a, (0, -len(steps) % 200)) for a in (steps, lar, loss)]
    columns = tuple(jnp.asarray(a, jnp.float32) for a in columns)
    real = jnp.arange(len(columns[0])) < len(steps)
    return _watched(monitor or Monitor.init(**options), columns, real, baseline)


def baseline_of(*lars, steps=STEPS, loss=None):
    return Baseline.from_runs([(steps, lar, loss) for lar in lars])


def test_a_slow_decline_is_no_alarm_and_a_fast_one_is():
    quiet, falling = watched(curve(noise=0.002)), watched(curve(extra=0.012, noise=0.002))
    assert not quiet.alarm and quiet.first_alarm_step == 0
    assert falling.alarm and falling["decline"].alarm
    assert falling["deviation"].first_alarm_step == 0
    assert 5000 < falling.first_alarm_step < 6500
    assert abs(falling.peak_lar - 0.68) < 0.005


def test_the_step_before_is_where_the_fall_began():
    for extra in (0.01, 0.02, 0.04):
        decline = watched(curve(extra=extra, noise=0.001))["decline"]
        assert 4500 < decline.step_before < decline.first_alarm_step < 7000
        assert decline.S > decline.limit


def test_deviation_at_the_same_step():
    baseline = baseline_of(curve(noise=0.002, seed=1))
    apart = watched(curve(decline=0.004, noise=0.002), baseline=baseline)
    assert apart["deviation"].alarm
    assert apart.first_alarm_step == apart["deviation"].first_alarm_step
    assert 0.02 < apart["deviation"].level < 0.035
    assert 0.001 < apart["deviation"].jitter < 0.004
    assert not watched(curve(noise=0.002), baseline=baseline).alarm


def test_a_decline_that_the_baseline_shares_is_no_alarm():
    lar = curve(extra=0.012)
    assert watched(lar)["decline"].alarm
    assert not watched(lar, baseline=baseline_of(lar + 0.001)).alarm
    short = Baseline.from_runs([(STEPS[:100], lar[:100], None)])  # one that has ended excuses none
    assert watched(lar, baseline=short)["decline"].alarm


def test_deviation_at_the_same_loss():
    loss, lower = 10 * STEPS**-0.3, 10 * (1.3 * STEPS) ** -0.3  # the second learns faster
    baseline = baseline_of(0.8 - 0.02 * loss, loss=loss)
    known = baseline.at_loss(lower).known
    assert not known[-30:].any() and known[5:150].all()
    same = watched(0.8 - 0.02 * lower, loss=lower, baseline=baseline)
    assert not same.alarm and abs(same["matched_loss"].level) < 5e-3
    below = watched(0.78 - 0.02 * lower, loss=lower, baseline=baseline)
    assert below["matched_loss"].first_alarm_step > 0
    assert abs(below["matched_loss"].level - 0.02) < 5e-3
    assert below["matched_loss"].heard == 0  # its losses are no longer the baseline's
    assert below["deviation"].heard > 0 and below["deviation"].limit > 0


def test_grokking_is_no_alarm():
    epochs = np.arange(20.0, 1001, 20)
    lar = 0.6 + 0.15 / (1 + np.exp(-(epochs - 500) / 50))
    loss = np.where(epochs < 100, 4.7, 0.05)
    grokked = watched(lar, epochs, loss, n=128)
    assert grokked["grokking"].alarm and not grokked.alarm
    assert 500 < grokked["grokking"].first_alarm_step < 700
    assert abs(grokked.memorised_lar - 0.6) < 1e-3
    k = jlar.effective_dimension(0.6 + grokked["grokking"].allowance, n=128)
    assert k == pytest.approx(0.4 * float(jlar.effective_dimension(0.6, n=128)), rel=1e-3)
    for unknown in (watched(lar, epochs, n=128), watched(lar, epochs, loss)):
        assert unknown["grokking"].first_alarm_step == 0


@pytest.mark.parametrize("outlier", [-0.5, 0.3, 0.9, 5.0])
@pytest.mark.parametrize("at", [3, 40, 100, 199])
def test_one_point_never_alarms(outlier, at):
    lar, loss = curve(noise=0.001), 10 * STEPS**-0.3
    lar[at] = outlier
    watching = watched(lar, loss=loss, baseline=baseline_of(curve(), loss=loss), n=128)
    assert watching.first_alarm_step == 0


def test_an_alarm_ends_with_its_cause_and_is_remembered():
    lar = curve() - 0.02 * ((STEPS > 3000) & (STEPS < 6000))
    ended = watched(lar, baseline=baseline_of(curve()))
    assert not ended.alarm and 3000 < ended.first_alarm_step < 3600
    assert ended["deviation"].step_before <= 3050


def test_the_noise_is_that_of_several_baselines():
    run = curve(noise=0.001) - 0.012 * (STEPS > 2000)
    one = baseline_of(curve(noise=0.001, seed=1))
    apart = [curve(noise=0.001, seed=2) + off for off in (-0.008, 0, 0.008)]
    several = baseline_of(*apart)
    assert several.runs == 3
    np.testing.assert_allclose(several.spread[0], 0.008 * np.sqrt(1 + 1 / 3), atol=0.001)
    assert watched(run, baseline=one).alarm and not watched(run, baseline=several).alarm


def test_the_noise_is_learnt_in_the_first_epoch_in_which_nothing_rings():
    offset = 0.01 * np.sin(np.log2(STEPS) * 4)  # what seeds differ by, slowly
    base = baseline_of(curve())
    run = curve() - offset - 0.05 * (STEPS > 7000)
    assert watched(run, baseline=base).first_alarm_step < 5000
    told = watched(run, baseline=base, second_epoch=5000)
    assert 0.005 < told["deviation"].noise < 0.01 and told["deviation"].allowance > 0.0125
    assert 7000 < told.first_alarm_step < 7500
    assert watched(run, baseline=base, second_epoch=20_000).first_alarm_step == 0


def test_a_step_without_the_baseline_adds_no_noise_to_the_other_signals():
    lar = curve(noise=0.003)
    usual = watched(lar, baseline=baseline_of(curve(noise=0.003, seed=1)))
    without = usual.update(11_500, lar[-1])  # far enough to weigh something
    np.testing.assert_allclose(without["decline"].allowance, usual["decline"].allowance, rtol=0.1)


def test_initialisation_says_nothing():
    dip = np.interp(np.log2(STEPS), [6, 9, 13.3], [0.51, 0.40, 0.40])
    low = watched(dip, baseline=baseline_of(dip + 0.05))
    assert low.first_alarm_step == 0 and (low.signals.limit[:3] == 0).all()


def test_nan_changes_nothing():
    lar = curve(extra=0.012, noise=0.002)
    steps = np.sort(np.concatenate([STEPS, STEPS + 7]))
    holes = np.where(np.isin(steps, STEPS), np.interp(steps, STEPS, lar), np.nan)
    plain, holed = watched(lar), watched(holes, steps)
    chex.assert_trees_all_equal(holed, plain)


def test_values_that_are_no_lar_change_nothing():
    monitor = watched(curve())
    for lar in (3e38, -3e38, 1e20, -1e20):
        chex.assert_trees_all_equal(monitor.update(20_000, lar), monitor)


def test_steps_may_be_tokens_in_integers_of_64_bits():
    for step in (3_100_000_000, np.int64(3_100_000_000), np.int64(2**32 + 7)):
        assert Monitor.init().update(step, 0.6).step == np.float32(step)
    steps = STEPS * 1e6
    baseline = Baseline.from_runs([(steps, curve(), None)])
    for step in (np.int64(3e9), np.int64(5e9)):
        chex.assert_trees_all_equal(baseline.at_step(step), baseline.at_step(float(step)))


def test_a_replay_changes_nothing_and_an_alarm_does_not_fire_twice():
    lar = curve(extra=0.012, noise=0.002)
    middle = watched(lar[:150], STEPS[:150])
    assert middle.alarm
    again = watched(lar[100:150], STEPS[100:150], monitor=middle)
    chex.assert_trees_all_equal(again, middle)
    resumed, whole = watched(lar[150:], STEPS[150:], monitor=middle), watched(lar)
    chex.assert_trees_all_equal(resumed, whole)


# Cadence: one record of a step each, thinned.
EVERY = np.arange(1.0, 1001)


def thinned(rng):
    place = np.arange(len(EVERY))
    yield from (place[every - 1 :: every] for every in (1, 2, 5, 10, 20))
    yield from (np.flatnonzero(rng.random(len(EVERY)) < share) for share in (0.5, 0.1))
    yield from (np.flatnonzero(place % period < count) for count, period in ((5, 50), (3, 20)))


def record(rng, since, rate, noise):
    """LAR and losses of a toy that rises to .68 by step 100 and overfits from `since` on."""
    u = np.log2(EVERY)
    lost = np.maximum(u - np.log2(since), 0)
    lar = 0.5 + 0.18 / (1 + np.exp(-2 * (u - 5))) - rate * lost
    loss = 5.5 * EVERY**-0.2 * (1 - 0.15 * lost * (rate > 0))
    return lar + noise * rng.standard_normal(1000), loss + 0.05 * rng.standard_normal(1000)


@pytest.mark.parametrize("seed", range(8))
def test_cadence_moves_the_first_alarm_by_less_than_a_gap_and_a_twentieth(seed):
    rng = np.random.default_rng(seed)
    since, noise = rng.uniform(200, 400), rng.choice([0, 0.001, 0.002, 0.003])
    runs = [(EVERY, *record(rng, since, 0, noise)) for _ in range(2)]
    lar, loss = record(rng, since, rng.uniform(0.08, 0.15), noise)
    rises = 0.55 + 0.2 / (1 + np.exp(-6 * (np.log2(EVERY) - np.log2(since))))
    memorised = np.where(EVERY < 60, 3.0, 0.1)
    cases = [
        (lar, loss, Baseline.from_runs(runs), OVERFITTING),
        (lar, loss, None, ("decline",)),
        (rises + noise * rng.standard_normal(1000), memorised, None, ("grokking",)),
    ]
    for lar, loss, baseline, names in cases:
        first = {}
        for use in thinned(np.random.default_rng(seed)):
            monitor = watched(lar[use], EVERY[use], loss[use], baseline=baseline, n=128)
            gap = np.diff(EVERY[use], prepend=0).max()
            for name in names:
                at = float(monitor[name].first_alarm_step)
                whole = first.setdefault(name, at)  # of the record as it is
                assert whole > 100
                assert abs(at - whole) < gap + 0.05 * whole + 1, (name, len(use), at, whole)


def test_the_unit_of_the_step_does_not_matter():
    lar = curve(extra=0.012, noise=0.002)
    units = (1, 1e6, 1e-6)  # steps, tokens, or a share of the run
    first = [float(watched(lar, STEPS * unit).first_alarm_step) / unit for unit in units]
    np.testing.assert_allclose(first[1:], first[0], rtol=0.01)


def test_irregular_steps_and_step_zero():
    steps = np.concatenate([[0.0], np.sort(np.random.default_rng(0).uniform(1, 10_000, 199))])
    quiet, falling = (watched(curve(extra=x, steps=steps), steps) for x in (0.0, 0.012))
    assert quiet.first_alarm_step == 0 and 5000 < falling.first_alarm_step < 6500
    chex.assert_trees_all_equal(quiet, watched(curve(steps=steps)[1:], steps[1:]))


def test_the_sum_is_that_of_numpy():
    """The CUSUM itself, by the formula, with a fixed allowance and no noise."""
    lar, base = curve(decline=0.004), curve()
    found = watched(lar, baseline=baseline_of(base), thresholds=Thresholds(noises=0.0, hold=1e3))
    # What baseline the monitor sees is the smoothed one; x is linear enough for its median.
    x = np.asarray(baseline_of(base).at_step(STEPS).lar) - lar
    u, S = np.log2(STEPS), 0.0
    aligned = np.argmax(np.maximum.accumulate(lar) > 0.6)
    for i in range(aligned, len(u)):
        S = max(0.0, S + (np.median(x[max(i - 1, 0) : i + 2]) - 0.006) * (u[i] - u[i - 1]))
    assert S > 0.01 and float(found["deviation"].S) == pytest.approx(S, rel=0.02)


def test_under_jit_vmap_scan_and_eagerly():
    lars = np.stack([curve(noise=0.002, seed=s, extra=x) for s, x in enumerate((0, 0.012, 0.02))])
    columns = [jnp.asarray(np.broadcast_to(a, (3, 200)), jnp.float32) for a in (STEPS, lars, 0)]
    real = jnp.ones((3, 200), bool)
    stacked = eqx.filter_vmap(_watched, in_axes=(None, 0, 0, None))(
        Monitor.init(), tuple(columns), real, None
    )
    for i, lar in enumerate(lars):
        alone = watched(lar)
        assert stacked.first_alarm_step[i] == alone.first_alarm_step
        np.testing.assert_allclose(stacked.signals.S[i], alone.signals.S, atol=1e-6)
    update = jax.jit(chex.assert_max_traces(lambda m, step, lar: m.update(step, lar), n=1))
    monitor, eager = Monitor.init(), Monitor.init()
    structure = jax.tree.map(lambda x: (x.shape, x.dtype), monitor)
    for step, lar in zip(STEPS[:30], lars[1], strict=False):
        monitor = update(monitor, jnp.int32(step), jnp.bfloat16(lar))
        eager = eager.update(int(step), jnp.bfloat16(lar))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), monitor) == structure
    chex.assert_trees_all_close(monitor, eager, atol=1e-6)
    assert sum(x.size for x in jax.tree.leaves(monitor)) < 100


@pytest.mark.parametrize("jit", [True, False])
def test_no_value_is_ever_nan_or_infinite_and_buffers_can_be_donated(jit):
    rows = zip(STEPS[:20], curve()[:20], 10 * STEPS[:20] ** -0.3, strict=True)
    baseline = baseline_of(curve() + 0.05, loss=10 * STEPS**-0.3)
    with (
        jax.debug_nans(True), jax.debug_infs(True), jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"), jax.disable_jit(not jit),
    ):  # fmt: skip
        monitor = Monitor.init(n=128, second_epoch=3)

        def updated(monitor, step, lar, loss):
            return monitor.update(step, lar, loss=loss, baseline=baseline)

        update = jax.jit(updated, donate_argnums=0)
        for step, lar, loss in rows:
            monitor = update(monitor, step, lar, loss)
        assert monitor.first_alarm_step >= 0 and not monitor["decline"].alarm
        jax.jit(lambda m: m.update(1, 0.5), donate_argnums=0)(Monitor.init())


def test_double_precision(x64):
    lar = curve(extra=0.012)
    found = watched(lar, baseline=baseline_of(curve()))
    assert found.alarm and found.step.dtype == jnp.float32


def test_misuse(unchecked):
    with pytest.raises(ValueError, match="lar must be a scalar; got shape"):
        Monitor.init().update(1, jnp.zeros(3))
    with pytest.raises(ValueError, match="lar must be an array or a number; got dict"):
        Monitor.init().update(1, {"lar/head": jnp.zeros(())})
    with pytest.raises(ValueError, match="at least 2"):
        Monitor.init(n=1)
    with pytest.raises(ValueError, match="two or more different steps"):
        baseline_of(np.ones(5), steps=np.zeros(5))
    with pytest.raises(ValueError, match="no steps in common"):
        Baseline.from_runs([(STEPS[:50], STEPS[:50], None), (STEPS[100:], STEPS[100:], None)])


def test_names():
    assert dir(jlar.monitor) == ["Baseline", "Monitor", "Signal", "Thresholds"]
    assert not set(dir(jlar.monitor)) & set(dir(jlar))


def test_baseline_follows_a_noisy_curve_and_ignores_outliers():
    rng = np.random.default_rng(0)
    steps = np.sort(rng.uniform(20, 10_000, 200))
    noisy = curve(steps=steps, noise=0.003)
    noisy[[50, 120]] = (0.2, np.nan)
    shuffled = rng.permutation(200)
    baseline = baseline_of(noisy[shuffled], steps=steps[shuffled])
    late = np.linspace(1500, 9000, 50)
    np.testing.assert_allclose(baseline.at_step(late).lar, curve(steps=late), atol=0.005)
    assert not baseline.at_step(np.array([5.0, 20_000.0])).known.any()
    assert not baseline.at_loss(3.0).known
    dense = np.arange(1, 10_001.0)
    found = baseline_of(curve(steps=dense), steps=dense).at_step(late)
    np.testing.assert_allclose(found.lar, curve(steps=late), atol=1e-3)
    assert found.known.all() and (found.spread == 0).all()


def test_baseline_by_loss_is_increasing_in_the_loss():
    rng, loss = np.random.default_rng(0), 10 * STEPS**-0.3
    noisy = loss + 0.02 * rng.standard_normal(200)
    baseline = baseline_of(0.6 - 0.02 * loss, loss=noisy)
    assert (np.diff(baseline.knots[1]) > 0).all()
    np.testing.assert_allclose(baseline.at_loss(jnp.float32(1.0)).lar, 0.58, atol=2e-3)
    assert not baseline.at_loss(jnp.float32(0.1)).known
    late = STEPS >= 1000  # what is before the rise is over, differs by what a run may be behind
    np.testing.assert_allclose(
        baseline.at_step(STEPS[late]).lar, (0.6 - 0.02 * loss)[late], atol=6e-3
    )
