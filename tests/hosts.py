"""One process of a sharded training run, as tests/test_hosts.py starts it.

    python hosts.py PROCESSES ID PORT STEPS

It writes one line per step: "step", its number, loss, LAR of the unembedding, and LAR of every
matrix. To stderr and at once, since Gloo talks on stdout and in pieces.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlar


def main(processes: int, number: int, port: int, steps: int) -> None:
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    if processes > 1:
        jax.distributed.initialize(
            f"localhost:{port}", processes, number, heartbeat_timeout_seconds=10
        )
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    data, rows, whole = (NamedSharding(mesh, P(*spec)) for spec in (("data",), ("model",), ()))
    rng = np.random.default_rng(0)

    def held(array, place):
        """Every process makes all of it and keeps its part."""
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

    model = eqx.nn.MLP(16, 32, 32, depth=1, key=jax.random.key(0))
    model = jax.tree.map(
        lambda a: held(np.asarray(a), rows if a.ndim == 2 else whole) if eqx.is_array(a) else a,
        model,
    )

    def loss_fn(model, x, labels):
        logits = jax.vmap(model)(x)
        W, hidden = model.layers[-1].weight, jax.nn.relu(jax.vmap(model.layers[0])(x))
        losses = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels, -1)[:, 0]
        return losses.mean(), jlar.energies(W, hidden)

    @eqx.filter_jit
    def step(model, x, labels):
        loss = jlar.capture(loss_fn, has_aux=True)
        (value, (e, lars)), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model, x, labels)
        model = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads))
        return model, (value, e.lar, *(each.lar for each in lars.values()))

    for number in range(steps):
        x = held(rng.normal(size=(64, 16)).astype(np.float32), data)
        labels = held(rng.integers(0, 32, (64, 1)), data)
        model, metrics = step(model, x, labels)
        line = " ".join(f"{float(each):.9g}" for each in (number, *metrics))
        sys.stderr.write(f"step {line}\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
