"""Vector math as C functions of one number: the compiler's own rules, written by a builder that speaks C.

The rules of :mod:`fusecell.compiler.codegen.vector_math` say which operations a function is made of, in which order;
here each becomes a C statement, so the bits are those of the kernels, lane by lane.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fusecell.compiler.codegen.llvm_text import Value
from fusecell.compiler.codegen.vector_math import BINARY_OPS, RULES
from fusecell.compiler.codegen.vector_math.constants import PRECISIONS
from fusecell.compiler.codegen.vector_math.function_builder import IntOperand, Operand, VectorFunction
from fusecell.compiler.ir.sizes import DType
from fusecell.errors import CompilerError

__all__ = ["KEYWORDS", "c_function", "c_number", "function_name"]

_WORDS = """
auto break case char const continue default do double else enum extern float for goto if inline int long register
restrict return short signed sizeof static struct switch typedef union unsigned void volatile while
alignas alignof bool class false true nullptr asm typeof
sqrt sqrtf floor floorf fabs fabsf copysign copysignf fma fmaf sin cos pow
"""
KEYWORDS = frozenset(_WORDS.split())
"""Names that no value may have: words of C and of C++, and the functions of the C library that the file calls."""
_COMPARISONS = {"olt": "<", "ogt": ">", "ole": "<=", "oge": ">=", "oeq": "=="}
_INTEGERS = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^", "shl": "<<", "lshr": ">>"}


def c_number(value: float, dtype: DType) -> str:
    """Spell a number of a format in C, exactly."""
    if dtype is DType.F32:
        # Nine digits spell a float32. Those of a float64 beside it may be another's: a compiler would round them again.
        with np.errstate(over="ignore"):
            value = float(np.float32(value))
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    text = f"{value:.9g}" if dtype is DType.F32 else f"{value:.17g}"
    if "." not in text and "e" not in text:
        text += ".0"
    return text + ("f" if dtype is DType.F32 else "")


def function_name(op: str, dtype: DType) -> str:
    """Name the C function of a primitive."""
    return f"{op}_{dtype}"


class _CFunction(VectorFunction):
    """Builder of one function of numbers, as C."""

    @property
    def vector(self) -> str:
        return self.precision.scalar

    @property
    def ints(self) -> str:
        return f"uint{self.precision.bits}_t"

    @property
    def _f(self) -> str:
        """The suffix of the C library's functions."""
        return "f" if self.precision.scalar == "float" else ""

    def comment(self, text: str) -> None:
        self.lines.append(f"    /* {text} */")

    def operand(self, x: Operand) -> Value:
        if isinstance(x, Value):
            return x
        return Value(c_number(x, self.precision.dtype), self.vector)

    def _let(self, name: str, expression: str, type: str) -> Value:
        # LLVM's names have points, C's have not.
        result = Value(self.fresh(name).replace(".", "_"), type)
        self._used.add(str(result))
        self.lines.append(f"    const {type} {result} = {expression};")
        return result

    def fresh(self, name: str) -> str:
        return super().fresh(name.replace(".", "_")).replace(".", "_")

    def _binary(self, name: str, opcode: str, a: Operand, b: Operand) -> Value:
        sign = {"fadd": "+", "fsub": "-", "fmul": "*", "fdiv": "/"}[opcode]
        return self._let(name, f"{self.operand(a)} {sign} {self.operand(b)}", self.vector)

    def neg(self, a: Operand, name: str) -> Value:
        return self._let(name, f"-({self.operand(a)})", self.vector)

    def lanewise(self, function: str, *args: Operand, name: str) -> Value:
        # C99 has no roundeven; in the rounding mode that programs begin with, rint is the same.
        function = "rint" if function == "roundeven" else function
        called = "FMA" if function == "fma" and self._f == self._own_f else f"{function}{self._f}"
        return self._let(name, f"{called}({', '.join(map(self.operand, args))})", self.vector)

    @property
    def _own_f(self) -> str:
        """The suffix in the format of the function's arguments."""
        return "f" if self.arguments[0].type == "float" else ""

    def fcmp(self, predicate: str, a: Operand, b: Operand, name: str) -> Value:
        x, y = self.operand(a), self.operand(b)
        if predicate == "uno":
            text = f"{x} != {x}" if x == y else f"{x} != {x} || {y} != {y}"
        elif predicate == "une":
            text = f"{x} != {y}"
        elif predicate in _COMPARISONS:
            text = f"{x} {_COMPARISONS[predicate]} {y}"
        else:  # unordered: true for NaN, and so the opposite comparison negated
            opposite = {"ugt": "<=", "uge": "<", "ult": ">=", "ule": ">"}[predicate]
            text = f"!({x} {opposite} {y})"
        return self._let(name, text, "int")

    def select(self, mask: Value, a: Operand, b: Operand, name: str) -> Value:
        return self._let(name, f"{mask} ? {self.operand(a)} : {self.operand(b)}", self.vector)

    def bits(self, x: Value, name: str) -> Value:
        return self._let(name, f"bits_{self.precision.dtype}({x})", self.ints)

    def from_bits(self, x: Value, name: str) -> Value:
        return self._let(name, f"number_{self.precision.dtype}({x})", self.vector)

    def _int(self, opcode: str, a: IntOperand, b: IntOperand, name: str) -> Value:
        x, y = (
            each if isinstance(each, Value) else f"UINT{self.precision.bits}_C({each % (1 << self.precision.bits)})"
            for each in (a, b)
        )
        y = y if opcode not in ("shl", "lshr") else str(b)
        return self._let(name, f"{x} {_INTEGERS[opcode]} {y}", self.ints)

    def is_nonzero(self, x: Value, name: str) -> Value:
        return self._let(name, f"{x} != 0", "int")

    # One lane is all there is.

    def lane(self, x: Value, lane: int, name: str) -> Value:
        return x

    def with_lane(self, x: Value, lane: int, scalar: Value, name: str) -> Value:
        return scalar

    def call_scalar(self, function: str, *args: Value, name: str) -> Value:
        return Value(f"{function}({', '.join(args)})", "double")

    def extended(self, x: Value, type: str, name: str) -> Value:
        return (
            Value(f"(double){x}", "double") if not str(x).isidentifier() else self._let(name, f"(double){x}", "double")
        )

    def truncated(self, x: Value, type: str, name: str) -> Value:
        return self._let(name, f"(float)({x})", "float") if str(x).isidentifier() else Value(f"(float)({x})", "float")

    def where_rare(self, mask: Value, op: str, args: Sequence[Value], otherwise: Value) -> Value:
        function = op.removesuffix(".far")
        wide = ", ".join(f"(double){arg}" for arg in args)
        return self._let("either", f"{mask} ? ({otherwise.type}){function}({wide}) : {otherwise}", otherwise.type)

    def text(self, op: str, result: Value) -> str:
        """Return the finished function."""
        kind = self.arguments[0].type
        parameters = ", ".join(f"{kind} {argument}" for argument in self.arguments)
        name = function_name(op, self.precision.dtype)
        return "\n".join(
            [f"static INLINE {kind} {name}({parameters})", "{", *self.lines, f"    return {result};", "}\n"]
        )


def c_function(op: str, dtype: DType) -> str:
    """Write the C function of a primitive that is more than an operator."""
    precision = next(each for each in PRECISIONS if each.dtype is dtype)
    names: Sequence[str] = ("x", "y") if op in BINARY_OPS else ("x",)
    f = _CFunction(precision, names)
    f.arguments = [Value(name, f.vector) for name in names]
    f._used = set(names) | KEYWORDS
    try:
        result = RULES[op](f, *f.arguments)
    except KeyError as error:
        raise CompilerError(f"{op} can't be written as C: {error}") from None
    return f.text(op, result)
