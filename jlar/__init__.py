"""The log-alignment ratio in JAX: a training run tells whether it is learning or memorising."""

from . import losses as losses
from . import nn as nn
from ._baseline import Baseline as Baseline
from ._capture import capture as capture
from ._capture import metrics as metrics
from ._energies import Energies as Energies
from ._energies import energies as energies
from ._energies import lar as lar
from ._lar import effective_dimension as effective_dimension
from ._monitor import Monitor as Monitor
from ._monitor import Signal as Signal
from ._monitor import Thresholds as Thresholds
from ._ranks import principal_dimension as principal_dimension
from ._sharded import sharded as sharded
from ._sites import Sites as Sites
from ._sites import sites as sites
from ._spectra import Alignment as Alignment
from ._spectra import Grams as Grams
from ._spectra import Spectra as Spectra
from ._spectra import alignment as alignment
from ._spectra import grams as grams
from ._spectra import spectra as spectra
from ._update import UpdateAlignment as UpdateAlignment
from ._update import update_alignment as update_alignment

__version__ = "0.1.0"
