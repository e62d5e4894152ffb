"""Claim: the loss in token chunks takes <= 1/4 of the plain loss's memory and <= 1.15x its time.

    python benchmarks/fused_loss.py [--json PATH] [--repeats 10] [--tokens 4096]
        [--vocabulary 65536] [--width 512] [--chunk 0] [--bits 32]

Value and both gradients; memory is XLA's temporary bytes. --bits 16 is bfloat16, --chunk 0 the
library's choice. The plain loss returns no energies; the chunked one does. The claim, and the
assertion, are for 2^28 logits (1 GiB) or more of tokens >= 8 x width: below, what the chunked loss
holds, 64 MiB of logits or the float32 gradient of W twice, is not small beside the plain logits.
"""

import _bench as bench
import jax
import jax.numpy as jnp

from jlar.losses import cross_entropy


def plain(W: jax.Array, X: jax.Array, labels: jax.Array) -> tuple[jax.Array, None]:
    """The loss with all its logits."""
    logits = jnp.matmul(X, W.T, precision=jax.lax.Precision.HIGHEST).astype(jnp.float32)
    of_label = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - of_label), None


def main() -> None:
    """Run the benchmark."""
    args = bench.options(__doc__ or "", tokens=4096, vocabulary=65_536, width=512, chunk=0, bits=32)
    keys = jax.random.split(jax.random.key(0), 3)
    dtype = {16: jnp.bfloat16, 32: jnp.float32}[args.bits]
    W = jax.random.normal(keys[0], (args.vocabulary, args.width), dtype) * args.width**-0.5
    X = jax.random.normal(keys[1], (args.tokens, args.width), dtype)
    labels = jax.random.randint(keys[2], (args.tokens,), 0, args.vocabulary)
    sides = {
        "plain": plain,
        "fused": lambda W, X, labels: cross_entropy(W, X, labels, chunk=args.chunk or None),
    }
    programs, costs = {}, {}
    for name, loss in sides.items():
        step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        programs[name], costs[name] = bench.compiled(step, W, X, labels)
        # XLA counts the body of a scan once, so its FLOPs are not those of the chunked loss.
        del costs[name]["flops"]
    times = bench.alternate(
        {s: lambda s=s: programs[s](W, X, labels) for s in sides},
        args.repeats,
        warm_up=1,
        clock=args.clock,
    )
    (plain_loss, _), plain_gradients = programs["plain"](W, X, labels)
    (loss, energies), gradients = programs["fused"](W, X, labels)
    differences = [
        float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip((loss, *gradients), (plain_loss, *plain_gradients), strict=True)
    ]
    slowdown = bench.ratios(times, "fused", "plain")
    memory = costs["fused"]["temporary_bytes"] / costs["plain"]["temporary_bytes"]
    figures = {
        "shape": {"tokens": args.tokens, "vocabulary": args.vocabulary, "width": args.width},
        "dtype": jnp.dtype(dtype).name,
        "chunk": args.chunk or "default",
        "repeats": args.repeats,
        "clock": args.clock,
        "seconds": {name: bench.spread(times[name]) for name in sides},
        **{f"{s}_{name}": value for s in sides for name, value in costs[s].items()},
        "time_ratio_fused_over_plain": slowdown,
        "memory_ratio_fused_over_plain": memory,
        "relative_difference_of_loss_dW_dX": differences,
        "lar": float(energies.lar),
    }
    bench.report(figures, args.json)
    tolerance = {16: 2e-2, 32: 1e-5}[args.bits]
    assert max(differences) <= tolerance, "the two losses differ by more than rounding"
    if args.tokens * args.vocabulary >= 2**28 and args.tokens >= 8 * args.width:
        assert slowdown["median"] <= 1.15, "the chunked loss takes more than 1.15x the time"
        assert memory <= 1 / 4, "the chunked loss takes more than a quarter of the memory"


if __name__ == "__main__":
    main()
