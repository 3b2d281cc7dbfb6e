"""Pointwise primitives as expressions of C, one feature at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fusecell.compiler.codegen.vector_math import OPS
from fusecell.compiler.ir.graph import Node
from fusecell.compiler.ir.sizes import DType
from fusecell.exporting.c_source.functions import function_name

__all__ = ["POINTWISE", "expression"]

Spell = Callable[..., str]


def _infix(sign: str) -> Spell:
    return lambda a, b: f"{a} {sign} {b}"


OPERATORS: Mapping[str, Spell] = {
    "add": _infix("+"),
    "sub": _infix("-"),
    "mul": _infix("*"),
    "div": _infix("/"),
    "neg": lambda a: f"-({a})",
    "lt": _infix("<"),
    "le": _infix("<="),
    "gt": _infix(">"),
    "ge": _infix(">="),
    "eq": _infix("=="),
    "ne": _infix("!="),
    "and": _infix("&&"),
    "or": _infix("||"),
    "not": lambda a: f"!{a}",
    "where": lambda a, b, c: f"{a} ? {b} : {c}",
    "broadcast": lambda a: a,
}
"""What C has an operator for; everything else is a function of `functions`."""
POINTWISE = frozenset(OPERATORS) | frozenset(OPS)
"""The pointwise primitives that C is written for; a test holds them to the table of primitives."""


def expression(node: Node, args: Sequence[str], needs: Callable[[str], None], dtype: DType) -> str:
    """Spell a pointwise value; ``needs`` is told of each function that it calls."""
    if node.op in OPERATORS:
        return OPERATORS[node.op](*(f"({arg})" if arg.startswith("-") else arg for arg in args))
    needs(node.op)
    return f"{function_name(node.op, dtype)}({', '.join(args)})"
