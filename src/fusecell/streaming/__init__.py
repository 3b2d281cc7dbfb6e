"""Streams: run a layer one step at a time; a saved stream runs without torch."""

from fusecell.streaming.file import load_stream
from fusecell.streaming.limits import Limits
from fusecell.streaming.small_weights import StoredWeight
from fusecell.streaming.stream import Stream
from fusecell.streaming.weight_error import Difference, WeightError, weight_error

__all__ = ["Difference", "Limits", "StoredWeight", "Stream", "WeightError", "load_stream", "weight_error"]
