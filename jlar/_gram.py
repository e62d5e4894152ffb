"""A^T A on meshes: what has to move moves in parts.

Nothing is gathered where the split is known, and little where only XLA knows it.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ._mesh import WHOLE, Split, names, size, total, vary_as


def gram(
    A: Float[Array, "*t c"],
    acc: jnp.dtype,
    split: Split,
    rows: tuple[str, ...] = (),
    columns: tuple[str, ...] = (),
    *,
    last_axis_first: bool = False,
) -> Float[Array, "n n"]:
    """A^T A over all leading axes in dtype `acc`, whole on every device; rows, columns split A.

    Where the columns are split, the devices exchange parts of A, at most n x n numbers at a time,
    until each holds whole rows. The same happens under jit with explicit axes. With automatic ones
    only XLA knows what splits A: its rows are spread over the mesh, and least moves where they were
    split over the mesh's axes in their order, or in reverse with `last_axis_first`.
    """
    mesh = jax.typeof(A).sharding.mesh
    if columns:
        of_device = _exchanged(A, acc, columns)
    elif mesh.explicit_axes and not mesh.manual_axes:
        return _explicit(A, acc, last_axis_first)
    else:
        of_device = _spread(A, acc, last_axis_first)
    return total(of_device, (*rows, *columns), split)


def _gram(A: Float[Array, "*t c"], acc: jnp.dtype) -> Float[Array, "c c"]:
    # One contraction over all token axes: merging them first would gather a sharded second one.
    leading = list(range(A.ndim - 1))
    highest = jax.lax.Precision.HIGHEST
    return jnp.tensordot(A, A, (leading, leading), precision=highest, preferred_element_type=acc)


def _explicit(
    A: Float[Array, "*t n"], acc: jnp.dtype, last_axis_first: bool
) -> Float[Array, "n n"]:
    """A^T A by the split that A's type tells."""
    sharding = jax.typeof(A).sharding
    *rows, columns = map(names, sharding.spec)
    rows = sum(rows, ())
    if not rows + columns:
        return _spread(A, acc, last_axis_first)
    local = partial(
        gram, acc=acc, split=Split(), rows=rows, columns=columns, last_axis_first=last_axis_first
    )
    axes = {*rows, *columns}
    return jax.shard_map(
        local, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=WHOLE, axis_names=axes
    )(A)


def _exchanged(
    A: Float[Array, "*t c"], acc: jnp.dtype, columns: tuple[str, ...]
) -> Float[Array, "n n"]:
    """The part of one device in A^T A: its columns of A, exchanged for a share of whole rows."""
    parts, c = size(columns), A.shape[-1]
    A = A.reshape(-1, c)
    n = c * parts
    # So many that no exchange carries more than n rows of n.
    blocks = max(1, -(-A.shape[0] // (parts * n)))
    per_block = parts * -(-A.shape[0] // (parts * blocks))
    A = jnp.pad(A, [(0, blocks * per_block - A.shape[0]), (0, 0)]).reshape(blocks, per_block, c)

    def of_block(block: Array) -> Array:
        whole = jax.lax.all_to_all(block, columns, split_axis=0, concat_axis=1, tiled=True)
        return _gram(whole, acc)

    return _sum(of_block, A, jnp.zeros((n, n), acc))


def _spread(A: Float[Array, "*t n"], acc: jnp.dtype, last_axis_first: bool) -> Float[Array, "n n"]:
    """A^T A, the rows of A spread over the automatic axes of its mesh, if it has one or two.

    Left alone, XLA gathers an A whose columns are split, and multiplies all of a replicated one on
    every device. With more axes, of the mesh or of tokens, it would gather in order to spread; and
    under vmap it may be the stack that is split.
    """
    mesh = jax.typeof(A).sharding.mesh
    axes = [axis for axis in mesh.auto_axes if mesh.shape[axis] > 1]
    shardy = getattr(jax.config, "jax_use_shardy_partitioner", True)
    if not 1 <= len(axes) <= 2 or not 2 <= A.ndim <= 3 or not shardy:
        return _gram(A, acc)
    spread = custom_vmap(lambda A: _over(axes[:: -1 if last_axis_first else 1], A, acc))
    spread.def_vmap(lambda _, __, As: (jax.vmap(partial(_gram, acc=acc))(As), True))
    return spread(A)


def _over(axes: list[str], A: Float[Array, "*t n"], acc: jnp.dtype) -> Float[Array, "n n"]:
    """A^T A, the rows of A split over these axes of its mesh."""
    mesh = jax.typeof(A).sharding.mesh
    first, *others, n = A.shape
    even, rest = [], []  # Mesh axes that divide the first axis of A, and those that do not.
    for axis in axes:
        parts = math.prod(mesh.shape[a] for a in (*even, axis))
        (rest if first % parts else even).append(axis)
    parts, pieces = (math.prod(mesh.shape[a] for a in over) for over in (even, rest))
    rows = [first // parts, *others]
    longest = rows.index(max(rows))  # The rest splits this axis.
    # No exchange carries more than n rows of n, unless the shorter axis alone is as long.
    per_block = max(1, n // max(1, math.prod(rows) // max(1, rows[longest])))
    blocks = max(1, -(-rows[longest] // (pieces * per_block)))
    per_block = -(-rows[longest] // (pieces * blocks))
    A, at = A.reshape(parts, *rows, n), 1 + longest
    pad = [(0, 0)] * A.ndim
    pad[at] = (0, pieces * per_block * blocks - rows[longest])
    A = jnp.pad(A, pad).reshape(*A.shape[:at], pieces, per_block, blocks, *A.shape[at + 1 :])
    over_devices = NamedSharding(mesh, PartitionSpec(tuple(even), tuple(rest)))

    def of_block(block: Array) -> Array:
        block = jax.lax.with_sharding_constraint(_forward(block), over_devices)
        return jax.vmap(jax.vmap(partial(_gram, acc=acc)))(block)

    A = jnp.moveaxis(A, (at + 2, 0, at), (0, 1, 2))
    return jnp.sum(_sum(of_block, A, jnp.zeros((parts, pieces, n, n), acc)), axis=(0, 1))


def _sum(f: Callable[[Array], Array], blocks: Array, zero: Array) -> Array:
    def add(so_far: Array, block: Array) -> tuple[Array, None]:
        return so_far + f(block), None

    return jax.lax.scan(add, vary_as(zero, blocks), blocks)[0]


def _forward(a: Array) -> Array:
    """`a`, with a sharding that does not depend on what is made of it.

    A sharding constraint on the result then shards nothing that `a` is made of: not the model.
    """
    return _forward_p.bind(a)


# Shardy has an operation for it, JAX no function.
_forward_p = Primitive("propagation_barrier")
_forward_p.def_impl(lambda a: a)
_forward_p.def_abstract_eval(lambda a: a)


@partial(mlir.register_lowering, _forward_p)
def _(_: mlir.LoweringRuleContext, a: ir.Value) -> list[ir.Value]:
    forward = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 1)  # from operand to result only
    return [sdy.PropagationBarrierOp(a, forward).result]
