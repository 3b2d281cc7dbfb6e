"""Multiply sums over rows, the gradients of weights, by numbers that all rows share: masks of a weight, triangles.

A sum is complete only after the last step, and such numbers may be others at each step. So each row's part of the sum
is multiplied by them, before it is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.remedies import AS_INPUT
from fusecell.compiler.frontend.sums_over_rows import as_matrix, reordered
from fusecell.compiler.frontend.traced_values import Index, Row, Sum, Untraceable, arranged

__all__ = ["parts_of_rows", "rearranged", "spread", "weighted"]

_MOST_ELEMENTS = 2**12
"""Of a sum that rows add to one by one. Training with DropConnect on 16 x 16, 64 x 64 and 128 x 128 weights, with 8, 32
and 64 rows, took 0.25, 1.2 and 4.3 times as long as the loop."""


def weighted(w: Writer, sum_: Sum, factor: Operand) -> Sum:
    """Return a sum times numbers that all rows share; the two broadcast.

    Raises:
        Untraceable: for numbers that differ from row to row.
    """
    numbers = w.number(factor)
    if numbers.axis is not None:
        raise Untraceable(
            f"The gradient of a weight, a sum over rows, is multiplied by a value that each row has. {AS_INPUT}"
        )
    shape = tuple(np.broadcast_shapes(numbers.shape, sum_.shape))
    if shape != sum_.shape:
        sum_ = rearranged(w, sum_, np.broadcast_to(arranged(sum_.shape), shape))
    index = np.broadcast_to(numbers.full_index, sum_.shape).reshape(w.builder.nodes[sum_.node].type.shape)
    return Sum(sum_.shape, _weighted(w, sum_.node, numbers.node, index))


def parts_of_rows(w: Writer, sum_: Sum) -> Row:
    """Return what each row adds to a sum: (N, ...) values of the sum's shape."""
    each = _of_each_row(w, sum_.node)
    return Row((w.rows, *sum_.shape), each.node, 0, each.full_index.reshape(sum_.shape))


def rearranged(w: Writer, sum_: Sum, order: Index) -> Sum:
    """Return a sum with the elements ``order`` of it, in the shape of ``order``."""
    try:
        return Sum(order.shape, reordered(w.builder, sum_.node, order))
    except Untraceable:  # where the products that are summed have no strides in that order, each is moved
        each = _of_each_row(w, sum_.node)
    moved = Row((w.rows, order.size), each.node, 0, each.full_index.ravel()[order.ravel()])
    result = w.rowsum(moved, [0], False).node
    return Sum(order.shape, as_matrix(w.builder, result, order.shape) if order.ndim == 2 else result)


def spread(w: Writer, sum_: Sum, shape: Sequence[int], places: Index) -> Sum:
    """Return a sum at places of a larger tensor, given as the elements of that, and zeros elsewhere."""
    each = _of_each_row(w, sum_.node)
    index = np.full(math.prod(shape), -1, dtype=np.int64)
    index[places.ravel()] = each.full_index.ravel()
    result = w.rowsum(Row((w.rows, index.size), each.node, 0, index), [0], False).node
    return Sum(tuple(shape), as_matrix(w.builder, result, shape) if len(shape) == 2 else result)


def _weighted(w: Writer, sum_node: int, factor: int, index: Index) -> int:
    """Return the node of a sum times the features ``index`` of ``factor``, which has the shape of the sum's node."""
    node = w.builder.nodes[sum_node]
    if node.op == "total":
        return w.builder.add("total", *(_weighted(w, arg, factor, index) for arg in node.args))
    if node.op == "transpose":
        return w.builder.add("transpose", _weighted(w, node.args[0], factor, index.T))
    if node.op == "place":
        (part,) = node.args
        corner, extents = node.attrs["corner"], w.builder.nodes[part].type.shape
        inside = tuple(slice(start, start + extent) for start, extent in zip(corner, extents, strict=True))
        return w.builder.add("place", _weighted(w, part, factor, index[inside]), **node.attrs)
    if node.op == "scatter_sum":
        return _weighted_table(w, sum_node, factor, index)
    each = w.point("mul", _of_each_row(w, sum_node), Row((1, index.size), factor, None, index.reshape(1, -1)))
    result = w.rowsum(each, [0], False).node
    return as_matrix(w.builder, result, index.shape) if index.ndim == 2 else result


def _weighted_table(w: Writer, sum_node: int, factor: int, index: Index) -> int:
    """Return a sum of values at positions of a table, each times the factor of its place."""
    node = w.builder.nodes[sum_node]
    positions, values = node.args
    numbers = w.flat(Row((1, index.size), factor, None, index.reshape(1, -1)))
    taken = w.builder.add("take", numbers, positions, **node.attrs, outer=1, positions="shared")
    return w.builder.add("scatter_sum", positions, w.builder.add("mul", values, taken), **node.attrs)


def _of_each_row(w: Writer, sum_node: int) -> Row:
    """Return what each row adds to a sum, flat: (N, elements)."""
    node = w.builder.nodes[sum_node]
    size = math.prod(node.type.shape)
    if node.op == "total":
        parts = [_of_each_row(w, arg) for arg in node.args]
        return reduce(lambda sum_, part: w.point("add", sum_, part), parts)
    if node.op == "transpose":
        part = _of_each_row(w, node.args[0])
        return Row((w.rows, size), part.node, 0, part.full_index.reshape(node.type.shape[::-1]).T.ravel())
    if node.op == "place":
        part = _of_each_row(w, node.args[0])
        index = np.full(node.type.shape, -1, dtype=np.int64)
        extents = w.builder.nodes[node.args[0]].type.shape
        inside = tuple(slice(start, start + n) for start, n in zip(node.attrs["corner"], extents, strict=True))
        index[inside] = part.full_index.reshape(extents)
        return Row((w.rows, size), part.node, 0, index.ravel())
    if node.op == "rowsum":
        return Row((w.rows, size), node.args[0])
    if size > _MOST_ELEMENTS:
        raise Untraceable(
            f"The step changes a weight of {size:,} elements by numbers that are others at each step, such as a "
            f"dropout mask of it, which would take longer than the Python loop: up to {_MOST_ELEMENTS:,} are compiled. "
            "Mask the values that the weight is multiplied by instead, or draw one mask per call, with "
            "fusecell.WeightDrop."
        )
    if node.op == "outer":
        left, right = (Row((w.rows, w.features(arg)), arg) for arg in node.args)
        height, width = node.type.shape
        across = Row((w.rows, size), left.node, 0, arranged((height,)).repeat(width))
        along = Row((w.rows, size), right.node, 0, np.tile(arranged((width,)), height))
        return w.point("mul", across, along)
    if node.op == "contract_sum":
        attrs = {name: node.attrs[name] for name in ("shape", "count", "a", "b")}
        return Row((w.rows, size), w.builder.add("contract", *node.args, **attrs))
    raise Untraceable(
        f"The step multiplies the gradient of a weight by numbers that are others at each step. {AS_INPUT}"
    )
