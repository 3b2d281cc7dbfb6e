"""Pointwise primitives as LLVM instructions, one vector at a time.

Each entry writes the instructions of one primitive of `ir.primitives`, for the vectors of its arguments. Tables with
the same keys have its type, its evaluation in the interpreter and the ATen operation that it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_text import Value
from fusecell.compiler.codegen.vector_math import BINARY_OPS, UNARY_OPS

__all__ = ["POINTWISE_OPS"]

Emit = Callable[..., Value]
"""Takes the builder, the vectors of the arguments and, as ``name``, the name of the result."""


def _math(op: str) -> Emit:
    return lambda f, *args, name: f.math(op, *args, name=name)


def _compare(predicate: str) -> Emit:
    return lambda f, a, b, name: f.fcmp(predicate, a, b, name)


def _broadcast(f: Function, number: Value, name: str) -> Value:
    """Return a row's one number unchanged: it has been loaded into all lanes."""
    return number


POINTWISE_OPS: Mapping[str, Emit] = {
    **{op: _math(op) for op in (*UNARY_OPS, *BINARY_OPS)},
    # An instruction, though there is a vector function: negation is exact either way.
    "neg": Function.fneg,
    "add": Function.fadd,
    "sub": Function.fsub,
    "mul": Function.fmul,
    "div": Function.fdiv,
    # Ordered comparisons are false for NaN, as torch's are; only "ne" is true.
    "lt": _compare("olt"),
    "le": _compare("ole"),
    "gt": _compare("ogt"),
    "ge": _compare("oge"),
    "eq": _compare("oeq"),
    "ne": _compare("une"),
    "and": Function.and_,
    "or": Function.or_,
    "not": Function.not_,
    "where": Function.select,
    "broadcast": _broadcast,
}
