"""Claim: LAR costs <= 2% of a training step for the unembedding, <= 6% for every matrix (CPU).

    python benchmarks/overhead.py [--json PATH] [--repeats 10] [--profiles 3] [--layers 4]
        [--width 512] [--vocabulary 32000] [--batch 8] [--length 512] [--bf16 0] [--compile-only 1]

A decoder of scanned, rematerialised blocks with AdamW, three times: without LAR, with the energies
of the unembedding, and with those of every matrix, both by `jlar.capture`. Compared: FLOPs and
temporary memory as compiled, and time, the three sides in turn. Steps on a machine that others
share differ by more than 2%, so the claim is judged by kernels: the compiled steps have the same
ones but for those that LAR adds (which is checked of the products), and these are what the profiler
says they take, over all kernels of the plain step. Where kernels run side by side each takes
longer, so one core (`taskset -c 0`) is where this is exact.
"""

from typing import Any

import _bench as bench
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

import jlar


def linear(layer: eqx.nn.Linear, x: Float[Array, "b t n"]) -> Float[Array, "b t m"]:
    """A layer over batch and time, in the dtype of its input."""
    return jax.vmap(jax.vmap(layer))(x)


def rms_norm(x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
    """Root-mean-square normalisation without a gain."""
    return (
        x * jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True))
    ).astype(x.dtype)


