"""LAR in TensorBoard, Weights & Biases or any other tracker with `log(scalars, step=)`."""

import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from tensorboardX import SummaryWriter

import jlar

OPTIMIZER, EVERY = optax.adam(1e-2), 10


class TensorBoard:
    """Event files in a folder, for `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: str):
        self.writer = SummaryWriter(folder)

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Write each under its name; those that begin alike share a section."""
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)


@jlar.capture
def loss(params: Any, x: Float[Array, "t n"], y: Float[Array, "t m"]) -> Float[Array, ""]:
    """A two-layer network."""
    return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"] - y) ** 2)


@jax.jit
def step(params: Any, state: optax.OptState, *data: Array) -> Any:
    """One step, and its scalars by name: they stay on the device until they are logged."""
    (value, lars), grads = jax.value_and_grad(loss, has_aux=True)(params, *data)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state, {"loss": value, **jlar.metrics(lars)}


def main(steps: int = 41, tracker: Any = None) -> dict[str, Any]:
    """Train with a tracker such as wandb.init(mode="offline"); losses, LAR of the first matrix."""
    tracker = tracker or TensorBoard(tempfile.mkdtemp())
    x, up, down = (jax.random.normal(jax.random.key(i), (64, 64)) for i in range(3))
    x, params = x[:, :8], {"up": up[:8, :32] / 3, "down": down[:32, :4] / 6}
    state, losses, log, before = OPTIMIZER.init(params), [], {}, params
    for i in range(steps):
        before = params
        params, state, log = step(params, state, x, jnp.sin(x[:, :4]))
        losses.append(float(log["loss"]))
        if i % EVERY == 0:
            tracker.log({name: float(scalar) for name, scalar in log.items()}, step=i)
    print(f"logged every {EVERY} steps:", *log)
    return {"losses": losses, "lar": log["lar/up"], "W": before["up"].T, "X": x}


if __name__ == "__main__":
    main()
