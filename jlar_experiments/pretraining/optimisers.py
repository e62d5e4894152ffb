"""Adam, AdamW and Muon as the paper uses them, out of optax's parts."""

from typing import Any

import jax
import optax
from jaxtyping import PyTree

from .config import PretrainConfig

MUON_MOMENTUM = 0.95
# The last axis of a weight is its inputs, the one before its outputs; what leads (layers) is a
# batch of matrices that are made orthogonal one by one. optax's default skips stacked matrices.
DIMENSIONS = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)


def learning_rate(config: PretrainConfig) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine to zero, or the peak for ever."""
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, max(1, config.steps - config.warm_up))
    else:
        after = optax.constant_schedule(config.lr)
    if not config.warm_up:
        return after
    # The first step has the rate lr / warm_up: a rate of zero would waste a batch.
    ramp = optax.linear_schedule(config.lr / config.warm_up, config.lr, config.warm_up - 1)
    return optax.join_schedules([ramp, after], [config.warm_up])


def optimiser(config: PretrainConfig) -> Any:  # optax types parameters as containers of arrays only
    """The transformation of gradients: clipping, then the chosen rule with its decay."""
    rate = learning_rate(config)
    adam = optax.adamw(
        rate, config.beta1, config.beta2, 1e-8, weight_decay=config.weight_decay, mask=decayed
    )
    if config.optimiser == "muon":
        muon = optax.contrib.muon(
            rate,
            beta=MUON_MOMENTUM,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: DIMENSIONS, params),
        )
        rule = optax.partition({"muon": muon, "adam": adam}, _labels)
    else:
        rule = adam
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def decayed(params: PyTree) -> PyTree:
    """True for matrices, the embedding and unembedding among them; gains are left alone."""
    return _by_name(params, lambda name: name not in ("gain", "gains"))


def _labels(params: PyTree) -> PyTree:
    """Muon for the blocks' matrices; Adam for embedding, unembedding and gains."""
    by_adam = ("embedding", "unembedding", "gain", "gains")
    return _by_name(params, lambda name: "adam" if name in by_adam else "muon")


def _by_name(params: PyTree, value: Any) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda path, _: value(path[-1].name), params)
