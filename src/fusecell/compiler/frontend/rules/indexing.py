"""Rules for taking elements by positions: gather, index_select, embedding; and for their gradients.

Positions are values as any others, whole numbers in the graph's own format. Those of a row pick from the row itself, or
from a weight's rows; the gradient adds up in a fixed order what was picked from one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fusecell.compiler.frontend.contractions import weight_row
from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.remedies import AS_INPUT
from fusecell.compiler.frontend.rules.repeated_places import is_overwritten, reduced_at
from fusecell.compiler.frontend.rules.row_numbers import is_every_row, own_elements
from fusecell.compiler.frontend.rules.scans import along
from fusecell.compiler.frontend.rules.several_indices import counted_from_start, picked_together
from fusecell.compiler.frontend.traced_values import Masked, Row, RowNumbers, Sum, Untraceable, Value, Weight

__all__ = ["INDEXING", "gather", "index_select", "scattered"]

_FEW_WRITES = 16
"""Values, at the most, that are written over one another one by one; of more, all places are compared."""
_PICKS = "The step picks elements by a mask, whose number depends on values; select with torch.where instead."
_MIXES = (
    "The step mixes the rows of the batch: it picks rows of the batch by position; pick features of each row with "
    "torch.gather instead."
)


def _like_index(w: Writer, x: Row, dim: int, index: Row) -> Row:
    """Return x cut to the sizes that index has beside ``dim``, as gather takes no more of it."""
    axis = dim % len(x.shape)
    for position, size in enumerate(index.shape):
        if position not in (axis, x.axis) and x.shape[position] != size:
            x = w.move(lambda numbers, at=position, to=size: numbers.narrow(at, 0, to), x)
    return x


def gather(w: Writer, x: Operand, dim: int, index: Operand, sparse_grad: bool = False) -> Row:
    positions = w.number(index)
    row = _like_index(w, w.number(x), dim, positions)
    outer, count, inner = along(w, row, dim)
    _, picks, _ = along(w, positions, dim)
    axis = _common_axis(row, positions)
    node = w.builder.add(
        "take", w.flat(row), w.flat(positions), outer=outer, count=count, inner=inner, picks=picks, positions="each"
    )
    return Row(positions.shape, node, axis, None, positions.split if positions.is_merged else row.split)


def _common_axis(row: Row, positions: Row) -> int | None:
    if None not in (row.axis, positions.axis) and (row.axis, row.split) != (positions.axis, positions.split):
        raise Untraceable(_MIXES)
    return row.axis if positions.axis is None else positions.axis


def _scatter_add(w: Writer, x: Operand, dim: int, index: Operand, source: Operand) -> Row:
    positions, values, base = w.number(index), w.number(source), w.row(x)
    values = _like_index(w, values, dim, positions)
    result = scattered(w, base.shape, dim, positions, values)
    return w.point("add", base, result) if not _is_zero(w, base) else result


def scattered(w: Writer, shape: tuple[int, ...], dim: int, positions: Row, values: Row) -> Row:
    """Return zeros of a shape, to which values are added at positions along a dimension."""
    axis = dim % len(shape)
    _, picks, _ = along(w, positions, dim)
    beside = [n for position, n in enumerate(positions.shape) if position != axis]
    if beside != [n for position, n in enumerate(shape) if position != axis]:
        raise Untraceable("The step scatters into a part of a tensor; cut it out first.")
    whole = Row(shape, positions.node, _common_axis(values, positions), None, positions.split)
    outer, count, inner = along(w, whole, dim)
    node = w.builder.add(
        "scatter_add",
        w.flat(positions),
        w.flat(values),
        outer=outer,
        count=count,
        inner=inner,
        picks=picks,
        positions="each",
    )
    return Row(shape, node, whole.axis, None, whole.split)


def _is_zero(w: Writer, row: Row) -> bool:
    node = w.builder.nodes[row.node]
    return node.op == "const" and node.attrs["value"] == 0


def _scatter(w: Writer, x: Operand, dim: int, index: Operand, source: Operand, **options: Any) -> Row:
    if options.get("reduce") is not None:
        raise Untraceable("scatter with reduce is not compiled; use scatter_add or scatter_reduce of sums.")
    positions, base = w.number(index), w.row(x)
    values = w.number(source)
    if not values.shape:
        values = w.point("add", w.point("mul", positions, 0.0), values)
    values = _like_index(w, values, dim, positions)
    parts = along(w, positions, dim)[1]
    result = base
    # One after the other, as torch does it: of several values for one place the last one stays.
    if parts == 1 or _are_distinct(w, positions):
        added = scattered(w, base.shape, dim, positions, values)
        if _is_zero(w, base):
            return added
        ones = w.point("add", w.point("mul", positions, 0.0), 1.0)
        return w.point("where", w.truth(scattered(w, base.shape, dim, positions, ones)), added, base)
    if parts > _FEW_WRITES:
        is_hidden = is_overwritten(w, dim, positions)
        ones = w.point("where", is_hidden, 0.0, 1.0)
        added = scattered(w, base.shape, dim, positions, w.point("where", is_hidden, 0.0, values))
        return w.point("where", w.truth(scattered(w, base.shape, dim, positions, ones)), added, base)
    for place in range(parts):
        at = [w.move(lambda numbers, at=place: numbers.narrow(dim, at, 1), each) for each in (positions, values)]
        result = _scatter(w, result, dim, at[0], at[1])
    return result


def _are_distinct(w: Writer, positions: Row) -> bool:
    """Whether positions are those that sort, of which no two are equal."""
    node = w.builder.nodes[positions.node]
    while node.op in ("slice", "view", "broadcast") and len(node.args) == 1:
        node = w.builder.nodes[node.args[0]]
    return node.op == "argsort"


def index_select(w: Writer, x: Value, dim: int, index: Operand) -> Row:
    """Write elements along a dimension, at positions that are the same for all that is beside it."""
    row, positions = weight_row(w, x), w.number(index)
    axis = dim % max(len(row.shape), 1)
    shape = (*row.shape[:axis], *positions.shape, *row.shape[axis + 1 :])
    outer, count, inner = along(w, row, dim)
    if row.axis is not None and positions.axis is not None:
        raise Untraceable(_MIXES)
    picks = math.prod(positions.features)
    batch, split = row.axis, row.split
    if batch is not None and axis < batch:
        batch += len(positions.shape) - 1
    if positions.axis is not None:
        batch, split = axis + positions.axis, positions.split
    node = w.builder.add(
        "take",
        _whole(w, row),
        w.flat(positions),
        outer=outer,
        count=count,
        inner=inner,
        picks=picks,
        positions="shared",
    )
    return Row(shape, node, batch, None, split)


def _whole(w: Writer, row: Row) -> int:
    """Return the node of all elements in order; a matrix weight as it is."""
    index, size = row.full_index, w.features(row.node)
    is_whole = index.size == size and np.array_equal(index.ravel(), np.arange(size))
    if is_whole and w.builder.nodes[row.node].type.kind == "weight":
        return row.node
    return w.flat(row)


def _index(w: Writer, x: Value, indices: Sequence[Operand | None]) -> Row | Masked:
    if is_every_row(w, x, indices):
        return w.row(x)
    if any(isinstance(index, RowNumbers) for index in indices):
        own = own_elements(w, w.row(x), indices)
        return own.result(w, gather(w, own.opened(w, x), 1, own.positions))
    places = [place for place, index in enumerate(indices) if index is not None]
    if len(places) != 1:
        part = picked_together(w, w.row(x), indices)
        return index_select(w, part.opened(w, w.row(x)), part.axis, part.positions)
    index = indices[places[0]]
    assert index is not None
    if w.is_mask(w.row(index)):
        row = w.row(x)
        return Masked((), _PICKS, row, _mask_of(w, index, places[0], len(row.shape)))
    return index_select(w, x, places[0], counted_from_start(w, index, x.shape[places[0]]))


def _fill_of(w: Writer, value: Operand) -> float | None:
    """Return the number that a tensor is filled with, if it is: one of zeros has as many as a mask picks."""
    if isinstance(value, Weight):
        return value.fill
    if isinstance(value, Row) and w.builder.nodes[value.node].op == "const":
        return float(w.builder.nodes[value.node].attrs["value"])
    return None


def _mask_of(w: Writer, index: Operand, dim: int, dims: int) -> Row:
    """Return a mask that indexes dimensions from ``dim`` on, with as many dimensions as the tensor has."""

    def spread(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.reshape(*[1] * dim, *numbers.shape, *[1] * (dims - dim - numbers.ndim))

    mask: Row = w.move(spread, w.row(index))
    return mask


def _index_put(
    w: Writer, x: Operand, indices: Sequence[Operand | None], value: Operand, accumulate: bool = False, *_: Any
) -> Row | Sum:
    if is_every_row(w, x, indices):
        spread: Row = w.move(lambda numbers: numbers.expand(w.row(x).shape), w.row(value))
        return w.point("add", x, spread) if accumulate else spread
    if any(isinstance(each, RowNumbers) for each in indices):
        own = own_elements(w, w.row(x), indices)
        write = _scatter_add if accumulate else _scatter
        return own.closed(w, write(w, own.opened(w, x), 1, own.positions, own.values(w, value)))
    places = [place for place, index in enumerate(indices) if index is not None]
    index = indices[places[0]]
    assert index is not None
    if len(places) == 1 and w.is_mask(w.row(index)):
        mask = _mask_of(w, index, places[0], len(w.row(x).shape))
        if isinstance(value, Masked):
            if not value.is_of(mask):
                raise Untraceable("The step writes elements that one mask picks to places of another. " + _PICKS)
            value = value.row
        elif (fill := _fill_of(w, value)) is not None:
            value = fill
        elif accumulate or w.row(value).features not in ((), (1,)):
            raise Untraceable("The step writes values at places of a mask; write torch.where(mask, value, tensor).")
        return w.point("where", mask, w.point("add", x, value) if accumulate else value, x)
    base = w.row(x)
    if len(places) != 1:
        part = picked_together(w, base, indices)
        written = _write(w, part.opened(w, base), part.axis, part.positions, value, accumulate)
        if isinstance(written, Sum):
            raise Untraceable(
                f"The step adds up the gradient of a weight at positions along several dimensions. {AS_INPUT}"
            )
        return part.closed(w, written)
    return _write(w, base, places[0], counted_from_start(w, index, base.shape[places[0]]), value, accumulate)


def _write(w: Writer, base: Row, axis: int, positions: Row, value: Operand, accumulate: bool) -> Row | Sum:
    if not accumulate:
        return _index_write(w, base, axis, positions, value)
    shape = (*base.shape[:axis], *positions.shape, *base.shape[axis + 1 :])
    values = w.move(lambda numbers: numbers.expand(shape), w.number(value))
    return _index_add(w, base, axis, positions, values)


def _index_copy(w: Writer, x: Operand, dim: int, index: Operand, value: Operand) -> Row:
    base = w.row(x)
    axis = dim % len(base.shape)
    return _index_write(w, base, axis, counted_from_start(w, index, base.shape[axis]), value)


def _index_write(w: Writer, base: Row, axis: int, positions: Row, value: Operand) -> Row:
    """Write a tensor of which elements along a dimension are replaced, at positions that are the same beside it."""
    if positions.axis is not None or base.is_merged or axis == base.axis:
        raise Untraceable(_MIXES)
    shape = (*base.shape[:axis], *positions.shape, *base.shape[axis + 1 :])
    rows = w.const(0.0, tuple(size if dim == base.axis else 1 for dim, size in enumerate(base.shape)), base.axis)
    picks = math.prod(positions.shape)

    def spread(numbers: torch.Tensor) -> torch.Tensor:
        flat = numbers.reshape(*[1] * axis, picks, *[1] * (len(base.shape) - axis - 1))
        return flat.expand(*[1] * axis, picks, *base.shape[axis + 1 :])

    def joined(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.expand(shape).reshape(*base.shape[:axis], picks, *base.shape[axis + 1 :])

    at = w.point("add", w.move(spread, positions), rows)
    at = w.move(lambda numbers: numbers.expand(*base.shape[:axis], picks, *base.shape[axis + 1 :]), at)
    return _scatter(w, base, axis, at, w.move(joined, w.number(value)))


_BEGINS = {"amax": -math.inf, "amin": math.inf, "prod": 1.0, "sum": 0.0, "mean": 0.0}
_JOINS = {"amax": "maximum", "amin": "minimum", "prod": "mul"}


def _scatter_reduce(
    w: Writer, x: Operand, dim: int, index: Operand, source: Operand, reduce: str, *, include_self: bool = True
) -> Row:
    positions, base = w.number(index), w.row(x)
    values = _like_index(w, w.number(source), dim, positions)
    ones = w.point("add", w.point("mul", positions, 0.0), 1.0)
    count = scattered(w, base.shape, dim, positions, ones)
    is_reached = w.truth(count)
    start = base if include_self else w.point("where", is_reached, _BEGINS[reduce], base)
    if reduce in ("sum", "mean"):
        result = w.point("add", start, scattered(w, base.shape, dim, positions, values))
        if reduce == "sum":
            return result
        return w.point("div", result, w.point("maximum", w.point("add", count, float(include_self)), 1.0))
    parts = along(w, positions, dim)[1]
    if parts > _FEW_WRITES:
        each = reduced_at(w, base, dim, positions, values, reduce, _BEGINS[reduce])
        return w.point("where", is_reached, w.point(_JOINS[reduce], start, each), start)
    result = start
    for place in range(parts):
        at = [w.move(lambda numbers, at=place: numbers.narrow(dim, at, 1), each) for each in (positions, values)]
        result = _scatter(w, result, dim, at[0], w.point(_JOINS[reduce], gather(w, result, dim, at[0]), at[1]))
    return result


def _index_add(w: Writer, x: Operand, dim: int, index: Operand, source: Operand, alpha: float = 1) -> Row | Sum:
    """Write a tensor to which slices are added along a dimension: the gradient of `index_select`."""
    base, positions, values = w.row(x), w.number(index), w.number(source)
    if alpha != 1:
        values = w.point("mul", values, alpha)
    axis = dim % len(base.shape)
    if positions.axis is not None:
        if axis != 0 or not _is_zero(w, base):
            raise Untraceable(_MIXES)
        return _sum_at(w, positions, values, base.shape)
    picks = math.prod(positions.features)
    spread = Row(base.shape, values.node, values.axis, None, values.split)
    outer, count, inner = along(w, spread, dim)
    node = w.builder.add(
        "scatter_add",
        w.flat(positions),
        w.flat(values),
        outer=outer,
        count=count,
        inner=inner,
        picks=picks,
        positions="shared",
    )
    result = Row(base.shape, node, values.axis, None, values.split)
    return result if _is_zero(w, base) else w.point("add", base, result)


def _sum_at(w: Writer, positions: Row, values: Row, shape: tuple[int, ...]) -> Sum:
    """Add up values of all rows in the rows of a weight of a shape, at each row's positions."""
    picks = math.prod(positions.features)
    operands = (w.flat(positions), w.flat(values))
    node = w.builder.add("scatter_sum", *operands, count=shape[0], inner=math.prod(shape[1:]), picks=picks)
    return Sum(shape, node)


