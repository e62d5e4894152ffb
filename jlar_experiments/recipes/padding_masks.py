"""Sequences of unlike length: padding counts neither for the loss nor for LAR."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

import jlar

OPTIMIZER, PAD = optax.adam(1e-2), 50.0
Params = dict[str, Array]
Tokens = Float[Array, "sequences length _"]


def error(params: Params, x: Tokens, y: Tokens, mask: Bool[Array, "sequences length"]) -> Any:
    """A two-layer network on every token; the mean is over the tokens that there are."""
    each = jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"] - y) ** 2, axis=-1)
    return jnp.sum(each * mask) / jnp.sum(mask)


@jax.jit
def step(params: Params, state: optax.OptState, x: Tokens, y: Tokens, mask: Array) -> Any:
    """One step; the mask has one entry per token and serves every matrix."""
    loss = jlar.capture(error, mask=mask)
    (value, lars), grads = jax.value_and_grad(loss, has_aux=True)(params, x, y, mask)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value, lars


def main(steps: int = 40) -> dict[str, Any]:
    """Train on a sine; losses, and the last LAR of the first matrix over the tokens alone."""
    keys = jax.random.split(jax.random.key(0), 3)
    lengths = jnp.array([16, 9, 4, 12, 7, 16, 3, 11])
    mask = jnp.arange(16) < lengths[:, None]
    x = jnp.where(mask[..., None], jax.random.normal(keys[0], (8, 16, 8)), PAD)
    y = jnp.sin(x[..., :4])
    up, down = jax.random.normal(keys[1], (8, 32)), jax.random.normal(keys[2], (32, 4))
    params = {"up": up / 3, "down": down / 6}
    state, losses, lars, before = OPTIMIZER.init(params), [], {}, params
    for _ in range(steps):
        before = params
        params, state, value, lars = step(params, state, x, y, mask)
        losses.append(float(value))
    kept = lars["up"]
    _, all_of_them = jax.jit(jlar.capture(error))(before, x, y, mask)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"up: LAR {kept.lar:.3f} of {kept.count} tokens, {jnp.mean(mask):.0%} of the batch")
    print(
        f"up: LAR {all_of_them['up'].lar:.3f} if the padding counts: of the padding, not the data"
    )
    return {"losses": losses, "lar": kept.lar, "W": before["up"].T, "X": x[mask]}


if __name__ == "__main__":
    main()
