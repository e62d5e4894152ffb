"""p and q of every matrix every so many steps, with weights and batch split over all devices."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

import jlar

OPTIMIZER = optax.adam(1e-2)
Params = dict[str, Array]


def error(params: Params, x: Float[Array, "t n"], y: Float[Array, "t m"]) -> Float[Array, ""]:
    """A two-layer network."""
    return jnp.mean((jax.nn.gelu(x @ params["up"].T) @ params["down"].T - y) ** 2)


@jax.jit
def step(params: Params, state: optax.OptState, *data: Array) -> Any:
    """One step, with LAR: sums of squares, of which devices exchange a few scalars."""
    (value, lars), grads = jax.value_and_grad(jlar.capture(error), has_aux=True)(params, *data)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value, lars


@jax.jit
def spectra(params: Params, *data: Array) -> dict[str, jlar.Spectra]:
    """p and q of each matrix, by a forward pass, two Gram matrices and an `eigh` of n x n."""
    _, grams = jlar.capture(error, measure=jlar.grams)(params, *data)
    return {path: g.spectra() for path, g in grams.items()}


def main(steps: int = 41) -> dict[str, Any]:
    """Train on a sine; losses, and the last spectra of the first matrix."""
    n = jax.device_count()
    shape = (n // 2, 2) if n % 2 == 0 else (n, 1)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 3)
    x = place(jax.random.normal(keys[0], (16 * n, 8)), "data")
    y = jnp.sin(x[:, :4])
    up, down = jax.random.normal(keys[1], (32, 8)), jax.random.normal(keys[2], (4, 32))
    params = {"up": place(up / 3, "model"), "down": place(down / 6, None, "model")}
    state, losses, seen, before = OPTIMIZER.init(params), [], {}, params
    for i in range(steps):
        if i % 20 == 0:
            seen, before = spectra(params, x, y), params
            for path, s in seen.items():
                print(f"step {i}: {path:4} p1 {s.p[0]:.2f}, q1 {s.q[0]:.2f}, LAR {s.lar:.3f}")
        params, state, value, _ = step(params, state, x, y)
        losses.append(float(value))
    return {"losses": losses, "lar": seen["up"].lar, "W": before["up"], "X": x, "seen": seen["up"]}


if __name__ == "__main__":
    main()
