"""Does pushing LAR up make a network generalise sooner? The paper's open question, an experiment.

    python -m jlar_experiments.grokking.intervention FOLDER [--c C] [--steps N] [--decays D ...]

The small relative of the paper's set-up (x + y mod 31, 60% of the pairs, width 64, one block, full
batch), ten seeds under one vmap. From the step at which a seed has memorised (training accuracy
99%) its loss has c LAR of the unembedding added or subtracted, or as a control another quantity,
scaled at every step to the gradient norm of c LAR: the logarithm of the norm of W, the stable rank
of W, or a random direction in the space of all parameters. With weight decay 1 and 0. What is done
is kept in FOLDER, one file an arm. Criterion (log/grokking.md): the step of 95% validation
accuracy shifts by more than a quarter, in opposite directions for + and -, each with p < .01 by a
sign test against the same seeds without a term, and the controls do not.
"""

import argparse
import gzip
import json
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import jlar

from .. import records
from .figures import STYLE
from .model import Transformer
from .plan import SMALL_P, small

FIRST_SEED, SEEDS, EVERY = 20, 10, 25
TERMS = ("none", "lar+", "lar-", "norm+", "norm-", "rank+", "rank-", "random+", "random-")
DECAYS = (1.0, 0.0)
Logs = dict[tuple[str, float], list[dict[str, Any]]]  # of each arm: its term and weight decay
MEMORISED, GENERALISES = 0.99, 0.95


