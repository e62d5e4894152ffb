"""Training and evaluation of an ensemble of grokking runs: pure, jitted over chunks of epochs."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

import jlar
from jlar.monitor import Monitor

from .config import GrokConfig
from .measures import Harmonics, comparators, harmonics
from .model import MODELS, Norm, OneHotMLP, Transformer

Model = Transformer | OneHotMLP
Trained = tuple[Model, optax.OptState]

PIECE = 512  # pairs that are evaluated together
HELD = 0.95  # share of the variance for k95, and of p for q_in_top95


class State(NamedTuple):
    """A model, its optimiser, its age and its monitor; arrays have a leading axis of members."""

    model: Model
    optimiser: optax.OptState
    epoch: Int[Array, "*members"]
    monitor: Monitor


class Data(NamedTuple):
    """The rows (x, y, answer) to train on and those to validate on, and the key of the batches."""

    train: Int[Array, "*members train 3"]
    validation: Int[Array, "*members validation 3"]
    order: PRNGKeyArray
    harmonics: Harmonics


class Metrics(NamedTuple):
    """What is logged; LAR and what follows it are over the whole training set."""

    train_loss: Float[Array, "*members"]
    train_acc: Float[Array, "*members"]
    val_loss: Float[Array, "*members"]
    val_acc: Float[Array, "*members"]
    lar: Float[Array, "*members"]
    k_pred: Float[Array, "*members"]
    k95: Float[Array, "*members"]
    pr_p: Float[Array, "*members"]
    pr_q: Float[Array, "*members"]
    corr: Float[Array, "*members"]
    q_in_top95: Float[Array, "*members"]
    stable_rank: Float[Array, "*members"]
    effective_rank: Float[Array, "*members"]
    weight_norm: Float[Array, "*members"]
    logits_pr: Float[Array, "*members"]
    logits_rank99: Float[Array, "*members"]
    fourier_k99: Float[Array, "*members"]


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


def _seeds(config: GrokConfig) -> Int[Array, " members"]:
    return jnp.asarray(np.array(config.all_seeds, dtype=np.int32))


def initial(config: GrokConfig) -> State:
    """The state of every seed of this run before the first step."""
    return _initial(config.program, _seeds(config))


@partial(jax.jit, static_argnums=0)
def _initial(config: GrokConfig, seeds: Int[Array, " members"]) -> State:
    def one(seed: Int[Array, ""]) -> State:
        model = MODELS[config.model](config, _key(seed, 0))
        monitor = Monitor.init(n=config.width)
        return State(model, _optimiser(config).init(model), jnp.zeros((), jnp.int32), monitor)

    return jax.vmap(one)(seeds)


def data(config: GrokConfig) -> Data:
    """Every seed's own random split of the task's pairs."""
    pairs = jnp.asarray(config.operation.pairs(config.p).astype(np.int32))
    waves = harmonics(config.operation, config.p)
    return _split(config.train_pairs, config.shuffled_labels, pairs, waves, _seeds(config))


@partial(jax.jit, static_argnums=(0, 1))
def _split(
    trained: int,
    shuffled: bool,
    pairs: Int[Array, "pairs 3"],
    waves: Harmonics,
    seeds: Int[Array, " members"],
) -> Data:
    def one(seed: Int[Array, ""]) -> Data:
        table = pairs
        if shuffled:
            table = table.at[:, 2].set(jax.random.permutation(_key(seed, 3), table[:, 2]))
        train, validation = jnp.split(jax.random.permutation(_key(seed, 1), table), [trained])
        return Data(train, validation, _key(seed, 2), waves)

    return jax.vmap(one)(seeds)


def _loss(model: Model, rows: Int[Array, "b 3"]) -> Float[Array, ""]:
    logits = model(rows[:, 0], rows[:, 1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 2]))


def stepping(config: GrokConfig) -> Callable[..., tuple[Trained, None]]:
    """The training step of a batch, in the form that a scan takes."""
    optimiser = _optimiser(config)

    def step(trained: Trained, rows: Int[Array, "b 3"]) -> tuple[Trained, None]:
        model, moments = trained
        gradient = jax.grad(_loss)(model, rows)
        with jax.numpy_dtype_promotion("standard"):  # optax takes a float to the power of an int32
            updates, moments = optimiser.update(gradient, moments, model)
        return (eqx.apply_updates(model, updates), moments), None

    return step


def in_order(data: Data, epoch: int | Int[Array, ""]) -> Int[Array, "train 3"]:
    """One member's training pairs in the order of this epoch."""
    return jax.random.permutation(jax.random.fold_in(data.order, epoch), data.train)


