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
    """p and q of each matrix: a forward pass, two Gram matrices and an `eigh`, so not each step."""
    _, grams = jlar.capture(error, measure=jlar.grams)(params, *data)
    return {path: g.spectra() for path, g in grams.items()}


def main(steps: int = 41) -> dict[str, Any]:
    """Train on a sine; losses, and the last LAR and spectra of the first matrix."""
    model = 2 if jax.device_count() % 2 == 0 else 1
    shape, axes = (jax.device_count() // model, model), (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=axes)
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 3)
    x = place(jax.random.normal(keys[0], (16 * shape[0], 8)), "data")
    y = jnp.sin(x[:, :4])
    up, down = jax.random.normal(keys[1], (32, 8)), jax.random.normal(keys[2], (4, 32))
    params = {"up": place(up / 3, "model"), "down": place(down / 6, None, "model")}
    state, losses, lars, seen, before = OPTIMIZER.init(params), [], {}, {}, params
    for i in range(steps):
        before = params
        if i % 20 == 0:
            seen = spectra(params, x, y)
            for path, s in seen.items():
                print(f"step {i}: {path:4} p1 {s.p[0]:.2f}, q1 {s.q[0]:.2f}, LAR {s.lar:.3f}")
        params, state, value, lars = step(params, state, x, y)
        losses.append(float(value))
    result = {"losses": losses, "lar": lars["up"].lar, "W": before["up"], "X": x}
    return {**result, "p": seen["up"].p, "q": seen["up"].q}


if __name__ == "__main__":
    main()
