"""A whole epoch as one compiled scan over its batches, which returns a curve of LAR per matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import jlar

OPTIMIZER = optax.adam(1e-2)
Params = dict[str, Array]
Carry = tuple[Any, optax.OptState]


@jlar.capture
def loss(params: Params, x: Float[Array, "t n"], y: Float[Array, "t m"]) -> Float[Array, ""]:
    """A two-layer network."""
    return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"] - y) ** 2)


@jax.jit
def epoch(carry: Carry, *batches: Float[Array, "steps t _"]) -> tuple[Carry, dict[str, Array]]:
    """All steps of an epoch; what a logger takes, one entry per step."""

    def step(carry: Carry, batch: tuple[Array, ...]) -> tuple[Carry, dict[str, Array]]:
        params, state = carry
        (value, lars), grads = jax.value_and_grad(loss, has_aux=True)(params, *batch)
        updates, state = OPTIMIZER.update(grads, state, params)
        # W differs from step to step, so each step has a LAR of its own and nothing is pooled.
        log = {"loss": value, **jlar.metrics(lars)}
        return (optax.apply_updates(params, updates), state), log

    return jax.lax.scan(step, carry, batches)


def main(epochs: int = 3) -> dict[str, Any]:
    """Train on a sine; losses, and the first LAR of the last epoch."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (20, 16, 8))
    y = jnp.sin(x[..., :4])
    up, down = jax.random.normal(keys[1], (8, 32)), jax.random.normal(keys[2], (32, 4))
    params = {"up": up / 3, "down": down / 6}
    carry, losses, log = (params, OPTIMIZER.init(params)), [], {}
    for i in range(epochs):
        params = carry[0]
        carry, log = epoch(carry, x, y)
        losses += log["loss"].tolist()
        ends = {name: f"{curve[0]:.3f} -> {curve[-1]:.3f}" for name, curve in log.items()}
        print(f"epoch {i + 1}, {len(log['loss'])} steps:", ends)
    return {"losses": losses, "lar": log["lar/up"][0], "W": params["up"].T, "X": x[0]}


if __name__ == "__main__":
    main()
