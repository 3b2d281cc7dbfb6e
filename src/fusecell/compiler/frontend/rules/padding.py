"""Rules for borders that repeat or mirror an image, for windows of one dimension, and for their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusecell.compiler.frontend.graph_writer import Writer
from fusecell.compiler.frontend.traced_values import Row, Untraceable

__all__ = ["PADDINGS"]

_MOST_TAPS = 64
"""Elements of a window whose gradient is added up, at the most: each is a value of its own."""


def _sources(size: int, before: int, after: int, mirrors: bool) -> list[int]:
    """Return which element each one of a padded dimension is."""
    if min(before, after) < 0:
        raise Untraceable("Padding by a negative number is not compiled; cut the image with a slice.")
    inside = list(range(size))
    if mirrors:
        return [*inside[before:0:-1], *inside, *inside[-2 : -2 - after : -1]]
    return [*[0] * before, *inside, *[size - 1] * after]


def _border(mirrors: bool) -> Callable[..., Any]:
    def rule(w: Writer, x: Row, padding: Sequence[int]) -> Row:
        def padded(numbers: Tensor) -> Tensor:
            for dim, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True), 1):
                sources = _sources(numbers.shape[-dim], before, after, mirrors)
                numbers = numbers.index_select(-dim, torch.tensor(sources))
            return numbers

        result: Row = w.move(padded, x)
        return result

    return rule


def _border_backward(mirrors: bool) -> Callable[..., Any]:
    def rule(w: Writer, g: Row, x: Row, padding: Sequence[int]) -> Row:
        for dim, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True), 1):
            g = _folded_back(w, g, -dim, x.shape[-dim], before, after, mirrors)
        return g

    return rule


def _folded_back(w: Writer, g: Row, dim: int, size: int, before: int, after: int, mirrors: bool) -> Row:
    """Add the gradient of a border to that of the elements that it repeats, along one dimension."""

    def part(start: int, length: int, at: int, flips: bool) -> Row:
        def placed(numbers: Tensor) -> Tensor:
            cut = numbers.narrow(dim, start, length)
            shape = list(cut.shape)
            shape[dim] = size
            whole = cut.new_zeros(shape)
            whole.narrow(dim, at, length).copy_(cut.flip(dim) if flips else cut)
            return whole

        row: Row = w.move(placed, g)
        return row

    total = part(before, size, 0, False)
    if mirrors:
        borders = [(0, before, 1)] * bool(before) + [(before + size, after, size - 1 - after)] * bool(after)
        for start, length, at in borders:
            total = w.point("add", total, part(start, length, at, True))
        return total
    for place in range(before):
        total = w.point("add", total, part(place, 1, 0, False))
    for place in range(after):
        total = w.point("add", total, part(before + size + place, 1, size - 1, False))
    return total


def _unfold_backward(w: Writer, g: Row, sizes: Sequence[int], dim: int, size: int, step: int) -> Row:
    """Add up the gradients of windows along a dimension, which are g's last one, where they overlap."""
    if size > _MOST_TAPS:
        raise Untraceable(f"The gradient of windows of more than {_MOST_TAPS} elements is not compiled.")
    axis = dim % len(sizes)
    total: Row | None = None
    for tap in range(size):

        def placed(numbers: Tensor, tap: int = tap) -> Tensor:
            cut = numbers.select(-1, tap)
            whole = cut.new_zeros([size if at == axis else cut.shape[at] for at, size in enumerate(sizes)])
            at: Any = (*[slice(None)] * axis, slice(tap, tap + cut.shape[axis] * step, step))
            whole[at] = cut
            return whole

        row: Row = w.move(placed, g)
        total = row if total is None else w.point("add", total, row)
    assert total is not None
    return total


PADDINGS: Mapping[str, Callable[..., Any]] = {
    **{f"reflection_pad{dims}d": _border(True) for dims in (1, 2, 3)},
    **{f"reflection_pad{dims}d_backward": _border_backward(True) for dims in (1, 2, 3)},
    **{f"replication_pad{dims}d": _border(False) for dims in (1, 2, 3)},
    **{f"replication_pad{dims}d_backward": _border_backward(False) for dims in (1, 2, 3)},
    "unfold_backward": _unfold_backward,
}
