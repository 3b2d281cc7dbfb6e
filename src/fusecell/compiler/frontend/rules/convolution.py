"""Rules for convolutions, transposed ones too, and their gradients: windows of an image times a weight.

A window is an index map: element (c, y, k) of an image's windows is its element (c, y * stride + k * dilation). So a
convolution is a contraction over channels and the kernel, and its gradients are two others::

    output[o, y]          = sum over c, k of  image[c, y s + k d]  weight[o, c, k]
    image gradient[c, x]  = sum over o, k of  spread[o, x + (K - 1 - k) d]  weight[o, c, k]
    weight gradient[o, c, k] = sum over rows, y of  gradient[o, y]  image[c, y s + k d]

where ``spread`` is the output's gradient with s - 1 zeros between its elements, padded or cropped.

With the batch among the channels, and a group of them for each row, each row has a kernel of its own: the same three,
without a sum over rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional

from fusecell.compiler.frontend.contractions import Labelled, product_of_rows, sum_of_products, weight_row
from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.rules.reduction import total
from fusecell.compiler.frontend.traced_values import Index, Row, Sum, Untraceable, Value, arranged

__all__ = ["CONVOLUTIONS", "Geometry", "image_gradient"]

Sizes = Sequence[int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Stride, padding and dilation of each spatial dimension, and the groups of channels."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, dims: int, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int) -> Geometry:
        s, p, d = (tuple(value) * (dims if len(value) == 1 else 1) for value in (stride, padding, dilation))
        return cls(s, p, d, groups)


def _convolution(
    w: Writer,
    image: Value,
    weight: Operand,
    bias: Operand | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
) -> Row:
    row, kernel = w.number(image), weight_row(w, weight)
    dims = len(kernel.shape) - 2
    geometry = Geometry.of(dims, stride, padding, dilation, groups)
    if _has_own_kernels(w, row, kernel, groups) and not transposed:
        own = replace(geometry, groups=groups // w.rows)
        result = _forward(w, _of_each_row(row, 1), _kernel_of_each_row(kernel), own, True)
        if bias is not None:
            added = _of_each_row(w.number(bias), 0)
            result = w.point("add", result, w.move(lambda numbers: numbers.unflatten(1, (-1, *[1] * dims)), added))
        return _merged_again(result, 1)
    if transposed:
        extents = [
            (size - 1) * s - 2 * p + d * (k - 1) + extra + 1
            for size, s, p, d, k, extra in zip(
                row.shape[2:],
                geometry.stride,
                geometry.padding,
                geometry.dilation,
                kernel.shape[2:],
                tuple(output_padding) * (dims if len(output_padding) == 1 else 1),
                strict=True,
            )
        ]
        result = image_gradient(w, row, kernel, extents, geometry)
    else:
        result = _forward(w, row, kernel, geometry)
    if bias is None:
        return result
    return w.point("add", result, w.move(lambda numbers: numbers.reshape(-1, *[1] * dims), w.row(bias)))


def _convolution_backward(
    w: Writer,
    gradient: Value,
    image: Value,
    weight: Operand,
    bias_sizes: Sizes | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Row | None, Row | Sum | None, Row | Sum | None]:
    g, x, kernel = w.number(gradient), w.number(image), weight_row(w, weight)
    dims = len(kernel.shape) - 2
    geometry = Geometry.of(dims, stride, padding, dilation, groups)
    of_image: Row | None = None
    of_weight: Row | Sum | None = None
    if _has_own_kernels(w, x, kernel, groups) and not transposed:
        return _backward_of_own_kernels(w, g, x, kernel, replace(geometry, groups=groups // w.rows), output_mask)
    if output_mask[0]:
        of_image = (
            _forward(w, g, kernel, geometry) if transposed else image_gradient(w, g, kernel, x.shape[2:], geometry)
        )
    if output_mask[1]:
        # A transposed convolution is the gradient of a plain one: its input and its output change places.
        small, large = (x, g) if transposed else (g, x)
        of_weight = _weight_gradient(w, small, large, kernel.shape, geometry)
    of_bias = total(w, g, [0, *range(2, 2 + dims)]) if output_mask[2] else None
    return of_image, of_weight, of_bias


def _has_own_kernels(w: Writer, image: Row, kernel: Row, groups: int) -> bool:
    """Whether an image has a row's channels after those of another, and a kernel for each row."""
    return image.axis == 1 and image.shape[0] == 1 and kernel.axis == 0 and groups % w.rows == 0


