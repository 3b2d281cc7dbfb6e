"""Builder of one vector function as LLVM text: straight-line code from vectors to a vector."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from fusecell.compiler.codegen.llvm_text import TextBuilder, Value, literal
from fusecell.compiler.codegen.vector_math.constants import F64, Precision
from fusecell.compiler.ir.primitives import LANES

__all__ = ["Operand", "VectorFunction", "function_name"]

Operand = Value | float
"""A value of the function, or a number that is in every lane."""
IntOperand = Value | int
_MASK = f"<{LANES} x i1>"


def function_name(op: str, dtype: str) -> str:
    """Return the name of the IR function for an op: ``function_name("tanh", "f32") == "@fc.tanh.f32"``."""
    return f"@fc.{op}.{dtype}"


class VectorFunction(TextBuilder):
    """Body of one function from vectors to a vector, and the declarations it needs.

    Attributes:
        helpers: definitions of functions that this one calls.
    """

    def __init__(self, precision: Precision, names: Sequence[str]) -> None:
        self.precision = precision
        self.arguments = [Value(f"%{name}", self.vector) for name in names]
        super().__init__(self.arguments, set())
        self.helpers: list[str] = []

    @property
    def vector(self) -> str:
        """LLVM's type of 16 numbers."""
        return f"<{LANES} x {self.precision.scalar}>"

    @property
    def ints(self) -> str:
        """LLVM's type of the same bits as 16 integers."""
        return f"<{LANES} x i{self.precision.bits}>"

    def operand(self, x: Operand) -> Value:
        """Return a value as it is, a number as the vector that has it in every lane."""
        if isinstance(x, Value):
            return x
        return Value(f"splat ({self.precision.scalar} {literal(x, self.precision.dtype)})", self.vector)

    # Arithmetic.

    def _vector(self, name: str, instruction: str) -> Value:
        return self.let(name, instruction, self.vector)

    def _binary(self, name: str, opcode: str, a: Operand, b: Operand) -> Value:
        return self._vector(name, f"{opcode} {self.vector} {self.operand(a)}, {self.operand(b)}")

    def add(self, a: Operand, b: Operand, name: str) -> Value:
        return self._binary(name, "fadd", a, b)

    def sub(self, a: Operand, b: Operand, name: str) -> Value:
        return self._binary(name, "fsub", a, b)

    def mul(self, a: Operand, b: Operand, name: str) -> Value:
        return self._binary(name, "fmul", a, b)

    def div(self, a: Operand, b: Operand, name: str) -> Value:
        return self._binary(name, "fdiv", a, b)

    def neg(self, a: Operand, name: str) -> Value:
        return self._vector(name, f"fneg {self.vector} {self.operand(a)}")

    def lanewise(self, function: str, *args: Operand, name: str) -> Value:
        """Call ``llvm.<function>``; only those that become instructions on every target belong here."""
        symbol = f"{function}.v{LANES}{self.precision.dtype}"
        return self._vector(name, self.intrinsic(symbol, *map(self.operand, args), result=self.vector))

    def fabs(self, x: Operand, name: str) -> Value:
        return self.lanewise("fabs", x, name=name)

    def copysign(self, magnitude: Operand, sign: Operand, name: str) -> Value:
        return self.lanewise("copysign", magnitude, sign, name=name)

    def fma(self, a: Operand, b: Operand, c: Operand, name: str) -> Value:
        """Return a * b + c, rounded once."""
        return self.lanewise("fma", a, b, c, name=name)

    def horner(self, x: Value, coefficients: Sequence[float], name: str, *, start: Operand | None = None) -> Value:
        """Return c0 + x c1 + x^2 c2 ..., plus ``start`` times the next power of x."""
        rest = list(coefficients)
        p: Operand = rest.pop() if start is None else start
        while rest:
            p = self.fma(p, x, rest.pop(), name)
        return self.operand(p)

    # Choices. An ordered comparison with NaN is false, so at_most and at_least pass on the NaN of x.

    def fcmp(self, predicate: str, a: Operand, b: Operand, name: str) -> Value:
        """Compare lane by lane, by LLVM's predicate: ``olt`` is less and neither NaN, ``ugt`` greater or a NaN."""
        return self.let(name, f"fcmp {predicate} {self.vector} {self.operand(a)}, {self.operand(b)}", _MASK)

    def select(self, mask: Value, a: Operand, b: Operand, name: str) -> Value:
        first, second = self.operand(a), self.operand(b)
        return self._vector(name, f"select {_MASK} {mask}, {self.vector} {first}, {self.vector} {second}")

    def at_most(self, x: Value, limit: Operand, name: str) -> Value:
        """Return min(x, limit), and NaN where x is NaN."""
        return self.select(self.fcmp("ogt", x, limit, f"{name}.over"), limit, x, name)

    def at_least(self, x: Value, limit: Operand, name: str) -> Value:
        """Return max(x, limit), and NaN where x is NaN."""
        return self.select(self.fcmp("olt", x, limit, f"{name}.under"), limit, x, name)

    # Bits.

    def bits(self, x: Value, name: str) -> Value:
        """Return the bits of numbers, as integers."""
        return self.let(name, f"bitcast {self.vector} {x} to {self.ints}", self.ints)

    def from_bits(self, x: Value, name: str) -> Value:
        """Return the numbers that have these bits."""
        return self._vector(name, f"bitcast {self.ints} {x} to {self.vector}")

    def int_add(self, a: IntOperand, b: IntOperand, name: str) -> Value:
        return self._int("add", a, b, name)

    def int_sub(self, a: IntOperand, b: IntOperand, name: str) -> Value:
        return self._int("sub", a, b, name)

    def and_(self, a: IntOperand, b: IntOperand, name: str) -> Value:
        return self._int("and", a, b, name)

    def or_(self, a: IntOperand, b: IntOperand, name: str) -> Value:
        return self._int("or", a, b, name)

    def xor(self, a: IntOperand, b: IntOperand, name: str) -> Value:
        return self._int("xor", a, b, name)

    def shl(self, a: IntOperand, bits: int, name: str) -> Value:
        return self._int("shl", a, bits, name)

    def lshr(self, a: IntOperand, bits: int, name: str) -> Value:
        return self._int("lshr", a, bits, name)

    def _int(self, opcode: str, a: IntOperand, b: IntOperand, name: str) -> Value:
        operands = (x if isinstance(x, Value) else f"splat (i{self.precision.bits} {x})" for x in (a, b))
        return self.let(name, f"{opcode} {self.ints} {', '.join(operands)}", self.ints)

    def is_nonzero(self, x: Value, name: str) -> Value:
        """Return the mask of the lanes that have any bit set."""
        return self.let(name, f"icmp ne {self.ints} {x}, zeroinitializer", _MASK)

    # Single lanes.

    def lane(self, x: Value, lane: int, name: str) -> Value:
        return self.let(name, f"extractelement {self.vector} {x}, i32 {lane}", self.precision.scalar)

    def with_lane(self, x: Value, lane: int, scalar: Value, name: str) -> Value:
        """Return a vector with one lane replaced."""
        return self._vector(name, f"insertelement {self.vector} {x}, {scalar.type} {scalar}, i32 {lane}")

    def call_scalar(self, function: str, *args: Value, name: str) -> Value:
        """Call a function of the C library, from doubles to a double."""
        self.declares.add(f"declare double @{function}({', '.join(['double'] * len(args))})")
        return self.let(name, self.calling(f"@{function}", args, "double"), "double")

    # float32 in double arithmetic.

    def widened(self) -> VectorFunction:
        """Return a builder of the same function in double: what either writes follows what the other wrote."""
        double = copy.copy(self)
        double.precision = F64
        return double

    def extended(self, x: Value, type: str, name: str) -> Value:
        """Convert to a wider format, exactly."""
        return self.let(name, f"fpext {x.type} {x} to {type}", type)

    def truncated(self, x: Value, type: str, name: str) -> Value:
        """Convert to a narrower format, rounded."""
        return self.let(name, f"fptrunc {x.type} {x} to {type}", type)

    # The whole.

    def where_rare(self, mask: Value, op: str, args: Sequence[Value], otherwise: Value) -> Value:
        """Return the function of ``op`` where the mask is set, called only if some lane needs it."""
        # A branch for all lanes together, and a select within: what a lane gets doesn't depend on its neighbours.
        needed = self.let("needed", self.intrinsic(f"vector.reduce.or.v{LANES}i1", mask, result="i1"), "i1")
        self.lines += ["  br label %usual", "usual:", f"  br i1 {needed}, label %rare, label %done", "rare:"]
        name = function_name(op, self.precision.dtype)
        called = self._vector("called", self.calling(name, args, self.vector))
        merged = self.select(mask, called, otherwise, "merged")
        self.lines += ["  br label %done", "done:"]
        return self._vector("either", f"phi {self.vector} [ {otherwise}, %usual ], [ {merged}, %rare ]")

    def definition(self, op: str, result: Value, attributes: str = "alwaysinline nounwind") -> str:
        """Return the finished text: ``define internal ... { ... }``, helpers first."""
        params = ", ".join(f"{self.vector} {argument}" for argument in self.arguments)
        head = f"define internal {self.vector} {function_name(op, self.precision.dtype)}({params}) {attributes} {{"
        body = "\n".join([head, *self.lines, f"  ret {self.vector} {result}", "}", ""])
        return "\n".join([*self.helpers, body])
