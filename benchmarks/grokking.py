"""Claim: `jlar grok` is 2.5x as fast as plain PyTorch (CPU), logs cost under 5%, 5 seeds 5 times 1.

    pip install torch   # for the other side only
    python benchmarks/grokking.py [--json PATH] [--repeats 10]

Both sides take the ten steps of one epoch of the default: x + y mod 97, 50%, batches of 512. The
PyTorch side is the model as one writes it down: all four positions through both blocks. One and
five seeds take twenty epochs, from log to log as `jlar grok` does; five may cost 5% more than five
times one, which is the noise of the measurement.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import _bench as bench
import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]  (not a dependency)

from jlar_experiments.grokking import train
from jlar_experiments.grokking.config import GrokConfig

CONFIG = GrokConfig()
LOGGED = 20  # epochs per log


class Block(torch.nn.Module):
    """Post-norm causal attention and ReLU MLP, without biases in the linear maps."""

    def __init__(self, n: int):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(n, 4, bias=False, batch_first=True)
        self.first, self.second = torch.nn.LayerNorm(n), torch.nn.LayerNorm(n)
        up, down = torch.nn.Linear(n, 4 * n, bias=False), torch.nn.Linear(4 * n, n, bias=False)
        self.mlp = torch.nn.Sequential(up, torch.nn.ReLU(), down)
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream after this block."""
        attended, _ = self.attention(x, x, x, attn_mask=self.mask, need_weights=False)
        x = self.first(x + attended)
        return self.second(x + self.mlp(x))


class Transformer(torch.nn.Module):
    """The same decoder as `jlar_experiments.grokking.model`."""

    def __init__(self, tokens: int, n: int):
        super().__init__()
        self.embedding, self.positions = torch.nn.Embedding(tokens, n), torch.nn.Embedding(4, n)
        self.blocks = torch.nn.Sequential(Block(n), Block(n))
        self.unembedding = torch.nn.Linear(n, tokens - 2, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits at the last position."""
        return self.unembedding(self.blocks(self.embedding(tokens) + self.positions.weight)[:, -1])


def pytorch_epoch() -> Callable[[], float]:
    """A function that trains one epoch."""
    model = Transformer(CONFIG.elements + 2, CONFIG.width)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.98), weight_decay=1.0)
    pairs = torch.from_numpy(CONFIG.operation.pairs(CONFIG.p))
    train = pairs[torch.randperm(len(pairs))[: CONFIG.train_pairs]]
    op, equals = (torch.full((len(train),), CONFIG.elements + i) for i in range(2))
    tokens, answers = torch.stack([train[:, 0], op, train[:, 1], equals], 1), train[:, 2]

    def epoch() -> float:
        loss = torch.zeros(())
        for rows in torch.randperm(len(train)).split(CONFIG.batch_size):
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(tokens[rows]), answers[rows])
            loss.backward()
            optimiser.step()
        return loss.item()

    return epoch


def jlar_epochs(config: GrokConfig) -> tuple[Callable[[int], Any], Callable[[], Any], Any]:
    """Functions that train some epochs and that log, and what the compiler says of the first."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("run",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("run"))
    state, data = jax.device_put((train.initial(config), train.data(config)), spread)
    last = np.ones(config.seeds, np.int32)
    program, costs = bench.compiled(
        lambda *inputs: train.advanced(config.program, mesh, *inputs), state, data, last
    )
    states = [state]

    def epochs(number: int) -> Any:
        states[0] = program(states[0], data, np.asarray(states[0].epoch) + number)
        return states[0]

    return epochs, lambda: jax.device_get(train.evaluated(mesh, states[0], data)), costs


def main() -> None:
    """Run the benchmark."""
    args = bench.options(__doc__ or "")
    one, log, costs = jlar_epochs(CONFIG)
    five, _, _ = jlar_epochs(dataclasses.replace(CONFIG, seeds=5))
    sides = {"jlar": lambda: one(1), "pytorch": pytorch_epoch(), "log": log}
    times = bench.alternate(sides, args.repeats)
    seeds = {"one": lambda: one(LOGGED), "five": lambda: five(LOGGED)}
    times |= bench.alternate(seeds, args.repeats, warm_up=1)
    speed = bench.ratios(times, "pytorch", "jlar")
    logging = bench.ratios(times, "log", "jlar")["median"] / LOGGED
    ensemble = bench.ratios(times, "five", "one")
    figures = {
        "torch": torch.__version__,
        "repeats": args.repeats,
        "seconds": {name: bench.spread(values) for name, values in times.items()},
        "steps_per_second_over_pytorch": speed,
        "log_share_of_training": logging,
        "five_seeds_over_one": ensemble,
        **costs,
    }
    bench.report(figures, args.json)
    assert speed["median"] >= 2.5, "not 2.5x as fast as PyTorch"
    assert ensemble["median"] <= 5 * 1.05, "five seeds cost more than five times one"
    assert logging < 0.05, "a log costs 5% of the training between two logs or more"


if __name__ == "__main__":
    main()
