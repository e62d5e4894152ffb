"""Twelve recipes of small language models, to judge the monitor on what it was not made with.

    python -m jlar_experiments.monitoring.suite FOLDER [--recipes PATTERN] [--tokens FOLDER]

Each recipe is trained on text seen once (the healthy runs), on `sequences` sequences again and
again, and on four times as many; three seeds each, under one vmap. A log has the step, LAR of
the unembedding, training loss, validation loss, and the sums of squares of X and W. What is done is
kept in FOLDER, one file for each recipe and size of data: a killed suite goes on with the same
command. Recipes marked "fit" choose thresholds, those marked "judge" are judged.
"""

import argparse
import fnmatch
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import jlar

from .. import records
from ..pretraining import corpus
from ..pretraining.optimisers import DIMENSIONS

SEEDS = 3
LENGTH = 64  # tokens of a sequence
HELD_OUT = 128  # sequences of the validation set
EVERY = 10  # steps between logs; a validation at every other one


@dataclass(frozen=True)
class Recipe:
    """How a small language model is trained."""

    half: Literal["fit", "judge"]
    sequences: int
    width: int = 64
    layers: int = 2
    norm: Literal["pre", "post", "both", "none"] = "pre"
    final_norm: bool = True
    tied: bool = False
    optimiser: Literal["adam", "adamw", "muon", "sgd"] = "adamw"
    lr: float = 2e-3
    decay: float = 0.1
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    vocabulary: int = 256  # 256: bytes, else a BPE
    batch: int = 8
    steps: int = 1200
    dropout: float = 0.0  # of what attention and MLP add
    noise: float = 0.0  # share of the training text's tokens that are random ones


RECIPES = {
    "pre-adamw": Recipe("fit", 256),
    "both-tied-adam-64": Recipe("judge", 64, norm="both", tied=True, optimiser="adam",
                                schedule="cosine"),
    "wide-sgd": Recipe("fit", 128, width=96, layers=1, optimiser="sgd", lr=0.3, steps=2000),
    "post-bpe512": Recipe("judge", 512, width=128, norm="post", lr=1e-3, schedule="cosine",
                          vocabulary=512),
    "deep-tied-muon": Recipe("fit", 256, width=48, layers=4, tied=True, optimiser="muon", lr=5e-3,
                             batch=16, steps=800),
    "no-norm-bpe512": Recipe("judge", 200, norm="none", optimiser="adam", vocabulary=512, batch=4,
                             lr=1e-3, steps=2000),
    "one-layer-bpe1024": Recipe("fit", 1024, width=128, layers=1, optimiser="adam",
                                schedule="cosine", vocabulary=1024, batch=16, steps=800),
    "no-final-norm": Recipe("judge", 400, width=96, layers=3, final_norm=False, lr=1e-3,
                            schedule="linear"),
    "post-tied-64": Recipe("fit", 64, norm="post", tied=True, schedule="linear"),
    "muon-bpe1024": Recipe("judge", 300, optimiser="muon", lr=4e-3, schedule="cosine",
                           vocabulary=1024),
    "narrow-decay-1": Recipe("fit", 800, width=32, decay=1.0, batch=32, steps=800),
    "tied-sgd-bpe512": Recipe("judge", 128, width=128, tied=True, optimiser="sgd", lr=0.2,
                              schedule="cosine", vocabulary=512, steps=2000),
}  # fmt: skip


def parameters(recipe: Recipe, key: Array) -> dict[str, Any]:
    """Weights inputs x outputs, normal with variance 1 / inputs."""
    n, keys = recipe.width, iter(jax.random.split(key, 6 * recipe.layers + 3))

    def draw(*shape: int, scale: float) -> Array:
        return jax.random.normal(next(keys), shape) * scale

    def block() -> dict[str, Array]:
        shapes = {name: (n, n) for name in "qkvo"} | {"up": (n, 4 * n), "down": (4 * n, n)}
        return {name: draw(*shape, scale=shape[0] ** -0.5) for name, shape in shapes.items()}

    made: dict[str, Any] = {
        "embedding": draw(recipe.vocabulary, n, scale=n**-0.5),
        "positions": draw(LENGTH, n, scale=n**-0.5),
        "blocks": [block() for _ in range(recipe.layers)],
    }
    return made if recipe.tied else made | {"head": draw(n, recipe.vocabulary, scale=n**-0.5)}


