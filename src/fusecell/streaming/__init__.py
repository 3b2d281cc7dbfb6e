"""Streams: run a layer one step at a time; a saved stream runs without torch."""

from fusecell.streaming.file import load_stream
from fusecell.streaming.limits import Limits
from fusecell.streaming.stream import Stream

__all__ = ["Limits", "Stream", "load_stream"]