def _of_each_row(value: Row, axis: int) -> Row:
    """Return a value whose batch is merged with the channels after it, dimension ``axis``, with the batch first."""
    apart = value.apart()
    channels, rest = value.split[1], value.shape[axis + 1 :]
    rows = value.shape[axis] // channels
    return Row((rows, channels, *rest), apart.node, 0, apart.full_index.reshape(channels, *rest))


def _kernel_of_each_row(kernel: Row) -> Row:
    """Return the kernels of rows as one kernel is, without the batch."""
    own = _of_each_row(kernel, 0)
    return Row(own.shape[1:], own.node, None, own.index)


def _merged_again(value: Row, axis: int) -> Row:
    """Return a value (N, channels, ...) with both as dimension ``axis``, after dimensions of size 1."""
    rows, channels, *rest = value.shape
    shape = (*[1] * axis, rows * channels, *rest)
    merged = Row(shape, value.node, axis, None, (1, channels))
    return replace(merged, index=value.full_index.reshape(merged.features))


def _backward_of_own_kernels(
    w: Writer, gradient: Row, image: Row, kernel: Row, geometry: Geometry, output_mask: Sequence[bool]
) -> tuple[Row | None, Row | None, Row | None]:
    g, x, own = _of_each_row(gradient, 1), _of_each_row(image, 1), _kernel_of_each_row(kernel)
    of_image = image_gradient(w, g, own, x.shape[2:], geometry, True) if output_mask[0] else None
    of_weight: Row | None = None
    if output_mask[1]:
        a, b, labels = _weight_operands(w, g, x, own.shape, geometry)
        sizes = {**b.sizes(), **a.sizes()}
        product = product_of_rows(w, a, b, labels, sizes, (w.rows, *(sizes[label] for label in labels)), 0)
        grouped = product.full_index.reshape(own.shape)
        of_weight = _merged_again(Row((w.rows, *own.shape), product.node, 0, grouped), 0)
    of_bias = _merged_again(w.reduce("sum", g, range(2, len(g.shape)), False), 0) if output_mask[2] else None
    return None if of_image is None else _merged_again(of_image, 1), of_weight, of_bias


def _forward(w: Writer, image: Row, kernel: Row, geometry: Geometry, own: bool = False) -> Row:
    windows, lead = _windows(w, image, kernel.shape[2:], geometry)
    spatial = len(kernel.shape) - 2
    positions, taps = _axes("y", spatial), _axes("k", spatial)
    a = Labelled(windows.node, windows.index, (*lead, "g", "c", *positions, *taps), True)
    b = Labelled(kernel.node, _grouped(kernel.full_index, geometry.groups), ("g", "o", "c", *taps), own)
    return _image(w, image, a, b, (*lead, "g", "o", *positions))


def image_gradient(w: Writer, gradient: Row, kernel: Row, extents: Sizes, geometry: Geometry, own: bool = False) -> Row:
    def spread(numbers: Tensor) -> Tensor:
        dims = range(len(extents))
        spaced = [(size - 1) * s + 1 for size, s in zip(numbers.shape[2:], geometry.stride, strict=True)]
        result = numbers.new_zeros(*numbers.shape[:2], *spaced)
        spaced_out: Any = (..., *(slice(None, None, s) for s in geometry.stride))
        result[spaced_out] = numbers
        padding: list[int] = []
        for dim in reversed(dims):
            low = (kernel.shape[2 + dim] - 1) * geometry.dilation[dim] - geometry.padding[dim]
            padding += [low, extents[dim] + geometry.padding[dim] - spaced[dim]]
        return functional.pad(result, padding)

    ones = (1,) * len(extents)
    plain = Geometry(ones, (0,) * len(extents), geometry.dilation, geometry.groups)
    spread_gradient: Row = w.move(spread, gradient)
    windows, lead = _windows(w, spread_gradient, kernel.shape[2:], plain)
    spatial = len(extents)
    positions, taps = _axes("y", spatial), _axes("k", spatial)
    flipped = np.flip(windows.index, tuple(range(windows.index.ndim - spatial, windows.index.ndim)))
    a = Labelled(windows.node, flipped, (*lead, "g", "o", *positions, *taps), True)
    b = Labelled(kernel.node, _grouped(kernel.full_index, geometry.groups), ("g", "o", "c", *taps), own)
    return _image(w, gradient, a, b, (*lead, "g", "c", *positions))


