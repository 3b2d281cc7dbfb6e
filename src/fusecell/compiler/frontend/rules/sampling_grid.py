"""Rules for ``grid_sample``: images read at places between their elements, and the gradients.

An element of the result lies between four of the image, at the corners (x, y) of a square, or between eight of a
volume::

    result = sum over corners of  weight(corner) image(corner),   weight = (1 - |x - corner x|) (1 - |y - corner y|)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.rules.indexing import gather, scattered
from fusecell.compiler.frontend.rules.sampling_cubic import cubic_backward, cubic_sampled
from fusecell.compiler.frontend.rules.sampling_places import (
    BORDER,
    REFLECTION,
    flat,
    of_channels,
    reflected,
    spread,
    unnormalised,
)
from fusecell.compiler.frontend.traced_values import Row

__all__ = ["SAMPLING_GRIDS"]

_NEAREST, _BICUBIC = 1, 2
"""torch's numbers of modes; 0 is bilinear."""


@dataclass(frozen=True)
class _Axis:
    """Places along one dimension of an image: (N, places).

    Attributes:
        low: the last element before each place, or the nearest; as a number that may lie outside.
        beyond: how far each place is from ``low``, below 1; None for the nearest.
        slope: how fast a place moves with the grid's number.
    """

    size: int
    low: Row
    beyond: Row | None
    slope: Operand


def _axis(w: Writer, grid: Row, part: int, size: int, mode: int, padding: int, aligned: bool) -> _Axis:
    place, scale = unnormalised(w, grid, part, size, aligned)
    slope: Operand = scale
    if padding == REFLECTION:
        place, turn = reflected(w, place, size, aligned)
        slope = w.point("mul", turn, scale)
    if padding in (BORDER, REFLECTION):
        inside = w.point("and", w.point("gt", place, 0.0), w.point("lt", place, size - 1.0))
        slope = w.point("where", inside, slope, 0.0)
        place = w.point("minimum", w.point("maximum", place, 0.0), size - 1.0)
    if mode == _NEAREST:
        return _Axis(size, w.point("round", place), None, slope)
    low = w.point("floor", place)
    return _Axis(size, low, w.point("sub", place, low), slope)


@dataclass(frozen=True)
class _Corner:
    """One corner of all squares.

    Attributes:
        positions: (N, 1, places), of the elements in the flat image.
        inside: whether the corner is one of the image's.
        weights: of x, of y and, in a volume, of z; None for the nearest.
        at: 1 for each dimension in which it is the one behind the place.
    """

    positions: Row
    inside: Row
    weights: tuple[Row, ...] | None
    at: tuple[int, ...]


def _corners(w: Writer, axes: Sequence[_Axis]) -> list[_Corner]:
    corners = []
    for steps in itertools.product(*[(0,) if axis.beyond is None else (0, 1) for axis in axes]):
        at = steps[::-1]  # x is the fastest
        insides, places, weights = [], [], []
        for axis, step in zip(axes, at, strict=True):
            place = w.point("add", axis.low, float(step)) if step else axis.low
            insides.append(w.point("and", w.point("ge", place, 0.0), w.point("le", place, axis.size - 1.0)))
            places.append(w.point("minimum", w.point("maximum", place, 0.0), axis.size - 1.0))
            if axis.beyond is not None:
                weights.append(axis.beyond if step else w.point("sub", 1.0, axis.beyond))
        position = places[-1]
        for axis, place in zip(axes[-2::-1], places[-2::-1], strict=True):
            position = w.point("add", w.point("mul", position, float(axis.size)), place)
        inside = functools.reduce(lambda a, b: w.point("and", a, b), insides)
        own = tuple(of_channels(w, weight) for weight in weights)
        corners.append(_Corner(of_channels(w, position), of_channels(w, inside), own or None, at))
    return corners


def _joint(w: Writer, weights: Sequence[Row]) -> Row:
    return functools.reduce(lambda a, b: w.point("mul", a, b), weights)


