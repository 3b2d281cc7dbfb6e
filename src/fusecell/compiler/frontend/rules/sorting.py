"""Rules for what puts elements in order: sort, topk, kthvalue, median."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fusecell.compiler.frontend.graph_writer import Writer
from fusecell.compiler.frontend.rules.indexing import gather
from fusecell.compiler.frontend.rules.scans import along
from fusecell.compiler.frontend.traced_values import Row, Untraceable

__all__ = ["SORTING"]


_FEWER = 4
"""Times as many elements as are taken, from which on a pass over the line for each is faster than sorting it."""


def _sorted(w: Writer, x: Row, dim: int = -1, descending: bool = False, first: int | None = None) -> tuple[Row, Row]:
    """Write a value's elements in order along a dimension, and their positions; where asked, the first ones."""
    row = w.number(x)
    if not row.shape:
        return row, w.const(0.0)
    last: Row = w.move(lambda numbers: numbers.movedim(dim, -1), row)
    outer, count, _ = along(w, last, -1)
    few: dict[str, Any] = {"first": first} if first is not None and first * _FEWER <= count else {}
    node = w.builder.add("argsort", w.flat(last), outer=outer, count=count, descending=descending, **few)
    shape = (*last.shape[:-1], few.get("first", count))
    order = Row(shape, node, last.axis, None, last.split)
    order = w.move(lambda numbers: numbers.movedim(-1, dim), order)
    if first is not None and not few:
        order = w.move(lambda numbers: numbers.narrow(dim, 0, first), order)
    return gather(w, row, dim, order), order


def _sort(w: Writer, x: Row, dim: int = -1, descending: bool = False, **options: Any) -> tuple[Row, Row]:
    return _sorted(w, x, options.get("dim", dim), options.get("descending", descending))


def _topk(w: Writer, x: Row, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Row, Row]:
    return _sorted(w, x, dim, largest, k)


def _kth(w: Writer, x: Row, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Row, Row]:
    return _elements_at(w, x, _kth_position(w, x, k, dim), dim, keepdim)


def _kth_position(w: Writer, x: Row, k: int, dim: int) -> Row:
    """Write where the k-th of a line's elements in order is, with one position along the dimension."""
    _, order = _sorted(w, x, dim, first=k)
    if not order.shape:
        return order
    position: Row = w.move(lambda numbers: numbers.narrow(dim, k - 1, 1), order)
    return position


def _elements_at(w: Writer, x: Row, positions: Row, dim: int, keepdim: bool) -> tuple[Row, Row]:
    """Write the elements at positions along a dimension, and these."""
    both = gather(w, x, dim, positions), positions
    if keepdim:
        return both
    values, places = (w.move(lambda numbers: numbers.squeeze(dim), each) for each in both)
    return values, places


def _median(w: Writer, x: Row, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None:
        raise Untraceable("The median of all elements mixes the rows of the batch; give it a dimension.")
    # NaN is the median of a line that has any: the first of them, which is its maximum too.
    largest, place = w.reduce("amax", x, [dim], True), w.reduce("argmax", x, [dim], True)
    middle = _kth_position(w, x, (x.shape[dim] + 1) // 2, dim)
    return _elements_at(w, x, w.point("where", w.point("ne", largest, largest), place, middle), dim, keepdim)


SORTING: Mapping[str, Callable[..., Any]] = {
    "sort": _sort,
    "argsort": lambda w, x, *args, **options: _sort(w, x, *args, **options)[1],
    "topk": _topk,
    "kthvalue": _kth,
    "median": _median,
}
