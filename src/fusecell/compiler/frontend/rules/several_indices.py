"""Rules for ``m[:, i, j]``: elements that several tensors of positions pick together, read or written.

Of a matrix's triangle, say, ``i, j = torch.tril_indices(3, 3)``. The dimensions are merged, and so are the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.traced_values import Row, Untraceable

__all__ = ["Together", "counted_from_start", "picked_together"]


@dataclass(frozen=True)
class Together:
    """Dimensions of a tensor that are indexed together.

    Attributes:
        axis: where they are, merged into one, in what `opened` returns.
        positions: along that dimension.
    """

    axis: int
    positions: Any
    _order: tuple[int, ...]
    _sizes: tuple[int, ...]

    def opened(self, w: Writer, x: Row) -> Row:
        """Return a tensor with the dimensions merged."""
        last = self.axis + len(self._sizes) - 1
        row: Row = w.move(lambda numbers: numbers.permute(self._order).flatten(self.axis, last), x)
        return row

    def closed(self, w: Writer, row: Row) -> Row:
        """Return a tensor as it was before `opened`."""
        back = sorted(range(len(self._order)), key=self._order.__getitem__)
        result: Row = w.move(lambda numbers: numbers.unflatten(self.axis, self._sizes).permute(back), row)
        return result


def counted_from_start(w: Writer, index: Operand, size: int) -> Row:
    """Return positions, of which negative ones count from the end."""
    return w.point("where", w.point("lt", index, 0.0), w.point("add", index, float(size)), index)


def picked_together(w: Writer, x: Row, indices: Sequence[Operand | None]) -> Together:
    """Return the dimensions that several tensors index; as in torch they come first where they are no neighbours.

    Raises:
        Untraceable: for masks among them, and where they pick rows of the batch.
    """
    places = [place for place, index in enumerate(indices) if index is not None]
    if x.axis in places or x.is_merged:
        raise Untraceable(
            "The step mixes the rows of the batch: it picks rows of the batch by position; take elements of each row."
        )
    position: Any = None
    for place in places:
        index: Any = indices[place]
        if w.is_mask(w.row(index)):
            raise Untraceable("The step indexes with a mask next to other tensors; take elements with torch.gather.")
        own = counted_from_start(w, index, x.shape[place])
        size = float(x.shape[place])
        position = own if position is None else w.point("add", w.point("mul", position, size), own)
    sizes = tuple(x.shape[place] for place in places)
    if places[-1] - places[0] == len(places) - 1:
        return Together(places[0], position, tuple(range(len(x.shape))), sizes)
    return Together(0, position, (*places, *(dim for dim in range(len(x.shape)) if dim not in places)), sizes)
