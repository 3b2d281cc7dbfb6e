"""The check mode, ``FUSECELL_CHECK=1``: guard pages and canaries round all memory of a kernel, and scratch full of NaN.

A kernel gets copies of everything the caller gives, and scratch of the check's own. Each piece ends where a page
begins that nobody may touch, so that reading or writing one number too far ends the process on the spot; a canary
stands before it. What is read of scratch before it is written is NaN and spoils the result.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusecell.compiler.codegen import Emitted
from fusecell.compiler.ir.sizes import align_up
from fusecell.errors import CompilerError

__all__ = ["ENABLED", "Extent", "GuardedScratch", "checked_run"]

ENABLED = os.environ.get("FUSECELL_CHECK", "") not in ("", "0")

_CANARY = 0xFF
"""Every byte of it: as a number, NaN; as an address, none."""
_ROOM = 256
"""Bytes of a canary, at the least."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Extent:
    """A piece of the caller's memory: its word, and the words of the bytes between its rows, with their counts."""

    name: str
    pointer: int
    strides: tuple[tuple[int, int], ...]
    """For each dimension but the last: the word of its stride, and how many there are."""
    row: int
    """Bytes of the last dimension."""
    written: bool = True
    """Whether the kernel writes there."""
    slack: int = 0
    """Bytes behind it that the caller lets the kernel read."""


class _Guarded:
    """Memory with a canary and a guard page before it, and a guard page right behind it.

    Arguments:
        slack: bytes at its end that hold a canary too.
    """

    def __init__(self, name: str, size: int, slack: int = 0) -> None:
        self.name, self.size = name, size
        page = mmap.PAGESIZE
        inside = align_up(size + _ROOM, page)
        self._map = mmap.mmap(-1, inside + 2 * page)
        whole: Bytes = np.frombuffer(self._map, np.uint8)
        first = whole.ctypes.data
        self._inside = whole[page : page + inside]
        self._inside[:] = _CANARY
        self.start = first + page + inside - size
        self._before, self._behind = self._inside[: inside - size], self._inside[inside - slack :]
        for guard in (first, first + page + inside):
            _forbid(guard, page)

    def check(self) -> None:
        """Raise if a byte of a canary has changed."""
        for where, canary in (("before", self._before), ("behind", self._behind)):
            if not (canary == _CANARY).all():
                raise CompilerError(f"a kernel wrote {where} {self.name}, {self.size:,} bytes of memory.")


class GuardedScratch:
    """Scratch memory in which every buffer stands alone between guard pages.

    Arguments:
        block: of the call; takes the buffers' addresses.
    """

    def __init__(
        self, block: array[int], emitted: Emitted, position: Mapping[str, int], *, rows: int, chunk: int
    ) -> None:
        self._buffers = []
        block[position["scratch"]] = 0
        for name, size in emitted.buffers.items():
            bytes_ = align_up(size.bytes(rows, chunk))
            self._buffers.append(_Guarded(f"its buffer {name}", bytes_, emitted.slack))
            block[position[f"at.{name}"]] = self._buffers[-1].start

    def check(self) -> None:
        """Raise if anything was written outside a buffer.

        Raises:
            CompilerError: naming the buffer.
        """
        for buffer in self._buffers:
            buffer.check()


def checked_run(
    run: Callable[[int], None],
    block: array[int],
    emitted: Emitted,
    extents: list[Extent],
    position: Mapping[str, int],
    *,
    rows: int,
    chunk: int,
) -> None:
    """Run a kernel on guarded copies of the caller's memory and in guarded scratch, then bring the results home.

    Raises:
        CompilerError: naming the buffer, if anything was written outside one or an address is missing.
    """
    for name in emitted.pointers:
        if not block[position[name]]:
            raise CompilerError(f"a kernel was called without {name}.")
    scratch = GuardedScratch(block, emitted, position, rows=rows, chunk=chunk)
    copies = [_Copy(extent, block) for extent in extents if block[extent.pointer]]
    for copy in copies:
        copy.bring()
    run(block.buffer_info()[0])
    scratch.check()
    for copy in copies:
        copy.guarded.check()
        copy.take_home()


class _Copy:
    """A piece of the caller's memory, packed row by row into guarded memory for the time of a call."""

    def __init__(self, extent: Extent, block: array[int]) -> None:
        self.extent, self.block = extent, block
        self.theirs = block[extent.pointer]
        # Rows that are one and the same stay so.
        dims = [(word, block[word], count if block[word] else 1) for word, count in extent.strides]
        self.words = [word for word, _, _ in dims]
        self.strides, self.counts = [stride for _, stride, _ in dims], [count for _, _, count in dims]
        self.row = extent.row
        while self.strides and self.strides[-1] == self.row:  # rows that touch are moved as one
            self.strides.pop()
            self.row *= self.counts.pop()
        size = math.prod(self.counts) * self.row
        self.guarded = _Guarded(extent.name, size + extent.slack, extent.slack)

    def bring(self) -> None:
        """Have the kernel work on the copy."""
        for theirs, ours in self._rows():
            ctypes.memmove(ours, theirs, self.row)
        self.block[self.extent.pointer] = self.guarded.start
        size = self.row
        for word, stride, count in reversed(list(zip(self.words, self.strides, self.counts, strict=False))):
            self.block[word] = size if stride else 0
            size *= count

    def take_home(self) -> None:
        """Bring the copy's values to the caller, and the addresses back."""
        for word, stride in zip(self.words, self.strides, strict=False):
            self.block[word] = stride
        self.block[self.extent.pointer] = self.theirs
        if self.extent.written:
            for theirs, ours in self._rows():
                ctypes.memmove(theirs, ours, self.row)

    def _rows(self) -> Iterator[tuple[int, int]]:
        ours = self.guarded.start
        for index in np.ndindex(*self.counts):
            yield self.theirs + sum(i * stride for i, stride in zip(index, self.strides, strict=True)), ours
            ours += self.row


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _forbid(address: int, size: int) -> None:
    """Have the system end the process that touches these pages; where it can't, canaries are all there is."""
    if sys.platform != "win32" and _libc().mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0):
        raise MemoryError(f"no guard page at {address:#x}: the system has none left.")
