"""What each pointwise primitive is in LLVM: the fourth reading of the table in ``ir.primitives``."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from fusecell.compiler.codegen.llvm_builder import LANES, Function
from fusecell.compiler.codegen.vector_math import BINARY_OPS, UNARY_OPS

__all__ = ["VALUES", "literal"]

Emit = Callable[[Function, list[str], str], str]


def _instruction(opcode: str) -> Emit:
    return lambda f, args, name: f.let(name, f"{opcode} {f.module.vector} {', '.join(args)}")


def _logic(opcode: str) -> Emit:
    return lambda f, args, name: f.let(name, f"{opcode} <{LANES} x i1> {', '.join(args)}")


def _function(op: str) -> Emit:
    return lambda f, args, name: f.math(op, *args, name=name)


def _not(f: Function, args: list[str], name: str) -> str:
    return f.let(name, f"xor <{LANES} x i1> {args[0]}, splat (i1 true)")


def _where(f: Function, args: list[str], name: str) -> str:
    vector = f.module.vector
    return f.let(name, f"select <{LANES} x i1> {args[0]}, {vector} {args[1]}, {vector} {args[2]}")


def _broadcast(f: Function, args: list[str], name: str) -> str:
    """A row's one number is in all lanes already."""
    return args[0]


# Ordered comparisons are false for NaN, as torch's are; only "ne" is true.
_COMPARE = {"lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge", "eq": "oeq", "ne": "une"}

VALUES: Mapping[str, Emit] = {
    **{op: _function(op) for op in (*UNARY_OPS, *BINARY_OPS)},
    "neg": _instruction("fneg"),
    "add": _instruction("fadd"),
    "sub": _instruction("fsub"),
    "mul": _instruction("fmul"),
    "div": _instruction("fdiv"),
    **{op: _instruction(f"fcmp {condition}") for op, condition in _COMPARE.items()},
    "and": _logic("and"),
    "or": _logic("or"),
    "not": _not,
    "where": _where,
    "broadcast": _broadcast,
}


def literal(value: float, dtype: str) -> str:
    """A number as LLVM writes it, exact: a float32 is spelled by the double it is rounded to."""
    if dtype == "f32":
        try:
            value = struct.unpack("<f", struct.pack("<f", value))[0]
        except OverflowError:
            value = float("inf") if value > 0 else float("-inf")
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"
