"""Training and evaluation of an ensemble of grokking runs: pure, jitted over chunks of epochs."""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

import jlar

from ..config import GrokConfig
from .measures import Harmonics, comparators, harmonics
from .model import MODELS, Norm, OneHotMLP, Transformer

Epoch = int | Int[Array, ""]
Model = Transformer | OneHotMLP

HELD = 0.95  # share of the variance for k95, and of p for q_in_top95


class State(NamedTuple):
    """The model and its optimiser; in an ensemble every array has a leading axis of seeds."""

    model: Model
    optimiser: optax.OptState


class Data(NamedTuple):
    """The rows (x, y, answer) to train on and those to validate on, and the key of the batches."""

    train: Int[Array, "*seeds train 3"]
    validation: Int[Array, "*seeds validation 3"]
    order: PRNGKeyArray
    harmonics: Harmonics


class Metrics(NamedTuple):
    """What is logged; LAR and what follows it are over the whole training set."""

    train_loss: Float[Array, "*seeds"]
    train_acc: Float[Array, "*seeds"]
    val_loss: Float[Array, "*seeds"]
    val_acc: Float[Array, "*seeds"]
    lar: Float[Array, "*seeds"]
    k_pred: Float[Array, "*seeds"]
    k95: Float[Array, "*seeds"]
    pr_p: Float[Array, "*seeds"]
    pr_q: Float[Array, "*seeds"]
    corr: Float[Array, "*seeds"]
    q_in_top95: Float[Array, "*seeds"]
    stable_rank: Float[Array, "*seeds"]
    effective_rank: Float[Array, "*seeds"]
    weight_norm: Float[Array, "*seeds"]
    logits_pr: Float[Array, "*seeds"]
    logits_rank99: Float[Array, "*seeds"]
    fourier_k99: Float[Array, "*seeds"]


def _optimiser(config: GrokConfig) -> Any:  # optax types parameters as containers of arrays only
    warm_up = optax.linear_schedule(config.lr / 10, config.lr, transition_steps=9)
    decay = config.weight_decay
    mask = None if config.decay_gains else _not_in_norms
    return optax.adamw(warm_up, b1=0.9, b2=0.98, eps=1e-8, weight_decay=decay, mask=mask)


def _not_in_norms(model: Model) -> Any:
    def is_norm(part: Any) -> bool:
        return isinstance(part, Norm)

    return jax.tree.map(lambda part: not is_norm(part), model, is_leaf=is_norm)


def _key(seed: Int[Array, ""], purpose: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(seed), purpose)


def _seeds(config: GrokConfig) -> Int[Array, " seeds"]:
    return jnp.asarray(np.array(config.all_seeds, dtype=np.int32))


@partial(jax.jit, static_argnums=0)
def initial(config: GrokConfig) -> State:
    """Every seed's state before the first step."""

    def one(seed: Int[Array, ""]) -> State:
        model = MODELS[config.model](config, _key(seed, 0))
        return State(model, _optimiser(config).init(model))

    return jax.vmap(one)(_seeds(config))


@partial(jax.jit, static_argnums=0)
def data(config: GrokConfig) -> Data:
    """Every seed's own random split of the task's pairs."""
    pairs = jnp.asarray(config.operation.pairs(config.p).astype(np.int32))
    waves = harmonics(config.operation, config.p)

    def one(seed: Int[Array, ""]) -> Data:
        table = pairs
        if config.shuffled_labels:
            table = table.at[:, 2].set(jax.random.permutation(_key(seed, 3), table[:, 2]))
        shuffled = jax.random.permutation(_key(seed, 1), table)
        train, validation = jnp.split(shuffled, [config.train_pairs])
        return Data(train, validation, _key(seed, 2), waves)

    return jax.vmap(one)(_seeds(config))


def _loss(model: Model, rows: Int[Array, "b 3"]) -> Float[Array, ""]:
    logits = model(rows[:, 0], rows[:, 1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 2]))


