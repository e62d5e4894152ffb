"""The log-alignment ratio in JAX: a training run tells whether it is learning or memorising.

Functions of (W, X), which all share these arguments:

    W: weights (m, n), outputs x inputs, as `equinox.nn.Linear` stores them (a Flax kernel is
        `kernel.T`), m >= 1. A scalar factor on W cancels. n >= 2, the input width, is the base of
        the logarithm everywhere.
    X: inputs (..., n), any number of leading token axes.
    Y: X W^T (..., m), if already computed: before bias, soft-cap and temperature.
    mask: (...,) of 0/1 or bool, one per token; tokens with 0 do not count, even if nan.
    axes: inside `jax.shard_map`, the mesh axes that split tokens, outputs and inputs, such as
        `{"t": "data", "m": "model"}`: the result is that of the whole arrays, on every device.
        Along a named axis that does not split an array, its values have to be the same on every
        device. Where an axis splits "n", or both "m" and "t" (FSDP), one device cannot compute Y,
        and `lar` and `energies` have to be given it. `jlar.sharded` says when to use what.

bfloat16 and narrower types are summed in float32. Wrong ranks, widths or shapes, n = 1 and complex
arrays are a ValueError at trace time that says what to write instead; zero or non-finite data give
nan. Everything works under jit, vmap and grad; what has no gradient says so in its first lines.
"""

from . import losses, monitor, nn
from ._alignment import alignment, principal_dimension, spectra
from ._capture import capture, metrics
from ._energies import Energies, effective_dimension, energies, lar
from ._grams import Grams, grams
from ._sharded import sharded
from ._sites import sites
from ._spectra import Spectra

__version__ = "0.1.0"

__all__ = [
    "Energies",
    "Grams",
    "Spectra",
    "alignment",
    "capture",
    "effective_dimension",
    "energies",
    "grams",
    "lar",
    "losses",
    "metrics",
    "monitor",
    "nn",
    "principal_dimension",
    "sharded",
    "sites",
    "spectra",
]


def __dir__() -> list[str]:
    return __all__
