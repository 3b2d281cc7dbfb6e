"""Index maps: arrays that hold, for each element of a tensor, the feature of a value where it is, or -1 for zero.

`access_of` finds the offset and strides of a map that has them, `blocks_of` cuts one that has not into a few that have:
what is padded, or joined of several tensors. `split_axes` finds axes that a map has lost, as that of a matrix that was
transposed and then flattened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fusecell.compiler.frontend.traced_values import NEXT_NODE, Index

__all__ = ["Access", "Blocks", "access_of", "blocks_of", "inverse", "split_axes"]

_MOST_BLOCKS = 16
"""Blocks along one axis, at the most: each becomes a loop in the kernel."""
_PART = 2**15
"""Elements of a map that are compared at once: what fits into a cache."""
_MOST_STEP = 4
"""Step of a tensor with zeros between its elements, at the most, as the gradient of a slice with a step has."""


@dataclass(frozen=True, slots=True)
class Access:
    """Offset and strides of an array of ``shape`` in a value's features."""

    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    def attrs(self) -> dict[str, Any]:
        """Return the attributes of a view, without what its shape has but one of."""
        axes = _merged(self)
        return {
            "shape": [extent for extent, _ in axes] or [1],
            "strides": [stride for _, stride in axes] or [0],
            "offset": self.offset,
        }


def _merged(access: Access) -> list[tuple[int, int]]:
    """Return (extent, stride) of each axis, neighbours that one axis can express as one."""
    axes: list[tuple[int, int]] = []
    for extent, stride in zip(access.shape, access.strides, strict=True):
        if extent == 1:
            continue
        if axes and axes[-1][1] == stride * extent:
            axes[-1] = (axes[-1][0] * extent, stride)
        else:
            axes.append((extent, stride))
    return axes


