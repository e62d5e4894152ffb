"""The training step and what it measures: pure, jitted, on any mesh.

    mesh = sharding.mesh(config.tensor)
    program = train.Program(config, mesh)
    state = program.initial()
    state, metrics = program.step(state, batch)     # batch (batch, length + 1), int32

To compile for devices that are not there, build the mesh from their topology
(`sharding.mesh(tensor, devices)`) and, without allocating anything, call
`program.step.lower(program.abstract_state, program.abstract_batch).compile()`.
"""

from functools import cached_property
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

import jlar
from jlar.monitor import Monitor

from .config import TOP, PretrainConfig
from .model import Decoder
from .optimisers import optimiser
from .sharding import BATCH, HIDDEN, abstract, shardings

Batch = Int[Array, "b t1"]


class State(NamedTuple):
    """What a step changes, and the monitor of its metrics, None without LAR."""

    step: Int[Array, ""]
    model: Decoder
    optimiser: optax.OptState
    monitor: Monitor | None = None


class Metrics(NamedTuple):
    """What every step returns; all is that of the whole batch, wherever its parts were."""

    step: Int[Array, ""]
    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    energies: dict[str, jlar.Energies]
    lars: dict[str, Float[Array, "*layers"]]
    keep_rates: dict[str, Float[Array, "*layers"]]


class Inspection(NamedTuple):
    """What is measured at a cadence, on the training batch and before its update."""

    lars: dict[str, Float[Array, "*layers"]]
    spectra: jlar.Spectra
    statistics: dict[str, Float[Array, ""]]


def losses(
    config: PretrainConfig,
    model: Decoder,
    tokens: Batch,
    place: NamedSharding | None = None,
) -> tuple[Float[Array, ""], tuple[jlar.Energies, Float[Array, "b t n"]]]:
    """Mean cross-entropy of the next token; the unembedding's energies and its inputs X."""
    X, labels, W = model.hidden(tokens[:, :-1], place), tokens[:, 1:], model.head
    cap = config.final_cap
    if config.loss == "fused":
        loss, energies = jlar.losses.cross_entropy(W, X, labels, soft_cap=cap or None)
        return loss, (energies, X)
    Y = jnp.matmul(X, W.T, preferred_element_type=jnp.float32)
    energies = jlar.energies(W, X, Y=Y)
    z = cap * jnp.tanh(Y / cap) if cap else Y
    return optax.softmax_cross_entropy_with_integer_labels(z, labels).mean(), (energies, X)


class Program:
    """The jitted functions of one configuration on one mesh."""

    def __init__(self, config: PretrainConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self._optimiser = optimiser(config)
        shapes = jax.eval_shape(self._initial, 0)
        self.places = shardings(shapes, mesh)
        self.abstract_state: State = abstract(shapes, self.places)
        self.batch_place = NamedSharding(mesh, BATCH)
        self._hidden_place = NamedSharding(mesh, HIDDEN)
        self.abstract_batch = jax.ShapeDtypeStruct(
            (config.batch, config.length + 1), jnp.int32, sharding=self.batch_place
        )

    def initial(self, seed: int | None = None) -> State:
        """The state before the first step, of the configuration's seed unless another is given."""
        return self._initialisation(self.config.seed if seed is None else seed)

    @cached_property
    def _initialisation(self) -> Any:
        return jax.jit(self._initial, out_shardings=self.places)

    @cached_property
    def step(self) -> Any:
        """`step(state, batch) -> (state, metrics)`; it consumes the state."""
        return jax.jit(self._step, donate_argnums=0, out_shardings=(self.places, None))

    @cached_property
    def validation(self) -> Any:
        """`validation(model, batches)` -> mean loss over batches (many, batch, length + 1)."""

        def mean(model: Decoder, batches: Int[Array, "k b t1"]) -> Float[Array, ""]:
            return jnp.mean(jax.lax.map(lambda b: self._losses(model, b)[0], batches))

        return jax.jit(mean)

    @cached_property
    def inspection(self) -> Any:
        """`inspection(model, batch)` -> `Inspection` of this model on this batch."""
        return jax.jit(self._inspection)

    def _losses(self, model: Decoder, tokens: Batch) -> Any:
        return losses(self.config, model, tokens, self._hidden_place)

    def _every_matrix(
        self, model: Decoder, tokens: Batch
    ) -> tuple[Float[Array, ""], tuple[dict[str, jlar.Energies], Float[Array, "b t n"]]]:
        """The loss, the energies of every matrix, and the inputs of the unembedding."""
        call = jlar.capture(self._losses, has_aux=True, where="blocks.*")
        loss, ((unembedding, X), blocks) = call(model, tokens)
        named = {path.removeprefix("blocks."): each for path, each in blocks.items()}
        return loss, ({"unembedding": unembedding, **named}, X)

    def _initial(self, seed: int | Int[Array, ""]) -> State:
        model = Decoder(self.config, jax.random.key(seed))
        config = self.config
        monitor = Monitor.init(n=config.width, second_epoch=config.sequences / config.batch)
        monitor = None if config.lar == "off" else monitor
        return State(jnp.zeros((), jnp.int32), model, self._optimiser.init(model), monitor)

    def _step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        def loss(model: Decoder) -> tuple[Array, dict[str, jlar.Energies]]:
            if self.config.lar == "every":
                value, (measured, _) = self._every_matrix(model, batch)
                return value, measured
            value, (energies, _) = self._losses(model, batch)
            return value, {} if self.config.lar == "off" else {"unembedding": energies}

        (value, measured), gradient = jax.value_and_grad(loss, has_aux=True)(state.model)
        with jax.numpy_dtype_promotion("standard"):  # optax takes a float to the power of an int32
            updates, optimiser_state = self._optimiser.update(
                gradient, state.optimiser, state.model
            )
        model = eqx.apply_updates(state.model, updates)
        new = State(state.step + 1, model, optimiser_state, state.monitor)
        ratios = {name: each.lar for name, each in measured.items()}
        kept = {name: each.keep_rate for name, each in measured.items()}
        norm = optax.tree.norm(gradient)
        return new, Metrics(state.step, value, norm, measured, ratios, kept)

    def _inspection(self, model: Decoder, batch: Batch) -> Inspection:
        _, (measured, X) = self._every_matrix(model, batch)
        lars = {name: each.lar for name, each in measured.items()}
        spectra = jlar.grams(model.head, X).spectra()
        statistics = {
            "corr": spectra.corr,
            "rank_corr": spectra.rank_corr,
            "sigma_p": spectra.sigma_p,
            "sigma_q": spectra.sigma_q,
            "stable_rank": spectra.stable_rank,
            "effective_rank": spectra.effective_rank,
            "rms_X": jnp.sqrt(jnp.mean(jnp.square(X.astype(jnp.float32)))),
        }
        for k in TOP:
            if k <= self.config.width:
                statistics[f"L{k}"], statistics[f"D{k}"] = spectra.top(k)
        return Inspection(lars, spectra, statistics)