def _epochs(config: GrokConfig, state: State, data: Data, first: Epoch, last: Epoch) -> State:
    """Train one seed from epoch `first` to `last`, each in an order of its own."""
    optimiser, steps = _optimiser(config), config.steps_per_epoch
    batch = min(config.batch_size, config.train_pairs)

    def step(state: State, rows: Int[Array, "b 3"]) -> tuple[State, None]:
        gradient = jax.grad(_loss)(state.model, rows)
        with jax.numpy_dtype_promotion("standard"):  # optax takes a float to the power of an int32
            updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.model)
        return State(eqx.apply_updates(state.model, updates), optimiser_state), None

    def epoch(number: Int[Array, ""], state: State) -> State:
        rows = jax.random.permutation(jax.random.fold_in(data.order, number), data.train)
        return jax.lax.scan(step, state, rows[: steps * batch].reshape(steps, batch, 3))[0]

    return jax.lax.fori_loop(first, last, epoch, state)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def advanced(
    config: GrokConfig,
    state: State,
    data: Data,
    live: Int[Array, " live"],
    first: Epoch,
    last: Epoch,
) -> State:
    """The ensemble, trained from epoch `first` to `last`; only the live seeds, by index, move."""
    chosen, pairs = jax.tree.map(lambda a: a[live], (state, data))
    if len(live) == 1:  # without vmap: on CPUs products with an axis of one in front are slower
        one, own = jax.tree.map(lambda a: a[0], (chosen, pairs))
        moved = jax.tree.map(lambda a: a[None], _epochs(config, one, own, first, last))
    else:
        together = jax.vmap(partial(_epochs, config), in_axes=(0, 0, None, None))
        moved = together(chosen, pairs, first, last)
    return jax.tree.map(lambda all, some: all.at[live].set(some), state, moved)


@jax.jit
def evaluated(state: State, data: Data, live: Int[Array, " live"]) -> tuple[Metrics, jlar.Spectra]:
    """Losses, accuracies, LAR and the spectra of the live seeds."""
    chosen = jax.tree.map(lambda a: a[live], (state.model, data))
    return jax.vmap(_evaluation)(*chosen)


def _evaluation(model: Model, data: Data) -> tuple[Metrics, jlar.Spectra]:
    W = model.unembedding
    X, Y, train_loss, train_acc = _answers(model, data.train)
    *_, val_loss, val_acc = _answers(model, data.validation)
    spectra = jlar.spectra(W, X)
    p, q = spectra.p, spectra.q
    top = jnp.cumsum(p) - p < HELD  # the first directions that reach the share, and no more
    metrics = Metrics(
        train_loss,
        train_acc,
        val_loss,
        val_acc,
        lar=spectra.lar,
        k_pred=jlar.effective_dimension(spectra.lar, W.shape[1]),
        k95=jlar.principal_dimension(X, HELD),
        pr_p=jlar.participation_ratio(p),
        pr_q=jlar.participation_ratio(q),
        corr=spectra.corr,
        q_in_top95=jnp.sum(jnp.where(top, q, 0)),
        **comparators(model, p, Y.T @ Y, data.harmonics)._asdict(),
    )
    return metrics, spectra


def _answers(
    model: Model, rows: Int[Array, "b 3"]
) -> tuple[Float[Array, "b n"], Float[Array, "b m"], Float[Array, ""], Float[Array, ""]]:
    """Unembedding inputs, logits, mean loss and accuracy over these pairs."""

    def one(row: Int[Array, " 3"]) -> Float[Array, " n"]:
        return model.activations(row[:1], row[1:2])[0]

    # In pieces that stay in a CPU's cache, and that keep the memory of p = 997 within bounds.
    X = jax.lax.map(one, rows, batch_size=512)
    logits = X @ model.unembedding.T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 2])
    right = jnp.argmax(logits, axis=-1) == rows[:, 2]
    return X, logits, jnp.mean(losses), jnp.mean(right, dtype=jnp.float32)
