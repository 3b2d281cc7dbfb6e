"""Safetensors files from elsewhere: read within limits, and held to the format in every particular.

The file is read, not mapped: another process that cuts it short can't end this one.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusecell.errors import quoted
from fusecell.strict_json import parse_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FILE_BYTES", "HEADER_BYTES", "TensorFile", "is_text", "read_tensor_file"]

FILE_BYTES, HEADER_BYTES = 2 << 30, 16 << 20
"""What a file, and the header of one, may have unless its reader says otherwise."""
_MOST_AXES, _MOST_NAME = 8, 1024
_DTYPES = {"F16": ("float16", 2), "BF16": ("bfloat16", 2), "F32": ("float32", 4), "F64": ("float64", 8)}
_DTYPES |= {"I64": ("int64", 8)}


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of a file: its dtype by torch's name, its shape, and the bytes that it begins and ends at."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """What a file holds: texts, and tensors by name."""

    metadata: dict[str, str]
    stored: dict[str, _Stored]
    data: bytearray

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Every tensor as a NumPy array with memory of its own."""
        return {
            name: np.frombuffer(self.data, each.dtype, math.prod(each.shape), each.start).reshape(each.shape).copy()
            for name, each in self.stored.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor as torch's, with memory of its own."""
        import torch

        found = {}
        for name, each in self.stored.items():
            count, dtype = math.prod(each.shape), getattr(torch, each.dtype)
            flat = torch.frombuffer(self.data, dtype=dtype, count=count, offset=each.start) if count else torch.empty(0)
            # Cloned, as vector code rounds differently where a file's tensors stand askew in memory.
            found[name] = flat.to(dtype).reshape(each.shape).clone()
        return found


def read_tensor_file(
    path: Path, dtypes: Collection[str], *, file_bytes: int = FILE_BYTES, header_bytes: int = HEADER_BYTES
) -> TensorFile:
    """Read a safetensors file.

    Arguments:
        dtypes: the dtypes, by the format's names, that its tensors may have.
        file_bytes, header_bytes: how long the file and its header may be.

    Raises:
        OSError: if it can't be read.
        ValueError: if it is no such file, or breaks a limit: what is wrong, without the path.
    """
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise ValueError("it is a pipe or a device, expected a file")
    with path.open("rb") as file:
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
    if len(data) != size - 8 - length:
        raise ValueError("it was cut short while it was read")
    try:
        listed = parse_json(header.decode("utf-8"), 3)
    except UnicodeDecodeError as error:
        raise ValueError(f"its header is no UTF-8: {error.reason} at byte {error.start}") from error
    if not isinstance(listed, dict):
        raise ValueError(f"its header is {quoted(listed)}, expected a JSON object")
    metadata = _metadata(listed.pop("__metadata__", {}))
    stored = {name: _stored(name, entry, dtypes) for name, entry in listed.items()}
    _check_order(stored, len(data))
    return TensorFile(metadata, stored, data)


def is_text(value: object) -> bool:
    """Whether a value is text that can be written again; half of a surrogate pair, which JSON can spell, is none."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _metadata(found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(is_text(text) for pair in found.items() for text in pair):
        raise ValueError(f"its metadata are {quoted(found)}, expected texts by name")
    return found


def _stored(name: str, entry: object, dtypes: Collection[str]) -> _Stored:
    if not name.isprintable() or len(name) > _MOST_NAME:
        raise ValueError(f"a tensor is called {quoted(name)}, expected up to {_MOST_NAME} characters that print")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {quoted(name)} is described by {quoted(entry)}, expected dtype, shape, data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in dtypes:
        raise ValueError(f"tensor {quoted(name)} is of dtype {quoted(kind)}, expected {' or '.join(sorted(dtypes))}")
    if not _are_sizes(shape) or len(shape) > _MOST_AXES:
        raise ValueError(f"tensor {quoted(name)} has the shape {quoted(shape)}, expected up to {_MOST_AXES} sizes")
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
    """Whether a value is a list of whole numbers that memory could have; True is none, nor is 1.0."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in value)


def _check_order(stored: dict[str, _Stored], size: int) -> None:
    """Whether tensors fill the file: none lies over another, and nothing between them."""
    here = 0
    for name, each in sorted(stored.items(), key=lambda pair: (pair[1].start, pair[1].stop)):
        if each.start != here:
            raise ValueError(f"tensor {quoted(name)} begins at byte {each.start}, expected {here}")
        here = each.stop
    if here != size:
        raise ValueError(f"its tensors end at byte {here} of {size}")
