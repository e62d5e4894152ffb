"""What LAR is compared with: ranks of the weights and dimensions of the logits of one task.

The logits enter by their Gram Y^T Y alone, so every measure is over all pairs of the training set.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import jlar

from .tasks import Task, composed, permutations

HELD = 0.99


class Harmonics(NamedTuple):
    """An orthonormal basis of functions of the answer, each column of one irreducible component.

    Integers modulo p: the sine and cosine of each frequency. Where the task divides: the same on
    the logarithms of the nonzero answers. S5: the matrix entries of each representation. The
    constant function is left out, because a softmax does not see it.
    """

    basis: Float[Array, "elements r"]
    component: Int[Array, " r"]


class Comparators(NamedTuple):
    """Measures that need no validation data either."""

    stable_rank: Float[Array, "*members"]
    effective_rank: Float[Array, "*members"]
    weight_norm: Float[Array, "*members"]
    logits_pr: Float[Array, "*members"]
    logits_rank99: Float[Array, "*members"]
    fourier_k99: Float[Array, "*members"]


def comparators(
    model: object, spectra: jlar.Spectra, gram: Float[Array, "m m"], harmonics: Harmonics
) -> Comparators:
    """All of them, from the model, the spectra of its unembedding and the Gram of its logits."""
    squares = jnp.sort(jnp.maximum(jnp.linalg.eigvalsh(gram), 0), descending=True)
    basis, component = harmonics
    powers = jnp.sum(basis * (gram @ basis), axis=0)
    by_component = jnp.zeros(len(component), gram.dtype).at[component].add(powers)
    sizes = jnp.zeros(len(component), gram.dtype).at[component].add(1)
    order = jnp.argsort(by_component, descending=True)
    return Comparators(
        stable_rank=spectra.stable_rank,
        effective_rank=spectra.effective_rank,
        weight_norm=jnp.sqrt(sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(model))),
        logits_pr=jnp.square(jnp.sum(squares)) / jnp.sum(jnp.square(squares)),
        logits_rank99=_held(squares, jnp.ones_like(squares)),
        fourier_k99=_held(by_component[order], sizes[order]),
    )


def _held(powers: Float[Array, " r"], sizes: Float[Array, " r"]) -> Float[Array, ""]:
    """The sizes of the first entries that hold 99% of the power, summed."""
    before = jnp.cumsum(powers) - powers
    return jnp.sum(jnp.where(before < HELD * jnp.sum(powers), sizes, 0))


def harmonics(task: Task, p: int) -> Harmonics:
    """The components of functions of this task's answers."""
    if task.permutations:
        columns, component = _representations()
    elif task.divides and task.nonzero_y:
        columns, component = _multiplicative(p)
    else:
        columns, component = _frequencies(p)
    return Harmonics(jnp.asarray(columns, jnp.float32), jnp.asarray(component, jnp.int32))


def _frequencies(order: int) -> tuple[np.ndarray, np.ndarray]:
    """Sines and cosines on the integers modulo `order`, without the constant."""
    angles = 2 * np.pi * np.arange(order) / order
    columns, component = [], []
    for frequency in range(1, order // 2 + 1):
        for wave in (np.cos(frequency * angles), np.sin(frequency * angles)):
            if np.abs(wave).max() > 1e-6:  # the sine of half the order vanishes
                columns.append(wave / np.linalg.norm(wave))
                component.append(frequency - 1)
    return np.stack(columns, axis=1), np.array(component)


def _multiplicative(p: int) -> tuple[np.ndarray, np.ndarray]:
    """The same on the powers of a generator of the nonzero answers; zero is one more component."""
    candidates = ([pow(each, i, p) for i in range(p - 1)] for each in range(2, p + 1))
    powers = next(each for each in candidates if len(set(each)) == p - 1)
    waves, component = _frequencies(p - 1)
    zero = np.eye(p)[0] - 1 / p
    columns = np.zeros((p, p - 1))
    columns[powers, 1:] = waves
    columns[:, 0] = zero / np.linalg.norm(zero)
    return columns, np.array([0, *(component + 1)])


def _representations() -> tuple[np.ndarray, np.ndarray]:
    """The matrix entries of the six nontrivial representations of S5, squares of their degrees.

    They are the eigenspaces, on functions of the group, of the sum over its ten transpositions,
    which acts on each by another number: 10 times the character's value over the degree.
    """
    elements, everything = permutations(), np.arange(120)
    operator = np.zeros((120, 120))
    for number in np.flatnonzero(np.sum(elements != np.arange(5), axis=1) == 2):
        operator[composed(elements[np.full(120, number)], elements), everything] += 1
    values, vectors = np.linalg.eigh(operator)
    _, component = np.unique(values.round(6), return_inverse=True)
    return vectors[:, :-1], component[:-1]  # the last is the constant
