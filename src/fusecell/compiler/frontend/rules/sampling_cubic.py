"""``grid_sample`` with mode="bicubic": sixteen elements around a place, by Keys's kernel (1981) with a = -3/4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fusecell.compiler.frontend.graph_writer import Writer
from fusecell.compiler.frontend.rules.indexing import gather, scattered
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

__all__ = ["cubic_backward", "cubic_sampled"]

_A = -0.75


@dataclass(frozen=True)
class _Tap:
    """One of four elements along a dimension, (N, 1, places).

    Attributes:
        place: of the element.
        inside: whether it is one of the image's; None where it always is.
        weight: of the element, and ``slope``, how fast it changes with the place.
    """

    place: Row
    inside: Row | None
    weight: Row
    slope: Row


def _polynomial(w: Writer, x: Row, coefficients: Sequence[float]) -> Row:
    """Write a polynomial, by its coefficients from the highest power down."""
    result = w.point("mul", x, coefficients[0])
    for coefficient in coefficients[1:-1]:
        result = w.point("add", result, coefficient) if coefficient else result
        result = w.point("mul", result, x)
    return w.point("add", result, coefficients[-1]) if coefficients[-1] else result


_NEAR, _FAR = (_A + 2, -(_A + 3), 0.0, 1.0), (_A, -5 * _A, 8 * _A, -4 * _A)
"""The kernel up to a distance of 1, and from there to 2, in powers of the distance."""


def _weight(w: Writer, beyond: Row, tap: int) -> tuple[Row, Row]:
    """Write the weight of a tap, 0 to 3, and its derivative, by how far the place is beyond the second one."""
    coefficients = _NEAR if tap in (1, 2) else _FAR
    derivative = [c * power for c, power in zip(coefficients, (3, 2, 1), strict=False)]
    if tap < 2:
        distance = w.point("add", beyond, 1.0) if tap == 0 else beyond
        return _polynomial(w, distance, coefficients), _polynomial(w, distance, derivative)
    distance = w.point("sub", float(tap - 1), beyond)
    return _polynomial(w, distance, coefficients), w.point("neg", _polynomial(w, distance, derivative))


def _taps(w: Writer, grid: Row, part: int, size: int, padding: int, aligned: bool) -> tuple[list[_Tap], float]:
    """Return the taps along a dimension, and how fast a place moves with the grid's number."""
    centre, scale = unnormalised(w, grid, part, size, aligned)
    low = w.point("floor", centre)
    beyond, taps = w.point("sub", centre, low), []
    for tap in range(4):
        place, inside = w.point("add", low, float(tap - 1)), None
        if padding == REFLECTION:
            place, _ = reflected(w, place, size, aligned)
        elif padding != BORDER:
            inside = w.point("and", w.point("ge", place, 0.0), w.point("le", place, size - 1.0))
        place = w.point("minimum", w.point("maximum", place, 0.0), size - 1.0)
        weight, slope = (of_channels(w, each) for each in _weight(w, beyond, tap))
        taps.append(_Tap(of_channels(w, place), None if inside is None else of_channels(w, inside), weight, slope))
    return taps, scale


def _position(w: Writer, x: _Tap, y: _Tap, image: Row) -> Row:
    place = w.point("add", w.point("mul", y.place, float(image.shape[3])), x.place)
    return spread(w, place, image.shape[1])


def _inside(w: Writer, x: _Tap, y: _Tap, value: Row) -> Row:
    """Return a value where both taps are inside of the image, and 0 elsewhere."""
    if x.inside is None or y.inside is None:
        return value
    return w.point("where", w.point("and", x.inside, y.inside), value, 0.0)


def _value(w: Writer, x: _Tap, y: _Tap, image: Row) -> Row:
    return _inside(w, x, y, gather(w, flat(w, image), 2, _position(w, x, y, image)))


def _total(w: Writer, parts: Sequence[Row]) -> Row:
    total = parts[0]
    for part in parts[1:]:
        total = w.point("add", total, part)
    return total


def cubic_sampled(w: Writer, image: Row, grid: Row, padding: int, aligned: bool) -> Row:
    """Write the image at the places of a grid."""
    across, _ = _taps(w, grid, 0, image.shape[3], padding, aligned)
    down, _ = _taps(w, grid, 1, image.shape[2], padding, aligned)
    lines = []
    for y in down:
        line = _total(w, [w.point("mul", _value(w, x, y, image), x.weight) for x in across])
        lines.append(w.point("mul", line, y.weight))
    sizes = grid.shape[1:-1]
    result: Row = w.move(lambda numbers: numbers.unflatten(-1, sizes), _total(w, lines))
    return result


def cubic_backward(
    w: Writer, gradient: Row, image: Row, grid: Row, padding: int, aligned: bool, output_mask: Sequence[bool]
) -> tuple[Row | None, Row | None]:
    """Write the gradients of the image and of the grid."""
    across, x_scale = _taps(w, grid, 0, image.shape[3], padding, aligned)
    down, y_scale = _taps(w, grid, 1, image.shape[2], padding, aligned)
    g, shape = flat(w, gradient), flat(w, image).shape
    pairs = [(x, y) for y in down for x in across]

    def along(weights: Callable[[_Tap, _Tap], tuple[Row, Row]], scale: float) -> Row:
        parts = []
        for x, y in pairs:
            own = w.reduce("sum", w.point("mul", g, _value(w, x, y, image)), [1], True)
            parts.append(w.point("mul", own, w.point("mul", *weights(x, y))))
        return w.point("mul", _total(w, parts), scale)

    of_image: Row | None = None
    if output_mask[0]:
        added = []
        for x, y in pairs:
            own = _inside(w, x, y, w.point("mul", g, w.point("mul", x.weight, y.weight)))
            added.append(scattered(w, shape, 2, _position(w, x, y, image), own))
        of_image = w.move(lambda numbers: numbers.reshape(image.shape), _total(w, added))
    if not output_mask[1]:
        return of_image, None
    slopes = [
        along(lambda x, y: (x.slope, y.weight), x_scale),
        along(lambda x, y: (x.weight, y.slope), y_scale),
    ]
    of_grid: Row = w.move(lambda numbers: torch.stack(numbers, -1).reshape(grid.shape), slopes)
    return of_image, of_grid
