"""Nests along an axis: reductions, running sums and the like.

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
from fusecell.compiler.codegen.llvm_text import Integer, Value
from fusecell.compiler.codegen.nests.lanes import for_groups, load_lanes, store_lanes
from fusecell.compiler.ir.axes import is_sequential
from fusecell.compiler.ir.primitives import LANES

__all__ = ["emit_reduce", "emit_scan", "joined"]

Attrs = Mapping[str, Any]
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
        f.store_scalar(joined(f, op, partial), f.at(out, f.mul(f.add(f.mul(outer, inner), place), item)))


def joined(f: Function, op: str, value: Value) -> Value:
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
