"""Alarms out of a run's LAR, while it trains or from its log afterwards."""

from ._baseline import Baseline
from ._monitor import Monitor, Signal, Thresholds

__all__ = ["Baseline", "Monitor", "Signal", "Thresholds"]


def __dir__() -> list[str]:
    return __all__
