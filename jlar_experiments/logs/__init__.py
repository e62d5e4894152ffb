"""Logs of anybody's runs: whatever a tracker wrote, read into one plain value, a `Log`."""

from .log import Log as Log
from .log import baseline as baseline
from .log import read as read
from .table import Unusable as Unusable
