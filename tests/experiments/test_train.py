"""Training and evaluation: against AdamW written out, and each seed against itself alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from jlar_experiments.config import GrokConfig
from jlar_experiments.grokking import train

SMALL = {"p": 11, "width": 16, "heads": 2, "layers": 1, "batch_size": 25, "epochs": 50}
TOGETHER, ALONE = GrokConfig(**SMALL, seeds=3), GrokConfig(**SMALL, seed=2)


def indices(*live):
    return jnp.array(live, jnp.int32)


@functools.cache
def data(config):
    return train.data(config)


@pytest.fixture(scope="module")
def trained():
    """Seeds 0 and 2 of the ensemble after 20 epochs, and the whole ensemble before."""
    start = train.initial(TOGETHER)
    before = jax.tree.map(jnp.copy, start)
    return before, train.advanced(TOGETHER, start, data(TOGETHER), indices(0, 2), 0, 20)


def test_split():
    pairs = data(TOGETHER)
    assert pairs.train.shape == (3, 60, 3) and pairs.validation.shape == (3, 61, 3)
    table = sorted(map(tuple, TOGETHER.operation.pairs(11)))
    for seed in range(3):
        both = np.concatenate([pairs.train[seed], pairs.validation[seed]])
        assert sorted(map(tuple, both)) == table
    assert np.any(pairs.train[0] != pairs.train[1])


def test_one_epoch_is_adamw_with_warm_up():
    state, pairs = train.initial(ALONE), data(ALONE)
    start = jax.tree.map(lambda a: np.asarray(a[0], np.float64), state.model)
    order = jax.random.fold_in(pairs.order[0], 7)
    rows = jax.random.permutation(order, pairs.train[0])[:50].reshape(2, 25, 3)

    @jax.jit
    @jax.grad
    def gradient(model, rows):
        logs = jax.nn.log_softmax(model(rows[:, 0], rows[:, 1]))
        return -jnp.mean(logs[jnp.arange(25), rows[:, 2]])

    leaves, structure = jax.tree.flatten(start)
    first, second = [np.zeros_like(a) for a in leaves], [np.zeros_like(a) for a in leaves]
    for step, lr in ((1, 1e-4), (2, 2e-4)):  # linear from a tenth, in ten steps
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
    after = train.advanced(ALONE, state, pairs, indices(0), 7, 8)
    for ours, expected in zip(jax.tree.leaves(after.model), leaves, strict=True):
        np.testing.assert_allclose(ours[0], expected, atol=2e-6)


def test_a_seed_in_an_ensemble_is_the_seed_alone(trained):
    pairs, own = data(TOGETHER), data(ALONE)
    np.testing.assert_array_equal(pairs.train[2], own.train[0])
    one = train.advanced(ALONE, train.initial(ALONE), own, indices(0), 0, 20)
    ours, _ = train.evaluated(trained[1], pairs, indices(2))
    theirs, _ = train.evaluated(one, own, indices(0))
    for name, value in ours._asdict().items():
        np.testing.assert_allclose(value, getattr(theirs, name), rtol=1e-3, err_msg=name)


def test_only_live_seeds_move_and_chunks_do_not_matter(trained):
    before, whole = trained
    halves = train.initial(TOGETHER)
    for first in (0, 10):
        halves = train.advanced(TOGETHER, halves, data(TOGETHER), indices(0, 2), first, first + 10)
    leaves = map(jax.tree.leaves, (before.model, whole.model, halves.model))
    for old, new, again in zip(*leaves, strict=True):
        np.testing.assert_array_equal(old[1], new[1])
        np.testing.assert_array_equal(new, again)
    assert np.any(before.model.unembedding[2] != whole.model.unembedding[2])


def test_evaluation_against_numpy(trained):
    pairs = data(TOGETHER)
    metrics, spectra = train.evaluated(trained[1], pairs, indices(2))
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
        np.testing.assert_allclose(getattr(metrics, name)[0], value, rtol=2e-4, err_msg=name)
    np.testing.assert_allclose(spectra.p[0], p, atol=1e-5)
    assert expected["train_loss"] != expected["val_loss"]
