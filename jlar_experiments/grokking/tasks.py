"""The twelve binary operations of the paper (section 4) as tables of all their pairs.

Tasks 1 to 9 act on the integers modulo p. Tasks 10 to 12 act on S5: element i is the i-th of the
120 permutations of (0, ..., 4) in lexicographic order, and a product is a composition from right to
left, (x.y)(i) = x(y(i)).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

S5_ORDER = 120

Elements = Int[np.ndarray, " pairs"]
Pairs = Int[np.ndarray, "pairs 3"]


@dataclass(frozen=True)
class Task:
    """One operation: its number and name in the paper, and what it needs of its operands."""

    number: int
    name: str
    answer: Callable[[Elements, Elements, int], Elements]
    divides: bool = False  # needs inverses, so p must be prime
    nonzero_y: bool = False  # pairs with y = 0 are left out
    permutations: bool = False  # acts on S5 instead of the integers modulo p

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        name = self.name.replace("/", "-over-").replace("|", "-or-")
        return name.replace("^-1", "-inverse").replace("^", "").replace("S5:", "s5-")

    @property
    def kind(self) -> tuple[bool, bool]:
        """Equal for tasks whose tables have the same shape."""
        return self.permutations, self.nonzero_y

    def elements(self, p: int) -> int:
        """How many operands there are: p, or 120 for S5."""
        return S5_ORDER if self.permutations else p

    def pairs(self, p: int) -> Pairs:
        """All rows (x, y, answer), x slowest."""
        count = self.elements(p)
        x, y = (a.ravel() for a in np.meshgrid(np.arange(count), np.arange(count), indexing="ij"))
        if self.nonzero_y:
            x, y = x[y != 0], y[y != 0]
        return np.stack([x, y, self.answer(x, y, p)], axis=1)


def _quotient(x: Elements, y: Elements, p: int) -> Elements:
    inverses = np.array([pow(int(a), -1, p) if a else 0 for a in range(p)])
    return x * inverses[y] % p


def permutations() -> Int[np.ndarray, "120 5"]:
    """All elements of S5, element i the i-th in lexicographic order."""
    return np.array(list(itertools.permutations(range(5))))


def _rank(images: Int[np.ndarray, "pairs 5"]) -> Elements:
    """The lexicographic index of each permutation; as base-5 numbers they sort the same way."""
    base = 5 ** np.arange(4, -1, -1)
    return np.searchsorted(permutations() @ base, images @ base)


def composed(*factors: Int[np.ndarray, "pairs 5"]) -> Elements:
    """The product of permutations, applied from right to left."""
    product = factors[-1]
    for factor in factors[-2::-1]:
        product = np.take_along_axis(factor, product, axis=1)
    return _rank(product)


def _s5(x: Elements, y: Elements, form: str) -> Elements:
    s, t = permutations()[x], permutations()[y]
    factors = {"xy": (s, t), "xyx^-1": (s, t, np.argsort(s, axis=1)), "xyx": (s, t, s)}
    return composed(*factors[form])


TASKS = (
    Task(1, "x+y", lambda x, y, p: (x + y) % p),
    Task(2, "x-y", lambda x, y, p: (x - y) % p),
    Task(3, "x/y", _quotient, divides=True, nonzero_y=True),
    Task(
        4,
        "x/y|x-y",  # x/y where y is odd, x-y where it is even
        lambda x, y, p: np.where(y % 2 == 1, _quotient(x, y, p), (x - y) % p),
        divides=True,
    ),
    Task(5, "x^2+y^2", lambda x, y, p: (x**2 + y**2) % p),
    Task(6, "x^2+xy+y^2", lambda x, y, p: (x**2 + x * y + y**2) % p),
    Task(7, "x^2+xy+y^2+x", lambda x, y, p: (x**2 + x * y + y**2 + x) % p),
    Task(8, "x^3+xy", lambda x, y, p: (x**3 + x * y) % p),
    Task(9, "x^3+xy^2+y", lambda x, y, p: (x**3 + x * y**2 + y) % p),
    Task(10, "S5:xy", lambda x, y, p: _s5(x, y, "xy"), permutations=True),
    Task(11, "S5:xyx^-1", lambda x, y, p: _s5(x, y, "xyx^-1"), permutations=True),
    Task(12, "S5:xyx", lambda x, y, p: _s5(x, y, "xyx"), permutations=True),
)


def task(name: str) -> Task:
    """The task with this name, or this number in the paper.

    >>> task("x/y").number, task("12").name
    (3, 'S5:xyx')
    """
    for candidate in TASKS:
        if name in (candidate.name, str(candidate.number)):
            return candidate
    known = ", ".join(f"{each.number} {each.name}" for each in TASKS)
    raise ValueError(f"task {name!r} is unknown; write the number or the name of one of: {known}")
