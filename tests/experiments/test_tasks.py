"""The tables of the twelve tasks, against their definitions written once more in plain Python."""

import itertools

import numpy as np
import pytest

from jlar_experiments.grokking.tasks import TASKS, task

P = 7


def quotient(x, y):
    return next(z for z in range(P) if (z * y - x) % P == 0)


MODULAR = {
    1: lambda x, y: x + y,
    2: lambda x, y: x - y,
    3: quotient,
    4: lambda x, y: quotient(x, y) if y % 2 else x - y,
    5: lambda x, y: x * x + y * y,
    6: lambda x, y: x * x + x * y + y * y,
    7: lambda x, y: x * x + x * y + y * y + x,
    8: lambda x, y: x**3 + x * y,
    9: lambda x, y: x**3 + x * y * y + y,
}


@pytest.mark.parametrize("number", MODULAR)
def test_modular_tasks(number):
    expected = [
        (x, y, MODULAR[number](x, y) % P)
        for x, y in itertools.product(range(P), repeat=2)
        if number != 3 or y
    ]
    np.testing.assert_array_equal(task(str(number)).pairs(P), expected)


def after(s, t):
    """First t, then s."""
    return tuple(s[t[i]] for i in range(5))


@pytest.mark.parametrize("number", [10, 11, 12])
def test_permutations(number):
    group = list(itertools.permutations(range(5)))
    pairs = task(str(number)).pairs(97)
    assert len(pairs) == 120**2
    for x, y, z in np.random.default_rng(number).permutation(pairs)[:500]:
        s, t = group[x], group[y]
        inverse = next(u for u in group if after(s, u) == tuple(range(5)))
        last = {10: tuple(range(5)), 11: inverse, 12: s}[number]
        assert group[z] == after(after(s, t), last)


def test_names_and_numbers():
    assert [each.number for each in TASKS] == list(range(1, 13))
    for each in TASKS:
        assert task(each.name) is task(str(each.number)) is each
        assert not set(each.slug) & set("/|^: ")
    assert len({each.slug for each in TASKS}) == 12
    with pytest.raises(ValueError, match=r"'x\*y' is unknown.*12 S5:xyx"):
        task("x*y")
