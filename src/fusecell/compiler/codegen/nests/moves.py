"""Nests that move elements: copies of accesses, joins, elements taken by positions, and values added at positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_text import Integer, Value
from fusecell.compiler.codegen.nests.lanes import for_groups, load_lanes, store_lanes

__all__ = ["add_run_to", "clear", "emit_gather", "emit_interleave", "emit_scatter_add", "emit_take", "position"]

Attrs = Mapping[str, Any]


def emit_gather(f: Function, attrs: Attrs, sources: Sequence[Value], exact: Sequence[bool], out: Value) -> None:
    """Write a copy of an access: one loop an axis, and lanes along the last one."""
    item = f.module.itemsize
    source = f.at(sources[0], attrs["offset"] * item)
    axes = list(zip(attrs["shape"], (stride * item for stride in attrs["strides"]), strict=True))
    _copy_axes(f, axes, source, out, exact[0])


def _copy_axes(f: Function, axes: Sequence[tuple[int, int]], source: Value, out: Value, exact: bool) -> None:
    (extent, stride), rest = axes[0], axes[1:]
    item = f.module.itemsize
    if rest:
        bytes_ = item
        for inner, _ in rest:
            bytes_ *= inner
        with f.for_range("outer", 0, extent) as place:
            _copy_axes(f, rest, f.at(source, f.mul(place, stride)), f.at(out, f.mul(place, bytes_)), exact)
    elif stride in (0, item):
        _copy(f, source, stride, out, extent, exact)
    else:
        with f.for_range("element", 0, extent) as place:
            value = f.load_scalar(f.at(source, f.mul(place, stride)), "element")
            f.store_scalar(value, f.at(out, f.mul(place, item)))


def _copy(f: Function, source: Value, stride: int, out: Value, extent: int, exact: bool) -> None:
    """Write a copy of neighbours, or of one number, to neighbours."""
    item = f.module.itemsize

    def group(first: Integer, count: int) -> None:
        value = load_lanes(f, f.at(source, f.mul(first, stride)), stride, count, "lanes", exact=exact)
        store_lanes(f, value, f.at(out, f.mul(first, item)), item, count)

    for_groups(f, "column", extent, group)


def emit_interleave(
    f: Function, attrs: Attrs, sizes: Sequence[int], sources: Sequence[Value], exact: Sequence[bool], out: Value
) -> None:
    """Write a join of arrays along their second axis: row by row, one array after the other."""
    item, outer = f.module.itemsize, attrs["outer"]
    width = sum(sizes) // outer
    first = 0
    for size, source, is_exact in zip(sizes, sources, exact, strict=True):
        part = size // outer
        with f.for_range("line", 0, outer) as line:
            from_ = f.at(source, f.mul(line, part * item))
            _copy(f, from_, item, f.at(out, f.add(f.mul(line, width * item), first * item)), part, is_exact)
        first += part


def position(f: Function, pointer: Value, count: int) -> Value:
    """Load a position as an integer from 0 below ``count``: whatever the number is, no other memory is reached."""
    number = f.load_scalar(pointer, "position")
    # The saturating conversion turns NaN into 0, and infinities into the ends of the range.
    index = f.let("index", f.intrinsic(f"fptosi.sat.i64.{f.module.dtype}", number, result="i64"), "i64")
    return f.maximum(f.minimum(index, count - 1), 0, "index")


def emit_take(f: Function, attrs: Attrs, sources: Sequence[Value], exact: Sequence[bool], out: Value) -> None:
    """Write elements along an axis by positions."""
    value, positions = sources
    count, inner = attrs["count"], attrs["inner"]

    def copy_run(at: Value, line: Integer, target: Integer) -> None:
        source = _element(f, value, f.add(f.mul(line, count), position(f, at, count)), inner, 0)
        _copy(f, source, f.module.itemsize, _element(f, out, target, inner, 0), inner, exact[0])

    def copy_one(at: Value, line: Integer, target: Integer, place: Integer) -> None:
        source = _element(f, value, f.add(f.mul(line, count), position(f, at, count)), inner, place)
        f.store_scalar(f.load_scalar(source, "element"), _element(f, out, target, inner, place))

    _over_positions(f, attrs, positions, copy_run, copy_one)


def emit_scatter_add(f: Function, attrs: Attrs, sources: Sequence[Value], exact: Sequence[bool], out: Value) -> None:
    """Write zeros, to which values are added at positions, in the order of the positions."""
    positions, values = sources
    count, inner = attrs["count"], attrs["inner"]
    clear(f, out, attrs["outer"] * count * inner)

    def add_run(at: Value, line: Integer, source: Integer) -> None:
        target = _element(f, out, f.add(f.mul(line, count), position(f, at, count)), inner, 0)
        add_run_to(f, _element(f, values, source, inner, 0), target, inner, exact[1])

    def add_one(at: Value, line: Integer, source: Integer, place: Integer) -> None:
        target = _element(f, out, f.add(f.mul(line, count), position(f, at, count)), inner, place)
        value = f.load_scalar(_element(f, values, source, inner, place), "value")
        f.store_scalar(f.fadd(f.load_scalar(target, "so_far"), value, "sum"), target)

    _over_positions(f, attrs, positions, add_run, add_one)


def clear(f: Function, out: Value, size: int) -> None:
    """Write zeros."""
    item = f.module.itemsize
    for_groups(
        f, "column", size, lambda first, count: store_lanes(f, f.zero, f.at(out, f.mul(first, item)), item, count)
    )


def add_run_to(f: Function, source: Value, target: Value, extent: int, exact: bool) -> None:
    """Add neighbours to neighbours."""
    item = f.module.itemsize

    def group(first: Integer, count: int) -> None:
        at = f.at(target, f.mul(first, item))
        value = load_lanes(f, f.at(source, f.mul(first, item)), item, count, "value", exact=exact)
        so_far = load_lanes(f, at, item, count, "so_far", exact=True)
        store_lanes(f, f.fadd(so_far, value, "sum"), at, item, count)

    for_groups(f, "column", extent, group)


def _element(f: Function, start: Value, line: Integer, inner: int, place: Integer) -> Value:
    """Return the address of an element: ``line`` counts along the outer axis and the one of the positions."""
    return f.at(start, f.mul(f.add(f.mul(line, inner), place), f.module.itemsize))


def _over_positions(
    f: Function,
    attrs: Attrs,
    positions: Value,
    run: Callable[[Value, Integer, Integer], None],
    one: Callable[[Value, Integer, Integer, Integer], None],
) -> None:
    """Loop over positions: of those that all inner elements share a run of elements, else one element each."""
    item, picks, inner = f.module.itemsize, attrs["picks"], attrs["inner"]
    with f.for_range("outer", 0, attrs["outer"]) as line, f.for_range("pick", 0, picks) as pick:
        picked = f.add(f.mul(line, picks), pick)
        if attrs["positions"] == "shared":
            run(f.at(positions, f.mul(pick, item)), line, picked)
        elif inner == 1:
            one(f.at(positions, f.mul(picked, item)), line, picked, 0)
        else:
            with f.for_range("inner", 0, inner) as place:
                one(_element(f, positions, picked, inner, place), line, picked, place)
