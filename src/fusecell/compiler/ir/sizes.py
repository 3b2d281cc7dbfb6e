"""Sizes in memory: the two number formats, and how rows and buffers are padded."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fusecell.compiler.ir.primitives import LANES

__all__ = ["ALIGNMENT", "SLOT_BYTES", "DType", "Size", "align_up", "ceil_div", "padded"]

ALIGNMENT = 64
"""Bytes that the addresses of buffers are multiples of: a cache line, and the widest vector load (AVX-512)."""

SLOT_BYTES = 8
"""Bytes of a slot, of the argument block and of the team block."""


class DType(str, Enum):
    """Format of a graph's numbers; equal to its name, so that ``DType.F32 == "f32"``."""

    F32 = "f32"
    F64 = "f64"

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return 4 if self is DType.F32 else 8

    @property
    def llvm(self) -> str:
        """LLVM's name of the type."""
        return "float" if self is DType.F32 else "double"

    def __str__(self) -> str:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of a buffer: fixed, and per row of a step, row of a chunk, step of a chunk, and thread beyond the first.

    Attributes:
        per_thread: what each thread beyond the first writes.
        gaps: what lies unused beside it.
    """

    fixed: int = 0
    per_row: int = 0
    per_chunk_row: int = 0
    per_chunk_step: int = 0
    per_thread: int = 0
    gaps: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(
            self.fixed + other.fixed,
            self.per_row + other.per_row,
            self.per_chunk_row + other.per_chunk_row,
            self.per_chunk_step + other.per_chunk_step,
            self.per_thread + other.per_thread,
            self.gaps + other.gaps,
        )

    @property
    def per_helper(self) -> int:
        """Bytes for each thread beyond the first."""
        return self.per_thread + self.gaps

    def bytes(self, rows: int, chunk_steps: int, threads: int = 1) -> int:
        """Return the size in a call of ``rows`` rows, ``chunk_steps`` steps in a chunk, and ``threads`` threads."""
        of_chunk = rows * chunk_steps * self.per_chunk_row + chunk_steps * self.per_chunk_step
        return self.fixed + self.per_row * rows + of_chunk + (threads - 1) * self.per_helper


def ceil_div(count: int, size: int) -> int:
    """Divide, rounding up: the number of portions of ``size`` that hold ``count``."""
    return -(-count // size)


def align_up(count: int, multiple: int = ALIGNMENT) -> int:
    """Return the least multiple of ``multiple`` that is at least ``count``."""
    return ceil_div(count, multiple) * multiple


def padded(features: int) -> int:
    """Return the numbers that a row of ``features`` takes in a kernel's buffers: whole vectors."""
    return align_up(features, LANES)