def loss(
    params: dict[str, Any], tokens: Int[Array, "b t"], recipe: Recipe, key: Array | None = None
) -> Float[Array, ""]:
    """Mean cross-entropy of the next token, with dropout if there is a key."""

    def norm(x: Array, where: str) -> Array:
        if recipe.norm not in (where, "both"):
            return x
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)

    def dropped(x: Array, place: int) -> Array:
        if key is None or not recipe.dropout:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(key, place), 1 - recipe.dropout, x.shape)
        return jnp.where(keep, x / (1 - recipe.dropout), 0)

    x = params["embedding"][tokens[:, :-1]] * recipe.width**0.5
    x = x + params["positions"][: x.shape[1]] * recipe.width**0.5
    for i, block in enumerate(params["blocks"]):
        h = norm(x, "pre")
        q, k, v = ((h @ block[name]).reshape(*h.shape[:2], 4, -1) for name in "qkv")
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(h.shape)
        x = norm(x + dropped(h @ block["o"], 2 * i), "post")
        h = jax.nn.gelu(norm(x, "pre") @ block["up"]) @ block["down"]
        x = norm(x + dropped(h, 2 * i + 1), "post")
    if recipe.final_norm:
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
    logits = x @ (params["embedding"].T if recipe.tied else params["head"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """Clipping at 1, then the rule of the recipe with its schedule after 50 steps of warm-up."""
    after = {
        "constant": optax.constant_schedule(recipe.lr),
        "cosine": optax.cosine_decay_schedule(recipe.lr, recipe.steps - 50),
        "linear": optax.linear_schedule(recipe.lr, 0.0, recipe.steps - 50),
    }[recipe.schedule]
    ramp = optax.linear_schedule(recipe.lr / 50, recipe.lr, 49)
    rate = optax.join_schedules([ramp, after], [50])
    adam = optax.adamw(rate, 0.9, 0.98, weight_decay=recipe.decay)
    rules = {
        "adam": optax.adam(rate, 0.9, 0.98),
        "adamw": adam,
        "sgd": optax.sgd(rate, momentum=0.9),
        "muon": optax.partition(
            {
                "muon": optax.contrib.muon(
                    rate,
                    weight_decay=recipe.decay,
                    muon_weight_dimension_numbers=lambda p: jax.tree.map(lambda _: DIMENSIONS, p),
                ),
                "adam": adam,
            },
            lambda params: {
                name: jax.tree.map(
                    lambda _, name=name: "muon" if name == "blocks" else "adam", each
                )
                for name, each in params.items()
            },
        ),
    }
    return optax.chain(optax.clip_by_global_norm(1.0), rules[recipe.optimiser])


def orders(recipe: Recipe, sequences: int) -> Int[np.ndarray, "seeds steps batch"]:
    """Which sequences each seed sees in each step: all of them once before any again."""
    rng, needed = np.random.default_rng(0), recipe.steps * recipe.batch
    epochs = -(-needed // sequences)
    each = [
        np.concatenate([rng.permutation(sequences) for _ in range(epochs)])[:needed]
        for _ in range(SEEDS)
    ]
    return np.stack(each).reshape(SEEDS, recipe.steps, recipe.batch)


def train(
    recipe: Recipe, text: Int[np.ndarray, "sequences t"], held_out: Int[np.ndarray, "s t"]
) -> list[dict[str, Any]]:
    """The logs of all seeds of a recipe on this text."""
    rule, name = optimiser(recipe), "embedding" if recipe.tied else "head"
    captured = jlar.capture(lambda p, t, key: loss(p, t, recipe, key), where=name)
    rng = np.random.default_rng(1)
    random = rng.integers(recipe.vocabulary, size=text.shape)
    noisy = np.where(rng.random(text.shape) < recipe.noise, random, text)
    seen_text, unseen = (jnp.asarray(a, jnp.int32) for a in (noisy, held_out))

    def step(state: Any, rows: Array) -> Any:
        params, inner, key = state
        key, now = jax.random.split(key)
        (value, seen), grads = jax.value_and_grad(captured, has_aux=True)(
            params, seen_text[rows], now
        )
        updates, inner = rule.update(grads, inner, params)
        e = seen[name]
        measured = {"lar": e.lar, "train_loss": value, "x": e.x / e.count, "w": e.w}
        return (optax.apply_updates(params, updates), inner, key), measured

    @jax.jit
    @jax.vmap
    def advance(state: Any, rows: Array) -> Any:
        state, measured = jax.lax.scan(step, state, rows)
        return state, jax.tree.map(lambda a: a[-1], measured)

    validation = jax.jit(jax.vmap(lambda state: loss(state[0], unseen, recipe)))
    keys = jax.random.split(jax.random.key(0), SEEDS)
    state = jax.jit(jax.vmap(lambda key: (p := parameters(recipe, key), rule.init(p), key)))(keys)
    order, logged = orders(recipe, len(text)), []
    # The first log is that of the first step, then one at every tenth.
    ends = [1, *range(EVERY, recipe.steps + 1, EVERY)]
    for start, end in zip([0, *ends], ends, strict=False):
        state, measured = advance(state, jnp.asarray(order[:, start:end]))
        if end % (2 * EVERY) == 0:
            measured["val_loss"] = validation(state)
        for seed in range(SEEDS):
            row = {key: records.number(value[seed]) for key, value in measured.items()}
            logged.append({"seed": seed, "step": end, **row})
    return logged


def sequences(folder: Path, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) sequences of the standard library's sources."""
    kind = "bytes" if vocabulary == 256 else "bpe"
    out = corpus.folder("stdlib", kind, vocabulary, folder)
    stored = corpus.prepare("stdlib", kind, vocabulary, out, print)
    parts = []
    for part in ("train", "validation"):
        tokens = np.memmap(out / corpus.FILES[part], np.dtype(stored.dtype), "r")
        whole = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
        # Neighbouring sequences are of one file: a part of the data is to be of many.
        parts.append(np.random.default_rng(0).permutation(whole))
    return parts[0], parts[1][:HELD_OUT]


def run(
    recipes: dict[str, Recipe], counts: dict[str, tuple[int, ...]], folder: Path, tokens: Path
) -> None:
    """Train what is not there yet, one recipe and number of sequences after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, recipe in recipes.items():
        text, held_out = sequences(tokens, recipe.vocabulary)
        for count in counts[name]:
            path = folder / f"{name}-{count}.jsonl.gz"
            if path.exists():
                continue
            began = time.perf_counter()
            rows = train(recipe, text[:count], held_out)
            records.write_packed(path, rows)
            last = rows[-1]
            print(
                f"{path.name}: LAR {last['lar']:.3f}, training {last['train_loss']:.2f}, "
                f"validation {last['val_loss']:.2f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )


def main() -> None:
    """Train all recipes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the logs")
    parser.add_argument("--recipes", default="*", help="pattern of the names (default: all)")
    parser.add_argument("--tokens", type=Path, default=Path("runs/data"), help="of token files")
    arguments = parser.parse_args()
    chosen = {n: r for n, r in RECIPES.items() if fnmatch.fnmatch(n, arguments.recipes)}
    counts = {n: (r.steps * r.batch, r.sequences, 4 * r.sequences) for n, r in chosen.items()}
    run(chosen, counts, arguments.folder, arguments.tokens)


if __name__ == "__main__":
    main()
