"""Equinox's recipe for frozen layers, with the LAR of all matrices or of the trained ones only."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

import jlar

OPTIMIZER = optax.adam(1e-2)


def error(model: eqx.nn.MLP, x: Float[Array, "t n"], y: Float[Array, "t m"]) -> Float[Array, ""]:
    """The loss of the whole model."""
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def all_measured(trained: PyTree, frozen: PyTree, *data: Array) -> Any:
    """Capture sees the whole model; what is differentiated is decided outside of it."""
    return jlar.capture(error)(eqx.combine(trained, frozen), *data)


@jlar.capture
def trained_measured(trained: PyTree, frozen: PyTree, *data: Array) -> Float[Array, ""]:
    """Capture sees the trained part as weights; the frozen part is data like x and y."""
    return error(eqx.combine(trained, frozen), *data)


@eqx.filter_jit
def step(loss: Any, trained: PyTree, frozen: PyTree, state: optax.OptState, *data: Array) -> Any:
    """One step of the trained part, by either loss."""
    (value, lars), grads = eqx.filter_value_and_grad(loss, has_aux=True)(trained, frozen, *data)
    updates, state = OPTIMIZER.update(grads, state, trained)
    return eqx.apply_updates(trained, updates), state, value, lars


def main(steps: int = 40) -> dict[str, Any]:
    """Train the last layer of an MLP; losses, and the last LAR of a frozen matrix."""
    x = jax.random.normal(jax.random.key(0), (64, 8))
    y = jnp.sin(x[:, :4])
    model = eqx.nn.MLP(8, 4, 32, depth=2, key=jax.random.key(1))
    nothing = jax.tree.map(lambda _: False, model)
    trained, frozen = eqx.partition(model, eqx.tree_at(lambda m: m.layers[-1], nothing, True))
    state, losses, lars = OPTIMIZER.init(trained), [], {}
    for _ in range(steps):
        trained, state, value, lars = step(all_measured, trained, frozen, state, x, y)
        losses.append(float(value))
    _, _, _, of_trained = step(trained_measured, trained, frozen, state, x, y)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print("all:    ", {path: f"{e.lar:.3f}" for path, e in lars.items()})
    print("trained:", {path: f"{e.lar:.3f}" for path, e in of_trained.items()})
    lar, W = lars["layers.0.weight"].lar, model.layers[0].weight
    return {"losses": losses, "lar": lar, "W": W, "X": x, "trained": list(of_trained)}


if __name__ == "__main__":
    main()