def tables(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(x, y, x + y) of the pairs to train on, and of the others."""
    x, y = np.divmod(np.arange(SMALL_P**2), SMALL_P)
    rows = np.stack([x, y, (x + y) % SMALL_P], axis=1).astype(np.int32)
    rows = np.random.default_rng(seed).permutation(rows)
    count = round(0.6 * len(rows))
    return rows[:count], rows[count:]


def quantity(term: str, model: Transformer, rows: Array) -> Float[Array, ""]:
    """What is added to the loss, before its scale."""
    W = model.unembedding
    if term == "lar":
        return jlar.lar(W, model.activations(rows[:, 0], rows[:, 1]))
    if term == "norm":
        return jnp.log(jnp.linalg.norm(W))
    # The derivative of the largest singular value is that of u W v with u and v held fast.
    u, _, v = jax.lax.stop_gradient(jnp.linalg.svd(W, full_matrices=False))
    return jnp.sum(jnp.square(W)) / jnp.square(u[:, 0] @ W @ v[0])


def advance(term: str, decay: float, c: float) -> Any:
    """A jitted function from (states, tables) of all seeds to those some steps later, and logs."""
    kind, sign = term.rstrip("+-"), -1.0 if term.endswith("-") else 1.0
    rate = optax.linear_schedule(3e-4, 3e-3, 9)
    rule = optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=decay)

    def loss(model: Transformer, rows: Array) -> tuple[Array, Array]:
        logits = model(rows[:, 0], rows[:, 1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 2])
        return jnp.mean(losses), jnp.mean(jnp.argmax(logits, -1) == rows[:, 2])

    def added(model: Transformer, rows: Array, direction: Any) -> Any:
        """The gradient of the term, as long as that of c LAR. To add LAR is to climb it."""
        of_lar = jax.grad(lambda m: quantity("lar", m, rows))(model)
        own = direction if kind == "random" else jax.grad(lambda m: quantity(kind, m, rows))(model)
        scale = c * optax.global_norm(of_lar) / jnp.maximum(optax.global_norm(own), 1e-30)
        return jax.tree.map(lambda g: -sign * scale * g, own)

    def step(state: Any, train: Array, direction: Any) -> Any:
        model, inner, memorised = state
        (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(model, train)
        memorised = memorised | (accuracy >= MEMORISED)
        if kind != "none":
            more = added(model, train, direction)
            grads = jax.tree.map(lambda g, m: g + jnp.where(memorised, m, 0), grads, more)
        updates, inner = rule.update(grads, inner, model)
        return (optax.apply_updates(model, updates), inner, memorised), (value, accuracy)

    def some(state: Any, train: Array, held_out: Array, direction: Any) -> Any:
        state, (value, accuracy) = jax.lax.scan(
            lambda s, _: step(s, train, direction), state, length=EVERY
        )
        model, _, memorised = state
        X = model.activations(train[:, 0], train[:, 1])
        logged = {
            "train_loss": value[-1],
            "train_acc": accuracy[-1],
            "val_acc": loss(model, held_out)[1],
            "lar": jlar.lar(model.unembedding, X),
            "memorised": memorised.astype(jnp.float32),
        }
        return state, logged

    return rule, jax.jit(jax.vmap(some))


def arm(term: str, decay: float, c: float, steps: int, first: int) -> list[dict[str, Any]]:
    """The logs of all seeds of one arm."""
    rule, run = advance(term, decay, c)
    seeds = range(first, first + SEEDS)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    train, held_out = (jnp.stack(each) for each in zip(*map(tables, seeds), strict=True))
    models = jax.vmap(lambda key: Transformer(small(), key))(keys)
    draw = jax.vmap(lambda key, a: jax.random.normal(jax.random.fold_in(key, a.size), a.shape))
    directions = jax.tree.map(lambda a: draw(keys, a), eqx.filter(models, eqx.is_array))
    state = (models, jax.vmap(rule.init)(models), jnp.zeros(SEEDS, bool))
    rows = []
    for end in range(EVERY, steps + 1, EVERY):
        state, logged = run(state, train, held_out, directions)
        for i, seed in enumerate(seeds):
            row = {name: records.number(value[i]) for name, value in logged.items()}
            rows.append({"seed": seed, "step": end, **row})
    return rows


def reaches(rows: list[dict[str, Any]], seed: int) -> float:
    """The step at which a seed has 95% validation accuracy; infinite if it never has."""
    steps = (r["step"] for r in rows if r["seed"] == seed and r["val_acc"] >= GENERALISES)
    return next(steps, math.inf)


def sign_test(ratios: list[float]) -> float:
    """Two-sided p of as many ratios on one side of 1; equal ones are left out."""
    up, down = sum(r > 1 for r in ratios), sum(r < 1 for r in ratios)
    n, least = up + down, min(up, down)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n) if n else 1.0


def read(folder: Path) -> Logs:
    """The arms of which there are records."""
    logs = {}
    for path in sorted(folder.glob("*.jsonl.gz")):
        term, _, decay = path.name.removesuffix(".jsonl.gz").partition("-decay")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            logs[term, float(decay)] = list(map(json.loads, file))
    return logs


def analysis(logs: Logs) -> dict[str, Any]:
    """By arm: the step of 95% over that of the same seed without a term, and LAR at the end."""
    table = {}
    for (term, decay), rows in logs.items():
        seeds = sorted({row["seed"] for row in rows})
        plain = logs.get(("none", decay), rows)
        ratios = [
            a / b if math.isfinite(b) else (1.0 if math.isinf(a) else 0.0)
            for a, b in ((reaches(rows, seed), reaches(plain, seed)) for seed in seeds)
        ]
        last = rows[-1]["step"]
        end = [row for row in rows if row["step"] == last]
        table[f"{term}, weight decay {decay:g}"] = {
            "n": len(seeds),
            "reach 95%": sum(math.isfinite(reaches(rows, seed)) for seed in seeds),
            "median step": float(np.median([reaches(rows, seed) for seed in seeds])),
            "median ratio": float(np.median(ratios)),
            "sign test p": sign_test(ratios),
            "LAR at the end": float(np.mean([row["lar"] for row in end])),
            "validation accuracy at the end": float(np.mean([row["val_acc"] for row in end])),
            "training accuracy at the end": float(np.mean([row["train_acc"] for row in end])),
        }
    return table


def figure(logs: Logs, decay: float) -> Figure:
    """Validation accuracy and LAR over the steps, means of the seeds, one panel for each kind."""
    kinds = {
        "lar": "LAR",
        "norm": "weight norm",
        "rank": "stable rank",
        "random": "random direction",
    }
    drawn = Figure(figsize=(9, 4.2), layout="constrained")
    axes = drawn.subplots(2, len(kinds), sharex=True, sharey="row")
    lines: dict[str, tuple[str, str, Any]] = {
        "+": ("pushed up", "#2c8a57", "-"),
        "-": ("pushed down", "#b03a3a", "--"),
    }
    for column, (kind, title) in enumerate(kinds.items()):
        for row, (name, label) in enumerate(
            {"val_acc": "validation accuracy", "lar": "LAR"}.items()
        ):
            panel = axes[row, column]
            for sign, (_, colour, dash) in {"": ("no term", "grey", ":"), **lines}.items():
                rows = logs.get((kind + sign if sign else "none", decay), [])
                steps = sorted({each["step"] for each in rows})
                means = [
                    np.mean([each[name] for each in rows if each["step"] == step]) for step in steps
                ]
                panel.plot(steps, means, color=colour, linestyle=dash, linewidth=1.5)
            panel.set(ylabel=label if column == 0 else "", xlabel="step" if row else "")
        axes[0, column].set_title(title)
    handles = [Line2D([], [], color="grey", linestyle=":", label="no term")]
    handles += [Line2D([], [], color=c, linestyle=d, label=text) for text, c, d in lines.values()]
    drawn.legend(handles=handles, loc="outside upper center", ncols=3)
    return drawn


def main() -> None:
    """Run the arms that are not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the logs")
    parser.add_argument("--c", type=float, default=1.0, help="what LAR is multiplied by")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--terms", nargs="+", default=TERMS, choices=TERMS, metavar="TERM")
    parser.add_argument("--decays", type=float, nargs="+", default=DECAYS, metavar="DECAY")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the arms of --decays")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    terms: list[str] = arguments.terms
    for term, decay in [(term, decay) for decay in arguments.decays for term in terms]:
        path = arguments.folder / f"{term}-decay{decay:g}.jsonl.gz"
        if not path.exists():
            rows = arm(term, decay, arguments.c, arguments.steps, arguments.first_seed)
            records.write_packed(path, rows)
            print(f"{path.name} done", flush=True)
    logs = read(arguments.folder)
    print(json.dumps(analysis(logs), indent=1))
    if arguments.figure:
        with matplotlib.rc_context(STYLE):
            figure(logs, arguments.decays[0]).savefig(arguments.figure)


if __name__ == "__main__":
    main()
