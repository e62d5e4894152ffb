"""The presets of `jlar pretrain` and `jlar paper pretraining`: one code path, four scales."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .config import PretrainConfig

Settings = Mapping[str, Any]
ADAM = MappingProxyType({"beta1": 0.95, "beta2": 0.999, "weight_decay": 0.0})  # the paper's


@dataclass(frozen=True)
class Preset:
    """A baseline, the smaller data sets to compare with it, and the optimisers."""

    run: PretrainConfig
    sizes: tuple[int, ...]
    optimisers: Mapping[str, Settings]
    seeds: int = 1  # of every run
    baseline_seeds: int = 2  # of the baseline: their difference is the noise floor

    def config(self, **overrides: Any) -> PretrainConfig:
        """One run: the preset's settings, those of its optimiser, then the overrides."""
        chosen = overrides.get("optimiser", next(iter(self.optimisers)))
        settings = {"optimiser": chosen, **self.optimisers.get(chosen, {}), **overrides}
        return dataclasses.replace(self.run, **settings)

    def name(self, config: PretrainConfig) -> str:
        """A folder name that differs whenever a setting but the steps does."""
        parts = {"optimiser": config.optimiser, "unique_tokens": config.unique_tokens}
        usual = self.config(**parts, seed=config.seed)
        different = [
            f"{each.name}{getattr(config, each.name)}".replace("/", "-")
            for each in dataclasses.fields(config)
            if each.name != "steps" and getattr(config, each.name) != getattr(usual, each.name)
        ]
        shown = f"{config.unique_tokens}tokens"
        return "-".join([config.optimiser, shown, f"seed{config.seed}", *different])

    def arms(
        self, *, sizes: tuple[int, ...] | None = None, seeds: int | None = None, **settings: Any
    ) -> Iterator[PretrainConfig]:
        """All runs, the baseline of each optimiser first; the settings are the same in all."""
        sizes, seeds = sizes or self.sizes, seeds or self.seeds
        for optimiser in self.optimisers:
            for size in sizes:
                count = max(seeds, self.baseline_seeds) if size == sizes[0] else seeds
                for seed in range(count):
                    yield self.config(
                        **{**settings, "optimiser": optimiser, "unique_tokens": size, "seed": seed}
                    )


class BytesTiny(Preset):
    """A decoder of 0.16M parameters on bytes of the standard library, AdamW.

    `jlar paper pretraining --preset bytes-tiny`: the baseline (1.02M tokens once) and 25,600 tokens
    forty times; 82 s for both on two idle cores, 95 with the report. Expected (n = 3 seeds): a
    generalisation gap of 4.5 nats at the end, LAR .16 below the baseline's .77, D(t) against the
    gap with r = .97.
    """

    def __init__(self) -> None:
        super().__init__(
            run=PretrainConfig(unroll=2),
            sizes=(8000 * 128, 200 * 128),
            optimisers={"adamw": {"lr": 2e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.98}},
            baseline_seeds=1,
        )


class Cpu(Preset):
    """A decoder of 1M parameters on BPE tokens of the standard library, Adam and Muon.

    `jlar paper pretraining --preset cpu`: five sizes of data by two optimisers and a second seed of
    both baselines, 1,200 steps each; about an hour on two idle cores. Expected (n = 1): 4 to 32
    epochs end with gaps of .7 to 8.6 nats and LAR .016 to .099 below the baseline's .62; the
    monitor rings before the lowest validation loss of all that have one.
    """

    def __init__(self) -> None:
        super().__init__(
            run=PretrainConfig(
                tokenizer="bpe",
                vocabulary=2048,
                width=128,
                hidden=512,
                unroll=2,
                batch=16,
                steps=1200,
                unique_tokens=2_457_600,
                validation_tokens=32_768,
                schedule="cosine",
                warm_up=48,
            ),
            sizes=(2_457_600, 614_400, 307_200, 153_600, 76_800),
            optimisers={
                "adam": {"lr": 2e-3, **ADAM},
                "muon": {**ADAM, "lr": 4e-3, "weight_decay": 0.1},
            },
        )


class Gpu(Preset):
    """A decoder of 138M parameters in bfloat16 on BPE tokens of all installed sources.

    `jlar paper pretraining --preset gpu`: three sizes of data with Adam, sized by arithmetic for
    about 25 minutes on one H200 at 45% of its bf16 peak. Not yet run: expect the shape of `cpu`;
    whether D stays above zero at matched training loss at this size is the open question.
    """

    def __init__(self) -> None:
        super().__init__(
            run=PretrainConfig(
                corpus="site-packages",
                tokenizer="bpe",
                vocabulary=16_384,
                length=1024,
                width=768,
                layers=12,
                heads=12,
                hidden=3072,
                dtype="bfloat16",
                loss="fused",
                batch=64,
                steps=3500,
                unique_tokens=49_152_000,
                validation_tokens=524_288,
                schedule="cosine",
                warm_up=140,
                validate_every=25,
                inspect_every=250,
                checkpoint_every=500,
            ),
            sizes=(49_152_000, 12_288_000, 3_072_000),
            optimisers={"adam": {"lr": 6e-4, **ADAM}},
            baseline_seeds=1,
        )


class Paper3B(Preset):
    """The paper's 3.2B parameters, ten runs of 2B tokens, for a pod.

    `jlar paper pretraining --preset 3b --corpus FOLDER --distributed` on every host; the folder
    holds a token file of a vocabulary up to 128,256. Expected are the paper's numbers: LAR from .5
    to .676 (Adam) and .688 (Muon), then down, and further down than the 100B-token baseline's
    where a run overfits. Not run here; the step compiles for a pod (see `train`).
    """

    def __init__(self) -> None:
        super().__init__(
            run=PretrainConfig(
                corpus="tokens",
                tokenizer="bpe",
                vocabulary=128_256,
                length=8192,
                width=4096,
                layers=8,
                heads=32,
                hidden=16_384,
                dtype="bfloat16",
                remat="full",
                loss="fused",
                tensor=8,
                batch=24,
                steps=10_000,
                unique_tokens=90_000_000_000,
                validation_tokens=2_600_000,
                schedule="cosine",
                warm_up=400,
                validate_every=10,
                inspect_every=1000,
                checkpoint_every=500,
            ),
            # The paper's 100B to 200M tokens without the 10% that are held out.
            sizes=(90_000_000_000, 1_440_000_000, 720_000_000, 360_000_000, 180_000_000),
            optimisers={
                "adam": {"lr": 2.44e-4, **ADAM},
                "muon": {**ADAM, "lr": 9.77e-4, "weight_decay": 0.1},
            },
            baseline_seeds=1,
        )


PRESETS: dict[str, Preset] = {
    "bytes-tiny": BytesTiny(),
    "cpu": Cpu(),
    "gpu": Gpu(),
    "3b": Paper3B(),
}
