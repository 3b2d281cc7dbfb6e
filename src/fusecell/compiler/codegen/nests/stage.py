"""Function of a stage that is a nest: a loop over rows, around the nest's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fusecell.compiler.codegen.kernel_abi import Layout
from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_module import Module
from fusecell.compiler.codegen.llvm_text import Integer
from fusecell.compiler.codegen.nests.contraction import Axis, Contraction, Pointers
from fusecell.compiler.codegen.nests.moves import emit_gather, emit_interleave, emit_scatter_add, emit_take
from fusecell.compiler.codegen.nests.reductions import emit_reduce, emit_scan
from fusecell.compiler.codegen.nests.rows_at import RowsAt, rows_at
from fusecell.compiler.codegen.nests.sorting import emit_argsort
from fusecell.compiler.codegen.stage import FROM, STAGE_PARAMS, TO
from fusecell.compiler.schedule.plan import Plan, Stage

__all__ = ["contraction_axes", "emit_nest"]

_EMITTERS = {
    "gather": emit_gather,
    "reduce": emit_reduce,
    "scan": emit_scan,
    "take": emit_take,
    "scatter_add": emit_scatter_add,
    "argsort": emit_argsort,
}


def emit_nest(module: Module, layout: Layout, plan: Plan, stage: Stage) -> None:
    """Write the function of a stage that is a nest."""
    assert stage.nest is not None, f"{stage.name} is no nest"
    node = plan.graph[stage.nest]
    f = Function(module, stage.name, *STAGE_PARAMS)
    operands = [rows_at(f, layout, stage.operands[arg]) for arg in node.args]
    out = rows_at(f, layout, stage.totals[stage.nest])
    if node.op == "contract":
        _contract(f, node.attrs, operands, out)
    else:
        exact = [operand.exact for operand in operands]
        with f.for_range("row", FROM, TO) as row:
            sources = [operand.row(f, row) for operand in operands]
            if node.op == "interleave":
                sizes = [math.prod(plan.graph[arg].type.shape) for arg in node.args]
                emit_interleave(f, node.attrs, sizes, sources, exact, out.row(f, row))
            else:
                _EMITTERS[node.op](f, node.attrs, sources, exact, out.row(f, row))
    f.end()


def contraction_axes(attrs: Mapping[str, Any], item: int, strides: Sequence[Integer] | None = None) -> list[Axis]:
    """Return the axes of a contraction, neighbours that are one in all arrays as one.

    Arguments:
        strides: bytes between elements of the result along its axes; by default it is contiguous.
    """
    shape, count = attrs["shape"], attrs["count"]
    if strides is None:
        strides = [math.prod(shape[axis + 1 :]) * item for axis in range(len(shape))]
    outs: list[Integer | None] = [*strides, *[None] * len(count)]
    axes: list[Axis] = []
    for number, (extent, out) in enumerate(zip((*shape, *count), outs, strict=True)):
        a, b = (attrs[name]["strides"][number] * item for name in ("a", "b"))
        if extent == 1:
            continue
        axis = Axis(f"{'k' if out is None else 'i'}{number}", extent, a, b, out)
        before = axes[-1] if axes else None
        if before is not None and _continue(before, axis):
            axes[-1] = Axis(before.name, int(before.extent) * extent, a, b, out)
        else:
            axes.append(axis)
    return axes


def _continue(before: Axis, axis: Axis) -> bool:
    """Whether two axes are one in memory."""
    if (before.out is None) != (axis.out is None):
        return False
    pairs = [(before.a, axis.a), (before.b, axis.b)]
    if before.out is not None and axis.out is not None:
        pairs.append((before.out, axis.out))
    return all(
        isinstance(outer, int) and isinstance(inner, int) and outer == inner * axis.extent for outer, inner in pairs
    )


def _contract(f: Function, attrs: Mapping[str, Any], operands: Sequence[RowsAt], out: RowsAt) -> None:
    """Write a contraction of each row; where one operand is a weight, rows may be an axis of its tiles."""
    item = f.module.itemsize
    axes = contraction_axes(attrs, item)
    result = [axis for axis in axes if axis.out is not None]
    summed = [axis for axis in axes if axis.out is None]
    a, b = operands
    exact = (a.exact, b.exact)
    is_shared = 0 in (a.stride, b.stride) and not (a.order or b.order)
    if is_shared:
        rows = Axis("row", f.sub(TO, FROM, "rows"), a.stride, b.stride, out.stride)
        contraction = Contraction(f, [rows, *result], summed, exact)
        at = Pointers(a.row(f, FROM), b.row(f, FROM), out.row(f, FROM))
        with f.if_(f.gt(TO, FROM, "has_rows"), "has_rows"):
            contraction.emit(_offset(f, attrs, at))
        return
    contraction = Contraction(f, result, summed, exact)
    with f.for_range("row", FROM, TO) as row:
        contraction.emit(_offset(f, attrs, Pointers(a.row(f, row), b.row(f, row), out.row(f, row))))


def _offset(f: Function, attrs: Mapping[str, Any], at: Pointers) -> Pointers:
    """Return the addresses of the first elements."""
    item = f.module.itemsize
    return Pointers(f.at(at.a, attrs["a"]["offset"] * item), f.at(at.b, attrs["b"]["offset"] * item), at.out)
