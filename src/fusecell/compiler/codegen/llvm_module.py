"""Module of LLVM text: a kernel's functions, tables and declarations, and its number format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fusecell.compiler.backend.target import Target
from fusecell.compiler.codegen.llvm_text import Value
from fusecell.compiler.codegen.vector_math import declarations, definitions
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.sizes import DType, ceil_div, padded

__all__ = ["Module"]

MOST_INLINED = 256
"""Calls of vector functions in a module up to which they are inlined; LLVM would take minutes for more."""


@dataclass
class Module:
    """Module of LLVM text: its functions, and the vector functions and intrinsics that they call."""

    title: str
    dtype: DType
    target: Target
    functions: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    math: set[str] = field(default_factory=set)
    declares: set[str] = field(default_factory=set)
    math_calls: int = 0
    _emitted: set[str] = field(default_factory=set)

    @property
    def scalar(self) -> str:
        """LLVM's type of a number."""
        return self.dtype.llvm

    @property
    def vector(self) -> str:
        """LLVM's type of a vector: 16 lanes on every target, which LLVM splits into the machine's registers."""
        return f"<{LANES} x {self.scalar}>"

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def vector_bytes(self) -> int:
        """Bytes of a vector."""
        return LANES * self.itemsize

    def row_bytes(self, features: int) -> int:
        """Return the bytes of a row of ``features`` numbers in the kernel's buffers: whole vectors."""
        return padded(features) * self.itemsize

    def groups(self, columns: int) -> int:
        """Count the column groups, of one vector each, that hold ``columns``."""
        return ceil_div(columns, LANES)

    def is_new(self, name: str) -> bool:
        """Whether a function or table that is used several times has to be emitted now: true once per name."""
        new = name not in self._emitted
        self._emitted.add(name)
        return new

    def table(self, name: str, functions: Sequence[str]) -> None:
        """Add a constant table of function addresses; an empty name is a null entry."""
        entries = ", ".join(f"ptr @{each}" if each else "ptr null" for each in functions)
        self.tables.append(f"@{name} = internal constant [{len(functions)} x ptr] [{entries}]\n")

    def integers(self, name: str, values: Sequence[int]) -> Value:
        """Return the address of a constant table of 64-bit integers."""
        entries = ", ".join(f"i64 {value}" for value in values)
        self.tables.append(f"@{name} = internal constant [{len(values)} x i64] [{entries}]\n")
        return Value(f"@{name}", "ptr")

    def zeros(self, size: int) -> Value:
        """Return the address of ``size`` bytes of zeros."""
        name = f"@zeros.{size}"
        if self.is_new(name):
            self.tables.append(f"{name} = internal constant [{size} x i8] zeroinitializer, align 64\n")
        return Value(name, "ptr")

    def text(self) -> str:
        """Return the whole module as LLVM reads it."""
        # LLVM would prefer 256 bits on CPUs whose clock dropped for 512. Nobody reads floating-point exceptions, so
        # that none have to be preserved.
        width = self.target.vector_bits
        head = f"; {self.title}, {self.dtype}, for {self.target.name}\n"
        declares = "\n".join(sorted(self.declares | declarations(self.math, self.dtype)))
        attributes = f'attributes #0 = {{ nounwind "prefer-vector-width"="{width}" "no-trapping-math"="true" }}\n'
        maths = definitions(self.math, self.dtype, inline=self.math_calls <= MOST_INLINED)
        parts = [head, declares, maths, *self.tables, *self.functions, attributes]
        return "\n".join(part for part in parts if part)
