"""Write graph nodes for torch's operations: broadcasting, reductions, products with weights, sums over rows.

Moves of features, which all of these may need, are in `feature_moves`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fusecell.compiler.frontend.feature_moves import FeatureMoves
from fusecell.compiler.frontend.feature_reductions import reduced_lines
from fusecell.compiler.frontend.index_maps import access_of, inverse
from fusecell.compiler.frontend.sums_over_rows import as_matrix
from fusecell.compiler.frontend.traced_values import (
    Index,
    Matrix,
    Row,
    Shape,
    Sum,
    Unsupported,
    Untraceable,
    Value,
    Vector,
    Weight,
    scalar,
)
from fusecell.compiler.ir.graph import Builder

__all__ = ["Operand", "Writer"]

Operand = Value | float | int | bool
_LOGIC = ("and", "or", "not")


class Writer(FeatureMoves):
    """Writer of a graph: its methods take and return traced values, and add nodes for them.

    Arguments:
        builder: the graph so far.
        rows: the number of rows N it is traced with.
        leaf: returns the node of a slot of the prologue, as a ``"matrix"`` or a ``"vector"``.
        literal: adds a tensor of numbers to the prologue.
    """

    def __init__(
        self,
        builder: Builder,
        rows: int,
        leaf: Callable[[int, str], int],
        literal: Callable[[torch.Tensor], Weight] | None = None,
    ) -> None:
        super().__init__(builder, rows)
        self.leaf = leaf
        self._literal = literal

    def literal(self, tensor: torch.Tensor) -> Weight:
        """Return a tensor of numbers that a rule computes, such as a table of sines, as a weight."""
        if self._literal is None:
            raise Untraceable("A table of numbers is needed where there is no prologue.")
        return self._literal(tensor)

    def only_rows(self, mask: Row, value: Row) -> Row:
        """Return a value that is zero in the rows for which a mask, one element of each row, doesn't hold."""
        dims = tuple(self.rows if axis == value.axis else 1 for axis in range(len(value.shape)))
        index = None if mask.index is None else mask.index.reshape([1] * (len(dims) - 1))
        return self.point("where", Row(dims, mask.node, value.axis, index), value, 0.0)

    # operands

    def row(self, operand: Operand) -> Row:
        """Return any operand of an elementwise op as a value per row; what is the same for all rows has no axis."""
        if isinstance(operand, Row):
            return operand
        if isinstance(operand, Weight):
            return self._weight(operand)
        if isinstance(operand, bool | int | float | complex):
            return self.const(scalar(operand))
        if isinstance(operand, Unsupported):
            raise Untraceable(operand.reason)
        raise Untraceable(
            "The step mixes the rows of the batch: it sums over them and uses the sum in each. Sum over features, "
            "x.sum(-1), or pass what the batch shares as an input."
        )

    def const(self, value: float, shape: Shape = (), axis: int | None = None, split: tuple[int, int] = (1, 1)) -> Row:
        """Return a tensor filled with a number."""
        row = Row(shape, self.builder.const(value), axis, None, split)
        return Row(shape, row.node, axis, np.zeros(row.features, dtype=np.int64), split)

    def _weight(self, weight: Weight) -> Row:
        if weight.fill is not None:
            return self.const(weight.fill, weight.shape)
        if isinstance(weight.view, Vector):
            return self.indexed(weight.shape, self.leaf(weight.view.slot, "vector"), None, weight.view.index)
        return Row(weight.shape, self.leaf(weight.slot, "vector"), None)

    def is_mask(self, row: Row) -> bool:
        return self.builder.nodes[row.node].type.kind == "mask"

    def number(self, operand: Operand) -> Row:
        """Return an operand as numbers: truth values become 1 and 0."""
        row = self.row(operand)
        return self.point("where", row, 1.0, 0.0) if self.is_mask(row) else row

    def truth(self, operand: Operand) -> Row:
        """Return an operand as truth values: true for numbers that are not 0."""
        row = self.row(operand)
        return row if self.is_mask(row) else self.point("ne", row, 0.0)

    # elementwise

    def point(self, op: str, *operands: Operand) -> Row:
        """Add an elementwise primitive of operands that broadcast as torch's do."""
        rows = [
            self.truth(value) if op in _LOGIC or (op == "where" and position == 0) else self.number(value)
            for position, value in enumerate(operands)
        ]
        shape = tuple(np.broadcast_shapes(*(row.shape for row in rows)))
        merged = next((row for row in rows if row.is_merged), None)
        if merged is not None:
            apart = [self._apart_like(row, merged) for row in rows]
            return self.point(op, *apart).merged(merged.split)
        axis = self.common_axis(rows, len(shape))
        features = shape if axis is None else shape[:axis] + shape[axis + 1 :]
        layout = self._layout(rows, shape, axis)
        node = self.builder.add(op, *(self._aligned(row, shape, axis, features, layout) for row in rows))
        if self.builder.size(node) == math.prod(features):
            return Row(shape, node, axis, None if layout is None else layout.reshape(features))
        return Row(shape, node, axis, np.zeros(features, dtype=np.int64))

    def _apart_like(self, row: Row, merged: Row) -> Row:
        """Return an operand with its dimension that meets the batch of a merged one as three: before, batch, after."""
        assert merged.axis is not None
        if row.is_merged:
            if (row.split, len(row.shape) - (row.axis or 0)) != (merged.split, len(merged.shape) - merged.axis):
                raise Untraceable("The step mixes the rows of the batch: two values meet whose batches differ.")
            return row.apart()
        axis = merged.axis - len(merged.shape) + len(row.shape)
        if axis < 0:
            return row
        index = row.full_index
        if index.size and bool((index == index.flat[0]).all()):
            return Row((), row.node, None, index.ravel()[:1].reshape(()))
        if row.axis is not None or row.shape[axis] != 1:
            raise Untraceable("The step mixes the rows of the batch: two values meet whose batches differ.")
        shape = (*row.shape[:axis], 1, 1, 1, *row.shape[axis + 1 :])
        return Row(shape, row.node, None, index.reshape(shape))

    def common_axis(self, rows: Sequence[Row], dims: int) -> int | None:
        """Return the batch dimension of what ``rows`` broadcast to."""
        # Counted from the end, as broadcasting aligns shapes.
        from_end = {len(row.shape) - row.axis for row in rows if row.axis is not None}
        if len(from_end) > 1:
            raise Untraceable("The step mixes the rows of the batch: two values meet whose batch dimensions differ.")
        return dims - from_end.pop() if from_end else None

    def _layout(self, rows: Sequence[Row], shape: Shape, axis: int | None) -> Index | None:
        """Return the order of features to compute in, as the feature of each element; None for torch's own order.

        Values that are all transposed alike are computed as they are stored: nothing is moved.
        """
        whole = [row for row in rows if row.shape == shape and row.axis == axis]
        stored = [row.index for row in whole if row.index is not None and row.index.size == self.features(row.node)]
        if len(stored) <= sum(row.index is None for row in whole):
            return None
        votes = [sum(np.array_equal(index, other) for other in stored) for index in stored]
        layout = stored[int(np.argmax(votes))]
        access = access_of(layout)
        if (
            max(votes) <= len(whole) - len(stored)
            or access is None
            or access.offset
            or min(access.strides, default=0) < 0
        ):
            return None
        return layout if inverse(layout, layout.size) is not None else None

    def _aligned(self, row: Row, shape: Shape, axis: int | None, features: Shape, layout: Index | None) -> int:
        """Return the node of an operand, with its features where those of the result are."""
        if row.index is layout and row.shape == shape and row.axis == axis and self._is_flat(row.node):
            return row.node
        index = row.full_index
        if row.axis is None and axis is not None and index.ndim >= len(shape) - axis:
            batch = index.ndim - (len(shape) - axis)
            if index.shape[batch] != 1:
                raise Untraceable("The step mixes the rows of the batch with a weight that has as many rows.")
            index = index.squeeze(batch)
        # One feature broadcasts in a kernel, without a row of copies of it.
        if index.size and bool((index == index.flat[0]).all()):
            return self.single(row.node, int(index.flat[0]))
        index = np.broadcast_to(index, features)
        return self.gather([row.node], index if layout is None else index.transpose(_stored_order(layout)))

    def _is_flat(self, node: int) -> bool:
        return len(self.builder.nodes[node].type.shape) == 1

    def flat(self, operand: Operand) -> int:
        """Return the node of a value with all its features in torch's order."""
        row = self.row(operand)
        node = row.node if row.index is None else self.gather([row.node], row.full_index)
        size = math.prod(row.features)
        kind = self.builder.nodes[node].type.kind
        if self.builder.size(node) != size or kind == "weight":
            return self.builder.add("broadcast", node, size=size)
        return node

    def move(self, func: Callable[..., Any], values: Value | Sequence[Value], *args: Any, **kwargs: Any) -> Any:
        """Return the result of an operation that only moves elements of a value, or of a list of them."""
        several = not isinstance(values, Row | Weight)
        rows = [self.row(value) for value in values] if several else [self.row(values)]  # type: ignore[union-attr,arg-type]
        if len({self.is_mask(row) for row in rows}) > 1:
            rows = [self.number(row) for row in rows]
        return self.moved(func, rows, several, *args, **kwargs)

    # over features

    def reduce(self, op: str, operand: Operand, dims: Sequence[int] | None, keepdim: bool) -> Row:
        """Add a reduction of `ir.axes.REDUCTIONS` over dimensions that are not the batch."""
        row = self.number(operand)
        reduced = self.dims(row, dims)
        if row.axis in reduced:
            raise Untraceable(
                "The step mixes the rows of the batch: it reduces the batch dimension. Each row is a sequence of its "
                "own; reduce features, with dim=-1."
            )
        if row.axis is not None and row.is_merged:
            apart = [dim if dim < row.axis else dim + 2 for dim in reduced]
            return self.reduce(op, row.apart(), apart, keepdim).merged(row.split)
        shape = tuple(
            1 if dim in reduced else size for dim, size in enumerate(row.shape) if keepdim or dim not in reduced
        )
        axis = row.axis
        if axis is not None and not keepdim:
            axis -= sum(dim < axis for dim in reduced)
        if op in ("argmax", "argmin") and all(row.shape[dim] == 1 for dim in reduced):
            return self.const(0.0, shape, axis)  # the only place, not the only element
        index = row.full_index if row.axis is None else np.expand_dims(row.full_index, row.axis)
        others = [dim for dim in range(index.ndim) if dim not in reduced]
        lines = tuple(index.shape[dim] for dim in others)
        index = index.transpose(*others, *reduced)
        return Row(shape, reduced_lines(self, op, row.node, index, lines), axis)

    def dims(self, row: Row, dims: Sequence[int] | None) -> list[int]:
        """List dimensions counted from 0, all of them where none are named."""
        if dims is None or len(dims) == 0:
            return list(range(len(row.shape)))
        return sorted(dim % len(row.shape) for dim in dims)

    # products and sums over rows

    def product(self, row: Row, weight: Weight) -> Row:
        """Add a product of (N, K) rows and a (K, F) weight."""
        view = weight.view
        if not isinstance(view, Matrix):
            view = Matrix(weight.slot, (0, weight.shape[-2]), (0, weight.shape[-1]))
        of_row = self.builder.nodes[row.node]
        if of_row.op == "const" and of_row.attrs["value"] == 0:  # tangents of what has none are zeros
            self.leaf(view.slot, "matrix")  # its gradient is zeros, and ends here
            return self.const(0.0, (row.shape[0], weight.shape[-1]), row.axis)
        # A transposed view is no transposed copy: packing reads the stored matrix either way round.
        rows, cols = (view.cols, view.rows) if view.flipped else (view.rows, view.cols)
        node = self.builder.add(
            "product",
            self.flat(row),
            self.leaf(view.slot, "matrix"),
            transposed=view.flipped,
            rows=list(rows),
            cols=list(cols),
        )
        return Row((row.shape[0], weight.shape[-1]), node)

    def outer(self, left: Row, right: Row) -> Sum:
        """Add the sum over rows of leftᵀ right: (a, N) times (N, b)."""
        shape = (left.shape[0], right.shape[1])
        return Sum(shape, self.builder.add("outer", self.flat(self.number(left)), self.flat(self.number(right))))

    def rowsum(self, operand: Operand, dims: Sequence[int], keepdim: bool) -> Sum:
        """Add a sum over the rows, and over the other ``dims`` too."""
        row = self.number(operand)
        if row.axis is not None and row.is_merged:
            apart = [part for dim in dims for part in _parts_of(dim, row.axis)]
            total = self.rowsum(row.apart(), apart, True)
            shape = tuple(1 if d in dims else n for d, n in enumerate(row.shape) if keepdim or d not in dims)
            return Sum(shape, total.node)
        others = [dim for dim in dims if dim != row.axis]
        reduced = self.reduce("sum", row, others, True) if others else row
        shape = tuple(1 if dim in dims else size for dim, size in enumerate(row.shape) if keepdim or dim not in dims)
        return Sum(shape, self.builder.add("rowsum", self.flat(reduced)))

    def scaled(self, sum_: Sum, factor: float) -> Sum:
        """Return a sum times a number: the rows are multiplied by it, as there is no arithmetic on sums."""
        return Sum(sum_.shape, self._scaled(sum_.node, factor))

    def _scaled(self, index: int, factor: float) -> int:
        node, builder = self.builder.nodes[index], self.builder
        if node.op in ("outer", "rowsum", "contract_sum", "scatter_sum"):
            # Of a scatter the positions come first, then the values.
            args = list(node.args)
            scaled = 1 if node.op == "scatter_sum" else 0
            args[scaled] = builder.add("mul", args[scaled], builder.const(factor))
            return builder.add(node.op, *args, **node.attrs)
        return builder.add(node.op, *(self._scaled(arg, factor) for arg in node.args), **node.attrs)

    def transposed(self, sum_: Sum) -> Sum:
        """Return the transpose of a matrix."""
        node, shape = self.builder.nodes[sum_.node], sum_.shape[::-1]
        if node.op == "transpose":
            return Sum(shape, node.args[0])
        return Sum(shape, self.builder.add("transpose", sum_.node))

    def total(self, left: Sum, right: Sum) -> Sum:
        """Add two gradients."""
        parts: list[int] = []
        for part in (left, right):
            node = self.builder.nodes[part.node]
            parts += node.args if node.op == "total" else [part.node]
        ranks = {len(self.builder.nodes[part].type.shape) for part in parts}
        shape = tuple(np.broadcast_shapes(left.shape, right.shape))
        if len(ranks) > 1:
            # A vector's gradient is a column where elements of it were taken by position.
            matrix = shape[-2:] if len(shape) > 1 else (*shape, 1)
            parts = [as_matrix(self.builder, part, matrix) for part in parts]
        return Sum(shape, self.builder.add("total", *parts))


def _stored_order(layout: Index) -> tuple[int, ...]:
    """Return the axes of a permutation of features in the order in which these are stored."""
    access = access_of(layout)
    assert access is not None
    return tuple(sorted(range(layout.ndim), key=lambda axis: (-access.strides[axis], axis)))


def _parts_of(dim: int, batch: int) -> tuple[int, ...]:
    """Return a dimension of a merged value as dimensions of the value with its batch apart."""
    if dim == batch:
        return dim, dim + 1, dim + 2
    return (dim,) if dim < batch else (dim + 2,)
