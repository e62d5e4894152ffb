"""An alarm that the training step carries: a run on few data against a baseline on many."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import jlar
from jlar.monitor import Baseline, Monitor

OPTIMIZER = optax.adam(1e-2)


@jlar.capture
def loss(params: Any, x: Float[Array, "t n"], labels: Int[Array, " t"]) -> Float[Array, ""]:
    """A classifier of two layers."""
    logits = jax.nn.relu(x @ params["up"]) @ params["head"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@jax.jit
def step(i: Any, params: Any, state: Any, monitor: Any, baseline: Any, *data: Array) -> Any:
    """One step, which also hands its LAR, its loss and the baseline to the monitor."""
    (value, lars), grads = jax.value_and_grad(loss, has_aux=True)(params, *data)
    monitor = monitor.update(i, lars["head"].lar, loss=value, baseline=baseline)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state, monitor, value, lars["head"].lar


def train(tokens: int, baseline: Any, steps: int) -> dict[str, Any]:
    """A run on the first so many of the tokens, a tenth of which have a wrong label."""
    x = jax.random.normal((keys := jax.random.split(jax.random.key(0), 4))[0], (16_384, 32))
    wrong = jax.random.uniform(keys[1], (16_384,)) < 0.1
    labels = jnp.where(wrong, 0, jnp.argmax(x[:, :8], axis=1))
    up, head = jax.random.normal(keys[2], (32, 64)) / 6, jax.random.normal(keys[3], (64, 8)) / 8
    before, at = (params := {"up": up, "head": head}), jnp.arange(64)
    state, monitor, log = OPTIMIZER.init(params), Monitor.init(), []
    for i in range(1, steps + 1):
        before, at = params, (at + 64) % tokens
        params, state, monitor, *seen = step(i, params, state, monitor, baseline, x[at], labels[at])
        log.append([float(each) for each in seen])
    (losses, lars), X = np.array(log).T, jax.nn.relu(x[at] @ before["up"])
    return {"losses": losses, "lars": lars, "monitor": monitor, "W": before["head"].T, "X": X}


def main(steps: int = 256) -> dict[str, Any]:
    """Train on many tokens and on few; the losses and the last LAR of the second run."""
    first = train(16_384, None, steps)
    log = (np.arange(1, steps + 1), first["lars"], first["losses"])
    run = train(256, Baseline.from_runs([log]), steps)
    print(f"LAR at the end {run['lars'][-1]:.3f}, of the baseline {first['lars'][-1]:.3f}")
    print("alarm:", run["monitor"].alarm, "first at step", run["monitor"].first_alarm_step)
    return {**run, "lar": run["lars"][-1], "baseline": first["monitor"]}


if __name__ == "__main__":
    main()
