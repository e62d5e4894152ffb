"""A haiku model: params are a dict of dicts, and so the names are theirs."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import jlar

OPTIMIZER = optax.adam(3e-3)


def forward(x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
    """Haiku's own attention and a two-layer network."""
    start = hk.initializers.VarianceScaling()
    x = x + hk.MultiHeadAttention(2, 8, w_init=start, name="attention")(x, x, x)
    return x + hk.nets.MLP([64, 16], name="mlp")(x)


MODEL = hk.without_apply_rng(hk.transform(forward))


def error(params: hk.Params, x: Float[Array, "b t n"]) -> Float[Array, ""]:
    """The model is to say what came before."""
    return jnp.mean((MODEL.apply(params, x) - jnp.roll(x, 1, axis=1)) ** 2)


@jax.jit
def step(params: hk.Params, state: optax.OptState, x: Float[Array, "b t n"]) -> Any:
    """One step: params, optimizer state, loss, and the energies of every matrix."""
    loss = jlar.capture(error)
    (value, lars), grads = jax.value_and_grad(loss, has_aux=True)(params, x)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value, lars


def main(steps: int = 40) -> dict[str, Any]:
    """Train; losses, and the last LAR of the queries."""
    x = jax.random.normal(jax.random.key(0), (8, 6, 16))
    params = jax.jit(MODEL.init)(jax.random.key(1), x)
    state, losses, lars, before = OPTIMIZER.init(params), [], {}, params
    for _ in range(steps):
        before = params
        params, state, value, lars = step(params, state, x)
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print("\n".join(f"{path:20} {e.lar:.3f}" for path, e in lars.items()))
    W = before["attention/query"]["w"].T
    return {"losses": losses, "lar": lars["attention/query.w"].lar, "W": W, "X": x}


if __name__ == "__main__":
    main()
