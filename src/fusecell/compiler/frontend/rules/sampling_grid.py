"""Rules for ``grid_sample``: images read at places between their elements, and the gradients.

An element of the result lies between four of the image, at the corners (x, y) of a square::

    result = sum over corners of  weight(corner) image(corner),   weight = (1 - |x - corner x|) (1 - |y - corner y|)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.rules.indexing import gather, scattered
from fusecell.compiler.frontend.traced_values import Row, Untraceable

__all__ = ["SAMPLING_GRIDS"]

_BILINEAR, _NEAREST = 0, 1
_ZEROS, _BORDER = 0, 1
"""torch's numbers of modes and paddings."""


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
    place: Row = w.move(lambda numbers: numbers[..., part].flatten(1), grid)
    scale = (size - 1) / 2 if aligned else size / 2
    place = w.point("mul", w.point("add", place, 1.0), scale)
    if not aligned:
        place = w.point("sub", place, 0.5)
    slope: Operand = scale
    if padding == _BORDER:
        inside = w.point("and", w.point("gt", place, 0.0), w.point("lt", place, size - 1.0))
        slope = w.point("where", inside, scale, 0.0)
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
        weights: of x and of y; None for the nearest.
    """

    positions: Row
    inside: Row
    weights: tuple[Row, Row] | None
    at: tuple[int, int]


def _corners(w: Writer, x: _Axis, y: _Axis) -> list[_Corner]:
    corners = []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)) if x.beyond is not None else ((0, 0),):
        insides, places, weights = [], [], []
        for axis, step in ((x, right), (y, down)):
            place = w.point("add", axis.low, float(step)) if step else axis.low
            insides.append(w.point("and", w.point("ge", place, 0.0), w.point("le", place, axis.size - 1.0)))
            places.append(w.point("minimum", w.point("maximum", place, 0.0), axis.size - 1.0))
            if axis.beyond is not None:
                weights.append(axis.beyond if step else w.point("sub", 1.0, axis.beyond))
        flat = w.point("add", w.point("mul", places[1], float(x.size)), places[0])
        corners.append(
            _Corner(
                _of_channels(w, flat),
                _of_channels(w, w.point("and", insides[0], insides[1])),
                (_of_channels(w, weights[0]), _of_channels(w, weights[1])) if weights else None,
                (right, down),
            )
        )
    return corners


def _of_channels(w: Writer, value: Row) -> Row:
    row: Row = w.move(lambda numbers: numbers.unsqueeze(1), value)
    return row


def _flat(w: Writer, image: Row) -> Row:
    row: Row = w.move(lambda numbers: numbers.flatten(2), image)
    return row


def _spread(w: Writer, positions: Row, channels: int) -> Row:
    row: Row = w.move(lambda numbers: numbers.expand(-1, channels, -1), positions)
    return row


def _squares(
    w: Writer, image: Row, grid: Row, mode: int, padding: int, aligned: bool
) -> tuple[_Axis, _Axis, list[_Corner]]:
    if mode not in (_BILINEAR, _NEAREST) or padding not in (_ZEROS, _BORDER) or len(image.shape) != 4:
        raise Untraceable(
            'grid_sample is compiled of images in two dimensions with mode="bilinear" or "nearest" and '
            'padding_mode="zeros" or "border".'
        )
    x = _axis(w, grid, 0, image.shape[3], mode, padding, aligned)
    y = _axis(w, grid, 1, image.shape[2], mode, padding, aligned)
    return x, y, _corners(w, x, y)


def _sampled(w: Writer, x: Operand, grid: Operand, mode: int, padding: int, aligned: bool) -> Row:
    image, places = w.number(x), w.number(grid)
    _, _, corners = _squares(w, image, places, mode, padding, aligned)
    total: Row | None = None
    for corner in corners:
        part = _value(w, image, corner)
        if corner.weights is not None:
            part = w.point("mul", part, w.point("mul", *corner.weights))
        total = part if total is None else w.point("add", total, part)
    sizes = places.shape[1:3]
    result: Row = w.move(lambda numbers: numbers.unflatten(-1, sizes), total)  # type: ignore[arg-type]  # there is a corner
    return result


def _value(w: Writer, image: Row, corner: _Corner) -> Row:
    """Return the image at a corner, (N, channels, places), 0 outside."""
    picked = gather(w, _flat(w, image), 2, _spread(w, corner.positions, image.shape[1]))
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
    across, down, corners = _squares(w, image, places, mode, padding, aligned)
    g = _flat(w, gradient)
    of_image: Row | None = None
    slopes: list[Row | None] = [None, None]
    for corner in corners:
        part = w.point("where", corner.inside, g, 0.0)
        weights = corner.weights
        if output_mask[0]:
            own = part if weights is None else w.point("mul", part, w.point("mul", *weights))
            at = _spread(w, corner.positions, image.shape[1])
            added = scattered(w, _flat(w, image).shape, 2, at, own)
            of_image = added if of_image is None else w.point("add", of_image, added)
        if output_mask[1] and weights is not None:
            along = w.reduce("sum", w.point("mul", g, _value(w, image, corner)), [1], False)
            for part_of, (step, other) in enumerate(zip(corner.at, weights[::-1], strict=True)):
                slope = w.point("mul", along, w.move(lambda numbers: numbers.squeeze(1), other))
                before = slopes[part_of]
                slope = slope if step else w.point("neg", slope)
                slopes[part_of] = slope if before is None else w.point("add", before, slope)
    if of_image is not None:
        of_image = w.move(lambda numbers: numbers.reshape(image.shape), of_image)
    return of_image, _of_grid(w, slopes, (across, down), places) if output_mask[1] else None


def _of_grid(w: Writer, slopes: Sequence[Row | None], axes: Sequence[_Axis], grid: Row) -> Row:
    """Return the grid's gradient, (N, height, width, 2), of those of the places along both dimensions."""
    if slopes[0] is None:  # the nearest element does not change with the place
        return w.point("mul", grid, 0.0)
    parts = [w.point("mul", slope, axis.slope) for slope, axis in zip(slopes, axes, strict=True)]  # type: ignore[arg-type]  # both are there
    stacked: Row = w.move(lambda numbers: torch.stack(numbers, -1).reshape(grid.shape), parts)
    return stacked


SAMPLING_GRIDS: Mapping[str, Callable[..., Any]] = {
    "grid_sampler_2d": _sampled,
    "grid_sampler_2d_backward": _sampled_backward,
}
