"""A flax NNX model with its own attention and dropout, split so that its state comes back."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

import jlar

OPTIMIZER, QUERY = optax.adam(3e-3), "attention.query.kernel"


class Block(nnx.Module):
    """NNX's own attention and a two-layer network."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(16, 64, rngs=rngs), nnx.Linear(64, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
        """The same shape."""
        x = x + self.attention(x)
        return x + self.dropout(self.down(nnx.gelu(self.up(x))))


def main(steps: int = 40) -> dict[str, Any]:
    """Train to say what came before; losses, and the last LAR of the queries."""
    x = jax.random.normal(jax.random.key(0), (8, 6, 16))
    graph, params, rest = nnx.split(Block(nnx.Rngs(0)), nnx.Param, ...)

    # What is traced is a copy of the module. What it changes in itself - the count from which
    # dropout draws, the means of a batch norm - is lost with the copy unless the loss returns it.
    def error(params: PyTree, rest: PyTree) -> tuple[Float[Array, ""], PyTree]:
        model = nnx.merge(graph, params, rest)
        value = jnp.mean((model(x) - jnp.roll(x, 1, axis=1)) ** 2)
        return value, nnx.state(model, nnx.Not(nnx.Param))

    @jax.jit
    def step(params: PyTree, rest: PyTree, state: optax.OptState) -> Any:
        loss = jlar.capture(error, has_aux=True)
        (value, (rest, lars)), grads = jax.value_and_grad(loss, has_aux=True)(params, rest)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state, value, lars

    state, losses, lars, before = OPTIMIZER.init(params), [], {}, params
    for _ in range(steps):
        before = params
        params, rest, state, value, lars = step(params, rest, state)
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}", {k: f"{e.lar:.3f}" for k, e in lars.items()})
    W, lar = nnx.merge(graph, before, rest).attention.query.kernel[...], lars[QUERY].lar
    return {"losses": losses, "lar": lar, "W": W.reshape(16, -1).T, "X": x, "rest": rest}


if __name__ == "__main__":
    main()
