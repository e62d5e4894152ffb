"""The settings of `jlar grok`: a frozen dataclass that refuses what cannot work."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from ..options import demand
from .tasks import TASKS, Task, task

Norm = Literal["post", "pre", "pre-no-final"]
Model = Literal["transformer", "mlp"]
LastBatch = Literal["keep", "drop"]
Activation = Literal["relu", "gelu"]
LARGEST_P = 1000  # a table of p^2 pairs is on the device


@dataclass(frozen=True)
class GrokConfig:
    """Everything that decides the numbers of `jlar grok`.

    The default is the paper's x + y mod 97 with one seed; one to two minutes on two cores.
    Expected: memorised near epoch 60 with LAR .61, grokked near 170 with .68, .71 at the end, k95
    near 15.
    """

    task: Annotated[str, "operation to learn, by the paper's name or number"] = "x+y"
    train_fraction: Annotated[float, "share of all pairs to train on (paper: .5; x+y: .05-.5)"] = (
        0.5
    )
    p: Annotated[int, "modulus of tasks 1 to 9 (paper: 97)"] = 97
    seeds: Annotated[int, "runs trained together, with consecutive seeds (paper: 5)"] = 1
    seed: Annotated[int, "first seed; split, initialisation and batches follow from it"] = 0
    epochs: Annotated[int, "epochs at most (paper: 50000)"] = 5000
    after_grok: Annotated[int, "epochs to go on after grokking (paper: 2000)"] = 80
    log_every: Annotated[int, "epochs between two logs (paper: 20)"] = 20
    lr: Annotated[float, "learning rate of AdamW, after 10 steps of warm-up (paper: .001)"] = 1e-3
    weight_decay: Annotated[float, "decoupled, on every parameter (paper: 1)"] = 1.0
    batch_size: Annotated[int, "pairs per step (paper: 512)"] = 512
    last_batch: Annotated[
        LastBatch,
        "the smaller last batch of an epoch: keep it, a step on the mean of its pairs (fits the "
        "paper's numbers), or drop it",
    ] = "keep"
    model: Annotated[
        Model,
        "transformer: the paper's; mlp: one-hot x and y into one hidden layer of ReLUs, of this "
        "width, without an embedding to squeeze them (generalises while LAR does not rise)",
    ] = "transformer"
    width: Annotated[int, "width n of the residual stream (paper: 128)"] = 128
    layers: Annotated[int, "transformer blocks (paper: 2)"] = 2
    heads: Annotated[int, "attention heads; must divide the width (paper: 4)"] = 4
    norm: Annotated[
        Norm,
        "post: LayerNorm after each residual sum (reproduces the paper, which does not say); pre: "
        "RMSNorm before each sub-block and at the end; pre-no-final: the same without the last",
    ] = "post"
    activation: Annotated[
        Activation, "of the feed-forward layers (the paper does not say; relu fits its x+y best)"
    ] = "relu"
    biases: Annotated[bool, "of attention and feed-forward layers, as PyTorch starts them"] = False
    embedding_scale: Annotated[
        float,
        "standard deviation of embeddings and positions at initialisation (1 reproduces the paper)",
    ] = 1.0
    tied: Annotated[bool, "the unembedding is the embedding"] = False
    decay_gains: Annotated[bool, "weight decay on the norms' gains and biases too"] = True
    shuffled_labels: Annotated[
        bool, "answers drawn anew for each seed, so that nothing can be learnt but by heart"
    ] = False
    spectra_every: Annotated[
        int, "epochs between two records of p and q, besides memorised, grokked and final"
    ] = 1000

    def __post_init__(self) -> None:
        """Refuse, in one line, what cannot be trained."""
        counts = "seeds epochs log_every batch_size width layers heads spectra_every"
        for name in counts.split():
            demand(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        demand(0 <= self.seed < 2**31, "seed must be from 0 to 2^31 - 1", self.seed)
        demand(self.after_grok >= 0, "after_grok must not be negative", self.after_grok)
        demand(0 < self.lr < float("inf"), "lr must be positive and finite", self.lr)
        decay, scale = self.weight_decay, self.embedding_scale
        demand(0 <= decay < float("inf"), "weight_decay must not be negative", decay)
        demand(0 < scale < float("inf"), "embedding_scale must be positive", scale)
        demand(self.norm in get_args(Norm), f"norm must be one of {get_args(Norm)}", self.norm)
        for name, kind in (("last_batch", LastBatch), ("activation", Activation)):
            value = getattr(self, name)
            demand(value in get_args(kind), f"{name} must be one of {get_args(kind)}", value)
        demand(
            self.log_every <= self.epochs,
            f"log_every must not exceed epochs ({self.epochs})",
            self.log_every,
        )
        demand(self.width >= 2, "width must be at least 2, the base of LAR's log", self.width)
        demand(
            self.width % self.heads == 0,
            f"heads must divide the width ({self.width})",
            self.heads,
        )
        self._check_model()
        self._check_task()

    def _check_model(self) -> None:
        demand(self.model in get_args(Model), f"model must be one of {get_args(Model)}", self.model)
        if self.model == "mlp":
            unused = "layers heads norm activation biases embedding_scale tied decay_gains"
            for name in unused.split():
                value = getattr(self, name)
                demand(value == getattr(GrokConfig, name), f"{name} is of no use to an mlp", value)

    def _check_task(self) -> None:
        chosen = task(self.task)
        object.__setattr__(self, "task", chosen.name)  # a number and its name are one setting
        if chosen.permutations:
            demand(
                self.p == GrokConfig.p,
                f"p is of no use to {chosen.name}, which has 120 elements",
                self.p,
            )
        else:
            demand(3 <= self.p <= LARGEST_P, f"p must be from 3 to {LARGEST_P}", self.p)
        if chosen.divides:
            prime = all(self.p % divisor for divisor in range(2, int(self.p**0.5) + 1))
            demand(prime, f"p must be prime, because {chosen.name} divides", self.p)
        fraction = self.train_fraction
        demand(0 < fraction < 1, "train_fraction must be between 0 and 1", fraction)
        trained = self.train_pairs
        demand(trained >= 2, "train_fraction leaves fewer than two pairs to train on", fraction)
        demand(trained < self.all_pairs, "train_fraction leaves nothing to validate on", fraction)

    @property
    def operation(self) -> Task:
        """The task itself."""
        return task(self.task)

    @property
    def elements(self) -> int:
        """The number of different operands."""
        return self.operation.elements(self.p)

    @property
    def all_pairs(self) -> int:
        """The number of rows in the task's table."""
        return self.elements * (self.elements - self.operation.nonzero_y)

    @property
    def train_pairs(self) -> int:
        """The number of pairs in the training set."""
        return round(self.train_fraction * self.all_pairs)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in the training set, one at least."""
        whole, rest = divmod(self.train_pairs, self.batch_size)
        return max(1, whole + (rest > 0 and self.last_batch == "keep"))

    @property
    def program(self) -> "GrokConfig":
        """What the compiled training depends on: runs for which it is equal can train together."""
        alike = (each for each in TASKS if each.kind == self.operation.kind)
        return dataclasses.replace(
            self,
            task=next(alike).name,
            seed=0,
            seeds=1,
            epochs=self.log_every,
            after_grok=0,
            spectra_every=1,
            shuffled_labels=False,
        )

    @property
    def all_seeds(self) -> range:
        """The seeds that train together."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def name(self) -> str:
        """A folder name that differs whenever a setting does."""
        parts = ["grok", self.operation.slug, f"{100 * self.train_fraction:g}"]
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if value != each.default and each.name not in ("task", "train_fraction"):
                parts.append(_part(each.name, value))
        return "-".join(parts)


def _part(name: str, value: object) -> str:
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    return value if isinstance(value, str) else f"{name}{value:g}"
