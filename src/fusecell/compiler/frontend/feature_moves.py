"""Write graph nodes for moves of features: which feature of which node each element of a tensor is, in order.

torch moves elements of tensors about; a graph has flat features per row. So every value keeps, besides its node, the
feature behind each of its elements (`Row.index`). A view changes the index alone. Nodes are written only where an
operation needs the features in order; by what the index is, these are

    one run of features          a slice, or a broadcast of one feature
    an offset and strides        a view
    a few runs                   slices, and a concat of them
    blocks of these, and zeros   an interleave of them
    any of these, then flattened the same, of an index with one of its axes as two
    anything else                up to 256 slices
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fusecell.compiler.frontend.index_maps import access_of, blocks_of, split_axes
from fusecell.compiler.frontend.traced_values import NEXT_NODE, Index, Row, Shape, Untraceable, runs
from fusecell.compiler.ir.graph import Builder, Node

__all__ = ["FeatureMoves"]

_OF_FLOATS = tuple(
    getattr(getattr(torch.ops.aten, f"{name}{dims}d"), overload)
    for name in ("upsample_nearest", "_upsample_nearest_exact")
    for dims in (1, 2, 3)
    for overload in ("default", "vec")
)
"""Moves that torch does not do on integers; float64 has all integers up to 2^53."""
_FEW_PARTS = 4
"""Runs of features, at the most, that become slices rather than blocks: each is stored where it belongs."""
_SOME_PARTS = 16
"""Slices from which on an axis that an index has lost is looked for, if they are short."""
_SHORT_RUN = 32
"""Features of a slice, on average, below which many of them are worth the search."""
_MOST_PARTS = 256
"""Slices that one move of features may become: each is a store of its own in the kernel."""
_MOST_DEPTH = 8
"""Axes along which an index is cut into blocks, at the most."""


class FeatureMoves:
    """Writer of moves of features.

    Arguments:
        builder: the graph so far.
        rows: the number of rows N it is traced with.
    """

    def __init__(self, builder: Builder, rows: int) -> None:
        self.builder = builder
        self.rows = rows

    def features(self, node: int) -> int:
        """Return how many numbers a node has per row; those of a matrix are its rows one after the other."""
        return math.prod(self.builder.nodes[node].type.shape)

    def is_mask_node(self, node: int) -> bool:
        return self.builder.nodes[node].type.kind == "mask"

    def zero(self, is_mask: bool) -> int:
        """Return the node of a number 0, or of false."""
        zero = self.builder.const(0.0)
        return self.builder.add("ne", zero, zero) if is_mask else zero

    def indexed(self, shape: Shape, node: int, axis: int | None, index: Index, split: tuple[int, int] = (1, 1)) -> Row:
        """Return these features of a node as a row; without an index where they are all of them in order."""
        size = self.features(node)
        if index.size == size and np.array_equal(index.ravel(), np.arange(size)):
            return Row(shape, node, axis, None, split)
        return Row(shape, node, axis, index, split)

    def single(self, node: int, feature: int) -> int:
        """Return one feature of a node; -1 is zero."""
        if feature < 0:
            return self.zero(self.is_mask_node(node))
        if self.features(node) == 1:
            return node
        return self._slice(node, feature, 1)[0]

    def gather(self, nodes: Sequence[int], index: Index) -> int:
        """Return features of ``nodes`` as one node; in ``index`` those of node i begin at i * NEXT_NODE."""
        if len(nodes) == 1 and self._is_whole(nodes[0], index):
            return nodes[0]
        return self._join(self._gathered(nodes, index, _MOST_DEPTH), 1)

    def _is_whole(self, node: int, index: Index) -> bool:
        size = self.features(node)
        is_flat = len(self.builder.nodes[node].type.shape) == 1
        return is_flat and index.size == size and np.array_equal(index.ravel(), np.arange(size))

    def _gathered(self, nodes: Sequence[int], index: Index, depth: int) -> list[int]:
        """Return nodes whose features, one after the other, are those of an index."""
        flat = index.ravel()
        if int(flat.max()) < 0:
            return [self._spread(self.zero(self.is_mask_node(nodes[0])), len(flat))]
        pieces = self._runs(flat, _FEW_PARTS)
        if pieces is not None and len(pieces) == 1:
            return self._slices(nodes, pieces)
        access = access_of(index)
        if access is not None:
            return [self._view(nodes, index, access.attrs())]
        if pieces is not None:
            return self._slices(nodes, pieces)
        blocks = blocks_of(index) if depth else None
        if blocks is not None:
            parts = [self._join(self._gathered(nodes, part, depth - 1), 1) for part in blocks.parts]
            return [self._join(parts, blocks.outer)]
        pieces = self._runs(flat, _MOST_PARTS)
        is_cut_small = pieces is None or (len(pieces) > _SOME_PARTS and len(flat) < _SHORT_RUN * len(pieces))
        split = split_axes(index) if depth and is_cut_small else None
        if split is not None:
            return self._gathered(nodes, split, depth - 1)
        if pieces is None:
            raise Untraceable(
                f"The step permutes features in more than {_MOST_PARTS} pieces that have no strides; keep the "
                "permutation as a tensor of the module, and take features with index_select or gather."
            )
        return self._slices(nodes, pieces)

    def _runs(self, flat: Index, most: int) -> list[tuple[int, int, int]] | None:
        """Return the runs of an index; None if they are more than ``most``."""
        # Each element that doesn't follow from the one before begins a run: these are counted at once.
        steps = np.diff(flat)
        breaks = int(((steps != 1) & (steps != 0)).sum())
        if breaks >= most:
            return None
        pieces = list(runs(flat))
        return pieces if len(pieces) <= most else None

    def _view(self, nodes: Sequence[int], index: Index, attrs: dict[str, Any]) -> int:
        """Return a view of one node, of what that is a view of where it is one."""
        source, first = divmod(attrs["offset"], NEXT_NODE)
        node = self.builder.nodes[nodes[source]]
        base = access_of(self._composed(node, index % NEXT_NODE)) if node.op in ("slice", "view") else None
        if base is not None:
            return self._view(node.args, self._composed(node, index % NEXT_NODE), base.attrs())
        return self.builder.add("view", nodes[source], **{**attrs, "offset": first})

    def _composed(self, node: Node, index: Index) -> Index:
        """Return an index into a slice or view as one into what it is a part of."""
        if node.op == "slice":
            return index + int(node.attrs["start"])
        shape, strides = node.attrs["shape"], node.attrs["strides"]
        places = np.unravel_index(index, shape)
        total = np.full(index.shape, node.attrs["offset"], dtype=np.int64)
        for place, stride in zip(places, strides, strict=True):
            total += place * stride
        return total

    def _join(self, parts: Sequence[int], outer: int) -> int:
        """Return nodes joined along the second of two axes."""
        if len(parts) == 1:
            return parts[0]
        kinds = {self.builder.nodes[part].type.kind for part in parts}
        # Values of one kind are joined: next to rows, a part of a weight becomes a row.
        if len(kinds) > 1:
            parts = [
                self.builder.add("broadcast", part, size=self.builder.size(part))
                if self.builder.nodes[part].type.kind == "weight"
                else part
                for part in parts
            ]
        if outer > 1:
            return self.builder.add("interleave", *parts, outer=outer)
        inner = (self.builder.nodes[part] for part in parts)
        flat_parts = [arg for part, node in zip(parts, inner, strict=True) for arg in _joined(part, node)]
        return self.builder.add("concat", *flat_parts)

    def _spread(self, node: int, size: int) -> int:
        return self.builder.add("broadcast", node, size=size) if size > 1 else node

    def _slices(self, nodes: Sequence[int], pieces: Sequence[tuple[int, int, int]]) -> list[int]:
        """Return runs (first, length, step) of features as nodes."""
        parts: list[int] = []
        for first, length, step in pieces:
            source, feature = divmod(first, NEXT_NODE)
            if step == 0 or first < 0:
                parts.append(self._spread(self.single(nodes[max(source, 0)], feature if first >= 0 else -1), length))
            else:
                parts += self._slice(nodes[source], feature, length)
        return parts

    def _slice(self, node: int, start: int, length: int) -> list[int]:
        """Return features of a node: one node, or of a concat the parts of what it joins."""
        whole = self.builder.nodes[node]
        if len(whole.type.shape) > 1:
            return [self.builder.add("view", node, shape=[length], strides=[1], offset=start)]
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

    # moves of tensors

    def moved(self, func: Callable[..., Any], rows: Sequence[Row], several: bool, *args: Any, **kwargs: Any) -> Any:
        """Return the result of an operation that only moves elements of a value, or of a list of them.

        The operation is run on tensors of numbers that say which element each is; number 0 is for zeros that it fills
        in. So every view and every join that torch has follows from torch's own implementation of it.
        """
        total = self.features(rows[0].node) if len(rows) == 1 else len(rows) * NEXT_NODE
        numbers = [self._numbered(row, position * NEXT_NODE, total) for position, row in enumerate(rows)]
        if func in _OF_FLOATS:
            result = func(numbers[0].double(), *args, **kwargs).long()
        else:
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
        apart = row.apart()
        index = apart.full_index
        numbers = np.where(index < 0, 0, index + 1 + start)
        if apart.axis is not None:
            numbers = np.expand_dims(numbers, apart.axis)
            shape = [1] * numbers.ndim
            shape[apart.axis] = self.rows
            per_row = (np.arange(self.rows, dtype=np.int64) * total).reshape(shape)
            numbers = np.where(numbers > 0, numbers + per_row, 0)
        return torch.from_numpy(np.ascontiguousarray(numbers).reshape(row.shape))

    def _row_of_numbers(self, result: torch.Tensor, nodes: Sequence[int], total: int, is_batched: bool) -> Row:
        """Read a value off its elements' numbers after a move, and find which dimension is the batch now."""
        numbers, shape = result.numpy(), tuple(result.shape)
        # The batch is the dimension along which every element moves on by one row. Its size alone would not prove it.
        for axis, split in self._batch_dimensions(shape):
            apart = numbers.reshape(*shape[:axis], split[0], self.rows, split[1], *shape[axis + 1 :])
            first = apart.take(0, axis + 1)
            steps = np.arange(self.rows, dtype=np.int64) * (total if is_batched else 0)
            along = steps.reshape([-1 if dim == axis + 1 else 1 for dim in range(apart.ndim)])
            head = np.expand_dims(first, axis + 1)
            if np.array_equal(apart, np.where(head > 0, head + along, 0)):
                row = Row(shape, nodes[0], axis, None, split)
                return self._row_of_index(shape, nodes, axis, first.reshape(row.features) - 1, split)
        if is_batched:
            raise Untraceable("The step mixes the rows of the batch: the batch dimension is cut or reordered.")
        return self._row_of_index(shape, nodes, None, numbers - 1, (1, 1))

    def _batch_dimensions(self, shape: Shape) -> list[tuple[int, tuple[int, int]]]:
        """List the dimensions that may be the batch, or the batch merged with others; those that are it come first."""
        whole = [(axis, (1, 1)) for axis, size in enumerate(shape) if size == self.rows]
        merged: list[tuple[int, tuple[int, int]]] = []
        for axis, size in enumerate(shape):
            groups, rest = divmod(size, self.rows)
            if rest == 0 and groups > 1:
                merged += [(axis, (part, groups // part)) for part in range(1, groups + 1) if groups % part == 0]
        return whole + merged

    def _row_of_index(
        self, shape: Shape, nodes: Sequence[int], axis: int | None, index: Index, split: tuple[int, int]
    ) -> Row:
        if not index.size:
            zero = self.builder.const(0.0)
            return Row(shape, zero, axis, np.zeros(index.shape, dtype=np.int64), split)
        if len(nodes) == 1:
            return self.indexed(shape, nodes[0], axis, index, split)
        # Of several values one node is made: of those that the result has elements of.
        return Row(shape, self.gather(nodes, index), axis, None, split)


def _joined(index: int, node: Node) -> tuple[int, ...]:
    return node.args if node.op == "concat" else (index,)
