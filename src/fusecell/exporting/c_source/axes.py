"""Loops of C for what is computed along axes: the primitives of :mod:`fusecell.compiler.ir.axes`.

The order of every sum is the compiler's: whether it goes from the first term to the last, or has sixteen partial
results, is asked of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusecell.compiler.codegen.nests.contraction import Axis, lane_axis
from fusecell.compiler.codegen.nests.stage import contraction_axes
from fusecell.compiler.ir.axes import is_sequential
from fusecell.compiler.ir.primitives import LANES
from fusecell.exporting.c_source.functions import function_name

__all__ = ["AXIS_LOOPS", "AxisNest", "indented", "view_index"]

Attrs = Mapping[str, Any]
Lines = list[str]


class AxisNest:
    """One value along axes: its attributes, where its operands and result are, and what its C needs.

    Arguments:
        attrs: of the node.
        sizes: numbers of each operand.
        sources: addresses of the operands, as C.
        out: the name of the result's array.
        real: C's name of the numbers.
        dtype: their format.
        needs: is told of each function that is called.
    """

    def __init__(
        self,
        attrs: Attrs,
        sizes: Sequence[int],
        sources: Sequence[str],
        out: str,
        real: str,
        dtype: Any,
        needs: Callable[[str], None],
    ) -> None:
        self.attrs, self.sizes, self.sources, self.out = attrs, sizes, sources, out
        self.real, self.dtype, self.needs = real, dtype, needs

    def combined(self, op: str, a: str, b: str) -> str:
        """Spell the combination of two results of a reduction."""
        if op in ("sum", "prod"):
            return f"{a} {'+' if op == 'sum' else '*'} {b}"
        name = "maximum" if op == "amax" else "minimum"
        self.needs(name)
        return f"{function_name(name, self.dtype)}({a}, {b})"


def _loop(name: str, count: int, body: Sequence[str], start: int = 0) -> Lines:
    if count == 1 and start == 0:
        return [f"{{ const int {name} = 0; (void){name};", *indented(body), "}"]
    return [f"for (int {name} = {start}; {name} < {count}; {name}++) {{", *indented(body), "}"]


def indented(lines: Sequence[str]) -> Lines:
    """Return lines one level further in."""
    return [f"    {line}" for line in lines]


def view_index(attrs: Attrs, at: str) -> str:
    """Spell where the feature ``at`` of a view is in the value that it is a view of."""
    shape, terms = attrs["shape"], []
    for axis, (extent, stride) in enumerate(zip(shape, attrs["strides"], strict=True)):
        inner = math.prod(shape[axis + 1 :])
        if extent > 1 and stride:
            place = f"({at})" if inner == 1 else f"({at}) / {inner}"
            place = place if axis == 0 or math.prod(shape[:axis]) == 1 else f"{place} % {extent}"
            terms.append(place if stride == 1 else f"({place}) * {stride}")
    return " + ".join([*([str(attrs["offset"])] if attrs["offset"] or not terms else []), *terms])


def _gather(nest: AxisNest) -> Lines:
    size = math.prod(nest.attrs["shape"])
    return _loop("col", size, [f"{nest.out}[col] = {nest.sources[0]}[{view_index(nest.attrs, 'col')}];"])


def _interleave(nest: AxisNest) -> Lines:
    outer, first = nest.attrs["outer"], 0
    width = sum(nest.sizes) // outer
    lines: Lines = []
    for size, source in zip(nest.sizes, nest.sources, strict=True):
        part = size // outer
        body = [f"{nest.out}[line * {width} + {first} + col] = {source}[line * {part} + col];"]
        lines += _loop("line", outer, _loop("col", part, body))
        first += part
    return lines


def _lines_of(nest: AxisNest, body: Sequence[str]) -> Lines:
    """Write the loops over all lines along the axis; the first element of a line is at ``first``."""
    count, inner = nest.attrs["count"], nest.attrs["inner"]
    start = f"const int first = line * {count * inner} + place;"
    return _loop("line", nest.attrs["outer"], _loop("place", inner, [start, *body]))


def _reduce(nest: AxisNest) -> Lines:
    op, outer, count, inner = (nest.attrs[name] for name in ("op", "outer", "count", "inner"))
    source, result = nest.sources[0], f"{nest.out}[line * {inner} + place]"
    if not is_sequential(op, outer, count, inner):
        nest.needs(op)
        return _lines_of(nest, [f"{result} = reduce_{op}({source} + first, {count}, {inner});"])
    element = f"{source}[first + step * {inner}]"
    if op in ("argmax", "argmin"):
        better = ">" if op == "argmax" else "<"
        body = [
            f"{nest.real} most = {source}[first], found_at = 0;",
            *_loop(
                "step",
                count,
                [
                    f"const {nest.real} candidate = {element};",
                    f"if (candidate {better} most || (candidate != candidate && most == most)) {{",
                    "    most = candidate;",
                    f"    found_at = ({nest.real})step;",
                    "}",
                ],
                start=1,
            ),
            f"{result} = found_at;",
        ]
        return _lines_of(nest, body)
    combined = nest.combined(op, "total", element)
    loop = _loop("step", count, [f"total = {combined};"], start=1)
    return _lines_of(nest, [f"{nest.real} total = {source}[first];", *loop, f"{result} = total;"])


def _scan(nest: AxisNest) -> Lines:
    count, inner = nest.attrs["count"], nest.attrs["inner"]
    place = f"first + ({count - 1} - step) * {inner}" if nest.attrs["reverse"] else f"first + step * {inner}"
    element = f"{nest.sources[0]}[at]"
    body = [
        f"const int at = {place};",
        f"total = step == 0 ? {element} : {nest.combined(nest.attrs['op'], 'total', element)};",
        f"{nest.out}[at] = total;",
    ]
    return _lines_of(nest, [f"{nest.real} total = 0;", *_loop("step", count, body)])


def _contract(nest: AxisNest) -> Lines:
    """Write sums of products: over the result's axes, then over those that are summed."""
    item = nest.dtype.itemsize
    axes = contraction_axes(nest.attrs, item)
    result, summed = ([axis for axis in axes if (axis.out is None) is is_summed] for is_summed in (False, True))
    lanes = lane_axis(result or [Axis("one", 1, 0, 0, item)], summed, item)
    a, b = (
        _place([(axis.name, getattr(axis, name)) for axis in axes], nest.attrs[name]["offset"], item) for name in "ab"
    )
    out = _place([(axis.name, axis.out) for axis in result], 0, item)
    factors = f"{nest.sources[0]}[{a}], {nest.sources[1]}[{b}]"
    if lanes.out is not None:
        inner = [f"total = FMA({factors}, total);"]
        begin, end = [f"{nest.real} total = 0;"], [f"{nest.out}[{out}] = total;"]
        order = summed
    else:
        nest.needs("partial sums")
        inner = [f"partial[{lanes.name} % {LANES}] = FMA({factors}, partial[{lanes.name} % {LANES}]);"]
        begin, end = [f"{nest.real} partial[{LANES}] = {{0}};"], [f"{nest.out}[{out}] = joined(partial);"]
        order = [*[axis for axis in summed if axis is not lanes], lanes]
    for axis in reversed(order):
        inner = _loop(axis.name, _extent(axis), inner)
    lines = [*begin, *inner, *end]
    for axis in reversed(result):
        lines = _loop(axis.name, _extent(axis), lines)
    return lines if result else ["{", *indented(lines), "}"]


