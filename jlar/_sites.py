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

    def cells(self) -> tuple[str, ...]:
        """The row as text; a reason takes the place of all that a product has."""
        shape, tokens, rows = (
            " x ".join(map(str, a)) for a in (self.shape, self.tokens, self.rows)
        )
        if self.why:
            return self.path, shape, f"- {self.why}"
        sizes = str(self.m), str(self.n), tokens or "1", rows
        return self.path, shape, self.name, *sizes, ", ".join(self.through)


class Sites(tuple[Row, ...]):
    """Rows that print as a table."""

    @classmethod
    def of(cls, program: Program) -> "Sites":
        """The sites of this program, leaf by leaf."""
        names, rows = program.names(), []
        for i, (path, leaf) in enumerate(zip(program.paths, program.leaves, strict=True)):
            here = [site for site in program.plan.sites if site.key.leaf == i]
            for key, tokens, through in here:
                # Names are those outside of any shard_map around this call; a site lists control
                # flow innermost first, a row outermost first.
                name = names[key.without(program.manual)]
                measured = name, key.m, key.n, tokens, key.stack, through[::-1]
                rows.append(Row(path, leaf.shape, *measured))
            why = dict.fromkeys(note for number, note in program.plan.notes if number == i)
            if why or not here:
                rows.append(Row(path, leaf.shape, why="; ".join(why) or _no_product(program, i)))
        return cls(dict.fromkeys(rows))

    def __str__(self) -> str:
        head = ("array", "shape", "measured as", "m", "n", "tokens", "rows", "through")
        lines = [head, *(row.cells() for row in sorted(self, key=lambda row: bool(row.why)))]
        # A reason, third in its row, may run over the columns that it leaves empty.
        full = [line for line in lines if len(line) > 3]
        widths = [max(len(line[i]) for line in (lines if i < 2 else full)) for i in range(8)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    __repr__ = __str__


def _no_product(program: Program, i: int) -> str:
    """Why a leaf of which the walk noted nothing has no product."""
    jaxpr = program.closed.jaxpr
    variable = jaxpr.invars[i]  # the leaves of the first argument are the first inputs
    if not is_weight(program.leaves[i]):
        return "a random key"
    if any(variable is atom for atom in jaxpr.outvars):
        return "returned as it is"
    used = any(variable is atom for eqn in jaxpr.eqns for atom in eqn.invars)
    return "never meets data" if used else "not used"


def sites(
    f: Callable[..., Any],
    *,
    has_aux: bool = False,
    where: Where = None,
    axes: mesh.Axes | None = None,
) -> Callable[..., Sites]:
    """A table of every array of the first argument: where `jlar.capture` measures it, or why not.

    Nothing is computed: the arguments may be `jax.ShapeDtypeStruct`s, as from `jax.eval_shape`.

    Args are those of `jlar.capture`; what `where` leaves out is listed as such, and `has_aux`
    changes nothing. In the table m are outputs, n inputs, tokens the token axes, rows the stacked
    matrices, and through is the control flow around the product.

    Returns:
        A function of the same arguments that returns `Sites`: a tuple of rows with path, shape,
        name, m, n, tokens, rows, through and why, that prints as a table, what is measured first.
        An array with several products has several rows.

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
        W          3 x 8 x 8  W            8   8  4 x 6   3     scan of 3
        embedding  50 x 8     embedding    50  8  4 x 6
        embedding  50 x 8     - looked up by data (an embedding)
        gain       8          - times data, entry by entry (a gain, a mask), is data
    """

    def call(weights: PyTree, /, *args: Any, **kwargs: Any) -> Sites:
        return Sites.of(Program(f, (weights, *args), kwargs, energies, where, mask=None, axes=axes))

    return call
