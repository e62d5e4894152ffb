"""Claim: the `cpu` preset trains at least as many tokens per second as NanoDO's model of its size.

    python benchmarks/pretraining.py --nanodo FOLDER [--json PATH] [--repeats 10] [--steps 5]

FOLDER is a checkout of github.com/google-deepmind/nanodo; of it only `model.py` is run, with flax
(`pip install flax`), neither of which jlar needs. Its decoder has the preset's width, depth, heads,
context, vocabulary and batch, and as many weights in each MLP: two matrices of 3/2 the preset's
hidden width, where jlar's gated GeLU has three. It ties unembedding to embedding, learns positions
and has half the norms, so it multiplies the same matrices with fewer parameters. Both train with
Adam, norm clipping and jitted steps on the same random tokens; jlar's step measures LAR.
"""

import argparse
import pathlib
import sys
from typing import Any

import _bench as bench
import jax
import jax.numpy as jnp
import optax

from jlar_experiments.pretraining import sharding, train
from jlar_experiments.pretraining.presets import PRESETS


def nanodo(folder: pathlib.Path, config: Any) -> tuple[Any, Any]:
    """(step, state) of NanoDO's decoder; step(state, batch) -> (state, loss)."""
    sys.path.insert(0, str(folder))
    from nanodo import model as module  # pyright: ignore[reportMissingImports]  (a checkout)

    described = module.DoConfig(
        D=config.width,
        H=config.heads,
        L=config.length,
        N=config.layers,
        V=config.vocabulary,
        F=config.hidden * 3 // 2,
        fsdp_enabled=False,
    )
    decoder = module.TransformerDo(described)
    optimise = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adam(config.lr, b1=config.beta1, b2=config.beta2),
    )

    @jax.jit
    def initial(key: jax.Array) -> Any:
        parameters = decoder.init(key, jnp.zeros((1, config.length), jnp.int32))
        return parameters, optimise.init(parameters)

    def step(state: Any, batch: jax.Array) -> Any:
        parameters, optimiser_state = state

        def loss(parameters: Any) -> jax.Array:
            logits = decoder.apply(parameters, batch[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(parameters)
        updates, optimiser_state = optimise.update(gradient, optimiser_state, parameters)
        return (optax.apply_updates(parameters, updates), optimiser_state), value

    return jax.jit(step, donate_argnums=0), initial(jax.random.key(0))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nanodo", type=pathlib.Path, required=True, help="a checkout of it")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each side")
    parser.add_argument("--steps", type=int, default=5, help="training steps in a call")
    parser.add_argument("--clock", choices=bench.CLOCKS, default="wall", help="what is timed")
    args = parser.parse_args()
    config = PRESETS["cpu"].config()
    program = train.Program(config, sharding.mesh(config.tensor))
    batch = jax.random.randint(
        jax.random.key(1), program.abstract_batch.shape, 0, config.vocabulary, jnp.int32
    )
    sides = {"jlar": (program.step, program.initial()), "nanodo": nanodo(args.nanodo, config)}
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(parameters))
        for name, parameters in (
            ("jlar", sides["jlar"][1].model),
            ("nanodo", sides["nanodo"][1][0]),
        )
    }
    states = {name: state for name, (_, state) in sides.items()}

    def steps(name: str) -> Any:
        for _ in range(args.steps):
            states[name], _ = sides[name][0](states[name], batch)
        return states[name]

    times = bench.alternate(
        {name: lambda name=name: steps(name) for name in sides}, args.repeats, clock=args.clock
    )
    ratio = bench.ratios(times, "nanodo", "jlar")
    tokens = config.batch * config.length * args.steps
    bench.report(
        {
            "sizes": vars(args) | {"json": None, "nanodo": None},
            "parameters": sizes,
            "tokens_per_second": {
                name: bench.spread([tokens / t for t in each]) for name, each in times.items()
            },
            "tokens_per_second_jlar_over_nanodo": ratio,
        },
        args.json,
    )
    assert ratio["median"] >= 1, f"missed: {ratio}"


if __name__ == "__main__":
    main()