class Block(eqx.Module):
    """Causal attention with heads of 64 and a GeLU MLP of four times the width."""

    q: eqx.nn.Linear
    k: eqx.nn.Linear
    v: eqx.nn.Linear
    o: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width: int, dtype: Any, key: PRNGKeyArray):
        shapes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
        layers = [
            eqx.nn.Linear(*shape, use_bias=False, dtype=dtype, key=k)
            for shape, k in zip(shapes, jax.random.split(key, 6), strict=True)
        ]
        self.q, self.k, self.v, self.o, self.up, self.down = layers

    def __call__(self, x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
        h = rms_norm(x)
        q, k, v = (linear(f, h).reshape(*x.shape[:2], -1, 64) for f in (self.q, self.k, self.v))
        a = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(self.o, a.reshape(x.shape))
        return x + linear(self.down, jax.nn.gelu(linear(self.up, rms_norm(x))))


class Decoder(eqx.Module):
    """Embedding, scanned blocks under remat, untied unembedding."""

    embedding: Float[Array, "v n"]
    blocks: Block
    head: eqx.nn.Linear

    def __init__(self, args: Any, key: PRNGKeyArray):
        dtype, keys = jnp.bfloat16 if args.bf16 else jnp.float32, jax.random.split(key, 3)
        self.embedding = jax.random.normal(keys[0], (args.vocabulary, args.width), dtype)
        make = eqx.filter_vmap(lambda key: Block(args.width, dtype, key))
        self.blocks = make(jax.random.split(keys[1], args.layers))
        self.head = eqx.nn.Linear(args.width, args.vocabulary, False, dtype=dtype, key=keys[2])

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t n"]:
        rows, static = eqx.partition(self.blocks, eqx.is_array)
        layer = jax.checkpoint(lambda x, row: eqx.combine(row, static)(x))
        x, _ = jax.lax.scan(lambda x, row: (layer(x, row), None), self.embedding[tokens], rows)
        return rms_norm(x)


def loss(model: Decoder, tokens: Int[Array, "b t+1"]) -> Float[Array, ""]:
    """Next-token cross-entropy."""
    logits = linear(model.head, model(tokens[:, :-1])).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def plain(model: Decoder, tokens: Int[Array, "b t+1"]) -> Any:
    """(loss, nothing), gradients."""
    return eqx.filter_value_and_grad(lambda m, t: (loss(m, t), {}), has_aux=True)(model, tokens)


def unembedding(model: Decoder, tokens: Int[Array, "b t+1"]) -> Any:
    """(loss, energies of the unembedding), gradients."""
    measured = jlar.capture(loss, where="head.weight")
    return eqx.filter_value_and_grad(measured, has_aux=True)(model, tokens)


def every_matrix(model: Decoder, tokens: Int[Array, "b t+1"]) -> Any:
    """(loss, energies of every matrix), gradients."""
    return eqx.filter_value_and_grad(jlar.capture(loss), has_aux=True)(model, tokens)


OPTIMISER = optax.adamw(1e-3)


def step(gradient: Any, static: Any, tokens: Int[Array, "b t+1"]) -> Any:
    """A training step from (arrays of the model, state of the optimiser)."""

    def call(arrays: Any, state: Any) -> Any:
        value, grads = gradient(eqx.combine(arrays, static), tokens)
        updates, state = OPTIMISER.update(eqx.filter(grads, eqx.is_array), state, arrays)
        lars = {name: each.lar for name, each in value[1].items()}
        return optax.apply_updates(arrays, updates), state, value[0], lars

    return call


def extra(kernels: dict[str, bench.Kernels], side: str) -> tuple[float, dict[str, float]]:
    """Seconds of the kernels that this side has and the plain one has not, or not as often.

    Beside all, over the plain side's, those of each kind that are a thousandth of them or more.
    """
    plain, other = kernels["plain"], kernels[side]
    step = sum(seconds for _, seconds in plain.values())
    more = {}
    for kind in plain | other:
        (before, seconds), (count, total) = plain.get(kind, (0, 0.0)), other.get(kind, (0, 0.0))
        if count != before:
            assert "dot_general" not in kind, (
                f"{side} multiplies {count} times, not {before}: {kind}"
            )
            more[kind] = (total - seconds) / step
    return sum(more.values()), {kind: share for kind, share in more.items() if share > 1e-3}


def main() -> None:
    """Run the benchmark."""
    defaults = dict(layers=4, width=512, vocabulary=32_000, batch=8, length=512)
    args = bench.options(__doc__ or "", **defaults, profiles=3, bf16=0, compile_only=0)
    sides = {"plain": plain, "unembedding": unembedding, "every_matrix": every_matrix}
    shape = args.batch, args.length + 1
    tokens = jax.random.randint(jax.random.key(1), shape, 0, args.vocabulary)
    programs, calls, costs = {}, {}, {}
    for name, gradient in sides.items():
        arrays, static = eqx.partition(Decoder(args, jax.random.key(0)), eqx.is_array)
        state = OPTIMISER.init(arrays)
        programs[name], costs[name] = bench.compiled(step(gradient, static, tokens), arrays, state)
        program = programs[name]
        calls[name] = lambda program=program, arrays=arrays, state=state: program(arrays, state)
    figures: dict[str, Any] = {"sizes": vars(args) | {"json": None}, "compiled": costs}
    claims, limits = {}, {}
    for name, (time, flops, memory) in {
        "unembedding": (0.02, 0.005, 0.01),
        "every_matrix": (0.06, 0.02, 0.02),
    }.items():
        for cost, limit in (("flops", flops), ("temporary_bytes", memory)):
            ratio = costs[name][cost] / costs["plain"][cost]
            claims[f"{name} {cost}"] = (ratio, 1 + limit)
        limits[name] = time
    if not args.compile_only:
        times = bench.alternate(calls, args.repeats, warm_up=1, clock=args.clock)
        for name, limit in limits.items():
            figures[f"time_{name}_over_plain"] = bench.ratios(times, name, "plain")
            claims[f"{name} time"] = figures[f"time_{name}_over_plain"]["median"], 1 + limit
        figures["seconds"] = {name: bench.spread(t) for name, t in times.items()}
        if jax.default_backend() == "cpu":
            profiles = [
                {name: bench.kernels(programs[name], calls[name]) for name in calls}
                for _ in range(args.profiles)
            ]
            for name, limit in limits.items():
                shares = [extra(profile, name) for profile in profiles]
                figures[f"kernels_{name}_over_plain"] = bench.spread([total for total, _ in shares])
                figures[f"kernels_{name}"] = shares[-1][1]
                claims[f"{name} time"] = figures[f"kernels_{name}_over_plain"]["median"], limit
    figures["ratio_and_limit"] = claims
    bench.report(figures, args.json)
    missed = [claim for claim, (ratio, limit) in claims.items() if ratio > limit]
    assert not missed, f"missed: {missed}"


if __name__ == "__main__":
    main()
