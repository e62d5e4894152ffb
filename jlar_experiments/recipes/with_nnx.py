"""A flax NNX model with its own attention and dropout, split so that its state comes back."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

import jlar


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


@nnx.jit
def step(model: Block, optimizer: nnx.Optimizer, x: Array) -> tuple[Array, dict[str, Any]]:
    """One step. What the traced copy changes in itself (dropout's count) goes unless returned."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def error(params: PyTree, rest: PyTree) -> tuple[Float[Array, ""], PyTree]:
        model = nnx.merge(graph, params, rest)
        value = jnp.mean((model(x) - jnp.roll(x, 1, axis=1)) ** 2)
        return value, nnx.state(model, nnx.Not(nnx.Param))

    loss = jlar.capture(error, has_aux=True)
    (value, (rest, lars)), grads = jax.value_and_grad(loss, has_aux=True)(params, rest)
    nnx.update(model, rest)
    optimizer.update(model, grads)
    return value, lars


def main(steps: int = 40) -> dict[str, Any]:
    """Train to say what came before; losses, and the last LAR of the queries."""
    x = jax.random.normal(jax.random.key(0), (8, 6, 16))
    model, losses, W, lars = Block(nnx.Rngs(0)), [], x, {}
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    for _ in range(steps):
        W = model.attention.query.kernel[...]
        value, lars = step(model, optimizer, x)
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}", {k: f"{e.lar:.3f}" for k, e in lars.items()})
    seen = {"lar": lars["attention.query.kernel"].lar, "W": W.reshape(16, -1).T, "X": x}
    return {"losses": losses, "rest": nnx.state(model, nnx.Not(nnx.Param)), **seen}


if __name__ == "__main__":
    main()