def _embedding(w: Writer, weight: Value, indices: Operand, padding: int = -1, *_: Any) -> Row:
    return index_select(w, weight, 0, indices)


def _embedding_backward(
    w: Writer, gradient: Row, indices: Operand, count: int, padding: int = -1, by_frequency: bool = False, *_: Any
) -> Sum:
    if by_frequency:
        raise Untraceable(
            "An embedding's gradient is scaled by how often the whole batch has each id, which mixes its rows; leave "
            "scale_grad_by_freq out."
        )
    positions = w.number(indices)
    if padding >= 0:
        is_padding: Row = w.move(lambda numbers: numbers.unsqueeze(-1), w.point("eq", positions, float(padding)))
        gradient = w.point("where", is_padding, 0.0, gradient)
    return _sum_at(w, positions, w.number(gradient), (count, gradient.shape[-1]))


INDEXING: Mapping[str, Callable[..., Any]] = {
    "gather": gather,
    "scatter": _scatter,
    "scatter_add": _scatter_add,
    "index_select": index_select,
    "index": _index,
    "_unsafe_index": _index,
    "index_put": _index_put,
    "_index_put_impl": _index_put,
    "index_add": _index_add,
    "index_copy": _index_copy,
    "index_fill": _index_copy,
    "embedding": _embedding,
    "embedding_dense_backward": _embedding_backward,
    "scatter_reduce": _scatter_reduce,
}
