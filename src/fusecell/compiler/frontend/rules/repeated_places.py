"""Values that are written to places of which several may be the same: what stays at each, by comparing the places."""

from __future__ import annotations

from fusecell.compiler.frontend.graph_writer import Writer
from fusecell.compiler.frontend.rules.scans import places
from fusecell.compiler.frontend.traced_values import Row

__all__ = ["is_overwritten", "reduced_at"]


def is_overwritten(w: Writer, dim: int, positions: Row) -> Row:
    """Return for each position along a dimension whether a later one is equal."""
    axis = dim % len(positions.shape)
    number = places(w, positions, axis)
    is_later = w.point("gt", _with_axis(w, number, 0), _with_axis(w, number, 1))
    is_equal = w.point("eq", _with_axis(w, positions, axis), _with_axis(w, positions, axis + 1))
    return w.truth(w.reduce("amax", w.point("and", is_equal, is_later), [axis + 1], False))


def reduced_at(w: Writer, base: Row, dim: int, positions: Row, values: Row, op: str, begin: float) -> Row:
    """Return for each place of a tensor along a dimension the reduction of what is written to it, from ``begin`` on."""
    axis = dim % len(base.shape)
    is_here = w.point("eq", _with_axis(w, places(w, base, axis), 1), _with_axis(w, positions, axis))
    return w.reduce(op, w.point("where", is_here, _with_axis(w, values, axis), begin), [axis + 1], False)


def _with_axis(w: Writer, row: Row, dim: int) -> Row:
    """Return a value with one more dimension, of size 1."""
    result: Row = w.move(lambda numbers: numbers.unsqueeze(dim), row)
    return result
