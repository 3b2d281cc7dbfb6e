"""Write graph nodes for products of two values along labelled dimensions, as einsum has them.

By what is summed, and what is a weight, a product is

    nothing is summed                   a pointwise product of broadcast operands
    features are summed                 a contract
    rows are summed, features or not    an outer product or a contract_sum: the gradient of a weight
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.index_maps import Access, access_of
from fusecell.compiler.frontend.traced_values import Index, Matrix, Row, Sum, Untraceable, Weight, arranged

__all__ = ["Labelled", "contracted", "product_of_rows", "sum_of_products", "weight_row"]

_MIXES = (
    "The step mixes the rows of the batch: it multiplies values of one row by those of another. Each row of the batch "
    "is a sequence of its own; attention and transformer layers have the batch first if made with batch_first=True."
)
_BATCH = "N"


@dataclass(frozen=True, slots=True)
class Labelled:
    """Operand of a contraction, whose dimensions have labels, the batch's not among them.

    Attributes:
        is_row: whether it has the batch.
    """

    node: int
    index: Index
    labels: tuple[str, ...]
    is_row: bool

    def sizes(self) -> Mapping[str, int]:
        return dict(zip(self.labels, self.index.shape, strict=True))

    def over(self, labels: Sequence[str], sizes: Mapping[str, int]) -> Index:
        """Return its index over other labels, which lack none but of size 1: along what it doesn't have it repeats."""
        order = [self.labels.index(label) for label in labels if label in self.labels]
        units = [axis for axis in range(self.index.ndim) if axis not in order]
        index = self.index.transpose(*units, *order)
        shape = [sizes[label] if label in self.labels else 1 for label in labels]
        return np.broadcast_to(index.reshape(shape), tuple(sizes[label] for label in labels))


def contracted(w: Writer, a: Operand, b: Operand, a_labels: str, b_labels: str, out: str) -> Row | Sum:
    """Return the product of two values, summed over the labels that the result doesn't have.

    Example: ``contracted(w, a, b, "bik", "bkj", "bij")`` is a product of batches of matrices.

    Arguments:
        a_labels: a letter for each dimension of a.
        out: the letters of the result's dimensions, in their order.
    """
    a_row, b_row = weight_row(w, a), weight_row(w, b)
    split, batch = _batch_label(a_row, b_row, a_labels, b_labels)
    left, right = _labelled(a_row, a_labels, batch, split), _labelled(b_row, b_labels, batch, split)
    sizes = {**right.sizes(), **left.sizes()}
    result = [part for label in out for part in (_parts(label, split) if label == batch else (label,))]
    if batch is None:
        return product_of_rows(w, left, right, result, sizes, tuple(sizes[label] for label in result), None)
    if batch in out:
        place = result.index(_BATCH)
        result.remove(_BATCH)
        shape = [sizes[label] for label in result]
        shape.insert(place, w.rows)
        return product_of_rows(w, left, right, result, sizes, tuple(shape), place).merged(split)
    return sum_of_products(w, left, right, result, sizes)


def weight_row(w: Writer, operand: Operand) -> Row:
    """Return an operand of a contraction as a row; a matrix in the form in which products take it."""
    if isinstance(operand, Weight) and isinstance(operand.view, Matrix) and operand.fill is None:
        node = w.leaf(operand.view.slot, "matrix")
        view = operand.view
        stored = arranged(w.builder.nodes[node].type.shape)[slice(*view.rows), slice(*view.cols)]
        return Row(operand.shape, node, None, stored.T if view.flipped else stored)
    return w.number(operand)


def _batch_label(a: Row, b: Row, a_labels: str, b_labels: str) -> tuple[tuple[int, int], str | None]:
    """Return how the batch is merged with other dimensions, and its label; None where neither value has it."""
    batches = {(labels[row.axis], row.split) for row, labels in ((a, a_labels), (b, b_labels)) if row.axis is not None}
    if not batches:
        return (1, 1), None
    if len(batches) > 1:
        raise Untraceable(_MIXES)
    label, split = batches.pop()
    return split, label


def _parts(label: str, split: tuple[int, int]) -> tuple[str, ...]:
    """Return the labels of the batch: with those of the dimensions that are merged with it, before and after."""
    return (_BATCH,) if split == (1, 1) else (f"{label}-", _BATCH, f"{label}+")


def _labelled(row: Row, labels: str, batch: str | None, split: tuple[int, int]) -> Labelled:
    if row.axis is None and batch is not None and batch in labels:
        raise Untraceable("The step mixes the rows of the batch with a weight that has as many rows.")
    apart = row.apart()
    names = [part for label in labels for part in (_parts(label, split) if label == batch else (label,))]
    if row.axis is not None:
        names.remove(_BATCH)
    return Labelled(apart.node, apart.full_index, tuple(names), row.axis is not None)


def product_of_rows(
    w: Writer,
    a: Labelled,
    b: Labelled,
    result: Sequence[str],
    sizes: Mapping[str, int],
    shape: tuple[int, ...],
    axis: int | None,
) -> Row:
    """Return a product that is a value per row, or the same for all rows."""
    summed = [label for label in sizes if label not in result]
    if math.prod(sizes[label] for label in summed) == 1:
        operands = [_broadcast(each, result, sizes, shape, axis) for each in (a, b)]
        return w.point("mul", *operands)
    attrs = _attrs(w, _stored_along(w, a, b, result, summed), _stored_along(w, b, a, result, summed), result, summed)
    return Row(shape, w.builder.add("contract", attrs.pop("left"), attrs.pop("right"), **attrs), axis)