def _extent(axis: Axis) -> int:
    assert isinstance(axis.extent, int)
    return axis.extent


def _place(strides: Sequence[tuple[str, Any]], offset: int, item: int) -> str:
    terms = [f"{name} * {stride // item}" if stride != item else name for name, stride in strides if stride]
    return " + ".join([*([str(offset)] if offset or not terms else []), *terms])


def _positions(nest: AxisNest, source: str, body: Callable[[str], Lines]) -> Lines:
    """Write the loops over positions; ``body`` takes the element's place among the picked ones."""
    picks, inner, count = nest.attrs["picks"], nest.attrs["inner"], nest.attrs["count"]
    nest.needs("position")
    own = "pick" if nest.attrs["positions"] == "shared" else f"(line * {picks} + pick) * {inner} + place"
    lines = [
        f"const int at = (line * {count} + position({source}[{own}], {count})) * {inner} + place;",
        *body(f"(line * {picks} + pick) * {inner} + place"),
    ]
    return _loop("line", nest.attrs["outer"], _loop("pick", picks, _loop("place", inner, lines)))


def _take(nest: AxisNest) -> Lines:
    value, positions = nest.sources
    return _positions(nest, positions, lambda picked: [f"{nest.out}[{picked}] = {value}[at];"])


def _scatter_add(nest: AxisNest) -> Lines:
    positions, values = nest.sources
    size = nest.attrs["outer"] * nest.attrs["count"] * nest.attrs["inner"]
    cleared = _loop("col", size, [f"{nest.out}[col] = 0;"])
    added = _positions(nest, positions, lambda picked: [f"{nest.out}[at] = {nest.out}[at] + {values}[{picked}];"])
    return [*cleared, *added]


def _argsort(nest: AxisNest) -> Lines:
    count, source = nest.attrs["count"], nest.sources[0]
    one, other = f"{source}[line * {count} + own]", f"{source}[line * {count} + other]"
    if nest.attrs["descending"]:
        before = "b > a || (b != b && a == a)"
    else:
        before = "b < a || (a != a && b == b)"
    body = [
        f"const {nest.real} a = {one};",
        "int before = 0;",
        *_loop(
            "other",
            count,
            [f"const {nest.real} b = {other};", "const int equal = a == b || (a != a && b != b);",
             f"before += {before} || (equal && other < own);"],
        ),
        f"{nest.out}[line * {count} + before] = ({nest.real})own;",
    ]  # fmt: skip
    return _loop("line", nest.attrs["outer"], _loop("own", count, body))


AXIS_LOOPS: Mapping[str, Callable[[AxisNest], Lines]] = {
    "gather": _gather,
    "interleave": _interleave,
    "reduce": _reduce,
    "scan": _scan,
    "contract": _contract,
    "take": _take,
    "scatter_add": _scatter_add,
    "argsort": _argsort,
}
"""The loops of each primitive along axes; a test holds them to the table of primitives."""
