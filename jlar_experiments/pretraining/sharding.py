"""Where arrays live: one mesh of two axes and one table, for FSDP and tensor parallelism.

Axis "data" holds parts of the batch and of every matrix, axis "tensor" the parts of one product.
"""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

BATCH = P("data", None)
HIDDEN = P("data", None, None)  # activations lie as the batch does
TABLE = {
    "embedding": P("tensor", "data"),
    "unembedding": P("tensor", "data"),
    # Inputs of a sub-block are whole, its inner width is split: one sum at its end.
    **dict.fromkeys(("q", "k", "v", "gate", "up"), P(None, "tensor", "data")),
    **dict.fromkeys(("o", "down"), P(None, "data", "tensor")),
}


def mesh(tensor: int, devices: list[Any] | None = None) -> Mesh:
    """All devices, `tensor` of them per matrix; or ValueError."""
    devices = jax.devices() if devices is None else devices
    if len(devices) % tensor:
        raise ValueError(f"tensor must divide the number of devices ({len(devices)}); got {tensor}")
    shape = (len(devices) // tensor, tensor)
    return jax.make_mesh(shape, ("data", "tensor"), (AxisType.Auto,) * 2, devices=devices)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The place of each array by its name in the table, whatever optimiser state it is in."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        spec = TABLE.get(str(getattr(path[-1], "name", "")), P()) if path else P()
        return NamedSharding(mesh, spec if len(spec) <= leaf.ndim else P())

    return jax.tree_util.tree_map_with_path(place, tree)


def abstract(tree: PyTree, places: PyTree) -> PyTree:
    """Shapes and places without memory: what a program is compiled from and restored into."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, places
    )
