"""One table of (W, X) pairs for every test: random, structured and degenerate."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray


class Pair(NamedTuple):
    W: Float[ndarray, "m n"]
    X: Float[ndarray, "t n"]


def _normal(seed: int, *shape: int) -> ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _basis(seed: int, n: int) -> ndarray:
    return np.linalg.qr(_normal(seed, n, n))[0]


def gaussian(m: int, n: int, t: int) -> Pair:
    return Pair(_normal(0, m, n), _normal(1, t, n))


def aligned(m: int, n: int, t: int, decay: float = 1.0) -> Pair:
    """Power-law spectra of W and X in one basis, as trained layers have them."""
    V, power = _basis(2, n), np.arange(1, n + 1.0) ** -decay
    return Pair(_normal(0, m, n) * power @ V.T, _normal(1, t, n) * power @ V.T)


def opposed(m: int, n: int, t: int) -> Pair:
    """X large where W is small: a LAR below one half."""
    V, power = _basis(2, n), np.arange(1, n + 1.0) ** -1.0
    return Pair(_normal(0, m, n) * power @ V.T, _normal(1, t, n) * power[::-1] @ V.T)


def low_rank(m: int, n: int, t: int, rank: int = 3) -> Pair:
    return Pair(_normal(0, m, rank) @ _normal(3, rank, n), _normal(1, t, n) + 0.5)


def subspace(k: int, m: int, n: int, t: int) -> Pair:
    """p uniform on k directions that hold all of q: the paper's model of a learned function."""
    V = _basis(2, n)[:, :k]
    return Pair(_basis(4, m)[:, :k] @ V.T, _normal(1, t, k) @ V.T)


CASES: dict[str, Callable[[], Pair]] = {
    "tall": lambda: gaussian(40, 12, 30),
    "wide": lambda: gaussian(7, 20, 30),
    "square": lambda: gaussian(16, 16, 16),
    "one row": lambda: gaussian(1, 9, 5),
    "one token": lambda: gaussian(6, 9, 1),
    "two inputs": lambda: gaussian(3, 2, 5),
    "aligned": lambda: aligned(50, 24, 80),
    "aligned wide": lambda: aligned(10, 24, 80),
    "opposed": lambda: opposed(50, 24, 80),
    "rank 3": lambda: low_rank(20, 16, 40),
    "rank 1": lambda: low_rank(20, 16, 40, rank=1),
    "subspace": lambda: subspace(5, 20, 16, 40),
    "small and large": lambda: Pair(_normal(0, 8, 8) * 1e-6, _normal(1, 8, 8) * 1e6),
}