def _weight_gradient(w: Writer, small: Row, large: Row, shape: tuple[int, ...], geometry: Geometry) -> Sum:
    a, b, labels = _weight_operands(w, small, large, shape, geometry)
    result = sum_of_products(w, a, b, labels, {**b.sizes(), **a.sizes()})
    return Sum(shape, result.node)


def _weight_operands(
    w: Writer, small: Row, large: Row, shape: tuple[int, ...], geometry: Geometry
) -> tuple[Labelled, Labelled, tuple[str, ...]]:
    """Return the operands of a weight's gradient and the labels of its dimensions."""
    windows, lead = _windows(w, large, shape[2:], geometry)
    spatial = len(shape) - 2
    positions, taps = _axes("y", spatial), _axes("k", spatial)
    apart = _batch_first(small).apart()
    index = apart.full_index
    index = index.reshape(*index.shape[: len(lead)], geometry.groups, -1, *index.shape[len(lead) + 1 :])
    a = Labelled(apart.node, index, (*lead, "g", "o", *positions), True)
    b = Labelled(windows.node, windows.index, (*lead, "g", "c", *positions, *taps), True)
    return a, b, ("g", "o", "c", *taps)


@dataclass(frozen=True, slots=True)
class _Windows:
    """Windows of an image: (channel groups, channels, positions, taps), after dimensions merged with the batch."""

    node: int
    index: Index


def _windows(w: Writer, image: Row, taps: Sizes, geometry: Geometry) -> tuple[_Windows, tuple[str, ...]]:
    """Return an image's windows, padded, and the labels of the dimensions that are merged with the batch."""
    padding = [amount for p in reversed(geometry.padding) for amount in (p, p)]
    padded: Row = _batch_first(image)
    if any(padding):
        padded = w.move(lambda numbers: functional.pad(numbers, padding), padded)
    apart = padded.apart()
    lead = ("before", "after") if padded.is_merged else ()
    node, index = apart.node, apart.full_index
    if bool((index < 0).any()):
        # Zeros around an image are written with it: a window then has strides.
        node, index = w.gather([node], index), arranged(index.shape)
    first = len(lead) + 1
    extents = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, taps, strict=True)]
    axes = tuple(range(first, first + len(taps)))
    views = np.lib.stride_tricks.sliding_window_view(index, extents, axes)
    strided = (slice(None),) * first + tuple(slice(None, None, s) for s in geometry.stride)
    views = views[strided + tuple(slice(None, None, d) for d in geometry.dilation)]
    grouped = views.reshape(*views.shape[: len(lead)], geometry.groups, -1, *views.shape[first:])
    return _Windows(node, grouped), lead


def _batch_first(image: Row) -> Row:
    if image.axis != 0:
        raise Untraceable(
            "The step convolves a tensor whose first dimension is not the batch: it takes (N, channels, ...)."
        )
    return image


def _grouped(index: Index, groups: int) -> Index:
    """Return a weight's index (out, in, taps) as (groups, out, in, taps)."""
    return index.reshape(groups, -1, *index.shape[1:])


def _axes(letter: str, count: int) -> tuple[str, ...]:
    return tuple(f"{letter}{axis}" for axis in range(count))


def _image(w: Writer, like: Row, a: Labelled, b: Labelled, result: Sequence[str]) -> Row:
    """Return a contraction as an image (N, channels, positions), merged as another is."""
    sizes = {**a.sizes(), **b.sizes()}
    lead = 2 if like.is_merged else 0
    axis = lead // 2
    extents = [sizes[label] for label in result]
    product = product_of_rows(w, a, b, result, sizes, (*extents[:axis], w.rows, *extents[axis:]), axis)
    channels = math.prod(extents[lead : lead + 2])
    shape = (*product.shape[: lead + 1], channels, *extents[lead + 2 :])
    index = None if product.index is None else product.index.reshape(*extents[:lead], channels, *extents[lead + 2 :])
    return Row(shape, product.node, axis, index).merged(like.split)


CONVOLUTIONS: Mapping[str, Callable[..., Any]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
}