def _broadcast(
    operand: Labelled, result: Sequence[str], sizes: Mapping[str, int], shape: tuple[int, ...], axis: int | None
) -> Row:
    """Return an operand as a value that broadcasts to the result."""
    kept = [label for label in operand.labels if label in result]
    index = operand.index.reshape([operand.sizes()[label] for label in kept])
    index = index.transpose([kept.index(label) for label in result if label in kept])
    extents = [sizes[label] if label in kept else 1 for label in result]
    index = index.reshape(extents)
    if axis is None:
        return Row(tuple(extents), operand.node, None, index)
    extents.insert(axis, shape[axis] if operand.is_row else 1)
    if operand.is_row:
        return Row(tuple(extents), operand.node, axis, index)
    return Row(tuple(extents), operand.node, None, index.reshape(extents))


def _stored_along(
    w: Writer, operand: Labelled, other: Labelled, result: Sequence[str], summed: Sequence[str]
) -> Labelled:
    """Return a weight in an order in which lanes can run over what it alone has of the result, if nothing else can."""
    access = access_of(operand.index)
    if w.builder.nodes[operand.node].type.kind != "weight" or access is None:
        return operand
    own = [label for label in result if label in operand.labels and label not in other.labels]
    if not own or not other.is_row or operand.index.size < 2:
        return operand
    strides = dict(zip(operand.labels, access.strides, strict=True))
    lanes = access_of(other.index)
    of_other = dict(zip(other.labels, lanes.strides if lanes else (), strict=False))
    extents = other.sizes()
    if strides[own[-1]] == 1 or any(
        of_other.get(label) == 1 and extents[label] >= 8 for label in result if label in extents
    ):
        return operand
    groups = [label for label in operand.labels if label in other.labels and label in result]
    order = [*groups, *(label for label in summed if label in operand.labels), *own]
    index = operand.index.transpose([operand.labels.index(label) for label in order])
    node = w.gather([operand.node], index)
    return Labelled(node, arranged(index.shape), tuple(order), operand.is_row)


def _attrs(w: Writer, a: Labelled, b: Labelled, result: Sequence[str], summed: Sequence[str]) -> dict[str, Any]:
    """Return the nodes and the attributes of a contraction over axes longer than 1."""
    sizes = {**a.sizes(), **b.sizes()}
    outer = [label for label in result if sizes.get(label, 1) > 1]
    inner = [label for label in summed if sizes.get(label, 1) > 1]
    read = [_read_in_place(w, operand, [*outer, *inner], sizes) for operand in (a, b)]
    nodes = [node for node, _ in read]
    accesses: list[dict[str, Any]] = [{"offset": access.offset, "strides": list(access.strides)} for _, access in read]
    if not outer:
        accesses = [{**access, "strides": [0, *access["strides"]]} for access in accesses]
    return {
        "left": nodes[0],
        "right": nodes[1],
        "shape": [sizes[label] for label in outer] or [1],
        "count": [sizes[label] for label in inner],
        "a": accesses[0],
        "b": accesses[1],
    }


def _read_in_place(w: Writer, operand: Labelled, labels: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, Access]:
    """Return the node and the access with which a kernel reads an operand; what has no strides is written in order."""
    is_number = w.features(operand.node) == 1
    access = None if is_number else access_of(operand.over(labels, sizes))
    if access is not None:
        return operand.node, access
    node = w.gather([operand.node], operand.index)
    size = operand.index.size
    # A number, or one feature, is written out: kernels read operands of products from memory.
    if w.features(node) != size or w.builder.nodes[node].op == "const":
        node = w.builder.add("broadcast", node, size=size)
    whole = Labelled(node, arranged(operand.index.shape), operand.labels, operand.is_row)
    access = access_of(whole.over(labels, sizes))
    assert access is not None
    return node, access


def sum_of_products(w: Writer, a: Labelled, b: Labelled, result: Sequence[str], sizes: Mapping[str, int]) -> Sum:
    """Return a product that is summed over rows: the gradient of a weight."""
    summed = [label for label in sizes if label not in result and label != _BATCH]
    shape = tuple(sizes[label] for label in result)
    is_outer = len(result) == 2 and not any(sizes[label] > 1 for label in summed)
    if is_outer and a.is_row and b.is_row:
        for left, right in ((a, b), (b, a)):
            sizes_of_both = (left.sizes().get(result[0]), right.sizes().get(result[1]))
            if sizes_of_both == shape == (left.index.size, right.index.size):
                return Sum(shape, w.builder.add("outer", _in_order(w, left), _in_order(w, right)))
    attrs = _attrs(w, a, b, result, summed)
    leaf = list(shape) if len(shape) == 2 else [math.prod(shape)]
    return Sum(shape, w.builder.add("contract_sum", attrs.pop("left"), attrs.pop("right"), **attrs, result=leaf))


def _in_order(w: Writer, operand: Labelled) -> int:
    flat = Row((w.rows, operand.index.size), operand.node, 0, operand.index.ravel())
    return w.flat(flat)
