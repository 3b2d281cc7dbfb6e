"""Streams: run a layer one step at a time; a saved stream runs without torch."""

from typing import TYPE_CHECKING, Any

from fusecell.streaming.file import load_stream
from fusecell.streaming.limits import Limits
from fusecell.streaming.small_weights import StoredWeight
from fusecell.streaming.stream import Stream

if TYPE_CHECKING:
    from fusecell.streaming.small_weights_error import Difference, WeightError, weight_error

__all__ = ["Difference", "Limits", "StoredWeight", "Stream", "WeightError", "load_stream", "weight_error"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fusecell.streaming' has no attribute {name!r}")
    # Not imported above: a stream that is loaded doesn't need it, and a device waits for each import.
    from fusecell.streaming import small_weights_error

    return getattr(small_weights_error, name)
