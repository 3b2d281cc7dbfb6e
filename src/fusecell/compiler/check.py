"""The check mode, ``FUSECELL_CHECK=1``: canaries round every buffer that a kernel writes, and scratch full of NaN.

A kernel gets memory of the check's own in the place of each of the caller's results, between two canaries, and
scratch in which the slack behind every buffer is one. What it reads before writing is NaN and spoils the result.
"""

from __future__ import annotations

import ctypes
import math
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusecell.compiler.emit import Emitted
from fusecell.errors import CompilerError

__all__ = ["ENABLED", "Extent", "checked_run"]

ENABLED = os.environ.get("FUSECELL_CHECK", "") not in ("", "0")

_CANARY = 0xFF
"""Every byte of it: as a number, NaN; as an address, none."""
_ROOM = 256
"""Bytes of a canary."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Extent:
    """A result in the caller's memory: its word, and the words of the bytes between its rows, with their counts."""

    name: str
    pointer: int
    strides: tuple[tuple[int, int], ...]
    """For each dimension but the last: the word of its stride, and how many there are."""
    row: int
    """Bytes of the last dimension."""


class _Guarded:
    """Memory between two canaries."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self._all: Bytes = np.full(size + 2 * _ROOM + 64, _CANARY, np.uint8)
        self.start = -(-(self._all.ctypes.data + _ROOM) // 64) * 64
        self._first = self.start - self._all.ctypes.data

    def check(self) -> None:
        """Raise if a byte before or behind has changed."""
        before, behind = self._all[: self._first], self._all[self._first + self.size :]
        for where, canary in (("before", before), ("behind", behind)):
            if not (canary == _CANARY).all():
                raise CompilerError(f"a kernel wrote {where} {self.name}, {self.size:,} bytes of memory.")


def checked_run(
    run: Callable[[int], None],
    block: array[int],
    emitted: Emitted,
    extents: list[Extent],
    position: Mapping[str, int],
    *,
    steps: int,
    rows: int,
    chunk: int,
) -> None:
    """Run a kernel on guarded copies of its results and in guarded scratch, then bring the results home.

    Raises:
        CompilerError: naming the buffer, if anything was written outside one.
    """
    scratch = _Guarded("the scratch memory", emitted.scratch.bytes(rows, chunk) + 64)
    block[position["scratch"]] = scratch.start
    copies = [_Copy(extent, block) for extent in extents if block[extent.pointer]]
    for copy in copies:
        copy.bring()
    run(block.buffer_info()[0])
    scratch.check()
    for name, size in emitted.buffers.items():
        end = block[position[f"at.{name}"]] + size.bytes(rows, chunk)
        slack = np.ctypeslib.as_array((ctypes.c_uint8 * emitted.slack).from_address(end - emitted.slack))
        if not (slack == _CANARY).all():
            raise CompilerError(f"a kernel wrote behind its buffer {name}, with {steps} steps of {rows} rows.")
    for copy in copies:
        copy.guarded.check()
        copy.take_home()


class _Copy:
    """A caller's result, packed row by row into guarded memory for the time of a call."""

    def __init__(self, extent: Extent, block: array[int]) -> None:
        self.extent, self.block = extent, block
        self.theirs = block[extent.pointer]
        self.strides = [block[word] for word, _ in extent.strides]
        self.counts = [count for _, count in extent.strides]
        self.row = extent.row
        while self.strides and self.strides[-1] == self.row:  # rows that touch are moved as one
            self.strides.pop()
            self.row *= self.counts.pop()
        self.guarded = _Guarded(extent.name, math.prod(self.counts) * self.row)

    def bring(self) -> None:
        """Have the kernel work on the copy."""
        for theirs, ours in self._rows():
            ctypes.memmove(ours, theirs, self.row)
        self.block[self.extent.pointer] = self.guarded.start
        size = self.row
        for (word, _), count in reversed(list(zip(self.extent.strides, self.counts, strict=False))):
            self.block[word] = size
            size *= count

    def take_home(self) -> None:
        """Bring the copy's values to the caller."""
        for theirs, ours in self._rows():
            ctypes.memmove(theirs, ours, self.row)

    def _rows(self) -> Iterator[tuple[int, int]]:
        ours = self.guarded.start
        for index in np.ndindex(*self.counts):
            yield self.theirs + sum(i * stride for i, stride in zip(index, self.strides, strict=True)), ours
            ours += self.row
