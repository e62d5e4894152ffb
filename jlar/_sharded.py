"""sharded: a function of (W, X) for those who hold a mesh and PartitionSpecs."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike

from ._checks import matrices
from ._mesh import Split, names


def sharded(
    function: Callable[..., Any], *, mesh: Mesh, W_spec: P, X_spec: P
) -> Callable[..., Any]:
    """A function of (W, X) of this library, for arrays that are sharded like this; jitted.

    The result is that of the whole arrays, on every device. There are three ways to it:

    - Plain `jax.jit` on sharded arrays, the default: `jlar.energies` and `jlar.lar` move a few
      scalars, `jlar.grams` and `jlar.spectra` sums of n x n numbers. With explicit mesh axes that
      is so however W and X are split. With automatic axes XLA decides, and gathers W or X where
      their columns (the inputs n) are split: use one of the other ways there.
    - `sharded`, when nothing may be gathered whatever XLA thinks, and you know the specs.
    - `axes=` of the functions, when you write the code of one device, inside `jax.shard_map`.

    By the last two as much moves, and where n is split, for the Grams and spectra, each device's
    share of W and X once, at most n x n numbers at a time. In all three the `eigh` of a spectrum
    runs on every device, O(n^3).

    Args:
        function: `jlar.lar`, `jlar.energies`, `jlar.grams`, `jlar.spectra` or `jlar.alignment`; or
            one of your own, `function(W, X, *, axes, ...)`, that calls them.
        mesh: the mesh whose devices hold the arrays.
        W_spec: how W (m, n) is sharded, such as P("model") for a vocabulary over "model".
        X_spec: how X (..., n) is sharded, such as P("data"); the entry of its last axis is n's.

    Returns:
        A function of (W, X), and of Y and mask by keyword: Y sharded as X over tokens and as W over
        outputs, to be given where a spec splits n or tokens and outputs lie over one axis (FSDP);
        the mask as the tokens of X.

    Raises:
        ValueError: JAX's own, of a spec that does not suit the mesh or an array, or of an array
            that lies elsewhere than mesh and spec say; and whatever the function raises.

    Example:
        >>> import jax, jlar
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> W, X = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> lar = jlar.sharded(jlar.lar, mesh=mesh, W_spec=P("model"), X_spec=P("data"))
        >>> print(f"{lar(W, X):.4f}")
        0.5024
    """

    @cache
    def compiled(given: tuple[str, ...], ndim: int) -> Callable[[dict[str, Array]], Any]:
        """The jitted function of these operands, for an X of `ndim` axes."""
        rows, inputs = map(names, (*W_spec, None, None)[:2])
        *of_tokens, last = (*X_spec, *(None,) * ndim)[:ndim]
        split = Split(t=sum(map(names, of_tokens), ()), m=rows, n=inputs, columns=names(last))
        specs = {"W": W_spec, "X": X_spec, "Y": P(*of_tokens, split.outputs), "mask": P(*of_tokens)}
        specs = {name: specs[name] for name in given}
        places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

        def local(operands: dict[str, Array]) -> Any:
            return function(operands.pop("W"), operands.pop("X"), **operands, axes=split)

        def place_and_run(operands: dict[str, Array]) -> Any:
            for name, a in operands.items():
                # On explicit axes shard_map takes no array that lies nowhere yet.
                if mesh.abstract_mesh.explicit_axes and not jax.typeof(a).sharding.mesh.axis_names:
                    operands[name] = jax.reshard(a, places[name])
            return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P())(operands)

        # JAX refuses arrays that lie elsewhere, instead of moving them.
        return jax.jit(place_and_run, in_shardings=(places,))

    def call(
        W: ArrayLike, X: ArrayLike, *, Y: ArrayLike | None = None, mask: ArrayLike | None = None
    ) -> Any:
        W, X = matrices(W, X)
        given = {"W": W, "X": X, "Y": Y, "mask": mask}
        operands = {name: jax.numpy.asarray(a) for name, a in given.items() if a is not None}
        return compiled(tuple(operands), X.ndim)(operands)

    return call
