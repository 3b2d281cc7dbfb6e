"""Sizes in memory: the two number formats, and how rows and buffers are padded."""

from __future__ import annotations

from enum import Enum

from fusecell.compiler.ir.primitives import LANES

__all__ = ["ALIGNMENT", "DType", "align_up", "ceil_div", "padded"]

ALIGNMENT = 64
"""Bytes that the addresses of buffers are multiples of: a cache line, and the widest vector load (AVX-512)."""


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


def ceil_div(count: int, size: int) -> int:
    """Divide, rounding up: the number of portions of ``size`` that hold ``count``."""
    return -(-count // size)


def align_up(count: int, multiple: int = ALIGNMENT) -> int:
    """Return the least multiple of ``multiple`` that is at least ``count``."""
    return ceil_div(count, multiple) * multiple


def padded(features: int) -> int:
    """Return the numbers that a row of ``features`` takes in a kernel's buffers: whole vectors."""
    return align_up(features, LANES)