def _squares(
    w: Writer, image: Row, grid: Row, mode: int, padding: int, aligned: bool
) -> tuple[list[_Axis], list[_Corner]]:
    sizes = image.shape[:1:-1]
    axes = [_axis(w, grid, part, size, mode, padding, aligned) for part, size in enumerate(sizes)]
    return axes, _corners(w, axes)


def _sampled(w: Writer, x: Operand, grid: Operand, mode: int, padding: int, aligned: bool) -> Row:
    image, places = w.number(x), w.number(grid)
    if mode == _BICUBIC:
        return cubic_sampled(w, image, places, padding, aligned)
    _, corners = _squares(w, image, places, mode, padding, aligned)
    total: Row | None = None
    for corner in corners:
        part = _value(w, image, corner)
        if corner.weights is not None:
            part = w.point("mul", part, _joint(w, corner.weights))
        total = part if total is None else w.point("add", total, part)
    sizes = places.shape[1:-1]
    result: Row = w.move(lambda numbers: numbers.unflatten(-1, sizes), total)  # type: ignore[arg-type]  # there is a corner
    return result


def _value(w: Writer, image: Row, corner: _Corner) -> Row:
    """Return the image at a corner, (N, channels, places), 0 outside."""
    picked = gather(w, flat(w, image), 2, spread(w, corner.positions, image.shape[1]))
    return w.point("where", corner.inside, picked, 0.0)


def _sampled_backward(
    w: Writer,
    gradient: Row,
    x: Operand,
    grid: Operand,
    mode: int,
    padding: int,
    aligned: bool,
    output_mask: Sequence[bool],
) -> tuple[Row | None, Row | None]:
    image, places = w.number(x), w.number(grid)
    if mode == _BICUBIC:
        return cubic_backward(w, gradient, image, places, padding, aligned, output_mask)
    axes, corners = _squares(w, image, places, mode, padding, aligned)
    g = flat(w, gradient)
    of_image: Row | None = None
    slopes: list[Row | None] = [None] * len(axes)
    for corner in corners:
        part = w.point("where", corner.inside, g, 0.0)
        weights = corner.weights
        if output_mask[0]:
            own = part if weights is None else w.point("mul", part, _joint(w, weights))
            at = spread(w, corner.positions, image.shape[1])
            added = scattered(w, flat(w, image).shape, 2, at, own)
            of_image = added if of_image is None else w.point("add", of_image, added)
        if output_mask[1] and weights is not None:
            along = w.reduce("sum", w.point("mul", g, _value(w, image, corner)), [1], False)
            for part_of, step in enumerate(corner.at):
                other = _joint(w, [*weights[:part_of], *weights[part_of + 1 :]])
                slope = w.point("mul", along, w.move(lambda numbers: numbers.squeeze(1), other))
                before = slopes[part_of]
                slope = slope if step else w.point("neg", slope)
                slopes[part_of] = slope if before is None else w.point("add", before, slope)
    if of_image is not None:
        of_image = w.move(lambda numbers: numbers.reshape(image.shape), of_image)
    return of_image, _of_grid(w, slopes, axes, places) if output_mask[1] else None


def _of_grid(w: Writer, slopes: Sequence[Row | None], axes: Sequence[_Axis], grid: Row) -> Row:
    """Return the grid's gradient, (N, ..., dimensions), of those of the places along each dimension."""
    if slopes[0] is None:  # the nearest element does not change with the place
        return w.point("mul", grid, 0.0)
    parts = [w.point("mul", slope, axis.slope) for slope, axis in zip(slopes, axes, strict=True)]  # type: ignore[arg-type]  # both are there
    stacked: Row = w.move(lambda numbers: torch.stack(numbers, -1).reshape(grid.shape), parts)
    return stacked


SAMPLING_GRIDS: Mapping[str, Callable[..., Any]] = {
    "grid_sampler_2d": _sampled,
    "grid_sampler_2d_backward": _sampled_backward,
    "grid_sampler_3d": _sampled,
    "grid_sampler_3d_backward": _sampled_backward,
}
