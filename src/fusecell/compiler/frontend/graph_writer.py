"""Write graph nodes for torch's operations: broadcasting, moves of features, reductions, products.

torch moves elements of tensors about; a graph has flat features per row. So every value keeps, besides its node, the
feature behind each of its elements (`Row.index`). A view changes the index alone; nodes that move features, slices and
concatenations, are written only where an operation needs the features in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

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
    runs,
    scalar,
)
from fusecell.compiler.ir.graph import Builder, Node

__all__ = ["Operand", "Writer"]

Operand = Value | float | int | bool
_LOGIC = ("and", "or", "not")
# Slices that one move of features, or reduction, may become: each is a store of its own in the kernel.
_MOST_PARTS = 256


class Writer:
    """Writer of a graph: its methods take and return traced values, and add nodes for them.

    Arguments:
        builder: the graph so far.
        rows: the number of rows N it is traced with.
        leaf: returns the node of a slot of the prologue, as a ``"matrix"`` or a ``"vector"``.
    """

    def __init__(self, builder: Builder, rows: int, leaf: Callable[[int, str], int]) -> None:
        self.builder = builder
        self.rows = rows
        self.leaf = leaf

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
        raise Untraceable("The step mixes the rows of the batch: a sum over rows is used row by row.")

    def const(self, value: float, shape: Shape = (), axis: int | None = None) -> Row:
        """Return a tensor filled with a number."""
        row = Row(shape, self.builder.const(value), axis)
        return Row(shape, row.node, axis, np.zeros(row.features, dtype=np.int64))

    def _weight(self, weight: Weight) -> Row:
        if weight.fill is not None:
            return self.const(weight.fill, weight.shape)
        if isinstance(weight.view, Vector):
            return self.indexed(weight.shape, self.leaf(weight.view.slot, "vector"), None, weight.view.index)
        return Row(weight.shape, self.leaf(weight.slot, "vector"), None)

    def indexed(self, shape: Shape, node: int, axis: int | None, index: Index) -> Row:
        """Return these features of a node as a row; without an index where they are all of them in order."""
        size = self.builder.size(node)
        if index.size == size and np.array_equal(index.ravel(), np.arange(size)):
            return Row(shape, node, axis)
        return Row(shape, node, axis, index)

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
        axis = self.common_axis(rows, len(shape))
        features = shape if axis is None else shape[:axis] + shape[axis + 1 :]
        node = self.builder.add(op, *(self._aligned(row, shape, axis, features) for row in rows))
        if self.builder.size(node) == math.prod(features):
            return Row(shape, node, axis)
        return Row(shape, node, axis, np.zeros(features, dtype=np.int64))

    def common_axis(self, rows: Sequence[Row], dims: int) -> int | None:
        """Return the batch dimension of what ``rows`` broadcast to."""
        # Counted from the end, as broadcasting aligns shapes.
        from_end = {len(row.shape) - row.axis for row in rows if row.axis is not None}
        if len(from_end) > 1:
            raise Untraceable("The step mixes the rows of the batch: two values meet whose batch dimensions differ.")
        return dims - from_end.pop() if from_end else None

    def _aligned(self, row: Row, shape: Shape, axis: int | None, features: Shape) -> int:
        """Return the node of an operand, with its features where those of the result are."""
        if row.index is None and row.shape == shape and row.axis == axis:
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
        return self.gather([row.node], np.broadcast_to(index, features).ravel())

    def flat(self, operand: Operand) -> int:
        """Return the node of a value with all its features in torch's order."""
        row = self.row(operand)
        node = row.node if row.index is None else self.gather([row.node], row.full_index.ravel())
        size = math.prod(row.features)
        kind = self.builder.nodes[node].type.kind
        if self.builder.size(node) != size or kind == "weight":
            return self.builder.add("broadcast", node, size=size)
        return node

    # features

    def single(self, node: int, feature: int) -> int:
        """Return one feature of a node; -1 is zero."""
        if feature < 0:
            zero = self.builder.const(0.0)
            return self.builder.add("ne", zero, zero) if self._is_mask(node) else zero
        if self.builder.size(node) == 1:
            return node
        return self._slice(node, feature, 1)[0]

    def _slice(self, node: int, start: int, length: int) -> list[int]:
        """Return features of a node: one node, or of a concat the parts of what it joins."""
        whole = self.builder.nodes[node]
        if whole.size == length:
            return [node]
        if whole.op != "concat":
            return [self.builder.add("slice", node, start=start, stop=start + length)]
        # A slice of a join would keep all of the join in memory, and tie what needs x only to what needs a state.
        parts, begin = [], 0
        for arg in whole.args:
            size = self.builder.size(arg)
            low, high = max(start, begin), min(start + length, begin + size)
            if low < high:
                parts += self._slice(arg, low - begin, high - low)
            begin += size
        return parts

    def gather(self, nodes: Sequence[int], flat: Index) -> int:
        """Return the features ``flat`` of ``nodes``, counted through all of them, as one node."""
        if len(nodes) == 1 and len(flat) == self.builder.size(nodes[0]) and np.array_equal(flat, np.arange(len(flat))):
            return nodes[0]
        starts = np.cumsum([0, *(self.builder.size(node) for node in nodes)])
        parts: list[int] = []
        for first, length, step in runs(flat):
            parts += self._part(nodes, starts, first, length, step)
            if len(parts) > _MOST_PARTS:
                raise Untraceable(
                    f"The step permutes features in more than {_MOST_PARTS} pieces; gathers are not compiled."
                )
        if len(parts) == 1:
            return parts[0]
        kinds = {self.builder.nodes[part].type.kind for part in parts}
        # A concat joins values of one kind: next to rows, a part of a weight becomes a row.
        if len(kinds) > 1:
            parts = [
                self.builder.add("broadcast", part, size=self.builder.size(part))
                if self.builder.nodes[part].type.kind == "weight"
                else part
                for part in parts
            ]
        inner = (self.builder.nodes[part] for part in parts)
        flat_parts = [arg for part, node in zip(parts, inner, strict=True) for arg in _joined(part, node)]
        return self.builder.add("concat", *flat_parts)

    def _part(self, nodes: Sequence[int], starts: Index, first: int, length: int, step: int) -> list[int]:
        """Return consecutive, or equal, features as nodes, one for each node that they reach into."""
        source = int(np.searchsorted(starts, max(first, 0), side="right")) - 1
        if step == 0 or first < 0:
            one = self.single(nodes[source], first - int(starts[source]) if first >= 0 else -1)
            return [self.builder.add("broadcast", one, size=length) if length > 1 else one]
        parts: list[int] = []
        while length:
            feature = first - int(starts[source])
            count = min(length, self.builder.size(nodes[source]) - feature)
            if count:
                parts += self._slice(nodes[source], feature, count)
            first, length, source = first + count, length - count, source + 1
        return parts

    def _is_mask(self, node: int) -> bool:
        return self.builder.nodes[node].type.kind == "mask"

    def move(self, func: Callable[..., Any], values: Value | Sequence[Value], *args: Any, **kwargs: Any) -> Any:
        """Return the result of an op that only moves elements of a value, or of a list of them.

        The op is run on tensors of numbers that say which element each is; number 0 is for zeros that it fills in.
        """
        # So every view and every join that torch has follows from torch's own implementation of it.
        several = not isinstance(values, Row | Weight)
        rows = [self.row(value) for value in values] if several else [self.row(values)]  # type: ignore[union-attr,arg-type]
        if len({self.is_mask(row) for row in rows}) > 1:
            rows = [self.number(row) for row in rows]
        sizes = [self.builder.size(row.node) for row in rows]
        total, starts = sum(sizes), np.cumsum([0, *sizes])
        numbers = [self._numbered(row, int(start), total) for row, start in zip(rows, starts, strict=False)]
        result = func(numbers if several else numbers[0], *args, **kwargs)
        nodes = [row.node for row in rows]
        is_batched = any(row.axis is not None for row in rows)
        if isinstance(result, torch.Tensor):
            return self._row_of_numbers(result, nodes, total, is_batched)
        return [self._row_of_numbers(part, nodes, total, is_batched) for part in result]

    def _numbered(self, row: Row, start: int, total: int) -> torch.Tensor:
        """Return a tensor of a value's shape whose elements are numbers: feature + 1, from ``start`` on.

        Each further row of the batch has numbers higher by ``total``.
        """
        index = row.full_index
        numbers = np.where(index < 0, 0, index + 1 + start)
        if row.axis is not None:
            numbers = np.expand_dims(numbers, row.axis)
            shape = [1] * numbers.ndim
            shape[row.axis] = self.rows
            per_row = (np.arange(self.rows, dtype=np.int64) * total).reshape(shape)
            numbers = np.where(numbers > 0, numbers + per_row, 0)
        return torch.from_numpy(np.ascontiguousarray(numbers))

    def _row_of_numbers(self, result: torch.Tensor, nodes: Sequence[int], total: int, is_batched: bool) -> Row:
        """Read a value off its elements' numbers after a move, and find which dimension is the batch now."""
        numbers, shape = result.numpy(), tuple(result.shape)
        # The batch is the dimension along which every element moves on by one row. Its size alone would not prove it.
        for axis in (dim for dim, size in enumerate(shape) if size == self.rows):
            first = numbers.take(0, axis)
            along = np.arange(self.rows, dtype=np.int64).reshape(
                [-1 if dim == axis else 1 for dim in range(len(shape))]
            )
            head = np.expand_dims(first, axis)
            if np.array_equal(numbers, np.where(head > 0, head + along * (total if is_batched else 0), 0)):
                return self._row_of_index(shape, nodes, axis, first - 1)
        if is_batched:
            raise Untraceable("The step mixes the rows of the batch: the batch dimension is cut, merged or reordered.")
        return self._row_of_index(shape, nodes, None, numbers - 1)

    def _row_of_index(self, shape: Shape, nodes: Sequence[int], axis: int | None, index: Index) -> Row:
        if len(nodes) == 1:
            return self.indexed(shape, nodes[0], axis, index)
        return Row(shape, self.gather(nodes, index.ravel()), axis) if index.size else self.const(0.0, shape, axis)

    # over features

    def reduce(self, op: str, operand: Operand, dims: Sequence[int] | None, keepdim: bool) -> Row:
        """Add a ``sum``, ``amax`` or ``amin`` over dimensions that are not the batch."""
        row = self.number(operand)
        reduced = self.dims(row, dims)
        if row.axis in reduced:
            raise Untraceable("The step mixes the rows of the batch: a reduction over the batch dimension.")
        shape = tuple(
            1 if dim in reduced else size for dim, size in enumerate(row.shape) if keepdim or dim not in reduced
        )
        axis = row.axis
        if axis is not None and not keepdim:
            axis -= sum(dim < axis for dim in reduced)
        index = row.full_index if row.axis is None else np.expand_dims(row.full_index, row.axis)
        others = [dim for dim in range(index.ndim) if dim not in reduced]
        count = math.prod(index.shape[dim] for dim in reduced)
        table = index.transpose(*others, *reduced).reshape(-1, count)
        return Row(shape, self._reduced(op, row.node, table), axis)

    def dims(self, row: Row, dims: Sequence[int] | None) -> list[int]:
        """List dimensions counted from 0, all of them where none are named."""
        if dims is None or len(dims) == 0:
            return list(range(len(row.shape)))
        return sorted(dim % len(row.shape) for dim in dims)

    def _reduced(self, op: str, node: int, table: Index) -> int:
        """Reduce each line of a table of features: by a primitive per line, or column by column, all lines at once."""
        builder, (lines, count) = self.builder, table.shape
        if count == 1:
            return self.gather([node], table[:, 0])
        # A reduction ends a stage of the kernel; joining a few columns is pointwise, and vectors run over the lines.
        if lines > 1 and count <= lines:
            parts = [self._gathered_rows(node, table[:, column]) for column in range(count)]
            result, join = parts[0], {"sum": "add", "amax": "maximum", "amin": "minimum"}[op]
            for part in parts[1:]:
                result = builder.add(join, result, part)
            return result
        if lines > _MOST_PARTS:
            raise Untraceable(f"The step reduces {lines} groups of {count} features.")
        totals = [builder.add(op, self._gathered_rows(node, table[line])) for line in range(lines)]
        return totals[0] if lines == 1 else builder.add("concat", *totals)

    def _gathered_rows(self, node: int, flat: Index) -> int:
        """Return features of a node as a value per row, those of a weight too."""
        features = self.gather([node], flat)
        if self.builder.nodes[features].type.kind == "weight":
            return self.builder.add("broadcast", features, size=len(flat))
        return features

    # products and sums over rows

    def product(self, operand: Value, weight: Weight) -> Row:
        """Add a product of (N, K) rows and a (K, F) weight."""
        row = self.number(operand)
        if row.axis != 0 or len(row.shape) != 2:
            shape = tuple("N" if dim == row.axis else str(size) for dim, size in enumerate(row.shape))
            raise Untraceable(
                f"The step multiplies a weight by a tensor of shape ({', '.join(shape)}): only (N, features) is "
                "compiled."
            )
        view = weight.view
        if not isinstance(view, Matrix):
            view = Matrix(weight.slot, (0, weight.shape[-2]), (0, weight.shape[-1]))
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
        others = [dim for dim in dims if dim != row.axis]
        reduced = self.reduce("sum", row, others, True) if others else row
        shape = tuple(1 if dim in dims else size for dim, size in enumerate(row.shape) if keepdim or dim not in dims)
        return Sum(shape, self.builder.add("rowsum", self.flat(reduced)))

    def scaled(self, sum_: Sum, factor: float) -> Sum:
        """Return a sum times a number: the rows are multiplied by it, as there is no arithmetic on sums."""
        return Sum(sum_.shape, self._scaled(sum_.node, factor))

    def _scaled(self, index: int, factor: float) -> int:
        node, builder = self.builder.nodes[index], self.builder
        if node.op in ("outer", "rowsum"):
            return builder.add(node.op, builder.add("mul", node.args[0], builder.const(factor)), *node.args[1:])
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
        shape = tuple(np.broadcast_shapes(left.shape, right.shape))
        return Sum(shape, self.builder.add("total", *parts))


def _joined(index: int, node: Node) -> tuple[int, ...]:
    return node.args if node.op == "concat" else (index,)
