"""Places of a grid in an image, which ``grid_sample`` reads, and the positions of elements there."""

from __future__ import annotations

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.traced_values import Row

__all__ = ["BORDER", "REFLECTION", "flat", "of_channels", "reflected", "spread", "unnormalised"]

BORDER, REFLECTION = 1, 2
"""torch's numbers of paddings; 0 is zeros."""


def unnormalised(w: Writer, grid: Row, part: int, size: int, aligned: bool) -> tuple[Row, float]:
    """Write places along a dimension in elements, and return how fast they move with the grid's numbers, -1 to 1."""
    place: Row = w.move(lambda numbers: numbers[..., part].flatten(1), grid)
    scale = (size - 1) / 2 if aligned else size / 2
    place = w.point("mul", w.point("add", place, 1.0), scale)
    return (place if aligned else w.point("sub", place, 0.5)), scale


def reflected(w: Writer, place: Operand, size: int, aligned: bool) -> tuple[Row, Row]:
    """Write places beyond an end as those before it, and 1, or -1 where a reflected one moves the other way."""
    low, span = (0.0, size - 1.0) if aligned else (-0.5, float(size))
    if span == 0:
        return w.point("mul", place, 0.0), w.point("mul", place, 0.0)
    distance = w.point("sub", place, low)
    turn = w.point("where", w.point("lt", distance, 0.0), -1.0, 1.0)
    distance = w.point("abs", distance)
    rest, turns = w.point("fmod", distance, span), w.point("floor", w.point("div", distance, span))
    half = w.point("mul", turns, 0.5)
    is_even = w.point("eq", w.point("floor", half), half)
    inner = w.point("add", w.point("where", is_even, rest, w.point("sub", span, rest)), low)
    return inner, w.point("where", is_even, turn, w.point("neg", turn))


def of_channels(w: Writer, value: Row) -> Row:
    """Return (N, places) as (N, 1, places)."""
    row: Row = w.move(lambda numbers: numbers.unsqueeze(1), value)
    return row


def flat(w: Writer, image: Row) -> Row:
    """Return (N, channels, ...) as (N, channels, elements)."""
    row: Row = w.move(lambda numbers: numbers.flatten(2), image)
    return row


def spread(w: Writer, positions: Row, channels: int) -> Row:
    """Return (N, 1, places) as (N, channels, places)."""
    row: Row = w.move(lambda numbers: numbers.expand(-1, channels, -1), positions)
    return row
