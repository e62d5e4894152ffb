"""Micro-batches in a scan: gradients are averaged, energies added, LARs never averaged."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import jlar

OPTIMIZER = optax.adam(1e-2)
Params = dict[str, Array]


@jlar.capture
def loss(params: Params, x: Float[Array, "t n"], y: Float[Array, "t m"]) -> Float[Array, ""]:
    """A two-layer network."""
    return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"] - y) ** 2)


@jax.jit
def step(params: Params, state: optax.OptState, *batches: Float[Array, "micro t _"]) -> Any:
    """One step on all micro-batches: one mean gradient, and the LAR of the whole batch."""

    def micro(total: Params, batch: tuple[Array, ...]) -> tuple[Params, Any]:
        (value, lars), grads = jax.value_and_grad(loss, has_aux=True)(params, *batch)
        return jax.tree.map(jnp.add, total, grads), (value, lars)

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, (values, each) = jax.lax.scan(micro, zeros, batches)
    grads = jax.tree.map(lambda g: g / len(values), total)
    updates, state = OPTIMIZER.update(grads, state, params)
    lars = {path: e.sum() for path, e in each.items()}  # adds the energies of the micro-batches
    return optax.apply_updates(params, updates), state, jnp.mean(values), lars, each


def main(steps: int = 40) -> dict[str, Any]:
    """Train on micro-batches of unlike scale; losses, and the last LAR over all of them."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (4, 16, 8)).at[:, :, 0].mul(jnp.array([[0.5], [1], [2], [8]]))
    y = jnp.sin(x[..., :4])
    up, down = jax.random.normal(keys[1], (8, 32)), jax.random.normal(keys[2], (32, 4))
    params = {"up": up / 3, "down": down / 6}
    state, losses, lars, each, before = OPTIMIZER.init(params), [], {}, {}, params
    for _ in range(steps):
        before = params
        params, state, value, lars, each = step(params, state, x, y)
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for path, e in lars.items():
        mean = jnp.mean(each[path].lar)
        print(f"{path}: LAR of all {e.count} tokens {e.lar:.4f} (a mean of 4 LARs: {mean:.4f})")
    return {"losses": losses, "lar": lars["up"].lar, "W": before["up"].T, "X": x}


if __name__ == "__main__":
    main()
