"""Strips: an operand of a sum over rows, laid out as its tiles read it.

A tile reads eight neighbouring features of row after row, and again for every block of columns of the other operand.
Where rows are long, each of these pieces lies in another line, soon in another page, and all of them in few sets of L1.
So the pieces of a stretch of rows are first put one behind the other.
"""

from __future__ import annotations

from fusecell.compiler.codegen.llvm_builder import Function, Module, Value
from fusecell.compiler.codegen.microkernel import tiling
from fusecell.compiler.schedule.plan import Plan, Sum

__all__ = ["PIECE", "STRETCH", "STRIPS", "emit_strips", "has_strips", "strip_bytes", "strips_bytes"]

STRETCH = 128
"""So many rows of an operand's tile stay in L1 while it meets all of the other operand."""
STRIPS = "strips"
"""Their buffer, which one sum has after the other."""
PIECE = 8
"""Features of a piece, as many as the highest tile takes."""
_LONG, _OFTEN = 2048, 16
"""Bytes of a row, and blocks of the other operand's columns, from which strips are worth being made."""
_AT_ONCE = 4


def has_strips(module: Module, plan: Plan, found: Sum) -> bool:
    """Whether a sum's first operand is read from strips: never a caller's rows, as pieces may go beyond the last."""
    if found.a is None or found.height * module.bytes < _LONG or module.blocks(found.width) < _OFTEN:
        return False
    return found.operands[found.a].buffer not in plan.gathered.values()


def strip_bytes(module: Module) -> int:
    """From one tile's strip to the next."""
    return STRETCH * PIECE * module.bytes


def strips_bytes(module: Module, found: Sum) -> int:
    """All strips of a sum."""
    most = tiling(module.target, module.dtype, 1, module.blocks(found.width)).most
    return -(-found.height // most) * strip_bytes(module)


def emit_strips(module: Module) -> str:
    """The function that puts the pieces of some rows for some tiles into strips, emitted on first use."""
    name = "strips"
    if name in module.made:
        return name
    module.made.add(name)
    head = ("ptr noalias %to", "ptr %from", "i64 %from.k", "i64 %rows", "i64 %tiles", "i64 %tile.bytes")
    f = Function(module, name, *head)
    most = f.let("most", f"and i64 %rows, {-_AT_ONCE}")
    for start, stop, rows in ((0, most, _AT_ONCE), (most, "%rows", 1)):
        with f.loop("k", start, stop, rows) as k:
            source, target = f.at("%from", f.mul(k, "%from.k")), f.at("%to", f.mul(k, PIECE * module.bytes))
            with f.loop("tile", 0, "%tiles") as tile:
                _move(f, f.at(source, f.mul(tile, "%tile.bytes")), f.at(target, f.mul(tile, strip_bytes(module))), rows)
    f.end()
    return name


def _move(f: Function, source: str, target: str, rows: int) -> None:
    """A tile's pieces of so many rows: all are read before any is written."""
    piece = f"<{PIECE} x {f.module.scalar}>"
    offsets: list[Value] = [f.mul("%from.k", row) for row in range(rows)]
    values = [f.let("piece", f"load {piece}, ptr {f.at(source, o)}, align {f.module.bytes}") for o in offsets]
    for row, value in enumerate(values):
        here = f.at(target, row * PIECE * f.module.bytes)
        f.do(f"store {piece} {value}, ptr {here}, align {PIECE * f.module.bytes}")
