"""Arrays in a dict and no framework: the loss, the one line, the step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import jlar

OPTIMIZER = optax.adam(1e-2)
Params = dict[str, Array]


def error(params: Params, x: Float[Array, "t n"], y: Float[Array, "t m"]) -> Float[Array, ""]:
    """A two-layer network; any function that JAX can trace would do."""
    hidden = jax.nn.gelu(x @ params["up"] + params["bias"])
    return jnp.mean((hidden @ params["down"] - y) ** 2)


loss = jlar.capture(error)  # the one line


@jax.jit
def step(params: Params, state: optax.OptState, *data: Array) -> Any:
    """One step: params, optimizer state, and what a logger takes."""
    (value, lars), grads = jax.value_and_grad(loss, has_aux=True)(params, *data)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state, {"loss": value, **jlar.metrics(lars)}


def main(steps: int = 60) -> dict[str, Any]:
    """Train on a sine; losses, and the last LAR of the first matrix."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (64, 8))
    y = jnp.sin(x[:, :4])
    params = {
        "up": jax.random.normal(keys[1], (8, 32)) / 3,
        "bias": jnp.zeros(32),
        "down": jax.random.normal(keys[2], (32, 4)) / 6,
    }
    state, losses, log, before = OPTIMIZER.init(params), [], {}, params
    for i in range(steps):
        before = params
        params, state, log = step(params, state, x, y)
        losses.append(float(log["loss"]))
        if i % 20 == 19:
            print(f"step {i + 1}:", {name: f"{value:.3f}" for name, value in log.items()})
    return {"losses": losses, "lar": log["lar/up"], "W": before["up"].T, "X": x}


if __name__ == "__main__":
    main()
