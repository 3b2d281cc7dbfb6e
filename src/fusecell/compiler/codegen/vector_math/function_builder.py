"""Writes one vector function as LLVM IR text, a named value at a time."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fusecell.compiler.codegen.vector_math.constants import F64, Precision
from fusecell.compiler.ir.primitives import LANES

Operand = str | float
"""The name of a value in the function, or a number that stands in every lane."""


def function_name(op: str, dtype: str) -> str:
    """Return the name of the IR function for an op: ``function_name("tanh", "f32") == "@fc.tanh.f32"``."""
    return f"@fc.{op}.{dtype}"


def literal(value: float, scalar: str) -> str:
    """Spell a number so that LLVM reads back its exact bits (a float is written as the double it equals)."""
    if scalar == "float":
        value = struct.unpack("<f", struct.pack("<f", value))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"


@dataclass
class VectorFunction:
    """The body of one function from vectors to a vector, and the declarations it needs."""

    precision: Precision
    arguments: tuple[str, ...]
    lines: list[str] = field(default_factory=list)
    declares: set[str] = field(default_factory=set)
    helpers: list[str] = field(default_factory=list)
    """Definitions of functions that this one calls."""
    _uses: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for argument in self.arguments:
            self._uses.setdefault(argument.removeprefix("%"), 1)

    @property
    def vector(self) -> str:
        return f"<{LANES} x {self.precision.scalar}>"

    @property
    def ints(self) -> str:
        return f"<{LANES} x i{self.precision.bits}>"

    def note(self, text: str) -> None:
        self.lines.append(f"  ; {text}")

    def value(self, name: str, instruction: str) -> str:
        """Append ``%name = instruction`` and return the name, made unique."""
        count = self._uses.get(name, 0)
        self._uses[name] = count + 1
        unique = f"%{name}.{count}" if count else f"%{name}"
        self.lines.append(f"  {unique} = {instruction}")
        return unique

    def operand(self, x: Operand) -> str:
        if isinstance(x, str):
            return x
        return f"splat ({self.precision.scalar} {literal(x, self.precision.scalar)})"

    def int_operand(self, x: str | int) -> str:
        return x if isinstance(x, str) else f"splat (i{self.precision.bits} {x})"

    # arithmetic

    def _binary(self, name: str, opcode: str, a: Operand, b: Operand) -> str:
        return self.value(name, f"{opcode} {self.vector} {self.operand(a)}, {self.operand(b)}")

    def add(self, name: str, a: Operand, b: Operand) -> str:
        return self._binary(name, "fadd", a, b)

    def sub(self, name: str, a: Operand, b: Operand) -> str:
        return self._binary(name, "fsub", a, b)

    def mul(self, name: str, a: Operand, b: Operand) -> str:
        return self._binary(name, "fmul", a, b)

    def div(self, name: str, a: Operand, b: Operand) -> str:
        return self._binary(name, "fdiv", a, b)

    def neg(self, name: str, a: Operand) -> str:
        return self.value(name, f"fneg {self.vector} {self.operand(a)}")

    def intrinsic(self, name: str, function: str, *args: Operand) -> str:
        """Call ``llvm.<function>``; only those that become instructions on every target belong here."""
        symbol = f"@llvm.{function}.v{LANES}{self.precision.dtype}"
        self.declares.add(f"declare {self.vector} {symbol}({', '.join([self.vector] * len(args))})")
        given = ", ".join(f"{self.vector} {self.operand(a)}" for a in args)
        return self.value(name, f"call {self.vector} {symbol}({given})")

    def fma(self, name: str, a: Operand, b: Operand, c: Operand) -> str:
        """a * b + c, rounded once."""
        return self.intrinsic(name, "fma", a, b, c)

    def horner(self, name: str, x: str, coefficients: Sequence[float], *, start: Operand | None = None) -> str:
        """c0 + x c1 + x^2 c2 ..., plus ``start`` times the next power of x."""
        rest = list(coefficients)
        p: Operand = rest.pop() if start is None else start
        while rest:
            p = self.fma(name, p, x, rest.pop())
        return self.operand(p)

    # choices; an ordered comparison with NaN is false, so at_most and at_least hand on the NaN of x

    def compare(self, name: str, predicate: str, a: Operand, b: Operand) -> str:
        return self.value(name, f"fcmp {predicate} {self.vector} {self.operand(a)}, {self.operand(b)}")

    def select(self, name: str, mask: str, a: Operand, b: Operand) -> str:
        first, second = self.operand(a), self.operand(b)
        return self.value(name, f"select <{LANES} x i1> {mask}, {self.vector} {first}, {self.vector} {second}")

    def at_most(self, name: str, x: str, limit: Operand) -> str:
        """min(x, limit), and NaN where x is NaN."""
        return self.select(name, self.compare(f"{name}.over", "ogt", x, limit), limit, x)

    def at_least(self, name: str, x: str, limit: Operand) -> str:
        """max(x, limit), and NaN where x is NaN."""
        return self.select(name, self.compare(f"{name}.under", "olt", x, limit), limit, x)

    # bits

    def bits(self, name: str, x: str) -> str:
        return self.value(name, f"bitcast {self.vector} {x} to {self.ints}")

    def from_bits(self, name: str, x: str) -> str:
        return self.value(name, f"bitcast {self.ints} {x} to {self.vector}")

    def int_op(self, name: str, opcode: str, a: str | int, b: str | int) -> str:
        return self.value(name, f"{opcode} {self.ints} {self.int_operand(a)}, {self.int_operand(b)}")

    # float32 in double arithmetic

    def widened(self) -> VectorFunction:
        """The same function, to be written on in double."""
        return replace(self, precision=F64)

    def widen(self, narrow: VectorFunction, x: str) -> str:
        return self.value("wide", f"fpext {narrow.vector} {x} to {self.vector}")

    def narrowed(self, wide: VectorFunction, x: str) -> str:
        return self.value("narrow", f"fptrunc {wide.vector} {x} to {self.vector}")

    # the whole

    def where_rare(self, mask: str, op: str, x: str, otherwise: str) -> str:
        """The function of ``op`` where the mask is set, called only if some lane needs it."""
        reduction = f"@llvm.vector.reduce.or.v{LANES}i1"
        self.declares.add(f"declare i1 {reduction}(<{LANES} x i1>)")
        needed = self.value("needed", f"call i1 {reduction}(<{LANES} x i1> {mask})")
        self.lines += ["  br label %usual", "usual:", f"  br i1 {needed}, label %rare, label %done", "rare:"]
        name = function_name(op, self.precision.dtype)
        called = self.value("called", f"call {self.vector} {name}({self.vector} {x})")
        merged = self.select("merged", mask, called, otherwise)
        self.lines += ["  br label %done", "done:"]
        return self.value("either", f"phi {self.vector} [ {otherwise}, %usual ], [ {merged}, %rare ]")

    def definition(self, op: str, result: str, attributes: str = "alwaysinline nounwind") -> str:
        """The finished text: ``define internal ... { ... }``, helpers first."""
        given = ", ".join(f"{self.vector} {a}" for a in self.arguments)
        name = function_name(op, self.precision.dtype)
        head = f"define internal {self.vector} {name}({given}) {attributes} {{"
        body = "\n".join([head, *self.lines, f"  ret {self.vector} {result}", "}", ""])
        return "\n".join([*self.helpers, body])
