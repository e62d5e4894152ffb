"""sites: a table of what capture measures, and why it does not measure the rest."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import PyTree

from . import _mesh as mesh
from ._energies import energies
from ._program import Program, Where, is_weight


class Row(NamedTuple):
    """An array of the first argument, and one of its products or why there is none."""

    path: str  # The array
    shape: tuple[int, ...]  # Its shape
    name: str = ""  # What `jlar.capture` calls the statistics; empty if it measures nothing here
    m: int = 0  # Outputs
    n: int = 0  # Inputs, the base of the logarithm
    tokens: tuple[int, ...] = ()  # The token axes of one product
    rows: tuple[int, ...] = ()  # Stacked matrices: layers of a scan, experts
    through: tuple[str, ...] = ()  # The control flow around the product, outermost first
    why: str = ""  # Why nothing is measured


class Sites(tuple[Row, ...]):
    """Rows that print as a table."""

    @classmethod
    def of(cls, program: Program) -> "Sites":
        """The sites of this program, leaf by leaf."""
        names, rows = program.names(), []
        for i, (path, leaf) in enumerate(zip(program.paths, program.leaves, strict=True)):
            here = [site for site in program.plan.sites if site.key.leaf == i]
            rows += dict.fromkeys(
                Row(
                    path,
                    leaf.shape,
                    names[site.key.beyond(program.manual)],
                    site.key.m,
                    site.key.n,
                    site.tokens,
                    site.key.stack,
                    site.through[::-1],
                )
                for site in here
            )
            why = dict.fromkeys(note for number, note in program.plan.notes if number == i)
            if why or not here:
                rows.append(Row(path, leaf.shape, why="; ".join(why) or _unseen(program, i)))
        return cls(rows)

    def __str__(self) -> str:
        head = ("array", "shape", "measured as", "m", "n", "tokens", "rows", "through")
        lines: list[tuple[str, ...]] = [head]
        for row in self:
            if row.why:
                lines.append((row.path, _product(row.shape), f"- {row.why}"))
                continue
            name = "" if row.name == row.path else row.name
            sizes = str(row.m), str(row.n), _product(row.tokens) or "1", _product(row.rows)
            through = ", ".join(row.through)
            lines.append((row.path, _product(row.shape), name or "itself", *sizes, through))
        # A reason, third in its row, may run over the columns that it leaves empty.
        full = [line for line in lines if len(line) > 3]
        widths = [max(len(line[i]) for line in (lines if i < 2 else full)) for i in range(8)]
        padded = (
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=False)) for line in lines
        )
        return "\n".join(line.rstrip() for line in padded)

    __repr__ = __str__


def _product(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _unseen(program: Program, i: int) -> str:
    leaf = program.leaves[i]
    if not is_weight(leaf):
        return "a random key"
    variable = program.closed.jaxpr.invars[i]
    used = any(variable is atom for eqn in program.closed.jaxpr.eqns for atom in eqn.invars)
    if any(variable is atom for atom in program.closed.jaxpr.outvars):
        return "returned as it is"
    return "never meets data" if used else "not used"


def sites(
    f: Callable[..., Any], *, where: Where = None, axes: mesh.Axes | None = None
) -> Callable[..., Sites]:
    """A table of every array of the first argument: where `jlar.capture` measures it, or why not.

    Nothing is computed: the arguments may be `jax.ShapeDtypeStruct`s, as from `jax.eval_shape`.

    Args:
        f: as for `jlar.capture`.
        where: as for `jlar.capture`; what it leaves out is listed as such.
        axes: as for `jlar.capture`.

    Returns:
        A function of the same arguments that returns `Sites`: a tuple of rows with path, shape,
        name, m, n, tokens, rows, through and why, that prints as a table. An array with several
        products has several rows.

    Raises:
        ValueError: as `jlar.capture`, but not where there is nothing to measure.

    Example:
        >>> import jax, jax.numpy as jnp, jlar
        >>> def loss(params, tokens):
        ...     h, _ = jax.lax.scan(
        ...         lambda h, W: (jnp.tanh(h @ W), None), params["embedding"][tokens], params["W"]
        ...     )
        ...     return jnp.sum(params["gain"] * h @ params["embedding"].T)
        >>> shapes = {"embedding": (50, 8), "W": (3, 8, 8), "gain": (8,)}
        >>> params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
        >>> print(jlar.sites(loss)(params, jax.ShapeDtypeStruct((4, 6), jnp.int32)))
        array      shape      measured as  m   n  tokens  rows  through
        W          3 x 8 x 8  itself       8   8  4 x 6   3     scan of 3
        embedding  50 x 8     itself       50  8  4 x 6
        embedding  50 x 8     - looked up by data (an embedding)
        gain       8          - times data, entry by entry (a gain, a mask), is data
    """

    def call(weights: PyTree, /, *args: Any, **kwargs: Any) -> Sites:
        return Sites.of(Program(f, (weights, *args), kwargs, energies, where, None, axes))

    return call
