"""Sixteen elements of an array as a vector, whatever the distance between them: loops, loads and stores of lanes."""

from __future__ import annotations

from collections.abc import Callable

from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_text import Integer, Value
from fusecell.compiler.ir.primitives import LANES

__all__ = ["for_groups", "load_lanes", "store_lanes"]


def for_groups(f: Function, name: str, extent: int, body: Callable[[Integer, int], None]) -> None:
    """Write ``body(first, count)`` for each sixteen elements of an axis, and once more for those that are left over."""
    whole = extent - extent % LANES
    if whole == LANES:
        body(0, LANES)
    elif whole:
        with f.for_range(name, 0, whole, LANES) as first:
            body(first, LANES)
    if extent % LANES:
        body(whole, extent % LANES)


def load_lanes(f: Function, pointer: Value, stride: int, count: int, name: str, *, exact: bool = False) -> Value:
    """Load ``count`` elements, ``stride`` bytes apart; further lanes hold anything, or zeros if ``exact``.

    Arguments:
        exact: whether nothing behind the last element may be read, as in a caller's rows.
    """
    if stride == 0:
        return f.load_splat(pointer, name)
    if stride == f.module.itemsize:
        if count == LANES or not exact:
            return f.load(pointer, name, f.module.itemsize)
        return f.load_masked(pointer, f.first_lanes(count), name)
    vector = f.zero
    for lane in range(count):
        element = f.load_scalar(f.at(pointer, lane * stride), f"{name}.element")
        vector = f.insert_lane(vector, element, lane, name)
    return vector


def store_lanes(f: Function, value: Value, pointer: Value, stride: int, count: int) -> None:
    """Store the first ``count`` lanes ``stride`` bytes apart; no other memory is written."""
    if stride == f.module.itemsize:
        if count == LANES:
            f.store(value, pointer, f.module.itemsize)
        else:
            f.store_masked(value, pointer, f.first_lanes(count))
        return
    for lane in range(count):
        f.store_scalar(f.lane(value, lane, "element"), f.at(pointer, lane * stride))