def _epochs(config: GrokConfig, state: State, data: Data, last: Int[Array, ""]) -> State:
    """Train one member up to epoch `last`, each epoch in an order of its own."""
    step = stepping(config)
    batch = min(config.batch_size, config.train_pairs)
    whole = config.train_pairs // batch

    def epoch(number: Int[Array, ""], trained: Trained) -> Trained:
        full, rest = jnp.split(in_order(data, number), [whole * batch])
        trained, _ = jax.lax.scan(step, trained, full.reshape(whole, batch, 3))
        return step(trained, rest)[0] if config.steps_per_epoch > whole else trained

    start = (state.model, state.optimiser)
    model, moments = jax.lax.fori_loop(state.epoch, last, epoch, start)
    reached = jnp.maximum(state.epoch, last)
    return state._replace(model=model, optimiser=moments, epoch=reached)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def advanced(
    config: GrokConfig,
    mesh: jax.sharding.Mesh,
    state: State,
    data: Data,
    last: Int[Array, " members"],
) -> State:
    """Every member, trained up to its epoch `last`; one that is there already stays as it is.

    Args:
        config: the `program` of all members.
        mesh: devices along its axis "run", over which the members are spread evenly.
    """
    return _each(partial(_epochs, config), mesh, len(last))(state, data, last)


def member(ensemble: Any, place: int) -> Any:
    """The arrays of one member of a pytree of an ensemble's arrays."""
    return jax.tree.map(lambda a: a[place], ensemble)


def _in_turn(mesh: jax.sharding.Mesh) -> bool:
    """On CPUs products with several weights are slower than one product after the other."""
    return mesh.devices.flat[0].platform == "cpu"


@partial(jax.jit, static_argnums=0)
def evaluated(mesh: jax.sharding.Mesh, state: State, data: Data) -> tuple[Metrics, jlar.Spectra]:
    """Losses, accuracies, LAR and the spectra of every member."""
    return _each(_evaluation, mesh, len(state.epoch))(state.model, data)


def _each(function: Callable[..., Any], mesh: jax.sharding.Mesh, members: int) -> Any:
    """The function over the members of each device: together, on CPUs one after the other."""

    def one(*inputs: Any) -> Any:
        return jax.tree.map(lambda a: a[None], function(*member(inputs, 0)))

    def in_turn(*inputs: Any) -> Any:
        return jax.lax.map(lambda each: function(*each), inputs)

    together = in_turn if _in_turn(mesh) else jax.vmap(function)
    local = one if members == mesh.size else together
    if mesh.size == 1:
        return local
    spec = jax.sharding.PartitionSpec("run")
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)


def _evaluation(model: Model, data: Data) -> tuple[Metrics, jlar.Spectra]:
    W = model.unembedding
    # Of all pairs at once, so that the model is compiled once.
    X, Y, losses, right = _answers(model, jnp.concatenate([data.train, data.validation]))
    trained = len(data.train)
    X, Y = X[:trained], Y[:trained]
    spectra = jlar.spectra(W, X, method="svd")
    p, q = spectra.p, spectra.q
    top = jnp.cumsum(p) - p < HELD  # the first directions that reach the share, and no more
    metrics = Metrics(
        jnp.mean(losses[:trained]),
        jnp.mean(right[:trained]),
        jnp.mean(losses[trained:]),
        jnp.mean(right[trained:]),
        lar=spectra.lar,
        k_pred=jlar.effective_dimension(spectra.lar, W.shape[1]),
        k95=jlar.principal_dimension(X, HELD),
        pr_p=spectra.participation_p,
        pr_q=spectra.participation_q,
        corr=spectra.corr,
        q_in_top95=jnp.sum(jnp.where(top, q, 0)),
        **comparators(model, spectra, Y.T @ Y, data.harmonics)._asdict(),
    )
    return metrics, spectra


def _answers(
    model: Model, rows: Int[Array, "b 3"]
) -> tuple[Float[Array, "b n"], Float[Array, "b m"], Float[Array, " b"], Float[Array, " b"]]:
    """Unembedding inputs, logits, loss, and 1 if the answer is right, of each of these pairs."""

    def one(row: Int[Array, " 3"]) -> Float[Array, " n"]:
        return model.activations(row[:1], row[1:2])[0]

    # In pieces that stay in a CPU's cache, and that keep the memory of p = 997 within bounds; of
    # equal size, so that the model is compiled once.
    padded = jnp.pad(rows, [(0, -len(rows) % PIECE), (0, 0)])
    X = jax.lax.map(one, padded, batch_size=PIECE)[: len(rows)]
    logits = X @ model.unembedding.T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 2])
    return X, logits, losses, (jnp.argmax(logits, axis=-1) == rows[:, 2]).astype(jnp.float32)
