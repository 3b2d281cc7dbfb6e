"""The first few of a sorted line without sorting it: one pass over the line for each.

A pass takes the best of the elements that come after the one before it. Each of the sixteen lanes has the best of every
sixteenth element; as the line is read from its end, of equals the first in the line is taken last, and stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_text import Value, literal
from fusecell.compiler.codegen.nests.lanes import load_lanes
from fusecell.compiler.ir.primitives import LANES

__all__ = ["emit_first"]

Attrs = Mapping[str, Any]


def emit_first(f: Function, attrs: Attrs, line: Value, exact: bool, result: Value) -> None:
    """Write the first positions that sort a line without NaN."""
    worst = -inf if attrs["descending"] else inf
    before = [f.constant(-worst), f.constant(-1.0)]
    with f.for_range_carrying("rank", 0, attrs["first"], before, names=("last", "last_place")) as (rank, carried):
        best, place = _joined_best(f, attrs, *_best_of_lanes(f, attrs, line, exact, *carried))
        number = f.first_lane(place, "position")
        f.store_scalar(number, f.at(result, f.mul(rank, f.module.itemsize)))
        carried[:] = [f.splat(f.first_lane(best, "best"), "last"), f.splat(number, "last_place")]


def _best_of_lanes(
    f: Function, attrs: Attrs, line: Value, exact: bool, last: Value, last_place: Value
) -> tuple[Value, Value]:
    """Return the best element of each lane that comes after the last one, and its position; the count for none."""
    count, item = attrs["count"], f.module.itemsize
    whole, tail = count - count % LANES, count % LANES
    best = [f.constant(-inf if attrs["descending"] else inf), f.constant(float(count))]
    if tail:
        elements = load_lanes(f, f.at(line, whole * item), item, tail, "x", exact=exact)
        numbers = f.fadd(_lane_numbers(f), f.constant(float(whole)), "places")
        best = _better(f, attrs, elements, numbers, [*best, last, last_place], f.first_lanes(tail))
    if not whole:
        return best[0], best[1]
    numbers = f.fadd(_lane_numbers(f), f.constant(float(whole - LANES)), "places")
    names = ("best", "place", "places")
    with f.for_range_carrying("k", 0, whole, [*best, numbers], step=LANES, names=names) as (k, carried):
        elements = f.load(f.at(line, f.mul(f.sub(whole - LANES, k), item)), "x", item)
        carried[:2] = _better(f, attrs, elements, carried[2], [*carried[:2], last, last_place])
        carried[2] = f.fsub(carried[2], f.constant(float(LANES)), "places")
    return carried[0], carried[1]


def _better(
    f: Function, attrs: Attrs, elements: Value, places: Value, known: list[Value], mask: Value | None = None
) -> list[Value]:
    """Return the better ones of elements and of those before, where they come after the last one, and their places."""
    best, place, last, last_place = known
    after, not_worse = ("olt", "oge") if attrs["descending"] else ("ogt", "ole")
    equal = f.and_(f.fcmp("oeq", elements, last, "equal"), f.fcmp("ogt", places, last_place, "behind"), "equal")
    comes_after = f.or_(f.fcmp(after, elements, last, "after"), equal, "after")
    is_better = f.and_(f.fcmp(not_worse, elements, best, "better"), comes_after, "better")
    if mask is not None:
        is_better = f.and_(is_better, mask, "better")
    return [f.select(is_better, elements, best, "best"), f.select(is_better, places, place, "place")]


def _joined_best(f: Function, attrs: Attrs, best: Value, place: Value) -> tuple[Value, Value]:
    """Return the best of sixteen, and its position, in lane 0; of equals the first in the line."""
    better = "ogt" if attrs["descending"] else "olt"
    width = LANES
    while width > 1:
        width //= 2
        order = [lane + width if lane < width else lane for lane in range(LANES)]
        others, other_places = f.shuffle(best, None, order, "others"), f.shuffle(place, None, order, "other_places")
        equal = f.and_(f.fcmp("oeq", others, best, "equal"), f.fcmp("olt", other_places, place, "before"), "equal")
        is_better = f.or_(f.fcmp(better, others, best, "better"), equal, "better")
        best, place = f.select(is_better, others, best, "best"), f.select(is_better, other_places, place, "place")
    return best, place


def _lane_numbers(f: Function) -> Value:
    """Return 0, 1, ..., 15."""
    module = f.module
    numbers = ", ".join(f"{module.scalar} {literal(float(lane), module.dtype)}" for lane in range(LANES))
    return Value(f"<{numbers}>", module.vector)
