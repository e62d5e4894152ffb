"""A flax Linen transformer under nn.scan and nn.remat: one LAR per layer, nothing recomputed."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import jlar

WIDTH, OPTIMIZER = 16, optax.adam(3e-3)


class Block(linen.Module):
    """Linen's own attention and a two-layer network."""

    @linen.compact
    def __call__(self, x: Float[Array, "b t n"], _: None) -> tuple[Float[Array, "b t n"], None]:
        """What goes on to the next layer, and nothing to stack."""
        x = x + linen.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        h = linen.Dense(4 * WIDTH, name="up")(x)
        return x + linen.Dense(WIDTH, name="down")(linen.gelu(h)), None


ROWS = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
MODEL = linen.scan(linen.remat(Block), **ROWS)()


def error(variables: Any, x: Float[Array, "b t n"]) -> Float[Array, ""]:
    """The model is to say what came before."""
    return jnp.mean((MODEL.apply(variables, x, None)[0] - jnp.roll(x, 1, axis=1)) ** 2)


@jax.jit
def step(variables: Any, state: optax.OptState, x: Float[Array, "b t n"]) -> Any:
    """One step: variables, optimizer state, loss, and the energies of every matrix."""
    (value, lars), grads = jax.value_and_grad(jlar.capture(error), has_aux=True)(variables, x)
    updates, state = OPTIMIZER.update(grads, state, variables)
    return optax.apply_updates(variables, updates), state, value, lars


def main(steps: int = 40) -> dict[str, Any]:
    """Train; losses, and the last LAR of the first layer's queries."""
    x = jax.random.normal(jax.random.key(0), (8, 6, WIDTH))
    variables = jax.jit(MODEL.init)(jax.random.key(1), x, None)
    state, losses, lars, before = OPTIMIZER.init(variables), [], {}, variables
    for _ in range(steps):
        before = variables
        variables, state, value, lars = step(variables, state, x)
        losses.append(float(value))
    lines = (f"{path:32} {[f'{lar:.3f}' for lar in e.lar]}" for path, e in lars.items())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}", *lines, sep="\n")
    W = before["params"]["attention"]["query"]["kernel"][0].reshape(WIDTH, -1).T
    return {"losses": losses, "lar": lars["params.attention.query.kernel"].lar[0], "W": W, "X": x}


if __name__ == "__main__":
    main()
