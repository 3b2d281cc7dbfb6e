"""Rules for ``m[torch.arange(N), place]``: each row's own elements, at places of its own, read or written.

The numbers of the rows are no values of a graph, in which a row doesn't know its number; as an index they say that each
row takes from itself, as ``gather`` and ``scatter`` do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.traced_values import Row, RowNumbers, Untraceable

__all__ = ["OwnElements", "is_every_row", "own_elements", "row_numbers"]

_REASON = "The step computes with the numbers of the rows, which a row of a batch does not know."
_OTHERWISE = (
    "The step indexes with the numbers of the rows and other tensors in a way that is not compiled; take elements "
    "along one dimension with torch.gather."
)


def row_numbers(shape: tuple[int, ...]) -> RowNumbers:
    """Return the value of ``torch.arange(N)``, or of it with more dimensions."""
    return RowNumbers(shape, _REASON)


def is_every_row(w: Writer, x: Operand, indices: Sequence[Operand | RowNumbers | None]) -> bool:
    """Whether an index is the numbers of the rows alone: ``m[torch.arange(N)]`` is m."""
    if not isinstance(indices[0], RowNumbers) or any(index is not None for index in indices[1:]):
        return False
    row = w.row(x)
    return row.axis == 0 and not row.is_merged and indices[0].shape == row.shape[:1]


@dataclass(frozen=True)
class OwnElements:
    """Elements that each row takes of itself.

    Attributes:
        positions: (N, k, R): along the second dimension of what `opened` returns.
        shape: of the result.
    """

    positions: Row
    shape: tuple[int, ...]
    _order: tuple[int, ...]
    _whole: tuple[int, ...]

    def opened(self, w: Writer, x: Operand) -> Row:
        """Return a tensor as (N, elements to choose from, the rest)."""
        count = self.positions.shape[-1]
        row: Row = w.move(lambda numbers: numbers.permute(self._order).reshape(numbers.shape[0], -1, count), w.row(x))
        return row

    def closed(self, w: Writer, row: Row) -> Row:
        """Return a tensor as it was before `opened`."""
        permuted = [self._whole[dim] for dim in self._order]
        back = sorted(range(len(self._order)), key=self._order.__getitem__)
        result: Row = w.move(lambda numbers: numbers.reshape(-1, *permuted[1:]).permute(back), row)
        return result

    def result(self, w: Writer, picked: Row) -> Row:
        """Return what was picked, (N, k, R), in the shape that torch gives it."""
        row: Row = w.move(lambda numbers: numbers.reshape(-1, *self.shape[1:]), picked)
        return row

    def values(self, w: Writer, value: Operand) -> Row:
        """Return what is written, of any shape that broadcasts, as (N, k, R)."""
        spread = w.move(lambda numbers: numbers.expand(self.shape), w.number(value))
        if isinstance(spread, Row) and spread.axis is None:  # the same for all rows
            spread = w.point("add", spread, w.const(0.0, (self.shape[0], *[1] * (len(self.shape) - 1)), 0))
        row: Row = w.move(lambda numbers: numbers.reshape(numbers.shape[0], *self.positions.shape[1:]), spread)
        return row


def own_elements(w: Writer, x: Row, indices: Sequence[Operand | RowNumbers | None]) -> OwnElements:
    """Return the elements that row numbers and other indices pick.

    Raises:
        Untraceable: where the row numbers are not those of the first dimension, or the others don't broadcast to them.
    """
    places = [place for place, index in enumerate(indices) if index is not None]
    others = places[1:]
    first = indices[0]
    if x.axis != 0 or x.is_merged or not isinstance(first, RowNumbers) or not others:
        raise Untraceable(_OTHERWISE)
    position: Any = None
    for place in others:
        index: Any = indices[place]
        if isinstance(index, RowNumbers) or w.is_mask(w.row(index)):
            raise Untraceable(_OTHERWISE)
        size = float(x.shape[place])
        own = w.point("where", w.point("lt", index, 0.0), w.point("add", index, size), index)
        position = own if position is None else w.point("add", w.point("mul", position, size), own)
    picks: tuple[int, ...] = torch.broadcast_shapes(first.shape, position.shape)  # type: ignore[no-untyped-call]  # torch's
    if position.axis not in (0, None) or picks[0] != x.shape[0] or any(size != 1 for size in first.shape[1:]):
        raise Untraceable(_OTHERWISE)
    if position.axis is None:  # the same places in all rows
        zeros = w.const(0.0, (x.shape[0], *[1] * (len(picks) - 1)), 0)
        position = w.point("add", position, zeros)
    order = (0, *others, *(dim for dim in range(1, len(x.shape)) if dim not in others))
    rest = tuple(x.shape[dim] for dim in order[1 + len(others) :])
    count, inner = math.prod(picks[1:]), math.prod(rest)

    def spread(numbers: torch.Tensor) -> torch.Tensor:
        flat = numbers.expand(picks).reshape(picks[0], count, 1)
        return flat.expand(picks[0], count, inner)

    return OwnElements(w.move(spread, position), (*picks, *rest), order, x.shape)
