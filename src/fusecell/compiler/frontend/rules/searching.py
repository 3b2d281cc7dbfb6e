"""Rules for finding values among others: bucketize, searchsorted, isin; each element is compared with all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.traced_values import Row, Untraceable

__all__ = ["SEARCHES"]


def _sought(w: Writer, bounds: Operand, x: Operand, right: bool) -> Row:
    """Count the bounds, the last dimension of the one operand, that are below each element of the other."""
    each = w.move(lambda numbers: numbers.unsqueeze(-1), w.number(x))
    # As a search does it: NaN is behind all bounds.
    is_above = w.point("lt", each, bounds) if right else w.point("le", each, bounds)
    return w.reduce("sum", w.number(w.point("not", is_above)), [-1], False)


def _bucketize(w: Writer, x: Operand, bounds: Operand, out_int32: bool = False, right: bool = False) -> Row:
    return _sought(w, bounds, x, right)


def _searchsorted(w: Writer, bounds: Operand, x: Operand, *_: Any, **options: Any) -> Row:
    if options.get("sorter") is not None:
        raise Untraceable("searchsorted with a sorter is not compiled; sort the sequence by it first, with gather.")
    sequence = w.number(bounds)
    if len(sequence.shape) > 1:
        sequence = w.move(lambda numbers: numbers.unsqueeze(-2), sequence)
    return _sought(w, sequence, x, bool(options.get("right")) or options.get("side") == "right")


def _isin(w: Writer, x: Operand, among: Operand, assume_unique: bool = False, invert: bool = False) -> Row:
    each = w.move(lambda numbers: numbers.unsqueeze(-1), w.number(x))
    flat = w.move(lambda numbers: numbers.reshape(-1), w.number(among))
    if flat.axis is not None:
        raise Untraceable("The step mixes the rows of the batch: isin looks for elements among those of all rows.")
    found = w.truth(w.reduce("amax", w.number(w.point("eq", each, flat)), [-1], False))
    return w.point("not", found) if invert else found


SEARCHES: Mapping[str, Callable[..., Any]] = {
    "bucketize": _bucketize,
    "searchsorted": _searchsorted,
    "isin": _isin,
}
