"""Base of the two builders of LLVM text: typed values, exact constants, unique names, declarations.

`llvm_builder.Function` writes a kernel's functions, with loops and memory; `function_builder.VectorFunction` of
`vector_math` writes straight-line functions of one vector. Both write a line of text per instruction, which LLVM parses
and verifies. Text, not llvmlite's builder of instructions, as that takes 47 ms for 4000 of them where text takes 2.4,
and lacks what kernels need: fused multiply-adds of vectors, attributes with a value, atomic stores. Besides, golden
files show the text as it is, and it is written without LLVM.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable

from fusecell.compiler.ir.sizes import DType

__all__ = [
    "FALSE",
    "NULL",
    "TRUE",
    "Integer",
    "TextBuilder",
    "Value",
    "i1",
    "i64",
    "literal",
    "ptr",
    "type_of",
    "typed",
]

_NOT_OF_NAMES = re.compile(r"[^A-Za-z0-9._]")


class Value(str):
    """LLVM value as its text, a name or a constant, together with its LLVM type."""

    type: str

    def __new__(cls, text: str, type: str) -> Value:
        value = super().__new__(cls, text)
        value.type = type
        return value


Integer = Value | int
"""An i64: a value of the running kernel, or a number that is known while its text is written."""

TRUE, FALSE, NULL = Value("true", "i1"), Value("false", "i1"), Value("null", "ptr")


def i64(name: str) -> Value:
    """Return an integer parameter, for a function's head and its body."""
    return Value(f"%{name}", "i64")


def i1(name: str) -> Value:
    """Return a boolean parameter."""
    return Value(f"%{name}", "i1")


def ptr(name: str) -> Value:
    """Return an address parameter."""
    return Value(f"%{name}", "ptr")


def type_of(*operands: Integer) -> str:
    """Return the LLVM type of operands: that of the first that isn't a plain number, else i64."""
    return next((operand.type for operand in operands if isinstance(operand, Value)), "i64")


def typed(operand: Integer) -> str:
    """Spell an operand with its type, as LLVM wants an argument: ``i64 %rows``."""
    return f"{type_of(operand)} {operand}"


def literal(value: float, dtype: DType | str) -> str:
    """Spell a constant with its exact bits: LLVM reads a float32 as the double it is equal to."""
    if dtype == DType.F32:
        try:
            value = struct.unpack("<f", struct.pack("<f", value))[0]
        except OverflowError:
            value = float("inf") if value > 0 else float("-inf")
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"


class TextBuilder:
    """Builder of the lines of one function, and of the declarations that its calls need.

    Arguments:
        arguments: the function's parameters.
        declares: the ``declare`` lines of the module, to which this function's are added.
    """

    def __init__(self, arguments: Iterable[Value], declares: set[str]) -> None:
        self.lines: list[str] = []
        self.declares = declares
        self._used = {argument.removeprefix("%") for argument in arguments}
        self._count: dict[str, int] = {}

    def comment(self, text: str) -> None:
        self.lines.append(f"  ; {text}")

    def do(self, instruction: str) -> None:
        """Append an instruction without a result."""
        self.lines.append(f"  {instruction}")

    def let(self, name: str, instruction: str, type: str = "i64") -> Value:
        """Append an instruction; return its result, under ``name`` or, where that is taken, ``name.1`` and so on."""
        result = Value(f"%{self.fresh(name)}", type)
        self.lines.append(f"  {result} = {instruction}")
        return result

    def fresh(self, name: str) -> str:
        """Return ``name``, made valid and unique within the function."""
        name = _NOT_OF_NAMES.sub("_", name)
        unique, count = name, self._count.get(name, 0)
        while unique in self._used:
            count += 1
            unique = f"{name}.{count}"
        self._count[name] = count
        self._used.add(unique)
        return unique

    def calling(self, function: str, args: Iterable[Integer], result: str = "void") -> str:
        """Spell the call of a function."""
        return f"call {result} {function}({', '.join(typed(arg) for arg in args)})"

    def intrinsic(self, function: str, *args: Value, result: str = "void") -> str:
        """Declare an intrinsic of LLVM by the types of its arguments, and spell its call."""
        self.declares.add(f"declare {result} @llvm.{function}({', '.join(type_of(arg) for arg in args)})")
        return self.calling(f"@llvm.{function}", args, result)
