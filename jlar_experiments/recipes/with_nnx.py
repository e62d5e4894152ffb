"""A flax NNX model with its own attention and dropout, split so that its state comes back."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

import jlar

OPTIMIZER = optax.adam(3e-3)


class Block(nnx.Module):
    """Attention and a two-layer network."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
        """The same shape."""
        x = x + self.attention(x)
        return x + self.dropout(self.down(nnx.gelu(self.up(x))))


def main(steps: int = 40) -> dict[str, Any]:
    """Train to say what came before; losses, and the last LAR of the queries."""
    x = jax.random.normal(jax.random.key(0), (8, 6, 16))
    model = Block(16, nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    # Like jax.grad, capture traces a copy. What the model changes in itself - the count from which
    # dropout draws, the means of a batch norm - is lost with it unless the loss returns it.
    def error(params: nnx.State, rest: nnx.State) -> tuple[Float[Array, ""], nnx.State]:
        model = nnx.merge(graph, params, rest)
        value = jnp.mean((model(x) - jnp.roll(x, 1, axis=1)) ** 2)
        return value, nnx.split(model, nnx.Param, ...)[2]

    @jax.jit
    def step(params: nnx.State, rest: nnx.State, state: optax.OptState) -> Any:
        loss = jlar.capture(error, has_aux=True)
        (value, (rest, lars)), grads = jax.value_and_grad(loss, has_aux=True)(params, rest)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state, value, lars

    state, losses, lars, before = OPTIMIZER.init(params), [], {}, params
    for _ in range(steps):
        before = params
        params, rest, state, value, lars = step(params, rest, state)
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print("\n".join(f"{path:24} {e.lar:.3f}" for path, e in lars.items()))
    nnx.update(model, params, rest)  # the module itself, trained
    W = before["attention"]["query"]["kernel"][...].reshape(16, -1).T
    drawn = int(model.dropout.rngs.count[...])
    lar = lars["attention.query.kernel"].lar
    return {"losses": losses, "lar": lar, "W": W, "X": x, "drawn": drawn}


if __name__ == "__main__":
    main()
