"""Writes nodes for values: broadcasting, bookkeeping of features, reductions, products."""

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
_MOST_PARTS = 256


class Writer:
    """Writes what a step does with its values into a graph.

    Arguments:
        builder: the graph so far.
        rows: the number of rows N it is traced with.
        leaf: the node of a slot of the prologue, as a ``"matrix"`` or a ``"vector"``.
    """

    def __init__(self, builder: Builder, rows: int, leaf: Callable[[int, str], int]) -> None:
        self.builder = builder
        self.rows = rows
        self.leaf = leaf

    # operands

    def row(self, operand: Operand) -> Row:
        """Any operand of an elementwise op as a value per row; what is the same for all rows has no axis."""
        if isinstance(operand, Row):
            return operand
        if isinstance(operand, Weight):
            return self._weight(operand)
        if isinstance(operand, bool | int | float | complex):
            return self.const(scalar(operand))
        if isinstance(operand, Unsupported):
            raise Untraceable(operand.why)
        raise Untraceable("It mixes the rows of the batch: a sum over rows is used row by row.")

    def const(self, value: float, shape: Shape = (), axis: int | None = None) -> Row:
        """A tensor filled with a number."""
        made = Row(shape, self.builder.const(value), axis)
        return Row(shape, made.node, axis, np.zeros(made.features, dtype=np.int64))

    def _weight(self, weight: Weight) -> Row:
        if weight.fill is not None:
            return self.const(weight.fill, weight.shape)
        if isinstance(weight.view, Vector):
            return self.made(weight.shape, self.leaf(weight.view.slot, "vector"), None, weight.view.index)
        return Row(weight.shape, self.leaf(weight.slot, "vector"), None)

    def made(self, shape: Shape, node: int, axis: int | None, index: Index) -> Row:
        """A row of these places of a node, in the plain form where they are in order."""
        size = self.builder.size(node)
        if index.size == size and np.array_equal(index.ravel(), np.arange(size)):
            return Row(shape, node, axis)
        return Row(shape, node, axis, index)

    def is_mask(self, row: Row) -> bool:
        return self.builder.nodes[row.node].type.kind == "mask"

    def number(self, operand: Operand) -> Row:
        """The operand as numbers: truth values become 1 and 0."""
        row = self.row(operand)
        return self.point("where", row, 1.0, 0.0) if self.is_mask(row) else row

    def truth(self, operand: Operand) -> Row:
        """The operand as truth values: numbers that are not 0."""
        row = self.row(operand)
        return row if self.is_mask(row) else self.point("ne", row, 0.0)

    # elementwise

    def point(self, op: str, *operands: Operand) -> Row:
        """An elementwise primitive of operands that broadcast as torch's do."""
        rows = [
            self.truth(value) if op in _LOGIC or (op == "where" and place == 0) else self.number(value)
            for place, value in enumerate(operands)
        ]
        shape = tuple(np.broadcast_shapes(*(row.shape for row in rows)))
        axis = self.common_axis(rows, len(shape))
        features = shape if axis is None else shape[:axis] + shape[axis + 1 :]
        node = self.builder.add(op, *(self._aligned(row, shape, axis, features) for row in rows))
        if self.builder.size(node) == math.prod(features):
            return Row(shape, node, axis)
        return Row(shape, node, axis, np.zeros(features, dtype=np.int64))

    def common_axis(self, rows: Sequence[Row], dims: int) -> int | None:
        """The batch dimension of what ``rows`` broadcast to."""
        found = {len(row.shape) - row.axis for row in rows if row.axis is not None}
        if len(found) > 1:
            raise Untraceable("It mixes the rows of the batch: two values meet whose batch dimensions differ.")
        return dims - found.pop() if found else None

    def _aligned(self, row: Row, shape: Shape, axis: int | None, features: Shape) -> int:
        if row.index is None and row.shape == shape and row.axis == axis:
            return row.node
        places = row.places
        if row.axis is None and axis is not None and places.ndim >= len(shape) - axis:
            at = places.ndim - (len(shape) - axis)
            if places.shape[at] != 1:
                raise Untraceable("It mixes the rows of the batch with a weight that has as many rows.")
            places = places.squeeze(at)
        if places.size and bool((places == places.flat[0]).all()):
            return self.single(row.node, int(places.flat[0]))
        return self.gather([row.node], np.broadcast_to(places, features).ravel())

    def flat(self, operand: Operand) -> int:
        """The node of a value with all its features in torch's order."""
        row = self.row(operand)
        node = row.node if row.index is None else self.gather([row.node], row.places.ravel())
        size = math.prod(row.features)
        kind = self.builder.nodes[node].type.kind
        if self.builder.size(node) != size or kind == "weight":
            return self.builder.add("broadcast", node, size=size)
        return node

    # features

    def single(self, node: int, place: int) -> int:
        """One feature of a node; -1 is zero."""
        if place < 0:
            zero = self.builder.const(0.0)
            return self.builder.add("ne", zero, zero) if self._mask(node) else zero
        if self.builder.size(node) == 1:
            return node
        return self._cut(node, place, 1)[0]

    def _cut(self, node: int, start: int, length: int) -> list[int]:
        """Features of a node, as one node or, of a concat, as parts of what it joins."""
        found = self.builder.nodes[node]
        if found.size == length:
            return [node]
        if found.op != "concat":
            return [self.builder.add("slice", node, start=start, stop=start + length)]
        parts, begin = [], 0
        for arg in found.args:
            size = self.builder.size(arg)
            low, high = max(start, begin), min(start + length, begin + size)
            if low < high:
                parts += self._cut(arg, low - begin, high - low)
            begin += size
        return parts

    def gather(self, nodes: Sequence[int], flat: Index) -> int:
        """The features ``flat`` of ``nodes`` laid end to end."""
        if len(nodes) == 1 and len(flat) == self.builder.size(nodes[0]) and np.array_equal(flat, np.arange(len(flat))):
            return nodes[0]
        starts = np.cumsum([0, *(self.builder.size(node) for node in nodes)])
        parts: list[int] = []
        for first, length, step in runs(flat):
            parts += self._part(nodes, starts, first, length, step)
            if len(parts) > _MOST_PARTS:
                raise Untraceable("It moves features about one by one, which is no bookkeeping but a gather.")
        if len(parts) == 1:
            return parts[0]
        kinds = {self.builder.nodes[part].type.kind for part in parts}
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
        """A stretch of features as nodes, one for each node that it reaches into."""
        source = int(np.searchsorted(starts, max(first, 0), side="right")) - 1
        if step == 0 or first < 0:
            one = self.single(nodes[source], first - int(starts[source]) if first >= 0 else -1)
            return [self.builder.add("broadcast", one, size=length) if length > 1 else one]
        parts: list[int] = []
        while length:
            place = first - int(starts[source])
            here = min(length, self.builder.size(nodes[source]) - place)
            if here:
                parts += self._cut(nodes[source], place, here)
            first, length, source = first + here, length - here, source + 1
        return parts

    def _mask(self, node: int) -> bool:
        return self.builder.nodes[node].type.kind == "mask"

    def move(self, func: Callable[..., Any], values: Value | Sequence[Value], *args: Any, **kwargs: Any) -> Any:
        """What an op that only moves elements makes of a value or a list of them.

        The op is run on the elements' places instead of the elements; place 0 is for the zeros that it fills in.
        """
        several = not isinstance(values, Row | Weight)
        rows = [self.row(value) for value in values] if several else [self.row(values)]  # type: ignore[union-attr,arg-type]
        if len({self.is_mask(row) for row in rows}) > 1:
            rows = [self.number(row) for row in rows]
        sizes = [self.builder.size(row.node) for row in rows]
        total, starts = sum(sizes), np.cumsum([0, *sizes])
        places = [self._numbered(row, int(start), total) for row, start in zip(rows, starts, strict=False)]
        moved = func(places if several else places[0], *args, **kwargs)
        nodes = [row.node for row in rows]
        batched = any(row.axis is not None for row in rows)
        if isinstance(moved, torch.Tensor):
            return self._found(moved, nodes, total, batched)
        return [self._found(part, nodes, total, batched) for part in moved]

    def _numbered(self, row: Row, start: int, total: int) -> torch.Tensor:
        places = row.places
        numbered = np.where(places < 0, 0, places + 1 + start)
        if row.axis is not None:
            numbered = np.expand_dims(numbered, row.axis)
            shape = [1] * numbered.ndim
            shape[row.axis] = self.rows
            per_row = (np.arange(self.rows, dtype=np.int64) * total).reshape(shape)
            numbered = np.where(numbered > 0, numbered + per_row, 0)
        return torch.from_numpy(np.ascontiguousarray(numbered))

    def _found(self, moved: torch.Tensor, nodes: Sequence[int], total: int, batched: bool) -> Row:
        numbers, shape = moved.numpy(), tuple(moved.shape)
        for axis in (dim for dim, size in enumerate(shape) if size == self.rows):
            first = numbers.take(0, axis)
            along = np.arange(self.rows, dtype=np.int64).reshape(
                [-1 if dim == axis else 1 for dim in range(len(shape))]
            )
            head = np.expand_dims(first, axis)
            if np.array_equal(numbers, np.where(head > 0, head + along * (total if batched else 0), 0)):
                return self._places(shape, nodes, axis, first - 1)
        if batched:
            raise Untraceable("It mixes the rows of the batch: the batch dimension is cut, merged or reordered.")
        return self._places(shape, nodes, None, numbers - 1)

    def _places(self, shape: Shape, nodes: Sequence[int], axis: int | None, index: Index) -> Row:
        if len(nodes) == 1:
            return self.made(shape, nodes[0], axis, index)
        return Row(shape, self.gather(nodes, index.ravel()), axis) if index.size else self.const(0.0, shape, axis)

    # over features

    def reduce(self, op: str, operand: Operand, dims: Sequence[int] | None, keepdim: bool) -> Row:
        """``sum``, ``amax`` or ``amin`` over dimensions that are not the batch."""
        row = self.number(operand)
        chosen = self.dims(row, dims)
        if row.axis in chosen:
            raise Untraceable("It mixes the rows of the batch: a reduction over the batch dimension.")
        shape = tuple(
            1 if dim in chosen else size for dim, size in enumerate(row.shape) if keepdim or dim not in chosen
        )
        axis = row.axis
        if axis is not None and not keepdim:
            axis -= sum(dim < axis for dim in chosen)
        places = row.places if row.axis is None else np.expand_dims(row.places, row.axis)
        kept = [dim for dim in range(places.ndim) if dim not in chosen]
        count = math.prod(places.shape[dim] for dim in chosen)
        table = places.transpose(*kept, *chosen).reshape(-1, count)
        return Row(shape, self._reduced(op, row.node, table), axis)

    def dims(self, row: Row, dims: Sequence[int] | None) -> list[int]:
        """Dimensions counted from 0, all of them where none are named."""
        if dims is None or len(dims) == 0:
            return list(range(len(row.shape)))
        return sorted(dim % len(row.shape) for dim in dims)

    def _reduced(self, op: str, node: int, table: Index) -> int:
        """Reduce each line of a table of features; a line each, or element by element where lines are many."""
        builder, (lines, count) = self.builder, table.shape
        if count == 1:
            return self.gather([node], table[:, 0])
        if lines > 1 and count <= lines:
            parts = [self._spread(node, table[:, column]) for column in range(count)]
            made, join = parts[0], {"sum": "add", "amax": "maximum", "amin": "minimum"}[op]
            for part in parts[1:]:
                made = builder.add(join, made, part)
            return made
        if lines > _MOST_PARTS:
            raise Untraceable(f"It reduces {lines} groups of {count} features.")
        made_lines = [builder.add(op, self._spread(node, table[line])) for line in range(lines)]
        return made_lines[0] if lines == 1 else builder.add("concat", *made_lines)

    def _spread(self, node: int, flat: Index) -> int:
        found = self.gather([node], flat)
        if self.builder.nodes[found].type.kind == "weight":
            return self.builder.add("broadcast", found, size=len(flat))
        return found

    # products and sums over rows

    def product(self, operand: Value, weight: Weight) -> Row:
        """(N, K) rows times a (K, F) weight."""
        row = self.number(operand)
        if row.axis != 0 or len(row.shape) != 2:
            raise Untraceable("It multiplies a weight with what is not one vector per row.")
        view = weight.view
        if not isinstance(view, Matrix):
            view = Matrix(weight.slot, (0, weight.shape[-2]), (0, weight.shape[-1]))
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
        """The sum over rows of leftᵀ right: (a, N) times (N, b)."""
        shape = (left.shape[0], right.shape[1])
        return Sum(shape, self.builder.add("outer", self.flat(self.number(left)), self.flat(self.number(right))))

    def rowsum(self, operand: Operand, dims: Sequence[int], keepdim: bool) -> Sum:
        """The sum over the rows, and over the other ``dims`` too."""
        row = self.number(operand)
        others = [dim for dim in dims if dim != row.axis]
        reduced = self.reduce("sum", row, others, True) if others else row
        shape = tuple(1 if dim in dims else size for dim, size in enumerate(row.shape) if keepdim or dim not in dims)
        return Sum(shape, self.builder.add("rowsum", self.flat(reduced)))

    def scaled(self, sum_: Sum, factor: float) -> Sum:
        """A sum times a number: the number goes to the rows."""
        return Sum(sum_.shape, self._scaled(sum_.node, factor))

    def _scaled(self, index: int, factor: float) -> int:
        node, builder = self.builder.nodes[index], self.builder
        if node.op in ("outer", "rowsum"):
            return builder.add(node.op, builder.add("mul", node.args[0], builder.const(factor)), *node.args[1:])
        return builder.add(node.op, *(self._scaled(arg, factor) for arg in node.args), **node.attrs)

    def transposed(self, sum_: Sum) -> Sum:
        """A matrix the other way round."""
        node, shape = self.builder.nodes[sum_.node], sum_.shape[::-1]
        if node.op == "transpose":
            return Sum(shape, node.args[0])
        return Sum(shape, self.builder.add("transpose", sum_.node))

    def total(self, left: Sum, right: Sum) -> Sum:
        """The sum of two gradients."""
        parts: list[int] = []
        for part in (left, right):
            node = self.builder.nodes[part.node]
            parts += node.args if node.op == "total" else [part.node]
        shape = tuple(np.broadcast_shapes(left.shape, right.shape))
        return Sum(shape, self.builder.add("total", *parts))


def _joined(index: int, node: Node) -> tuple[int, ...]:
    return node.args if node.op == "concat" else (index,)
