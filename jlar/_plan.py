"""What the walk over a jaxpr finds: sites, their keys, and the steps to run."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
from jaxtyping import PyTree

from ._devices import NOT_SPLIT, MeshSplit
from ._origin import Origin

Statistics = dict["Key", PyTree]


class Key(NamedTuple):
    """Products with equal keys are products of the same matrix, and pool."""

    leaf: int
    cut: str
    facing: str  # Which axes are the inputs: W and W.T are two matrices
    n: int
    m: int
    stack: tuple[int, ...]
    """First the lengths of loops around the product, then what it stacks itself."""
    loops: int = 0  # How many leading axes of `stack` come from loops
    split: MeshSplit = NOT_SPLIT
    """The mesh axes that split the product; one device's share is summed in the end."""
    varies: tuple[int, ...] = ()
    """The enclosing scans in which it is another matrix in each iteration."""

    def beyond(self, axes: Iterable[str]) -> "Key":
        """The key where these mesh axes have ended."""
        return self._replace(split=self.split.beyond(axes))


class Site(NamedTuple):
    """A product of a weight with data."""

    key: Key
    tokens: tuple[int, ...]
    through: tuple[str, ...] = ()  # The control flow around it, innermost first

    def inside(self, what: str, **changes: Any) -> "Site":
        """The same site seen from outside of one construct."""
        return self._replace(through=(*self.through, what), **changes)


class Step(NamedTuple):
    """What takes the place of an equation, or is run beside it."""

    run: Callable[..., tuple[Sequence[Any], Any]]
    """From the inputs to (the outputs, statistics by key); at a site just its statistics."""
    eqn: Any
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    key: Key | None = None  # Of a site
    same: Any = None  # Sites that have this in common, if it is not None, are traced once


class Plan(NamedTuple):
    """What there is to know of a jaxpr for given origins of its inputs."""

    walk: Any  # The Walk that made it
    jaxpr: jex.Jaxpr
    steps: list[Any]  # Its equations as they are, or what is run in their place
    origins: list[Origin]  # Of its results
    sites: list[Site]
    notes: list[tuple[int, str]]  # Why a leaf has no site here


class EqnPlan(NamedTuple):
    """What one equation adds to a plan."""

    origins: Sequence[Origin]  # Of its results
    sites: Sequence[Site] = ()
    notes: Sequence[tuple[int, str]] = ()
    step: Step | None = None
    """What is run in its place or, with `after`, beside it; None: the equation as it is."""
    after: Any = None  # The value that has to be there first