def access_of(index: Index) -> Access | None:
    """Return the offset and strides of a map; None if it has none, or holds zeros."""
    # Of [1, 0, -1] the last is a zero, not the next element of a stride of -1.
    if not index.size or int(index.min()) < 0:
        return None
    offset = int(index.flat[0])
    origin = (0,) * index.ndim
    strides = tuple(
        int(index[(*origin[:axis], 1, *origin[axis + 1 :])]) - offset if extent > 1 else 0
        for axis, extent in enumerate(index.shape)
    )
    reaches_next = any(abs(stride) > NEXT_NODE // 2 for stride in strides)
    if reaches_next or not _is_affine(index, strides):
        return None
    return Access(index.shape, offset, strides)


def _is_affine(index: Index, strides: Sequence[int]) -> bool:
    """Whether a map has these strides; part by part, as a copy of a large convolution's would be tens of megabytes."""
    if not index.ndim:
        return True
    first = index[0]
    if not _is_affine(first, strides[1:]):
        return False
    count = max(_PART // first.size, 1)
    for begin in range(0, len(index), count):
        part = index[begin : begin + count]
        moved = np.arange(begin, begin + len(part), dtype=np.int64) * strides[0]
        if not np.array_equal(part, first + moved.reshape(-1, *[1] * first.ndim)):
            return False
    return True


@dataclass(frozen=True, slots=True)
class Blocks:
    """A map as a few maps, joined along the second of three axes: (outer, the parts' own, all others)."""

    outer: int
    parts: tuple[Index, ...]


def blocks_of(index: Index) -> Blocks | None:
    """Cut a map along an axis; None where it takes too many blocks."""
    for axis in range(index.ndim):
        cuts = _cuts(index, axis)
        if 2 < len(cuts) <= _MOST_BLOCKS + 1:
            parts = tuple(np.take(index, range(*ends), axis) for ends in pairwise(cuts))
            return Blocks(math.prod(index.shape[:axis]), parts)
    return _stepped(index)


def _cuts(index: Index, axis: int) -> list[int]:
    """Return where a map begins anew along an axis: elsewhere each slice is the one before, moved on."""
    slices = np.moveaxis(index, axis, 0).reshape(index.shape[axis], -1)
    is_zero = slices < 0
    same_zeros = np.asarray((is_zero[1:] == is_zero[:-1]).all(1))
    steps = np.where(is_zero[1:], 0, slices[1:] - slices[:-1])
    high = np.where(is_zero[1:], np.iinfo(np.int64).min, steps).max(1)
    low = np.where(is_zero[1:], np.iinfo(np.int64).max, steps).min(1)
    all_zero = np.asarray(is_zero[1:].all(1))
    moves_on = same_zeros & (all_zero | ((low == high) & (np.abs(low) < NEXT_NODE // 2)))
    cuts: list[int] = [0]
    # The step between two slices of the block in hand: unknown at its beginning, None between zeros.
    step: tuple[int | None] | None = None
    for position in range(len(moves_on)):
        of_slice = None if all_zero[position] else int(low[position])
        if not moves_on[position] or (step is not None and of_slice != step[0]):
            cuts.append(position + 1)
            step = None
        elif step is None:
            step = (of_slice,)
    return [*cuts, len(slices)]


def _stepped(index: Index) -> Blocks | None:
    """Cut a map with zeros between its elements, every second or third of an axis, into these and the zeros."""
    for axis, extent in enumerate(index.shape):
        for step in range(2, _MOST_STEP + 1):
            if extent <= step:
                continue
            rest = np.moveaxis(index, axis, 0)
            between = [rest[first::step] for first in range(step)]
            if not all((part < 0).all() for part in between[1:]) or (between[0] < 0).all():
                continue
            whole = extent // step * step
            if whole != extent:
                parts = (np.take(index, range(whole), axis), np.take(index, range(whole, extent), axis))
                return Blocks(math.prod(index.shape[:axis]), parts)
            split = index.reshape(*index.shape[:axis], extent // step, step, *index.shape[axis + 1 :])
            parts = (np.take(split, [0], axis + 1), np.take(split, range(1, step), axis + 1))
            return Blocks(math.prod(split.shape[: axis + 1]), parts)
    return None


def split_axes(index: Index) -> Index | None:
    """Return a map with one of its axes as two, so that it has strides or a few blocks; None where no axis has that."""
    flat = _strided(index.ravel())
    if flat is not None:
        return flat
    splits = []
    for axis, extent in enumerate(index.shape):
        for inner in range(2, extent // 2 + 1):
            if extent % inner:
                continue
            split = index.reshape(*index.shape[:axis], extent // inner, inner, *index.shape[axis + 1 :])
            blocks = blocks_of(split)
            if blocks is not None:
                splits.append((sum(_changes(part) for part in blocks.parts), len(blocks.parts), split))
    return min(splits, key=lambda rated: rated[:2])[2] if splits else None


def _changes(index: Index) -> int:
    """Return how often a map begins anew along its axes, all together: 0 of one that has strides."""
    if int(index.max()) < 0 or _strided(index.ravel()) is not None:
        return 0
    return sum(len(_cuts(index, axis)) - 2 for axis in range(index.ndim))


def _strided(flat: Index) -> Index | None:
    """Return a flat map in the shape in which it has an offset and strides; None if there is none."""
    if int(flat.min()) < 0:
        return None
    shape: list[int] = []
    rest = flat
    while rest.size > 1:
        breaks = np.flatnonzero(np.diff(rest) != rest[1] - rest[0])
        length = int(breaks[0]) + 1 if breaks.size else rest.size
        if rest.size % length:
            return None
        shape.insert(0, length)
        rest = rest.reshape(-1, length)[:, 0]
    index = flat.reshape(shape)
    return None if access_of(index) is None else index


def inverse(index: Index, size: int) -> Index | None:
    """Return the element behind each of a value's ``size`` features; None unless a map has each of them once."""
    flat = index.ravel()
    if flat.size != size or flat.min() < 0:
        return None
    elements = np.full(size, -1, dtype=np.int64)
    elements[flat] = np.arange(size, dtype=np.int64)
    return elements if elements.min() >= 0 else None
