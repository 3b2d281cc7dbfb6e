"""A stream as bytes in a pickle: what its file would have, so that another process compiles the same steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from fusecell.streaming.bound_step import Array, Part
from fusecell.streaming.file import load_stream, write
from fusecell.streaming.limits import Limits
from fusecell.streaming.stream import Stream

__all__ = ["from_bytes", "to_bytes"]

# Whoever reads a pickle runs its program in any case.
_NO_LIMITS = Limits(**{field.name: 1 << 62 for field in fields(Limits)})


def to_bytes(parts: Sequence[Part]) -> bytes:
    """Return the content of a stream's file, without code."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "stream")
        write(parts, path)
        return path.read_bytes()


def from_bytes(content: bytes, rows: int, snapshot: tuple[Array, ...]) -> Stream:
    """Return the stream of a file's content, in the state of a snapshot."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "stream")
        path.write_bytes(content)
        stream = load_stream(path, rows, limits=_NO_LIMITS)
    stream.restore(snapshot)
    return stream
