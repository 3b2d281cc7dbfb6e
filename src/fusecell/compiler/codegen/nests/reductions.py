"""Nests along an axis: reductions, running sums and the like, and the positions that sort.

    for outer:
        for 16 lines:                       lanes along the inner axis, or along the outer one if that is all there is
            total = first element
            for the other elements:         in order
                total = total op element

A reduction whose axis is longer than there are lines has sixteen partial results for each line instead: lanes run along
the axis itself, and are joined pairwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_text import Integer, Value, typed
from fusecell.compiler.codegen.nests.lanes import for_groups, load_lanes, store_lanes
from fusecell.compiler.ir.axes import is_sequential
from fusecell.compiler.ir.primitives import LANES

__all__ = ["emit_argsort", "emit_reduce", "emit_scan"]

Attrs = Mapping[str, Any]
_LONG_LINE = 64
"""Elements from which on those that are sorted are compared by one comparison where they are no NaN."""
_IDENTITY = {"sum": 0.0, "prod": 1.0, "amax": float("-inf"), "amin": float("inf")}


def _combined(f: Function, op: str, a: Value, b: Value) -> Value:
    if op == "sum":
        return f.fadd(a, b, "total")
    if op == "prod":
        return f.fmul(a, b, "total")
    return f.math("maximum" if op == "amax" else "minimum", a, b, name="total")


def _for_lines(f: Function, attrs: Attrs, body: Any) -> None:
    """Write ``body(first element, bytes between lines, first result, bytes between results, count)`` for 16 lines each.

    Offsets are in bytes from the first element of the value, and in elements from the first result.
    """
    outer, count, inner = attrs["outer"], attrs["count"], attrs["inner"]
    item = f.module.itemsize
    if inner > 1:
        with f.for_range("outer", 0, outer) as line:

            def along_inner(first: Integer, lanes: int) -> None:
                start = f.add(f.mul(line, count * inner), first)
                body(f.mul(start, item), item, f.add(f.mul(line, inner), first), lanes)

            for_groups(f, "inner", inner, along_inner)
    else:
        for_groups(f, "outer", outer, lambda first, lanes: body(f.mul(first, count * item), count * item, first, lanes))


def emit_reduce(f: Function, attrs: Attrs, sources: Sequence[Value], exact: Sequence[bool], out: Value) -> None:
    """Write a reduction along an axis."""
    op, count, inner = attrs["op"], attrs["count"], attrs["inner"]
    item = f.module.itemsize
    if not is_sequential(op, attrs["outer"], count, inner):
        _in_partial_results(f, attrs, sources[0], exact[0], out)
        return

    def lines(start: Integer, distance: int, result: Integer, lanes: int) -> None:
        source = f.at(sources[0], start)
        first = load_lanes(f, source, distance, lanes, "first", exact=exact[0])
        if op in ("argmax", "argmin"):
            total = _extreme_position(f, op, source, first, distance, lanes, exact[0], attrs)
        else:
            with f.for_range_carrying("k", 1, count, [first]) as (k, carried):
                element = load_lanes(f, f.at(source, f.mul(k, inner * item)), distance, lanes, "x", exact=exact[0])
                carried[0] = _combined(f, op, carried[0], element)
            total = carried[0]
        store_lanes(f, total, f.at(out, f.mul(result, item)), item, lanes)

    _for_lines(f, attrs, lines)


def _extreme_position(
    f: Function, op: str, source: Value, first: Value, distance: int, lanes: int, exact: bool, attrs: Attrs
) -> Value:
    """Return the position of the first of the largest elements, or of the smallest; NaN is more extreme than all."""
    step = attrs["inner"] * f.module.itemsize
    better = "ogt" if op == "argmax" else "olt"
    with f.for_range_carrying("k", 1, attrs["count"], [first, f.zero]) as (k, carried):
        most, place = carried
        element = load_lanes(f, f.at(source, f.mul(k, step)), distance, lanes, "x", exact=exact)
        is_nan, was_number = f.fcmp("uno", element, element, "is_nan"), f.fcmp("ord", most, most, "was_number")
        is_first_nan = f.and_(is_nan, was_number, "is_first_nan")
        is_better = f.or_(f.fcmp(better, element, most, "is_better"), is_first_nan, "is_better")
        number = f.splat(f.as_number(k, "position"), "position")
        carried[:] = [f.select(is_better, element, most, "most"), f.select(is_better, number, place, "place")]
    return carried[1]


def _in_partial_results(f: Function, attrs: Attrs, source: Value, exact: bool, out: Value) -> None:
    """Write reductions of lines longer than there are of them: sixteen partial results each."""
    op, count, inner = attrs["op"], attrs["count"], attrs["inner"]
    item = f.module.itemsize
    whole, tail = count - count % LANES, count % LANES
    with f.for_range("outer", 0, attrs["outer"]) as outer, f.for_range("inner", 0, inner) as place:
        line = f.at(source, f.mul(f.add(f.mul(outer, count * inner), place), item))
        partial = f.constant(_IDENTITY[op])
        if whole:
            with f.for_range_carrying("k", 0, whole, [partial], step=LANES) as (k, carried):
                elements = load_lanes(f, f.at(line, f.mul(k, inner * item)), inner * item, LANES, "x")
                carried[0] = _combined(f, op, carried[0], elements)
            partial = carried[0]
        if tail:
            elements = load_lanes(f, f.at(line, whole * inner * item), inner * item, tail, "x", exact=exact)
            total = _combined(f, op, partial, elements)
            partial = f.select(f.first_lanes(tail), total, partial, "partial")
        f.store_scalar(_joined(f, op, partial), f.at(out, f.mul(f.add(f.mul(outer, inner), place), item)))


def _joined(f: Function, op: str, value: Value) -> Value:
    """Return sixteen partial results as one number: lanes l and l + 8, then l + 4, l + 2, l + 1."""
    width = LANES
    while width > 1:
        width //= 2
        upper = f.shuffle(value, None, [lane + width if lane < width else lane for lane in range(LANES)], "upper")
        value = _combined(f, op, value, upper)
    return f.first_lane(value, "total")


def emit_scan(f: Function, attrs: Attrs, sources: Sequence[Value], exact: Sequence[bool], out: Value) -> None:
    """Write a running sum, product, maximum or minimum along an axis, from its first element or from its last."""
    op, count, inner = attrs["op"], attrs["count"], attrs["inner"]
    step = inner * f.module.itemsize

    def lines(start: Integer, distance: int, _: Integer, lanes: int) -> None:
        def at(base: Value, k: Integer) -> Value:
            place = f.sub(count - 1, k) if attrs["reverse"] else k
            return f.at(f.at(base, start), f.mul(place, step))

        first = load_lanes(f, at(sources[0], 0), distance, lanes, "first", exact=exact[0])
        store_lanes(f, first, at(out, 0), distance, lanes)
        with f.for_range_carrying("k", 1, count, [first]) as (k, carried):
            element = load_lanes(f, at(sources[0], k), distance, lanes, "x", exact=exact[0])
            carried[0] = _combined(f, op, carried[0], element)
            store_lanes(f, carried[0], at(out, k), distance, lanes)

    _for_lines(f, attrs, lines)


def emit_argsort(f: Function, attrs: Attrs, sources: Sequence[Value], exact: Sequence[bool], out: Value) -> None:
    """Write the positions that sort: each element's place is the number of those that come before it."""
    count, item = attrs["count"], f.module.itemsize
    with f.for_range("outer", 0, attrs["outer"]) as outer:
        line, result = (f.at(base, f.mul(outer, count * item)) for base in (sources[0], out))
        with f.for_range("i", 0, count) as i:
            own = f.load_splat(f.at(line, f.mul(i, item)), "own")

            def put(place: Integer, i: Value = i, result: Value = result) -> None:
                f.store_scalar(f.as_number(i, "position"), f.at(result, f.mul(place, item)))

            if count < _LONG_LINE:
                put(_place(f, attrs, line, own, i, exact[0]))
            else:
                lanes = f.fcmp("ord", own, own, "is_number")
                is_number = f.let("is_number", f"extractelement {typed(lanes)}, i64 0", "i1")
                with f.if_(is_number, "number"):
                    put(_place_of_number(f, attrs, line, own, i, exact[0]))
                with f.unless(is_number, "number"):
                    put(_place(f, attrs, line, own, i, exact[0]))


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
    return f.as_integer(_joined(f, "sum", before), "place")


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
    return f.as_integer(_joined(f, "sum", before), "place")


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
