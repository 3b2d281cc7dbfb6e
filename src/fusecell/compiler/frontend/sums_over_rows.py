"""Rewrite sums over rows, the gradients of weights: as a matrix, as a vector, in another order of elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusecell.compiler.frontend.index_maps import access_of
from fusecell.compiler.frontend.remedies import AS_INPUT
from fusecell.compiler.frontend.traced_values import Index, Untraceable, arranged
from fusecell.compiler.ir.graph import Builder, Node

__all__ = ["as_matrix", "reordered"]

_NO_STRIDES = f"The step moves elements of the gradient of a weight in an order that has no strides. {AS_INPUT}"


def as_matrix(builder: Builder, index: int, shape: Sequence[int]) -> int:
    """Return a sum as a matrix: a vector's elements row by row."""
    if len(builder.nodes[index].type.shape) == 2:
        return index
    return reordered(builder, index, arranged(shape))


def reordered(builder: Builder, index: int, order: Index) -> int:
    """Return a sum with the elements ``order`` of it, of one or two dimensions, or flat if it has more."""
    node = builder.nodes[index]
    result = list(order.shape) if order.ndim <= 2 else [order.size]
    if list(node.type.shape) == result and np.array_equal(order, arranged(order.shape)):
        return index
    if node.op == "total":
        return builder.add("total", *(reordered(builder, arg, order) for arg in node.args))
    if node.op == "transpose":
        rows, cols = node.type.shape
        # Element (i, j) of a transpose is element (j, i) of its argument.
        return reordered(builder, node.args[0], order % cols * rows + order // cols)
    if node.op == "place" and (placed := _placed_rows(builder, node, order)) is not None:
        return placed
    attrs = _as_contraction(builder, node)
    if attrs is None:
        raise Untraceable(f"The step reshapes the gradient of a part of a weight. {AS_INPUT}")
    left, right = attrs.pop("left"), attrs.pop("right")
    axes = [axis for axis in range(order.ndim) if order.shape[axis] > 1]
    long = order.reshape([order.shape[axis] for axis in axes] or [1])
    for name in ("a", "b"):
        access = access_of(_of_result(attrs, name)[long])
        if access is None:
            raise Untraceable(_NO_STRIDES)
        summed = attrs[name]["strides"][len(attrs["shape"]) :]
        attrs[name] = {"offset": access.offset, "strides": [*access.strides, *summed]}
    attrs["shape"] = list(long.shape)
    return builder.add("contract_sum", left, right, **attrs, result=result)


def _placed_rows(builder: Builder, node: Node, order: Index) -> int | None:
    """Return whole rows of a matrix that are placed among zeros as a vector, as that matrix; None for other forms."""
    (part,), size = node.args, node.type.shape
    if len(size) != 1 or order.ndim != 2 or not np.array_equal(order, arranged(order.shape)):
        return None
    (start,), (count,), width = node.attrs["corner"], builder.nodes[part].type.shape, order.shape[1]
    if start % width or count % width:
        return None
    rows = reordered(builder, part, arranged((count // width, width)))
    return builder.add("place", rows, shape=list(order.shape), corner=[start // width, 0])


def _of_result(attrs: dict[str, Any], name: str) -> Index:
    """Return, for each element of a contraction's result, the feature at which its operand begins."""
    shape, access = attrs["shape"], attrs[name]
    places = np.unravel_index(arranged((math.prod(shape),)), shape)
    strides = access["strides"][: len(shape)]
    total = np.full(math.prod(shape), access["offset"], dtype=np.int64)
    for place, stride in zip(places, strides, strict=True):
        total += place * stride
    return total


def _as_contraction(builder: Builder, node: Node) -> dict[str, Any] | None:
    """Return a sum over rows as the arguments and attributes of a contraction; None for one that is none."""
    if node.op == "contract_sum":
        return {"left": node.args[0], "right": node.args[1]} | {
            name: node.attrs[name] for name in ("shape", "count", "a", "b")
        }
    if node.op == "outer":
        rows, cols = node.type.shape
        a, b = {"offset": 0, "strides": [1, 0]}, {"offset": 0, "strides": [0, 1]}
        return {"left": node.args[0], "right": node.args[1], "shape": [rows, cols], "count": [], "a": a, "b": b}
    if node.op == "rowsum":
        size = node.type.shape[0]
        ones = builder.add("broadcast", builder.const(1.0), size=1)
        a, b = {"offset": 0, "strides": [1]}, {"offset": 0, "strides": [0]}
        return {"left": node.args[0], "right": ones, "shape": [size], "count": [], "a": a, "b": b}
    return None
