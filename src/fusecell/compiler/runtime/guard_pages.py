"""The check mode, ``FUSECELL_CHECK=1``: guard pages and canaries around a kernel's memory, scratch full of NaN.

A kernel gets copies of all the caller's memory, and scratch of the check's own. Each piece ends at a page that the
process may not touch, so that reading or writing one number too far ends the process on the spot; before it there is a
canary, as only one end of it can be at a page. Scratch that is read before it is written is NaN, and spoils the result.
It is what Electric Fence does for malloc.
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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fusecell.compiler.ir.sizes import align_up
from fusecell.errors import CompilerError

if TYPE_CHECKING:
    from fusecell.compiler.codegen import Emitted

__all__ = ["ENABLED", "Extent", "GuardedScratch", "checked_run"]

ENABLED = os.environ.get("FUSECELL_CHECK", "") not in ("", "0")

_CANARY = 0xFF
"""Value of all its bytes: NaN as a number, no valid address as a pointer."""
_CANARY_BYTES = 256
"""The least size of a canary."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Extent:
    """A piece of the caller's memory: a tensor, of which only the last dimension has to be contiguous.

    Arguments:
        pointer: the slot of its address.
        strides: slot of the stride and size of each dimension but the last.
        row: bytes of the last dimension.
        written: whether the kernel may write there.
        slack: bytes behind it that the kernel may read.
    """

    name: str
    pointer: int
    strides: tuple[tuple[int, int], ...]
    row: int
    written: bool = True
    slack: int = 0


class _Guarded:
    """Memory with a canary and a guard page before it, and a guard page right behind it.

    Arguments:
        slack: bytes at its end that hold a canary too.
    """

    def __init__(self, name: str, size: int, slack: int = 0) -> None:
        self.name, self.size = name, size
        page = mmap.PAGESIZE
        usable = align_up(size + _CANARY_BYTES, page)
        self._map = mmap.mmap(-1, usable + 2 * page)
        pages: Bytes = np.frombuffer(self._map, np.uint8)
        first = pages.ctypes.data
        inside = pages[page : page + usable]
        inside[:] = _CANARY
        self.start = first + page + usable - size
        self._before, self._behind = inside[: usable - size], inside[usable - slack :]
        for guard in (first, first + page + usable):
            _forbid(guard, page)

    def check(self) -> None:
        """Raise if a byte of a canary has changed."""
        for where, canary in (("before", self._before), ("behind", self._behind)):
            if not (canary == _CANARY).all():
                raise CompilerError(f"a kernel wrote {where} {self.name}, {self.size:,} bytes of memory.")


class GuardedScratch:
    """Scratch memory in which every buffer has guard pages of its own.

    Arguments:
        values: the slots of the call's argument block, which get the buffers' addresses.
        indices: of the slots, by name.
    """

    def __init__(
        self, values: array[int], emitted: Emitted, indices: Mapping[str, int], *, rows: int, chunk: int, threads: int
    ) -> None:
        self._buffers = []
        # Without scratch of the caller's a kernel takes each buffer's address from a slot of its own.
        values[indices["scratch"]] = 0
        for name, size in emitted.buffers.items():
            # Threads' rows have no gaps between them here, in which a write would go unseen.
            size_bytes = align_up(replace(size, gaps=0).bytes(rows, chunk, threads))
            self._buffers.append(_Guarded(f"its buffer {name}", size_bytes, emitted.slack))
            values[indices[f"at.{name}"]] = self._buffers[-1].start

    def check(self) -> None:
        """Raise if anything was written outside a buffer.

        Raises:
            CompilerError: naming the buffer.
        """
        for buffer in self._buffers:
            buffer.check()


def checked_run(
    run: Callable[[int], None],
    values: array[int],
    emitted: Emitted,
    extents: list[Extent],
    indices: Mapping[str, int],
    *,
    rows: int,
    chunk: int,
    threads: int,
) -> None:
    """Run a kernel on guarded copies of the caller's memory and in guarded scratch, then copy the results back.

    Arguments:
        values: the slots of the call's argument block.
        indices: of the slots, by name.

    Raises:
        CompilerError: naming the buffer, if anything was written outside one or an address is missing.
    """
    for name in emitted.pointers:
        if not values[indices[name]]:
            raise CompilerError(f"a kernel was called without {name}.")
    scratch = GuardedScratch(values, emitted, indices, rows=rows, chunk=chunk, threads=threads)
    copies = [_Copy(extent, values) for extent in extents if values[extent.pointer]]
    for copy in copies:
        copy.copy_in()
    run(values.buffer_info()[0])
    scratch.check()
    for copy in copies:
        copy.guarded.check()
        copy.copy_out()


class _Copy:
    """A guarded copy of a piece of the caller's memory, its rows one behind the other, for the time of a call."""

    def __init__(self, extent: Extent, values: array[int]) -> None:
        self._extent, self._values = extent, values
        self._original = values[extent.pointer]
        # A stride of 0 makes all rows one, and so they stay in the copy.
        dims = [(slot, values[slot], count if values[slot] else 1) for slot, count in extent.strides]
        self._slots = [slot for slot, _, _ in dims]
        self._strides, self._counts = [stride for _, stride, _ in dims], [count for _, _, count in dims]
        self._row = extent.row
        while self._strides and self._strides[-1] == self._row:  # contiguous rows are copied as one
            self._strides.pop()
            self._row *= self._counts.pop()
        size = math.prod(self._counts) * self._row
        self.guarded = _Guarded(extent.name, size + extent.slack, extent.slack)

    def copy_in(self) -> None:
        """Copy the original, and write address and strides of the copy into the argument block."""
        for original, copy in self._rows():
            ctypes.memmove(copy, original, self._row)
        self._values[self._extent.pointer] = self.guarded.start
        size = self._row
        for slot, stride, count in reversed(list(zip(self._slots, self._strides, self._counts, strict=False))):
            self._values[slot] = size if stride else 0
            size *= count

    def copy_out(self) -> None:
        """Restore address and strides, and copy what the kernel has written to the original."""
        for slot, stride in zip(self._slots, self._strides, strict=False):
            self._values[slot] = stride
        self._values[self._extent.pointer] = self._original
        if self._extent.written:
            for original, copy in self._rows():
                ctypes.memmove(original, copy, self._row)

    def _rows(self) -> Iterator[tuple[int, int]]:
        """Yield the addresses of each row in the original and in the copy."""
        copy = self.guarded.start
        for index in np.ndindex(*self._counts):
            yield self._original + sum(i * stride for i, stride in zip(index, self._strides, strict=True)), copy
            copy += self._row


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _forbid(address: int, size: int) -> None:
    """Have the system end the process if it touches these pages; on Windows canaries have to do."""
    if sys.platform != "win32" and _libc().mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0):
        raise MemoryError(f"no guard page at {address:#x}: the system has none left.")
