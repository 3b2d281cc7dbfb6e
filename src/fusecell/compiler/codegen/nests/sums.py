"""Gradients of weights that are nests: contractions summed over rows and steps, and values added at positions.

    @<sum>:  for run of rows, for row:          in the order in which the steps run
                 accumulators += the nest of the row

Of a contraction rows are summed axes as any others, the outermost: a tile of accumulators stays in registers over all
rows of the range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_text import Integer, Value
from fusecell.compiler.codegen.nests.contraction import Axis, Contraction, Pointers
from fusecell.compiler.codegen.nests.lanes import store_lanes
from fusecell.compiler.codegen.nests.moves import add_run_to, position
from fusecell.compiler.codegen.nests.stage import contraction_axes
from fusecell.compiler.ir.primitives import LANES

__all__ = ["SummedRows", "emit_contract_sum", "emit_scatter_sum"]

Attrs = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SummedRows:
    """Rows of both operands that are added up.

    Attributes:
        a, b: address of the first row of each.
        runs, rows: how many runs there are, and rows of each.
        run_bytes, row_bytes: bytes from each to the next, of a and of b.
        shared_by: the number of the thread, and of threads, that share the accumulators.
        exact: of each operand, whether nothing behind its last row may be read.
    """

    a: Value
    b: Value
    runs: Integer
    rows: Integer
    run_bytes: tuple[Integer, Integer]
    row_bytes: tuple[Integer, Integer]
    shared_by: tuple[Value, Value]
    exact: tuple[bool, bool]


def emit_contract_sum(f: Function, attrs: Attrs, rows: SummedRows, acc: Value, opens: Value) -> None:
    """Write a contraction of each row, summed.

    Arguments:
        opens: whether the accumulators count as zero.
    """
    item = f.module.itemsize
    axes = contraction_axes(attrs, item, _result_strides(f, attrs))
    result = [axis for axis in axes if axis.out is not None]
    inner = [axis for axis in axes if axis.out is None]
    run = Axis("run", rows.runs, *rows.run_bytes, None)
    row = Axis("row", rows.rows, *rows.row_bytes, None)
    at = Pointers(f.at(rows.a, attrs["a"]["offset"] * item), f.at(rows.b, attrs["b"]["offset"] * item), acc)
    contraction = Contraction(f, result, [run, row, *inner], rows.exact, opens)
    if not contraction.sums_lanes:
        contraction.emit(at, rows.shared_by)
        return
    # Partial sums are joined row by row: a sum that went on in another call would otherwise be joined elsewhere.
    with f.for_range("run", 0, rows.runs) as run_number:
        of_run = at.along(f, run, run_number)
        with f.for_range("row", 0, rows.rows) as row_number:
            is_first = f.eq(f.add(run_number, row_number), 0, "is_first")
            opens_now = f.and_(opens, is_first, "opens_now")
            nest = Contraction(f, result, inner, rows.exact, opens_now)
            nest.emit(of_run.along(f, row, row_number), rows.shared_by)


def _result_strides(f: Function, attrs: Attrs) -> list[Integer]:
    """Return the bytes between elements along each axis of the result; the rows of a matrix are padded."""
    shape, result, item = attrs["shape"], attrs["result"], f.module.itemsize
    prefixes = [math.prod(shape[:axes]) for axes in range(len(shape) + 1)]
    row_axes = prefixes.index(result[0]) if len(result) == 2 else 0
    strides: list[Integer] = []
    for axis in range(len(shape)):
        if axis < row_axes:
            strides.append(math.prod(shape[axis + 1 : row_axes]) * f.module.row_bytes(result[1]))
        else:
            strides.append(math.prod(shape[axis + 1 :]) * item)
    return strides


def emit_scatter_sum(f: Function, attrs: Attrs, rows: SummedRows, acc: Value, opens: Value) -> None:
    """Write values of each row added at its positions."""
    count, inner, picks = attrs["count"], attrs["inner"], attrs["picks"]
    item, row_bytes = f.module.itemsize, f.module.row_bytes(inner)
    # Rows of the accumulators are divided among threads: each adds what belongs to its own.
    first, last = f.partition(count, *rows.shared_by)
    with f.if_(opens, "opens"), f.for_range("line", first, last) as line:
        line_at = f.at(acc, f.mul(line, row_bytes))
        with f.for_range("column", 0, row_bytes, LANES * item) as column:
            store_lanes(f, f.zero, f.at(line_at, column), item, LANES)
    with f.for_range("run", 0, rows.runs) as run, f.for_range("row", 0, rows.rows) as row:
        positions, values = (
            f.at(f.at(start, f.mul(run, run_bytes)), f.mul(row, bytes_))
            for start, run_bytes, bytes_ in zip((rows.a, rows.b), rows.run_bytes, rows.row_bytes, strict=True)
        )
        with f.for_range("pick", 0, picks) as pick:
            place = position(f, f.at(positions, f.mul(pick, item)), count)
            is_own = f.and_(f.ge(place, first, "is_after"), f.lt(place, last, "is_before"), "is_own")
            with f.if_(is_own, "own"):
                value = f.at(values, f.mul(pick, inner * item))
                add_run_to(f, value, f.at(acc, f.mul(place, row_bytes)), inner, rows.exact[1])
