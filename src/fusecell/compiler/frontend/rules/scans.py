"""Rules for cumulative operations, and for products and positions of extremes over axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.traced_values import Row, Untraceable

__all__ = ["SCANS", "along", "places", "scanned"]

_FEW_LOG_TERMS = 16
"""Terms of a running logarithm of sums, at the most, that become values of their own, each added to those before."""


def along(w: Writer, row: Row, dim: int) -> tuple[int, int, int]:
    """Return (outer, count, inner) of a value's features along a dimension."""
    features = list(row.apart().shape)
    if not row.shape:
        return 1, 1, 1
    axis = dim % len(row.shape)
    if axis == row.axis:
        raise Untraceable(
            "The step mixes the rows of the batch: it computes along the batch dimension; each row is a sequence of "
            "its own."
        )
    if row.axis is not None:
        apart = row.apart()
        assert apart.axis is not None
        axis += 2 * (row.is_merged and axis > row.axis)
        features.pop(apart.axis)
        axis -= axis > apart.axis
    return math.prod(features[:axis]), features[axis], math.prod(features[axis + 1 :])


def scanned(w: Writer, op: str, x: Operand, dim: int) -> Row:
    """Return the running sum, product or extreme along a dimension."""
    row = w.number(x)
    outer, count, inner = along(w, row, dim)
    if count == 1:
        return row
    node = w.builder.add("scan", w.flat(row), op=op, outer=outer, count=count, inner=inner, reverse=False)
    return Row(row.shape, node, row.axis, None, row.split)


def _scan(op: str) -> Callable[..., Any]:
    return lambda w, x, dim, **_: scanned(w, op, x, dim)


def _log_sum(w: Writer, x: Row, dim: int) -> Row:
    _, count, _ = along(w, x, dim)
    if count > _FEW_LOG_TERMS:
        return _log_sum_by_doubling(w, x, dim, count)
    # Of the running maximum, not of the whole one: what comes later must not take digits from what comes before.
    most = scanned(w, "amax", x, dim)
    values = [_part(w, x, dim, place) for place in range(count)]
    mosts = [_part(w, most, dim, place) for place in range(count)]
    sums = [w.const(1.0)]
    for place in range(1, count):
        before = w.point("mul", sums[-1], _share(w, mosts[place - 1], mosts[place]))
        sums.append(w.point("add", before, _share(w, values[place], mosts[place])))
    parts = [w.point("add", most_part, w.point("log", each)) for most_part, each in zip(mosts, sums, strict=True)]
    joined: Row = w.move(lambda numbers: torch.cat(numbers, dim), parts)
    return joined


def _log_sum_by_doubling(w: Writer, x: Row, dim: int, count: int) -> Row:
    """Return the logarithm of running sums, each pass of twice as many terms: their largest, and the sum beside it."""
    nothing = w.const(0.0, x.shape, x.axis, x.split)
    most, total, terms = x, w.const(1.0, x.shape, x.axis, x.split), 1
    while terms < count:
        # Before the first element there is nothing: a sum of 0, next to any largest.
        most_before = _earlier(w, most, most, dim, terms)
        total_before = _earlier(w, nothing, total, dim, terms)
        larger = w.point("maximum", most, most_before)
        own = w.point("mul", total, _share(w, most, larger))
        total = w.point("add", own, w.point("mul", total_before, _share(w, most_before, larger)))
        most, terms = larger, 2 * terms
    return w.point("add", most, w.point("log", total))


def _share(w: Writer, x: Row, most: Row) -> Row:
    """Return e to the difference of two values; 1 where they are equal, infinite ones included."""
    apart = w.point("sub", x, most)
    return w.point("exp", w.point("where", w.point("eq", x, most), 0.0, apart))


def _earlier(w: Writer, first: Row, x: Row, dim: int, places: int) -> Row:
    """Return the element that is some places before each one; of the first elements those of another value."""

    def moved(numbers: list[torch.Tensor]) -> torch.Tensor:
        start, rest = numbers
        return torch.cat((start.narrow(dim, 0, places), rest.narrow(dim, 0, rest.shape[dim] - places)), dim)

    row: Row = w.move(moved, [first, x])
    return row


def _part(w: Writer, x: Row, dim: int, place: int) -> Row:
    row: Row = w.move(lambda numbers: numbers.narrow(dim, place, 1), x)
    return row


def _product(w: Writer, x: Row, dim: int | None = None, keepdim: bool = False, **_: Any) -> Row:
    return w.reduce("prod", x, None if dim is None else [dim], keepdim)


def _extreme_position(op: str) -> Callable[..., Any]:
    def rule(w: Writer, x: Row, dim: int | None = None, keepdim: bool = False) -> Row:
        return w.reduce(op, x, None if dim is None else [dim], keepdim)

    return rule


def _extreme_of_dim(op: str) -> Callable[..., Any]:
    def rule(w: Writer, x: Row, dim: int | None = None, keepdim: bool = False) -> Any:
        if dim is None:
            return w.reduce(op, x, None, keepdim)
        return w.reduce(op, x, [dim], keepdim), w.reduce(op.replace("a", "arg", 1), x, [dim], keepdim)

    return rule


def _running_extreme(op: str) -> Callable[..., Any]:
    reaches = "ge" if op == "amax" else "le"

    def rule(w: Writer, x: Row, dim: int) -> tuple[Row, Row]:
        values = scanned(w, op, x, dim)
        # The last place so far at which the running extreme was met; NaN is one, and equal to nothing.
        is_met = w.point("or", w.point(reaches, x, values), w.point("ne", x, x))
        met = w.point("where", is_met, places(w, x, dim), 0.0)
        return values, scanned(w, "amax", met, dim)

    return rule


def places(w: Writer, x: Row, dim: int) -> Row:
    """Return the place of each element along a dimension, from 0 on."""
    axis = dim % max(len(x.shape), 1)
    size = x.shape[axis] if x.shape else 1
    ones = w.builder.add("broadcast", w.builder.const(1.0), size=size)
    counted = w.builder.add("scan", ones, op="sum", outer=1, count=size, inner=1, reverse=False)
    numbers = Row((size,), w.builder.add("sub", counted, w.builder.const(1.0)), None)
    row: Row = w.move(lambda numbers: numbers.reshape(-1, *[1] * (len(x.shape) - 1 - axis)), numbers)
    return row


SCANS: Mapping[str, Callable[..., Any]] = {
    "cumsum": _scan("sum"),
    "cumprod": _scan("prod"),
    "logcumsumexp": _log_sum,
    "cummax": _running_extreme("amax"),
    "cummin": _running_extreme("amin"),
    "prod": _product,
    "argmax": _extreme_position("argmax"),
    "argmin": _extreme_position("argmin"),
    "max": _extreme_of_dim("amax"),
    "min": _extreme_of_dim("amin"),
}
