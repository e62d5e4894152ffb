"""Monitor and Baseline: alarms on synthetic runs, statistics against NumPy, and transformations."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlar
import reference
from jlar._trend import Window

STEPS = np.arange(50.0, 10_001, 50)


def curve(decline=0.001, extra=0.0, since=5000, noise=0.0, seed=0, steps=STEPS):
    """LAR that rises to .68 at step 800, loses `decline` per 1000 steps, and `extra` more later."""
    rise = 0.5 + 0.18 * (1 - np.clip(1 - steps / 800, 0, 1) ** 3)
    lost = decline * np.maximum(steps - 800, 0) + extra * np.maximum(steps - since, 0)
    return rise - lost / 1000 + noise * np.random.default_rng(seed).standard_normal(len(steps))


COLUMNS = ("step", "lar", "train_loss", "baseline_lar", "baseline_at_loss")


@eqx.filter_jit
def _watched(monitor, columns):
    def updated(monitor, at):
        step, lar, *rest = at
        return monitor.update(step, lar, **dict(zip(COLUMNS[2:], rest, strict=True))), None

    return jax.lax.scan(updated, monitor, tuple(columns))[0]


def watched(lar, steps=STEPS, n=None, monitor=None, **columns):
    """The monitor after a log; padded to one of two lengths, since compiling is what takes time."""
    columns |= {"step": steps, "lar": lar}
    short = -len(steps) % 200
    padded = [
        np.pad(columns.get(name, np.full(len(steps), np.nan)), (0, short), constant_values=np.nan)
        for name in COLUMNS
    ]
    watched = _watched(monitor or jlar.Monitor.init(n=n), jnp.asarray(padded, jnp.float32))
    return eqx.tree_at(lambda m: m.ignored, watched, watched.ignored - short)


def test_a_slow_decline_is_no_alarm_and_a_fast_one_is():
    quiet, falling = watched(curve(noise=0.002)), watched(curve(extra=0.012, noise=0.002))
    assert not quiet.alarm and jnp.isnan(quiet.first_alarm_step)
    assert falling.alarm and falling.decline.alarm and not falling.deviation.rang
    assert 5000 < falling.first_alarm_step < 6500
    assert 500 < falling.peak_step < 5500 and abs(falling.peak_lar - 0.68) < 0.01
    assert falling.slope < -0.05 and falling.slope_per_step == pytest.approx(
        float(falling.slope) / 10_000 / np.log(2)
    )


def test_deviation_at_the_same_step():
    base = curve(noise=0.002, seed=1)
    baseline = jlar.Baseline.from_points(STEPS, base)
    at = np.asarray(baseline.at_step(STEPS))
    apart = watched(curve(decline=0.004, noise=0.002), baseline_lar=at)
    assert apart.deviation.alarm and apart.first_alarm_step == apart.deviation.first_alarm_step
    assert 0.02 < apart.deviation.level < 0.035 and 0.001 < apart.deviation.noise < 0.004
    assert not watched(curve(noise=0.002), baseline_lar=at).alarm


def test_a_decline_that_the_baseline_shares_is_no_alarm():
    lar = curve(extra=0.012)
    assert watched(lar).decline.alarm
    assert not watched(lar, baseline_lar=lar + 0.001).decline.rang
    short = np.where(STEPS < 5000, lar, np.nan)  # a baseline that has ended excuses nothing
    assert watched(lar, baseline_lar=short).decline.alarm


def test_deviation_at_the_same_loss():
    loss = 10 * STEPS**-0.3
    base = 0.6 - 0.02 * loss
    baseline = jlar.Baseline.from_points(STEPS, base, loss)
    faster = 10 * (1.3 * STEPS) ** -0.3  # learns faster, and is the same at equal loss
    at_loss = np.asarray(baseline.at_loss(faster))
    assert np.isnan(at_loss[-30:]).all() and np.isfinite(at_loss[1:150]).all()
    same = watched(0.6 - 0.02 * faster, train_loss=faster, baseline_at_loss=at_loss)
    assert not same.matched_loss.rang and abs(same.matched_loss.level) < 1e-3
    lower = watched(0.58 - 0.02 * faster, train_loss=faster, baseline_at_loss=at_loss)
    assert lower.matched_loss.alarm and abs(lower.matched_loss.level - 0.02) < 1e-3


def test_grokking_is_no_alarm():
    n, epochs = 128, np.arange(20.0, 1001, 20)
    lar = 0.6 + 0.12 / (1 + np.exp(-(epochs - 500) / 50))
    loss = np.where(epochs < 100, 4.7, 0.05)
    grokked = watched(lar, epochs, n=n, train_loss=loss)
    assert grokked.grokking.alarm and not grokked.alarm
    assert 500 < grokked.grokking.first_alarm_step < 650 and abs(grokked.memorised_lar - 0.6) < 1e-3
    k = jlar.effective_dimension(0.6 + grokked.grokking.threshold, n=n)
    assert k == pytest.approx(0.4 * float(jlar.effective_dimension(0.6, n=n)), rel=1e-3)
    assert not watched(lar, epochs, n=n).grokking.rang  # no training loss: not known
    assert not watched(lar, epochs, train_loss=loss).grokking.rang  # no width: not known


def test_one_point_never_alarms():
    for outlier in (0.3, 0.9, 5.0):
        for at in (40, 100, 199):
            lar = curve(noise=0.001)
            lar[at] = outlier
            assert not watched(lar, baseline_lar=curve()).first_alarm_step > 0, (outlier, at)


def test_an_alarm_ends_well_below_its_threshold():
    base = np.full(200, 0.68)
    noisy = base + 0.0005 * np.random.default_rng(0).standard_normal(200)
    lar = noisy - 0.02 * ((STEPS > 3000) & (STEPS < 6000)) - 0.008 * (STEPS >= 6000)
    held = watched(lar, baseline_lar=base)
    assert held.deviation.alarm  # below the threshold, above its half
    ended = watched(np.where(STEPS >= 6000, base, lar), baseline_lar=base)
    assert not ended.deviation.alarm and ended.deviation.rang
    assert held.first_alarm_step == ended.first_alarm_step


def test_nothing_is_said_about_a_short_log():
    few = watched(np.linspace(0.7, 0.5, 11), STEPS[:11], baseline_lar=np.full(11, 0.7))
    assert not few.alarm and jnp.isnan(few.deviation.level) and jnp.isnan(few.slope)


def test_a_log_of_two_decimals_rings_only_on_what_two_decimals_show():
    assert not watched(np.round(curve(noise=0.001), 2)).decline.rang
    assert watched(np.round(curve(extra=0.02, noise=0.001), 2)).decline.alarm


def test_what_the_warm_up_cost_is_no_alarm_once_it_is_over():
    transient = 0.03 * np.exp(-np.maximum(STEPS - 100, 0) / 150)  # gone before there is enough
    assert not watched(curve(noise=0.001) + transient).decline.rang


@pytest.mark.parametrize(
    ("losses", "rings"),
    [((0.03, 0.03, 0.02), False), ((0.01, 0.06, 0.06), True), ((0.03, 0.08, 0.08), True)],
)
def test_a_decline_is_judged_against_the_first_doubling_after_the_peak(losses, rings):
    """A run that settles loses much at first; what it loses later on top of that is overfitting."""
    at = np.log2(STEPS / 800)  # the peak is at step 800, and nearly four doublings follow
    after = np.interp(at, [0, 1, 2, 3, 4], 0.68 - np.cumsum([0, *losses, losses[-1]]))
    lar = np.where(at < 0, curve(decline=0), after)
    monitor = watched(lar + 0.001 * np.random.default_rng(0).standard_normal(len(lar)))
    assert monitor.decline.rang == rings == (monitor.decline.level > monitor.decline.threshold)
    # Of means over half and an eighth of a doubling, which straddle the bends.
    assert monitor.early_decline == pytest.approx(losses[0], rel=0.3)
    assert 700 < monitor.peak_step < 1200
    if rings:  # counted from the end of that doubling, to a point of the window
        assert abs(monitor.counted_doublings - monitor.peak_doublings - 1) < 0.05


def test_initialisation_is_no_peak():
    dip = np.interp(np.log2(STEPS), [6, 9, 13.3], [0.51, 0.40, 0.40])
    assert not watched(dip).decline.rang


def test_nan_is_counted_and_changes_nothing_else():
    lar = curve(extra=0.012, noise=0.002)
    steps = np.sort(np.concatenate([STEPS, STEPS + 7]))
    holes = np.where(np.isin(steps, STEPS), np.interp(steps, STEPS, lar), np.nan)
    plain, holed = watched(lar), watched(holes, steps)
    assert holed.ignored == len(STEPS) and holed.step == STEPS[-1] + 7
    for a, b in zip(jax.tree.leaves(plain.decline), jax.tree.leaves(holed.decline), strict=True):
        assert a == b


def test_a_replay_changes_nothing_and_an_alarm_does_not_fire_twice():
    lar = curve(extra=0.012, noise=0.002)
    middle = watched(lar[:150], STEPS[:150])
    assert middle.alarm
    again = watched(lar[100:150], STEPS[100:150], monitor=middle)
    assert again.replayed == 50
    chex.assert_trees_all_equal(eqx.tree_at(lambda m: m.replayed, again, middle.replayed), middle)
    whole, resumed = watched(lar), watched(lar[150:], STEPS[150:], monitor=again)
    assert whole.first_alarm_step == resumed.first_alarm_step == middle.first_alarm_step
    chex.assert_trees_all_equal(whole.windows, resumed.windows)


def test_cadence_and_unit_of_the_step_do_not_matter():
    firsts = []
    for scale, every in ((1, 50), (1, 25), (1e6, 50)):
        steps = np.arange(every, 10_001.0, every)
        lar = curve(extra=0.012, steps=steps)
        firsts.append(float(watched(lar, steps * scale).first_alarm_step) / scale)
    np.testing.assert_allclose(firsts, firsts[0], rtol=0.05)


def test_irregular_steps_and_step_zero():
    steps = np.concatenate([[0.0], np.sort(np.random.default_rng(0).uniform(1, 10_000, 199))])
    quiet, falling = (watched(curve(extra=x, steps=steps), steps) for x in (0.0, 0.012))
    assert not quiet.first_alarm_step > 0 and 5000 < falling.first_alarm_step < 6500


def test_under_jit_vmap_scan_and_eagerly():
    lars = np.stack([curve(noise=0.002, seed=s, extra=x) for s, x in enumerate((0, 0.012, 0.02))])
    columns = jnp.full((3, 5, 200), jnp.nan).at[:, 0].set(STEPS).at[:, 1].set(lars)
    stacked = eqx.filter_vmap(_watched, in_axes=(None, 0))(jlar.Monitor.init(), columns)
    for i, lar in enumerate(lars):
        alone = watched(lar)
        assert bool(stacked.alarm[i]) == bool(alone.alarm)
        np.testing.assert_allclose(stacked.decline.level[i], alone.decline.level, atol=1e-6)
    update = jax.jit(chex.assert_max_traces(lambda m, step, lar: m.update(step, lar), n=1))
    monitor, eager = jlar.Monitor.init(), jlar.Monitor.init()
    structure = jax.tree.map(lambda x: (x.shape, x.dtype), monitor)
    for step, lar in zip(STEPS[:30], lars[1], strict=False):
        monitor = update(monitor, jnp.int32(step), jnp.bfloat16(lar))
        eager = eager.update(int(step), jnp.bfloat16(lar))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), monitor) == structure
    chex.assert_trees_all_close(monitor, eager, atol=1e-6)
    assert sum(x.size for x in jax.tree.leaves(monitor)) < 400


def test_noise_is_that_of_the_points():
    rng = np.random.default_rng(0)
    for rho, low, high in ((0.0, 0.8, 1.6), (0.6, 0.5, 1.5)):
        found = []
        for _ in range(20):
            e = np.zeros(48)
            for i in range(48):
                e[i] = rho * e[i - 1] + np.sqrt(1 - rho**2) * rng.standard_normal()
            y = 0.6 + 0.003 * e - 0.001 * np.arange(48)
            window = Window(
                jnp.arange(48, dtype=jnp.float32) / 60,
                jnp.asarray(y, jnp.float32),
                jnp.asarray(48, jnp.int32),
                jnp.zeros(3, jnp.float32),
            )
            found.append(float(window.noise[1]))
        ratio = np.median(found) / (0.003 * np.sqrt((1 + rho) / (1 - rho)))
        assert low < ratio < high, (rho, ratio)


def test_level_and_slope_against_numpy():
    rng = np.random.default_rng(1)
    u, y = np.sort(rng.uniform(9, 10, 48)), rng.standard_normal(48)
    window = Window(
        jnp.asarray(u, jnp.float32), jnp.asarray(y, jnp.float32), jnp.int32(48), jnp.zeros(3)
    )
    single, long_run = reference.residual_noise(u, y)
    np.testing.assert_allclose(window.noise, (single, long_run), rtol=1e-4)
    inside = u >= u[-1] - 0.5
    np.testing.assert_allclose(window.slope(0.5), np.polyfit(u[inside], y[inside], 1)[0], rtol=1e-3)
    inside = u >= u[-1] - 0.25
    expected = (u[inside].mean(), y[inside].mean())
    np.testing.assert_allclose(window.level(0.25, jnp.float32(9)), expected, rtol=1e-4)


def test_misuse(unchecked):
    with pytest.raises(ValueError, match="takes scalars; got shape"):
        jlar.Monitor.init().update(1, jnp.zeros(3))
    with pytest.raises(ValueError, match="at least 2"):
        jlar.Monitor.init(n=1)
    with pytest.raises(ValueError, match="two or more different steps"):
        jlar.Baseline.from_points(np.zeros(5), np.ones(5))


def test_baseline_follows_a_noisy_curve_and_ignores_outliers():
    rng = np.random.default_rng(0)
    steps = np.sort(rng.uniform(20, 10_000, 200))
    noisy = curve(steps=steps, noise=0.003)
    noisy[[50, 120]] = (0.2, np.nan)
    shuffled = rng.permutation(200)
    baseline = jlar.Baseline.from_points(steps[shuffled], noisy[shuffled])
    late = np.linspace(1000, 9000, 50)
    np.testing.assert_allclose(baseline.at_step(late), curve(steps=late), atol=0.004)
    assert np.isnan(baseline.at_step(np.array([5.0, 20_000.0]))).all()
    assert np.isnan(baseline.at_loss(3.0)) and baseline.lar.size <= 256
    dense = jlar.Baseline.from_points(np.arange(1, 10_001.0), curve(steps=np.arange(1, 10_001.0)))
    assert dense.lar.size <= 256
    np.testing.assert_allclose(dense.at_step(late), curve(steps=late), atol=1e-3)


def test_baseline_by_loss_is_monotone_in_the_loss():
    rng = np.random.default_rng(0)
    loss = 10 * STEPS**-0.3
    baseline = jlar.Baseline.from_points(
        STEPS, 0.6 - 0.02 * loss, loss + 0.02 * rng.standard_normal(200)
    )
    assert (np.diff(baseline.loss) > 0).all()
    np.testing.assert_allclose(baseline.at_loss(jnp.float32(1.0)), 0.58, atol=2e-3)
    assert np.isnan(baseline.at_loss(jnp.float32(0.1)))


def test_baseline_files(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        f'{{"step": {s}, "lar": {v}, "loss": null}}\n' for s, v in zip(STEPS, curve(), strict=True)
    ]
    path.write_text("".join(rows) + '{"note": 1}\n\n')
    baseline = jlar.Baseline.from_jsonl(path)
    assert baseline.loss.size == 0
    chex.assert_trees_all_equal(baseline, jlar.Baseline.from_points(STEPS, curve()))
    baseline.save(tmp_path / "baseline.json")
    chex.assert_trees_all_equal(jlar.Baseline.load(tmp_path / "baseline.json"), baseline)
    with pytest.raises(ValueError, match="has both 'step' and 'LAR'"):
        jlar.Baseline.from_jsonl(path, lar="LAR")
