"""Streams: a layer one step at a time; saved, in a process without torch."""

from fusecell.streaming.file import load_stream
from fusecell.streaming.stream import Stream

__all__ = ["Stream", "load_stream"]
