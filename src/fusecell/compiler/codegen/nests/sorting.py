"""The nest of the positions that sort: by counting what comes before each element, or by selecting a few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_text import Integer, Value, typed
from fusecell.compiler.codegen.nests.lanes import load_lanes
from fusecell.compiler.codegen.nests.reductions import joined
from fusecell.compiler.codegen.nests.selection import emit_first
from fusecell.compiler.ir.primitives import LANES

__all__ = ["emit_argsort"]

Attrs = Mapping[str, Any]
_LONG_LINE = 64
"""Elements from which on those that are sorted are compared by one comparison where they are no NaN."""


def emit_argsort(f: Function, attrs: Attrs, sources: Sequence[Value], exact: Sequence[bool], out: Value) -> None:
    """Write the positions that sort, all of them or the first: of a line's ``count``, where those are few."""
    count, item = attrs["count"], f.module.itemsize
    first = attrs.get("first", count)
    with f.for_range("outer", 0, attrs["outer"]) as outer:
        line = f.at(sources[0], f.mul(outer, count * item))
        result = f.at(out, f.mul(outer, first * item))
        if first == count:
            _by_counting(f, attrs, line, exact[0], result)
        else:
            has_nan = _has_nan(f, count, line, exact[0])
            with f.unless(has_nan, "numbers"):
                emit_first(f, attrs, line, exact[0], result)
            with f.if_(has_nan, "numbers"):
                _by_counting(f, attrs, line, exact[0], result)


def _by_counting(f: Function, attrs: Attrs, line: Value, exact: bool, result: Value) -> None:
    """Write positions of one line: each element's place is the number of those that come before it."""
    count, item = attrs["count"], f.module.itemsize
    with f.for_range("i", 0, count) as i:
        own = f.load_splat(f.at(line, f.mul(i, item)), "own")

        def put(place: Integer, i: Value = i) -> None:
            f.store_scalar(f.as_number(i, "position"), f.at(result, f.mul(place, item)))

        if attrs.get("first", count) < count:
            place = _place(f, attrs, line, own, i, exact)
            with f.if_(f.lt(place, attrs["first"], "is_first"), "is_first"):
                put(place)
        elif count < _LONG_LINE:
            put(_place(f, attrs, line, own, i, exact))
        else:
            lanes = f.fcmp("ord", own, own, "is_number")
            is_number = f.let("is_number", f"extractelement {typed(lanes)}, i64 0", "i1")
            with f.if_(is_number, "number"):
                put(_place_of_number(f, attrs, line, own, i, exact))
            with f.unless(is_number, "number"):
                put(_place(f, attrs, line, own, i, exact))


def _has_nan(f: Function, count: int, line: Value, exact: bool) -> Value:
    """Return whether a line has a NaN."""
    item = f.module.itemsize
    whole, tail = count - count % LANES, count % LANES
    nans = f.zero
    if whole:
        with f.for_range_carrying("k", 0, whole, [nans], step=LANES) as (k, carried):
            elements = f.load(f.at(line, f.mul(k, item)), "x", item)
            carried[0] = f.select(f.fcmp("uno", elements, elements, "is_nan"), f.constant(1.0), carried[0], "nans")
        nans = carried[0]
    if tail:
        elements = load_lanes(f, f.at(line, whole * item), item, tail, "x", exact=exact)
        is_nan = f.and_(f.fcmp("uno", elements, elements, "is_nan"), f.first_lanes(tail), "is_nan")
        nans = f.select(is_nan, f.constant(1.0), nans, "nans")
    return f.ne(f.as_integer(joined(f, "amax", nans), "nans"), 0, "has_nan")


def _place(f: Function, attrs: Attrs, line: Value, own: Value, i: Value, exact: bool) -> Value:
    """Return how many elements come before element ``i``: smaller ones, and equal ones that are before it."""
    count = attrs["count"]
    whole, tail = count - count % LANES, count % LANES
    before = f.zero
    if whole:
        with f.for_range_carrying("j", 0, whole, [before], step=LANES) as (j, carried):
            carried[0] = _counted(f, attrs, line, own, i, j, LANES, exact, carried[0])
        before = carried[0]
    if tail:
        before = _counted(f, attrs, line, own, i, whole, tail, exact, before)
    return f.as_integer(joined(f, "sum", before), "place")


def _place_of_number(f: Function, attrs: Attrs, line: Value, own: Value, i: Value, exact: bool) -> Value:
    """Return the same where element ``i`` is no NaN: one comparison for each other, but for those in its own vector."""
    count, item = attrs["count"], f.module.itemsize
    whole, tail = count - count % LANES, count % LANES
    # NaN comes first in falling order, and last in rising order.
    equal_too, without_equal = ("uge", "ugt") if attrs["descending"] else ("ole", "olt")
    own_vector = f.minimum(f.sub(i, f.urem(i, LANES, "lane")), whole, "own_vector")
    behind = f.minimum(f.add(own_vector, LANES), whole, "behind")
    before = f.zero
    for name, start, stop, predicate in (
        ("before", 0, own_vector, equal_too),
        ("beside", own_vector, behind, ""),
        ("behind", behind, whole, without_equal),
    ):
        with f.for_range_carrying(name, start, stop, [before], step=LANES) as (j, carried):
            if predicate:
                other = f.load(f.at(line, f.mul(j, item)), "other", item)
                comes_before = f.fcmp(predicate, other, own, "comes_before")
                carried[0] = f.fadd(carried[0], f.select(comes_before, f.constant(1.0), f.zero, "one"), "before")
            else:
                carried[0] = _counted(f, attrs, line, own, i, j, LANES, exact, carried[0])
        before = carried[0]
    if tail:
        before = _counted(f, attrs, line, own, i, whole, tail, exact, before)
    return f.as_integer(joined(f, "sum", before), "place")


def _counted(
    f: Function, attrs: Attrs, line: Value, own: Value, i: Value, first: Integer, lanes: int, exact: bool, so_far: Value
) -> Value:
    """Return ``so_far`` with the elements from ``first`` on added that come before element ``i``."""
    item = f.module.itemsize
    other = load_lanes(f, f.at(line, f.mul(first, item)), item, lanes, "other", exact=exact)
    comes_before = f.and_(_before(f, other, own, attrs["descending"]), f.first_lanes(lanes), "comes_before")
    equal = f.and_(_equal(f, other, own), f.first_lanes(f.sub(i, first)), "is_equal_before")
    is_before = f.or_(comes_before, equal, "is_before")
    return f.fadd(so_far, f.select(is_before, f.constant(1.0), f.zero, "one"), "before")


def _before(f: Function, a: Value, b: Value, descending: bool) -> Value:
    """Return whether a comes before b, NaN counting as larger than all numbers."""
    is_nan_a, is_nan_b = f.fcmp("uno", a, a, "is_nan"), f.fcmp("uno", b, b, "is_nan")
    if descending:
        larger = f.and_(is_nan_a, f.not_(is_nan_b, "is_number"), "is_larger")
        return f.or_(f.fcmp("ogt", a, b, "is_larger"), larger, "comes_before")
    smaller = f.and_(is_nan_b, f.not_(is_nan_a, "is_number"), "is_smaller")
    return f.or_(f.fcmp("olt", a, b, "is_smaller"), smaller, "comes_before")


def _equal(f: Function, a: Value, b: Value) -> Value:
    both = f.and_(f.fcmp("uno", a, a, "is_nan"), f.fcmp("uno", b, b, "is_nan"), "both_nan")
    return f.or_(f.fcmp("oeq", a, b, "is_equal"), both, "is_equal")
