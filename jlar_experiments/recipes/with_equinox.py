"""An equinox model whose training step also returns the LAR of every matrix."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import jlar

OPTIMIZER = optax.adam(1e-2)


def error(model: eqx.nn.MLP, x: Float[Array, "t n"], y: Float[Array, "t m"]) -> Float[Array, ""]:
    """The loss, as it would be without jlar."""
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


@eqx.filter_jit
def step(
    model: eqx.nn.MLP, state: optax.OptState, x: Float[Array, "t n"], y: Float[Array, "t m"]
) -> tuple[eqx.nn.MLP, optax.OptState, Float[Array, ""], dict[str, jlar.Energies]]:
    """One step: model, optimizer state, loss, and the energies of every matrix."""
    loss = jlar.capture(error)  # the one line
    (value, lars), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model, x, y)
    updates, state = OPTIMIZER.update(grads, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), state, value, lars


def main(steps: int = 60) -> dict[str, Any]:
    """Train on a sine; the losses, and the last LAR of the first matrix beside its W and X."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (64, 8))
    y = jnp.sin(x[:, :4])
    model = eqx.nn.MLP(8, 4, 32, depth=2, key=keys[1])
    state = OPTIMIZER.init(eqx.filter(model, eqx.is_array))
    print(jlar.sites(error)(model, x, y), end="\n\n")  # what is measured, and what is not
    losses, lars, before = [], {}, model
    for i in range(steps):
        before = model
        model, state, value, lars = step(model, state, x, y)
        losses.append(float(value))
        if i % 20 == 19:
            shown = {name: f"{lar:.3f}" for name, lar in jlar.metrics(lars).items()}
            print(f"step {i + 1}: loss {value:.4f}, {shown}")
    W, lar = before.layers[0].weight, lars["layers.0.weight"].lar
    return {"losses": losses, "lar": lar, "W": W, "X": x}


if __name__ == "__main__":
    main()
