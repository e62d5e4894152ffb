"""The settings of one pre-training run: a frozen dataclass that refuses what cannot work."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from ..options import demand

Optimiser = Literal["adam", "adamw", "muon"]
Schedule = Literal["cosine", "constant"]
Remat = Literal["none", "dots", "full"]
Statistics = Literal["off", "unembedding", "every"]
CHOICES = {
    "tokenizer": Literal["bytes", "bpe"],
    "dtype": Literal["float32", "bfloat16"],
    "remat": Remat,
    "loss": Literal["plain", "fused"],
    "optimiser": Optimiser,
    "schedule": Schedule,
    "lar": Statistics,
}
POSITIVE = (
    "length unique_tokens validation_tokens width layers heads hidden tensor batch steps "
    "validate_every inspect_every checkpoint_every"
).split()

TOP = (1, 2, 3, 5, 10)  # the k of L_k and D_k


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides the numbers of one run of `jlar pretrain`."""

    corpus: Annotated[
        str,
        "stdlib (the sources of this Python's standard library), site-packages (those installed "
        "beside it), a folder or file of text, or a folder made by `jlar data`",
    ] = "stdlib"
    tokenizer: Annotated[
        Literal["bytes", "bpe"], "one token per byte, or a BPE trained on the corpus"
    ] = "bytes"
    vocabulary: Annotated[int, "tokens of the model; 256 for bytes"] = 256
    length: Annotated[int, "tokens per sequence (paper: 8192)"] = 128
    unique_tokens: Annotated[int, "training tokens that are seen again and again"] = 1_024_000
    validation_tokens: Annotated[int, "held-out tokens per validation (paper: 2.6M)"] = 16_384

    width: Annotated[int, "width n of the residual stream (paper: 4096)"] = 64
    layers: Annotated[int, "decoder blocks (paper: 8)"] = 2
    heads: Annotated[int, "attention heads; must divide the width (paper: 32)"] = 4
    hidden: Annotated[int, "hidden width of the gated-GeLU MLP (paper: 16384)"] = 256
    tied: Annotated[bool, "unembedding tied to the embedding (paper: appendix D.3)"] = False
    attention_cap: Annotated[float, "soft-cap of attention scores, 0 for none"] = 0.0
    final_cap: Annotated[float, "soft-cap of the logits, 0 for none (paper: none)"] = 0.0
    dtype: Annotated[Literal["float32", "bfloat16"], "of the computation; masters are float32"] = (
        "float32"
    )
    remat: Annotated[Remat, "what blocks recompute: nothing, all but products, everything"] = "none"
    loss: Annotated[
        Literal["plain", "fused"], "fused: jlar.losses.cross_entropy, without logits in memory"
    ] = "plain"
    unroll: Annotated[int, "layers per step of the scan over layers; changes no number"] = 1
    tensor: Annotated[int, "devices that share one matrix; the rest share the batch"] = 1

    optimiser: Annotated[Optimiser, "adam, adamw (the same with decay) or muon"] = "adamw"
    lr: Annotated[float, "peak learning rate (paper: 2.44e-4 Adam, 9.77e-4 Muon)"] = 2e-3
    weight_decay: Annotated[
        float, "decoupled, on matrices alone; must be 0 for adam (paper: .1 with Muon)"
    ] = 0.1
    beta1: Annotated[float, "of Adam (paper: .95); Muon's momentum is .95"] = 0.9
    beta2: Annotated[float, "of Adam (paper: .999)"] = 0.98
    clip: Annotated[float, "global norm that gradients are clipped to (paper: 1)"] = 1.0
    schedule: Annotated[Schedule, "of the learning rate after its warm-up (paper: cosine)"] = (
        "constant"
    )
    warm_up: Annotated[int, "steps of linear warm-up, 0 for none (paper: 400)"] = 50
    batch: Annotated[int, "sequences per step over all devices (paper: 24)"] = 8
    steps: Annotated[int, "training steps (paper: 10000)"] = 1000
    seed: Annotated[int, "of initialisation and order of the data, not of the subset"] = 0

    lar: Annotated[Statistics, "matrices measured in every step"] = "unembedding"
    validate_every: Annotated[int, "steps between validations (paper: 10)"] = 20
    inspect_every: Annotated[
        int, "steps between spectra and the LAR of every matrix (paper: 1000)"
    ] = 50
    checkpoint_every: Annotated[int, "steps between checkpoints; changes no number"] = 200

    def __post_init__(self) -> None:
        """Refuse, in one line, what cannot be trained."""
        for name, choices in CHOICES.items():
            demand(getattr(self, name) in get_args(choices), f"{name} must be one of "
                    f"{', '.join(get_args(choices))}", getattr(self, name))  # fmt: skip
        for name in POSITIVE:
            demand(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("attention_cap", "final_cap", "weight_decay"):
            value = getattr(self, name)
            demand(0 <= value < math.inf, f"{name} must be finite and not negative", value)
        for name in ("lr", "clip"):
            value = getattr(self, name)
            demand(0 < value < math.inf, f"{name} must be positive and finite", value)
        for name in ("beta1", "beta2"):
            demand(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1)", getattr(self, name))
        demand(0 <= self.seed < 2**31, "seed must be from 0 to 2^31 - 1", self.seed)
        demand(
            0 <= self.warm_up <= self.steps,
            f"warm_up must be from 0 to steps ({self.steps})",
            self.warm_up,
        )
        demand(
            self.layers % max(self.unroll, 1) == 0 and self.unroll >= 1,
            f"unroll must divide layers ({self.layers})",
            self.unroll,
        )
        self._check_sizes()

    def _check_sizes(self) -> None:
        demand(
            self.width % (2 * self.heads) == 0,
            f"heads must divide the width ({self.width}) into even parts, which RoPE rotates",
            self.heads,
        )
        demand(self.vocabulary >= 2, "vocabulary must be at least 2", self.vocabulary)
        if self.tokenizer == "bytes":
            demand(
                self.vocabulary >= 256, "vocabulary must be at least 256 for bytes", self.vocabulary
            )
        demand(
            self.unique_tokens >= self.length,
            f"unique_tokens must be one sequence ({self.length}) at least",
            self.unique_tokens,
        )
        demand(
            self.validation_tokens >= self.length,
            f"validation_tokens must be one sequence ({self.length}) at least",
            self.validation_tokens,
        )
        if self.optimiser == "adam":
            demand(
                self.weight_decay == 0,
                "weight_decay must be 0 for adam; optimiser adamw decays",
                self.weight_decay,
            )

    @property
    def sequences(self) -> int:
        """Different sequences in the training set."""
        return self.unique_tokens // self.length

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens per step."""
        return self.batch * self.length

    @property
    def epochs(self) -> float:
        """How often the run sees each training sequence."""
        return self.steps * self.batch / self.sequences

    @property
    def parameters(self) -> int:
        """Entries of all matrices."""
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        return embeddings + self.layers * self.width * (4 * self.width + 3 * self.hidden)

    @property
    def flops_per_token(self) -> float:
        """Of a training step without recomputation: 6 per used weight, and causal attention."""
        used = self.parameters - (0 if self.tied else self.vocabulary * self.width)
        return 6.0 * used + 6.0 * self.layers * self.width * self.length
