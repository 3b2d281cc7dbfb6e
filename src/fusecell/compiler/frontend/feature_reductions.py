"""Write graph nodes for reductions over axes: by few primitives of whole rows, by additions, or by one over an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fusecell.compiler.frontend.feature_moves import FeatureMoves
from fusecell.compiler.frontend.index_maps import access_of, inverse
from fusecell.compiler.frontend.traced_values import Index

__all__ = ["reduced_lines"]

_JOINS = {"sum": "add", "amax": "maximum", "amin": "minimum"}
"""Reductions that a primitive of a whole row does, and the pointwise primitive that joins two values."""
_MOST_JOINED = 8
"""Values that are joined one by one, at the most: pointwise values of a stage cost no memory."""


def reduced_lines(w: FeatureMoves, op: str, node: int, index: Index, lines: tuple[int, ...]) -> int:
    """Reduce features of a node; ``index`` has the axes ``lines`` that stay, then those that are reduced.

    All ways have the order of `ir.axes`, and so the same bits.
    """
    number = math.prod(lines)
    table = index.reshape(number, -1)
    count = table.shape[1]
    if count == 1:
        return w.gather([node], index.reshape(lines or (1,)))
    if op in _JOINS and number == 1:
        return w.builder.add(op, _row_of(w, node, index))
    if op in _JOINS and count <= number and count <= _MOST_JOINED and _are_runs(table):
        # Vectors run over the lines.
        parts = [_row_of(w, node, table[:, column].reshape(lines)) for column in range(count)]
        result = parts[0]
        for part in parts[1:]:
            result = w.builder.add(_JOINS[op], result, part)
        return result
    axes = _stored_axes(w, node, index, len(lines))
    if axes is not None:
        return w.builder.add("reduce", node, op=op, outer=axes[0], count=axes[1], inner=axes[2])
    return w.builder.add("reduce", _row_of(w, node, table), op=op, outer=number, count=count, inner=1)


def _are_runs(table: Index) -> bool:
    """Whether each column of a table is neighbouring features."""
    return bool((np.diff(table, axis=0) == 1).all())


def _row_of(w: FeatureMoves, node: int, index: Index) -> int:
    """Return features of a node as a value per row, those of a weight too."""
    features = w.gather([node], index)
    if w.builder.nodes[features].type.kind == "weight":
        return w.builder.add("broadcast", features, size=index.size)
    return features


def _stored_axes(w: FeatureMoves, node: int, index: Index, lines: int) -> tuple[int, int, int] | None:
    """Return (outer, count, inner) of the node's own features if the reduced axes are neighbours there, else None."""
    size = w.features(node)
    access = access_of(index)
    if access is None or access.offset or inverse(index, size) is None or w.builder.nodes[node].type.kind == "weight":
        return None
    long = [axis for axis in range(index.ndim) if index.shape[axis] > 1]
    stored = sorted(long, key=lambda axis: -access.strides[axis])
    places = [place for place, axis in enumerate(stored) if axis >= lines]
    others = [axis for axis in stored if axis < lines]
    # What stays must be in order, and the reduced axes side by side, in order too.
    if others != sorted(others) or places != list(range(places[0], places[0] + len(places))):
        return None
    reduced = [stored[place] for place in places]
    if reduced != sorted(reduced):
        return None
    extent = _product(index.shape, stored)
    outer = _product(index.shape, stored[: places[0]])
    count = _product(index.shape, reduced)
    return outer, count, extent // (outer * count)


def _product(shape: Sequence[int], axes: Sequence[int]) -> int:
    return int(np.prod([shape[axis] for axis in axes], dtype=np.int64))
