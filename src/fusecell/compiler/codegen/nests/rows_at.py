"""Rows of the operands and of the result of a nest: where each row of the step that runs is in memory."""

from __future__ import annotations

from dataclasses import dataclass

from fusecell.compiler.codegen.kernel_abi import STEP, Layout, RowAddress, StepRows, row_address
from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_text import Integer, Value
from fusecell.compiler.schedule.plan import Location

__all__ = ["RowsAt", "is_callers", "rows_at"]


@dataclass(frozen=True, slots=True)
class RowsAt:
    """Rows of a value.

    Attributes:
        address: of row 0.
        stride: bytes between rows; 0 where all rows are one, as of a weight.
        exact: whether nothing behind a row's features may be read or written, as in a caller's tensor.
        order: address of the numbers of the caller's rows, if the rows are in the caller's order.
    """

    address: Value
    stride: Integer
    exact: bool = False
    order: Value | None = None

    def row(self, f: Function, row: Integer) -> Value:
        """Return the address of a row."""
        if self.order is not None:
            row = f.load_int(f.at(self.order, f.mul(row, 8)), "caller_row", once=True)
        return f.at(self.address, f.mul(row, self.stride))


def rows_at(f: Function, layout: Layout, location: Location, at: StepRows = STEP) -> RowsAt:
    """Return the rows of a value of one step."""
    rows: RowAddress = row_address(f, layout, f.module, location.buffer, at)
    start = f.at(rows.start, location.offset * f.module.itemsize)
    order = layout.buffer(f, "order") if rows.in_caller_order else None
    return RowsAt(start, rows.stride, is_callers(location), order)


def is_callers(location: Location) -> bool:
    """Whether a value is in a tensor of the caller's; saved values are too, but have slack behind them."""
    return location.buffer.scope == "user"
