"""Several inputs or outputs of a step as one flat row, in which a kernel has them side by side.

What a row consists of is written as a shape, ``(4, 16)``; as a tuple of shapes, ``((5,), ())``; or as a dict of shapes
by name. Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

__all__ = [
    "RowLayout", "feature_ranges", "is_one_shape", "joined_row", "public_size", "shape_list", "split_row",
    "total_features",
]  # fmt: skip

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
RowLayout = Shape | tuple[Shape, ...] | Mapping[str, Shape]
"""The shape of a row's only tensor; or those of several."""


def is_one_shape(layout: RowLayout) -> bool:
    """Whether a row is one tensor."""
    return not isinstance(layout, Mapping) and not any(isinstance(entry, tuple) for entry in layout)


def shape_list(layout: RowLayout) -> list[Shape]:
    """List the shape of each tensor of a row.

    Example:
        >>> from fusecell.streaming.row_layout import shape_list
        >>> shape_list((4, 16)), shape_list({"read": (4,), "strength": ()})
        ([(4, 16)], [(4,), ()])
    """
    entries: Any = layout.values() if isinstance(layout, Mapping) else layout
    return [layout] if is_one_shape(layout) else list(entries)  # type: ignore[list-item]  # a Shape, as just asked


def public_size(layout: RowLayout) -> Any:
    """Return a row's shape as users write it: one dimension as the number of features.

    Example:
        >>> from fusecell.streaming.row_layout import public_size
        >>> public_size((4,)), public_size((4, 16)), public_size({"read": (4,), "strength": ()})
        (4, (4, 16), {'read': 4, 'strength': ()})
    """
    if isinstance(layout, Mapping):
        return {name: public_size(shape) for name, shape in layout.items()}
    return layout[0] if is_one_shape(layout) and len(layout) == 1 else layout


def total_features(layout: RowLayout) -> int:
    """Count the features of a row."""
    return sum(math.prod(shape) for shape in shape_list(layout))


def feature_ranges(layout: RowLayout) -> Iterator[tuple[int, int]]:
    """Iterate over the first feature of each tensor in the flat row, and the one behind its last."""
    return pairwise(accumulate([math.prod(shape) for shape in shape_list(layout)], initial=0))


def split_row(row: Array, layout: RowLayout) -> Any:
    """Return the tensors of flat rows (..., features), each with memory of its own, in the form of their layout."""
    parts = [
        row[..., first:last].copy().reshape((*row.shape[:-1], *shape))
        for (first, last), shape in zip(feature_ranges(layout), shape_list(layout), strict=True)
    ]
    if is_one_shape(layout):
        return parts[0]
    return dict(zip(layout, parts, strict=True)) if isinstance(layout, Mapping) else tuple(parts)


def joined_row(values: Any, layout: RowLayout, convert: Callable[[Any], Array], what: str) -> Array:
    """Return several tensors side by side: (..., features), with the leading dimensions that all of them have.

    Arguments:
        convert: makes an array of a value.
        what: takes them, for the error message.

    Raises:
        TypeError, ValueError: unless there is a value for each shape, all with the same leading dimensions.
    """
    shapes = shape_list(layout)
    is_list = isinstance(values, tuple | list)
    if not is_list or len(values) != len(shapes):
        kind = f"{len(values)} of them" if is_list else type(values).__name__
        raise TypeError(f"{what} a tuple of {len(shapes)} arrays, got {kind}.")
    arrays = [convert(value) for value in values]
    leading = {array.shape[: array.ndim - len(shape)] for array, shape in zip(arrays, shapes, strict=True)}
    fit = all(array.shape[array.ndim - len(shape) :] == shape for array, shape in zip(arrays, shapes, strict=True))
    if len(leading) != 1 or not fit:
        actual = ", ".join(str(array.shape) for array in arrays)
        takes = ", ".join(f"({', '.join(['...', *map(str, shape)])})" for shape in shapes)
        raise ValueError(f"{what} arrays of shapes {takes}, with the same dimensions in front; got {actual}.")
    (common,) = leading
    return np.concatenate([array.reshape(*common, -1) for array in arrays], -1)
