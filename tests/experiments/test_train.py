"""Training and evaluation: against AdamW written out, and each seed against itself alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from jlar_experiments.grokking import train
from jlar_experiments.grokking.config import GrokConfig

SMALL = {"p": 11, "width": 16, "heads": 2, "layers": 1, "batch_size": 25, "epochs": 50}
TOGETHER, ALONE = GrokConfig(**SMALL, seeds=3), GrokConfig(**SMALL, seed=2)


def advanced(config, state, data, *last, devices=1):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("run",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("run"))
    state, data = jax.device_put((state, data), spread)
    return train.advanced(config.program, mesh, state, data, jnp.array(last, jnp.int32))


evaluation = jax.jit(train._evaluation)


def evaluated(state, data, place):
    """One member's metrics."""
    return evaluation(*train.member((state.model, data), place))[0]


@functools.cache
def data(config):
    return train.data(config)


@pytest.fixture(scope="module")
def trained():
    """The ensemble before, and with seeds 0 and 2 trained for 20 epochs."""
    start = train.initial(TOGETHER)
    before = jax.tree.map(jnp.copy, start)
    return before, advanced(TOGETHER, start, data(TOGETHER), 20, 0, 20)


def test_split():
    pairs = data(TOGETHER)
    assert pairs.train.shape == (3, 60, 3) and pairs.validation.shape == (3, 61, 3)
    table = sorted(map(tuple, TOGETHER.operation.pairs(11)))
    for seed in range(3):
        both = np.concatenate([pairs.train[seed], pairs.validation[seed]])
        assert sorted(map(tuple, both)) == table
    assert np.any(pairs.train[0] != pairs.train[1])


@pytest.mark.parametrize(("last_batch", "sizes"), [("keep", (25, 25, 10)), ("drop", (25, 25))])
def test_one_epoch_is_adamw_with_warm_up(last_batch, sizes):
    config = dataclasses.replace(ALONE, last_batch=last_batch)
    assert config.steps_per_epoch == len(sizes)
    state, pairs = train.initial(config), data(config)
    start = jax.tree.map(lambda a: np.asarray(a[0], np.float64), state.model)
    order = jax.random.fold_in(pairs.order[0], 7)
    rows = jnp.split(jax.random.permutation(order, pairs.train[0]), np.cumsum(sizes))

    @jax.jit
    @jax.grad
    def gradient(model, rows):
        logs = jax.nn.log_softmax(model(rows[:, 0], rows[:, 1]))
        return -jnp.mean(logs[jnp.arange(len(rows)), rows[:, 2]])

    leaves, structure = jax.tree.flatten(start)
    first, second = [np.zeros_like(a) for a in leaves], [np.zeros_like(a) for a in leaves]
    for step in range(1, 1 + len(sizes)):
        lr = step * 1e-4  # linear from a tenth, in ten steps
        model = jax.tree.unflatten(structure, [jnp.asarray(a, jnp.float32) for a in leaves])
        slopes = [
            np.asarray(g, np.float64) for g in jax.tree.leaves(gradient(model, rows[step - 1]))
        ]
        first = [0.9 * m + 0.1 * g for m, g in zip(first, slopes, strict=True)]
        second = [0.98 * v + 0.02 * g**2 for v, g in zip(second, slopes, strict=True)]
        leaves = [
            a - lr * (m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.98**step)) + 1e-8) + 1.0 * a)
            for a, m, v in zip(leaves, first, second, strict=True)
        ]
    after = advanced(config, state._replace(epoch=jnp.array([7], jnp.int32)), pairs, 8)
    assert after.epoch[0] == 8
    for ours, expected in zip(jax.tree.leaves(after.model), leaves, strict=True):
        np.testing.assert_allclose(ours[0], expected, atol=2e-6)


def test_a_seed_in_an_ensemble_is_the_seed_alone(trained):
    pairs, own = data(TOGETHER), data(ALONE)
    np.testing.assert_array_equal(pairs.train[2], own.train[0])
    one = advanced(ALONE, train.initial(ALONE), own, 20)
    for name, value in evaluated(trained[1], pairs, 2)._asdict().items():
        alone = getattr(evaluated(one, own, 0), name)
        np.testing.assert_allclose(value, alone, rtol=1e-3, err_msg=name)


def test_only_asked_members_move_and_chunks_do_not_matter(trained):
    before, whole = trained
    halves = train.initial(TOGETHER)
    for last in (10, 20):
        halves = advanced(TOGETHER, halves, data(TOGETHER), last, 0, last)
    leaves = map(jax.tree.leaves, (before.model, whole.model, halves.model))
    for old, new, again in zip(*leaves, strict=True):
        np.testing.assert_array_equal(old[1], new[1])
        np.testing.assert_array_equal(new, again)
    assert np.any(before.model.unembedding[2] != whole.model.unembedding[2])
    assert list(whole.epoch) == list(halves.epoch) == [20, 0, 20]


def test_spread_over_devices(trained, monkeypatch):
    """Eight members on four devices, vmapped two by two as on accelerators."""
    monkeypatch.setattr(train, "_in_turn", lambda mesh: False)
    eight = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    state, pairs = jax.tree.map(lambda a: a[eight], (trained[0], data(TOGETHER)))
    start = jax.tree.map(np.array, state)
    after = advanced(TOGETHER, state, pairs, 20, 0, 20, 20, 0, 0, 20, 0, devices=4)
    assert list(after.epoch) == [20, 0, 20, 20, 0, 0, 20, 0]
    alone, ours = (evaluated(jax.device_get(each), pairs, 2) for each in (trained[1], after))
    for name, value in ours._asdict().items():
        np.testing.assert_allclose(value, getattr(alone, name), rtol=1e-3, err_msg=name)
    for old, new in zip(*map(jax.tree.leaves, (start.model, after.model)), strict=True):
        np.testing.assert_array_equal(old[5], new[5])


def test_evaluation_against_numpy(trained):
    pairs = data(TOGETHER)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("run",))
    metrics, spectra = train.evaluated(mesh, trained[1], pairs)
    model = jax.tree.map(lambda a: a[2], trained[1].model)
    W = np.asarray(model.unembedding, np.float64)
    expected = {}
    for name, rows in (("val", pairs.validation[2]), ("train", pairs.train[2])):
        X = np.asarray(model.activations(rows[:, 0], rows[:, 1]), np.float64)
        logits, answers = X @ W.T, np.asarray(rows[:, 2])
        losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(rows)), answers]
        expected[f"{name}_loss"] = losses.mean()
        expected[f"{name}_acc"] = np.mean(logits.argmax(1) == answers)
    p, q, _ = reference.spectra(W, X)
    lar = reference.lar(W, X)
    expected |= {
        "lar": lar,
        "k_pred": 16 ** (2 * (1 - lar)),
        "k95": reference.principal_dimension(X),
        "pr_p": 1 / np.sum(p**2),
        "q_in_top95": q[: int(np.searchsorted(np.cumsum(p), 0.95)) + 1].sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(metrics, name)[2], value, rtol=2e-4, err_msg=name)
    np.testing.assert_allclose(spectra.p[2], p, atol=1e-5)
    assert expected["train_loss"] != expected["val_loss"]
