"""Training and evaluation: against AdamW written out, and each seed against itself alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from jlar_experiments.config import GrokConfig
from jlar_experiments.grokking import train

SMALL = {"p": 11, "width": 16, "heads": 2, "layers": 1, "batch_size": 25, "epochs": 50}


def indices(*live):
    return jnp.array(live, jnp.int32)


def test_split():
    config = GrokConfig(**SMALL, seeds=2)
    pairs = train.data(config)
    assert pairs.train.shape == (2, 60, 3) and pairs.validation.shape == (2, 61, 3)
    table = sorted(map(tuple, config.operation.pairs(11)))
    for seed in range(2):
        both = np.concatenate([pairs.train[seed], pairs.validation[seed]])
        assert sorted(map(tuple, both)) == table
    assert np.any(pairs.train[0] != pairs.train[1])


def test_one_epoch_is_adamw_with_warm_up():
    config = GrokConfig(**SMALL)
    state, pairs = train.initial(config), train.data(config)
    start = jax.tree.map(lambda a: np.asarray(a[0], np.float64), state.model)
    order = jax.random.fold_in(pairs.order[0], 7)
    rows = jax.random.permutation(order, pairs.train[0])[:50].reshape(2, 25, 3)

    def loss(model, rows):
        logs = jax.nn.log_softmax(model(rows[:, 0], rows[:, 1]))
        return -jnp.mean(logs[jnp.arange(25), rows[:, 2]])

    leaves, structure = jax.tree.flatten(start)
    first, second = [np.zeros_like(a) for a in leaves], [np.zeros_like(a) for a in leaves]
    for step, lr in ((1, 1e-4), (2, 2e-4)):  # linear from a tenth, in ten steps
        model = jax.tree.unflatten(structure, [jnp.asarray(a, jnp.float32) for a in leaves])
        gradient = jax.tree.leaves(jax.grad(loss)(model, rows[step - 1]))
        first = [0.9 * m + 0.1 * np.asarray(g) for m, g in zip(first, gradient, strict=True)]
        second = [
            0.98 * v + 0.02 * np.asarray(g) ** 2 for v, g in zip(second, gradient, strict=True)
        ]
        leaves = [
            a - lr * (m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.98**step)) + 1e-8) + 1.0 * a)
            for a, m, v in zip(leaves, first, second, strict=True)
        ]
    trained = train.advanced(config, state, pairs, indices(0), 7, 8)
    for ours, expected in zip(jax.tree.leaves(trained.model), leaves, strict=True):
        np.testing.assert_allclose(ours[0], expected, atol=2e-6)


def test_a_seed_in_an_ensemble_is_the_seed_alone():
    together, alone = GrokConfig(**SMALL, seeds=3), GrokConfig(**SMALL, seed=1)
    pairs, own = train.data(together), train.data(alone)
    np.testing.assert_array_equal(pairs.train[1], own.train[0])
    some = train.advanced(together, train.initial(together), pairs, indices(0, 1), 0, 10)
    one = train.advanced(alone, train.initial(alone), own, indices(0), 0, 10)
    ours, _ = train.evaluated(some, pairs, indices(1))
    theirs, _ = train.evaluated(one, own, indices(0))
    for name, value in ours._asdict().items():
        np.testing.assert_allclose(value, getattr(theirs, name), rtol=1e-3, err_msg=name)


def test_only_live_seeds_move_and_chunks_do_not_matter():
    config = GrokConfig(**SMALL, seeds=3)
    start, pairs = train.initial(config), train.data(config)
    before = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, start))
    whole = train.advanced(config, start, pairs, indices(0, 2), 0, 4)
    halves = train.initial(config)
    for first in (0, 2):
        halves = train.advanced(config, halves, pairs, indices(0, 2), first, first + 2)
    leaves = map(jax.tree.leaves, (before.model, whole.model, halves.model))
    for old, new, again in zip(*leaves, strict=True):
        np.testing.assert_array_equal(old[1], new[1])
        np.testing.assert_array_equal(new, again)
    assert np.any(before.model.unembedding[2] != whole.model.unembedding[2])


def test_evaluation_against_numpy():
    config = GrokConfig(**{**SMALL, "seeds": 2, "width": 32})
    pairs = train.data(config)
    state = train.advanced(config, train.initial(config), pairs, indices(0, 1), 0, 30)
    metrics, spectra = train.evaluated(state, pairs, indices(1))
    model = jax.tree.map(lambda a: a[1], state.model)
    rows = np.asarray(pairs.train[1])
    X = np.asarray(model.activations(rows[:, 0], rows[:, 1]), np.float64)
    W = np.asarray(model.unembedding, np.float64)
    logits = X @ W.T
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(rows)), rows[:, 2]]
    p, q, _ = reference.spectra(W, X)
    lar = reference.lar(W, X)
    held = int(np.searchsorted(np.cumsum(p), 0.95)) + 1
    expected = {
        "train_loss": losses.mean(),
        "train_acc": np.mean(logits.argmax(1) == rows[:, 2]),
        "lar": lar,
        "k_pred": 32 ** (2 * (1 - lar)),
        "q_in_top95": q[:held].sum(),
        "pr_p": 1 / np.sum(p**2),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(metrics, name)[0], value, rtol=2e-4, err_msg=name)
    np.testing.assert_allclose(spectra.p[0], p, atol=1e-5)
    assert not np.allclose(metrics.val_loss, metrics.train_loss)


@pytest.mark.parametrize("norm", ["pre", "pre-no-final"])
def test_other_norms_learn(norm):
    config = GrokConfig(**{**SMALL, "norm": norm, "embedding_scale": 0.25})
    state, pairs = train.initial(config), train.data(config)
    before, _ = train.evaluated(state, pairs, indices(0))
    after, _ = train.evaluated(
        train.advanced(config, state, pairs, indices(0), 0, 40), pairs, indices(0)
    )
    assert after.train_loss < before.train_loss - 0.2
