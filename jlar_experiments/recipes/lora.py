"""Low-rank adapters on a frozen matrix: the LAR of what the data meets, W + BA, or of each part."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import jlar

OPTIMIZER = optax.adam(1e-2)
Arrays = dict[str, Array]


def merged(p: Arrays, x: Float[Array, "t n"], y: Float[Array, "t m"]) -> Float[Array, ""]:
    """One product, with the sum: one LAR, under the name of the largest array, W."""
    return jnp.mean((x @ (p["W"] + p["B"] @ p["A"]).T - y) ** 2)


def apart(p: Arrays, x: Float[Array, "t n"], y: Float[Array, "t m"]) -> Float[Array, ""]:
    """The same numbers from three products: three LARs."""
    return jnp.mean((x @ p["W"].T + x @ p["A"].T @ p["B"].T - y) ** 2)


@jax.jit
def step(adapters: Arrays, frozen: Arrays, state: optax.OptState, *data: Array) -> Any:
    """One step of A and B alone."""

    def loss(adapters: Arrays) -> tuple[Float[Array, ""], dict[str, jlar.Energies]]:
        # W is in capture's first argument although nobody differentiates it: if it came from
        # elsewhere, it would be data, and so would be the sum of it and BA.
        return jlar.capture(merged)(frozen | adapters, *data)

    (value, lars), grads = jax.value_and_grad(loss, has_aux=True)(adapters)
    updates, state = OPTIMIZER.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, value, lars


def main(steps: int = 60) -> dict[str, Any]:
    """Adapt a random matrix to another; losses, and the last LAR of the sum."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, frozen = jax.random.normal(keys[0], (64, 16)), {"W": jax.random.normal(keys[1], (8, 16))}
    y = x @ (frozen["W"] + 0.3 * jax.random.normal(keys[2], (8, 16))).T
    adapters = {"A": jax.random.normal(keys[3], (2, 16)) / 4, "B": jnp.zeros((8, 2))}
    state, losses, lars, before = OPTIMIZER.init(adapters), [], {}, adapters
    for _ in range(steps):
        before = adapters
        adapters, state, value, lars = step(adapters, frozen, state, x, y)
        losses.append(float(value))
    _, parts = jax.jit(jlar.capture(apart))(frozen | before, x, y)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print("merged:", {path: f"{e.lar:.3f}" for path, e in lars.items()})
    print("apart: ", {path: f"{e.lar:.3f}" for path, e in parts.items()})
    W = frozen["W"] + before["B"] @ before["A"]
    return {"losses": losses, "lar": lars["W"].lar, "W": W, "X": x}


if __name__ == "__main__":
    main()
