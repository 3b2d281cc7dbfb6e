"""Feature shapes: what a cell declares of its states, inputs and outputs, and tuples and dicts of output tensors.

A size is a number of features or a shape, ``10`` or ``(4, 16, 16)``; a tensor of it is (N, 10) or (N, 4, 16, 16) in a
step. Kernels have all features of a row side by side, row-major: a flat row, and a tuple or dict of outputs as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "OutputSize",
    "Outputs",
    "Shape",
    "Size",
    "feature_shape",
    "features_of",
    "has_flat_rows",
    "in_order",
    "is_size",
    "map_outputs",
    "output_shape",
    "output_shapes",
    "packed",
    "size_text",
    "tensors_of",
    "unpacked",
    "zero_outputs",
]

Shape = tuple[int, ...]
Size = int | Shape
"""A number of features, or the shape of a row: ``(4, 16, 16)``; ``()`` is one number without a dimension."""
OutputSize = Any
"""A size; or, of a step with several outputs, a tuple of sizes of which one is a shape, or a dict of sizes."""
Outputs = Any
"""A tensor, or a tuple or dict of tensors."""


def feature_shape(size: Size) -> Shape:
    """Return a size as a shape."""
    return tuple(size) if isinstance(size, tuple | list) else (size,)


def features_of(size: Size) -> int:
    """Return the number of features of a size."""
    return math.prod(size) if isinstance(size, tuple | list) else size


def is_size(size: OutputSize) -> bool:
    """Whether an output size is that of one tensor."""
    if isinstance(size, tuple | list):
        return not any(isinstance(entry, tuple | list) for entry in size)
    return not isinstance(size, Mapping)


def output_shapes(size: OutputSize) -> dict[str, Shape]:
    """Return the shape of each output by name: ``output``, ``output[0]`` or ``output[name]``."""
    if is_size(size):
        return {"output": feature_shape(size)}
    items = size.items() if isinstance(size, Mapping) else enumerate(size)
    return {f"output[{name!r}]": feature_shape(entry) for name, entry in items}


def output_shape(size: OutputSize) -> Shape:
    """Return the shape of an output as kernels have it: several outputs are one flat row."""
    if is_size(size):
        return feature_shape(size)
    return (sum(math.prod(shape) for shape in output_shapes(size).values()),)


def size_text(size: OutputSize, *leading: object) -> str:
    """Format a shape behind leading dimensions: ``(N, 4, 16)``."""
    if not is_size(size):
        items = size.items() if isinstance(size, Mapping) else enumerate(size)
        return ", ".join(f"{name!r}: {size_text(entry, *leading)}" for name, entry in items)
    dims = [str(dim) for dim in (*leading, *feature_shape(size))]
    return f"({dims[0]},)" if len(dims) == 1 else f"({', '.join(dims)})"


def has_flat_rows(cell: Any) -> bool:
    """Whether x and the output of a cell are one vector of features per row."""
    return not any(isinstance(size, tuple | list | Mapping) for size in (cell.input_size, cell.output_size))


# Tuples and dicts of outputs


def tensors_of(outputs: Outputs) -> tuple[Tensor, ...]:
    """Return the tensors of an output, in order."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    return tuple(outputs.values()) if isinstance(outputs, Mapping) else tuple(outputs)


def in_order(size: OutputSize, outputs: Outputs) -> Outputs:
    """Return a dict of outputs in the order of its output size; others as they are."""
    return {name: outputs[name] for name in size} if isinstance(size, Mapping) else outputs


def map_outputs(function: Callable[..., Tensor], outputs: Outputs, *others: Outputs) -> Outputs:
    """Return an output with a function applied to each of its tensors, and to those at the same places of others."""
    if isinstance(outputs, Tensor):
        return function(outputs, *others)
    if isinstance(outputs, Mapping):
        return {name: function(value, *(other[name] for other in others)) for name, value in outputs.items()}
    return tuple(function(*values) for values in zip(outputs, *others, strict=True))


def zero_outputs(size: OutputSize, new_zeros: Callable[..., Tensor], *leading: int) -> Outputs:
    """Make outputs of zeros behind leading dimensions."""
    if is_size(size):
        return new_zeros((*leading, *feature_shape(size)))
    if isinstance(size, Mapping):
        return {name: new_zeros((*leading, *feature_shape(entry))) for name, entry in size.items()}
    return tuple(new_zeros((*leading, *feature_shape(entry))) for entry in size)


def packed(outputs: Outputs, leading: int) -> Tensor:
    """Return several outputs as one flat row behind leading dimensions; one as it is."""
    if isinstance(outputs, Tensor):
        return outputs
    return torch.cat([value.reshape(*value.shape[:leading], -1) for value in tensors_of(outputs)], -1)


def unpacked(size: OutputSize, row: Tensor, leading: int) -> Outputs:
    """Return the outputs of which :func:`packed` made one row, each with memory of its own; one as it is."""
    if is_size(size):
        return row
    start = 0
    parts = []
    for shape in output_shapes(size).values():
        count = math.prod(shape)
        parts.append(row.narrow(-1, start, count).reshape(*row.shape[:leading], *shape).clone())
        start += count
    return dict(zip(size, parts, strict=True)) if isinstance(size, Mapping) else tuple(parts)
