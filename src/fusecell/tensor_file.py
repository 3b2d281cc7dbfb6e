"""Read safetensors files from untrusted sources: within limits, and strict in every detail of the format.

The file is read, not mapped: if another process truncates a mapped file, reading on is a fatal SIGBUS.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fusecell.errors import quoted
from fusecell.strict_json import parse_json

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["FILE_BYTES", "HEADER_BYTES", "TensorFile", "is_text", "read_tensor_file"]

FILE_BYTES, HEADER_BYTES = 2 << 30, 16 << 20
"""The default limits of a file and of its header, in bytes."""
_MAX_AXES, _MAX_NAME = 8, 1024
_DTYPES = {"F16": ("float16", 2), "BF16": ("bfloat16", 2), "F32": ("float32", 4), "F64": ("float64", 8)}
_DTYPES |= {"I64": ("int64", 8), "U16": ("uint16", 2), "I8": ("int8", 1)}


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file: its dtype by torch's name, its shape, and its range of bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The content of a file: metadata and tensors by name.

    Attributes:
        metadata: texts by name.
        stored: the position and type of each tensor by name.
        data: the bytes after the header, into which positions point.
    """

    metadata: dict[str, str]
    stored: dict[str, _Stored]
    data: bytearray

    def arrays(self, prefix: str = "") -> dict[str, np.ndarray[Any, Any]]:
        """Copy every tensor whose name begins so into a NumPy array."""
        return {
            name: np.frombuffer(self.data, each.dtype, math.prod(each.shape), each.start).reshape(each.shape).copy()
            for name, each in self.stored.items()
            if name.startswith(prefix)
        }

    def tensors(self) -> dict[str, Tensor]:
        """Copy every tensor into one of torch's."""
        import torch

        tensors = {}
        for name, each in self.stored.items():
            count, dtype = math.prod(each.shape), getattr(torch, each.dtype)
            flat = torch.frombuffer(self.data, dtype=dtype, count=count, offset=each.start) if count else torch.empty(0)
            # Cloned into aligned memory: torch's vector code rounds differently where a tensor starts unaligned.
            tensors[name] = flat.to(dtype).reshape(each.shape).clone()
        return tensors


def read_tensor_file(
    path: str | Path, dtypes: Collection[str], *, file_bytes: int = FILE_BYTES, header_bytes: int = HEADER_BYTES
) -> TensorFile:
    """Read a safetensors file.

    Arguments:
        dtypes: the dtypes that its tensors may have, by the format's names.
        file_bytes, header_bytes: the limits of the file and of its header.

    Raises:
        OSError: if it can't be read.
        ValueError: if it isn't such a file, or exceeds a limit. The text says what is wrong, without the path.
    """
    # A directory is left to open(), whose IsADirectoryError says what is wrong; opening a pipe would wait forever.
    if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
        raise ValueError("it is a pipe or a device, expected a file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > file_bytes:
            raise ValueError(f"it has {size:,} bytes, more than the {file_bytes:,} that it may have")
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > size - 8:
            raise ValueError("it is cut short, or no safetensors file: its header would end behind its end")
        if length > header_bytes:
            raise ValueError(f"its header has {length:,} bytes, more than the {header_bytes:,} that it may have")
        header = file.read(length)
        data = bytearray(file.read(size - 8 - length))
    if len(data) != size - 8 - length:  # another process may write to it meanwhile
        raise ValueError("it was cut short while it was read")
    try:
        entries = parse_json(header.decode("utf-8"), 3)
    except UnicodeDecodeError as error:
        raise ValueError(f"its header is no UTF-8: {error.reason} at byte {error.start}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"its header is {quoted(entries)}, expected a JSON object")
    metadata = _metadata(entries.pop("__metadata__", {}))
    stored = {name: _stored(name, entry, dtypes) for name, entry in entries.items()}
    _check_order(stored, len(data))
    return TensorFile(metadata, stored, data)


def is_text(value: object) -> bool:
    """Return whether a value is a text that can be encoded; JSON can spell half of a surrogate pair, which can't."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _metadata(value: object) -> dict[str, str]:
    """Return the header's metadata after checking that they are texts by name."""
    if not isinstance(value, dict) or not all(is_text(text) for pair in value.items() for text in pair):
        raise ValueError(f"its metadata are {quoted(value)}, expected texts by name")
    return value


def _stored(name: str, entry: object, dtypes: Collection[str]) -> _Stored:
    """Return a tensor's entry in the header after checking each of its fields and that they agree."""
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise ValueError(f"a tensor is called {quoted(name)}, expected up to {_MAX_NAME} characters that print")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {quoted(name)} is described by {quoted(entry)}, expected dtype, shape, data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in dtypes:
        raise ValueError(f"tensor {quoted(name)} is of dtype {quoted(kind)}, expected {' or '.join(sorted(dtypes))}")
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        raise ValueError(f"tensor {quoted(name)} has the shape {quoted(shape)}, expected up to {_MAX_AXES} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {quoted(name)} lies at {quoted(offsets)}, expected two offsets")
    dtype, width = _DTYPES[kind]
    if offsets[1] - offsets[0] != math.prod(shape) * width:
        raise ValueError(
            f"tensor {quoted(name)} of shape {quoted(shape)} and dtype {kind} takes {math.prod(shape) * width} bytes, "
            f"but lies at {quoted(offsets)}"
        )
    return _Stored(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: object) -> bool:
    """Return whether a value is a list of integers from 0 to 2**48 - 1, the sizes of an address space."""
    # By type, as True and 1.0 equal 1.
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in value)


def _check_order(stored: dict[str, _Stored], size: int) -> None:
    """Raise ValueError unless the tensors fill the file without overlaps and gaps, as the format requires."""
    end = 0
    for name, each in sorted(stored.items(), key=lambda pair: (pair[1].start, pair[1].stop)):
        if each.start != end:
            raise ValueError(f"tensor {quoted(name)} begins at byte {each.start}, expected {end}")
        end = each.stop
    if end != size:
        raise ValueError(f"its tensors end at byte {end} of {size}")
