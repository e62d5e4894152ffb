"""Which runs `jlar paper grokking` consists of: sets of runs, and presets that choose some."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..options import demand
from .config import GrokConfig
from .tasks import TASKS, task

SMALL_P = 31
Preset = Literal["quick", "cpu", "full"]

SETS = {
    "A": "the twelve tasks with 50% of the pairs",
    "B": "x+y with 5, 10, 20 and 30%",
    "dating": "a smaller relative, p = 31: four tasks, three controls",
    "where": "the same on x+y: norms, embedding scales, tied, decay of gains",
    "mlp": "a one-hot MLP, without a bottleneck",
}


@dataclass(frozen=True)
class PaperConfig:
    """The settings of `jlar paper grokking`."""

    preset: Annotated[
        Preset,
        "quick: x+y, 50%, one seed; cpu: tasks 1, 2, 3, 9, 10 and x+y at 30%, shortened; full: the "
        "paper's 12 tasks and 4 fractions, 5 seeds, 50,000 epochs. Estimated from the time of one "
        "epoch on two quiet cores: 5 minutes, an hour, weeks (full is for a GPU)",
    ] = "cpu"
    set: Annotated[str | None, "only these sets, of " + ", ".join(SETS)] = None
    tasks: Annotated[str | None, "only these tasks of set A, names or numbers"] = None
    seeds: Annotated[int | None, "seeds of each run, instead of the preset's"] = None
    epochs: Annotated[int | None, "epochs at most, instead of the preset's"] = None
    after_grok: Annotated[int | None, "epochs to go on after grokking, instead of the preset's"] = (
        None
    )

    def __post_init__(self) -> None:
        """Refuse what is no set and no task."""
        for name in _listed(self.set):
            demand(name in SETS, f"set must be of {', '.join(SETS)}", name)
        for name in _listed(self.tasks):
            task(name)
        for name in ("seeds", "epochs"):
            value = getattr(self, name)
            demand(value is None or value >= 1, f"{name} must be at least 1", value)
        demand((self.after_grok or 0) >= 0, "after_grok must not be negative", self.after_grok)

    def runs(self) -> list[GrokConfig]:
        """The settings of every run, one seed each; the first seed of all of them comes first."""
        preset = ["A"] if self.tasks else _IN_PRESET[self.preset]
        chosen = _listed(self.set) or preset
        runs = [each for name in chosen for each in _RUNS[name](self)]
        return sorted(dict.fromkeys(runs), key=lambda config: config.seed)

    def each(self, config: GrokConfig, seeds: int) -> Iterator[GrokConfig]:
        """This run with every seed, and the lengths of the options."""
        lengths = {name: getattr(self, name) for name in ("epochs", "after_grok")}
        lengths = {name: value for name, value in lengths.items() if value is not None}
        for seed in range(config.seed, config.seed + (self.seeds or seeds)):
            log_every = min(config.log_every, lengths.get("epochs", config.log_every))
            yield dataclasses.replace(config, seed=seed, log_every=log_every, **lengths)


def _listed(names: str | None) -> list[str]:
    return names.replace(",", " ").split() if names else []


def _set_a(paper: PaperConfig) -> Iterator[GrokConfig]:
    full = paper.preset == "full"
    wanted = {task(name).name for name in _listed(paper.tasks)} or {
        "quick": {"x+y"},
        "cpu": {TASKS[number - 1].name for number in (1, 2, 3, 9, 10)},
        "full": {each.name for each in TASKS},
    }[paper.preset]
    for each in TASKS:
        if each.name in wanted:
            shortened = GrokConfig(
                task=each.name,
                after_grok=200 if each.permutations else 400,
                epochs=1000 if each.number in (6, 7, 8, 9) else 3000,
            )
            long = GrokConfig(task=each.name, epochs=50_000, after_grok=2000)
            yield from paper.each(long if full else shortened, _seeds(paper, each.name))


def _set_b(paper: PaperConfig) -> Iterator[GrokConfig]:
    for fraction in (0.3,) if paper.preset == "cpu" else (0.05, 0.1, 0.2, 0.3):
        shortened = GrokConfig(train_fraction=fraction, epochs=3000, after_grok=400)
        long = GrokConfig(train_fraction=fraction, epochs=50_000, after_grok=2000)
        yield from paper.each(long if paper.preset == "full" else shortened, _seeds(paper, "30%"))


def _seeds(paper: PaperConfig, what: str) -> int:
    if paper.preset == "full":
        return 5
    return {"x+y": 3, "30%": 2}.get(what, 1) if paper.preset == "cpu" else 1


def small(**settings: Any) -> GrokConfig:
    """A relative that groks in half a minute; seed 10, because earlier ones were tried out."""
    return GrokConfig(
        **{
            "p": SMALL_P,
            "train_fraction": 0.6,
            "width": 64,
            "layers": 1,
            "lr": 0.003,
            "batch_size": 1000,  # all of the pairs
            "log_every": 25,
            "spectra_every": 25,
            "epochs": 3000,
            "after_grok": 500,
            "seed": 10,
            **settings,
        }
    )


def _dating(paper: PaperConfig) -> Iterator[GrokConfig]:
    for name in ("x+y", "x/y", "x-y", "x^2+y^2"):
        yield from paper.each(small(task=name), 3)
    for control in ({"weight_decay": 0.0}, {"shuffled_labels": True}, {"train_fraction": 0.2}):
        yield from paper.each(small(**control), 3)


def _where(paper: PaperConfig) -> Iterator[GrokConfig]:
    norms, scales, either = ("post", "pre", "pre-no-final"), (1.0, 0.3, 0.125), (False, True)
    for norm, scale, tied, decay in itertools.product(norms, scales, either, either[::-1]):
        yield from paper.each(
            small(norm=norm, embedding_scale=scale, tied=tied, decay_gains=decay), 3
        )


def _mlp(paper: PaperConfig) -> Iterator[GrokConfig]:
    yield from paper.each(small(model="mlp", width=256, layers=GrokConfig.layers), 3)


_RUNS: dict[str, Callable[[PaperConfig], Iterator[GrokConfig]]] = {
    "A": _set_a,
    "B": _set_b,
    "dating": _dating,
    "where": _where,
    "mlp": _mlp,
}
_IN_PRESET = {"quick": ["A"], "cpu": ["A", "B"], "full": list(SETS)}


def folder_name(config: GrokConfig) -> str:
    """The same for runs that differ in their length alone, so that a longer one continues."""
    lengths = {name: getattr(GrokConfig, name) for name in ("epochs", "after_grok")}
    return dataclasses.replace(config, **lengths).name
