"""Rules for convolutions, transposed ones too, and their gradients: windows of an image times a weight.

A window is an index map: element (c, y, k) of an image's windows is its element (c, y * stride + k * dilation). So a
convolution is a contraction over channels and the kernel, and its gradients are two others::

    output[o, y]          = sum over c, k of  image[c, y s + k d]  weight[o, c, k]
    image gradient[c, x]  = sum over o, k of  spread[o, x + (K - 1 - k) d]  weight[o, c, k]
    weight gradient[o, c, k] = sum over rows, y of  gradient[o, y]  image[c, y s + k d]

where ``spread`` is the output's gradient with s - 1 zeros between its elements, padded or cropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
) -> tuple[Row | None, Sum | None, Row | Sum | None]:
    g, x, kernel = w.number(gradient), w.number(image), weight_row(w, weight)
    dims = len(kernel.shape) - 2
    geometry = Geometry.of(dims, stride, padding, dilation, groups)
    of_image: Row | None = None
    of_weight: Sum | None = None
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


def _forward(w: Writer, image: Row, kernel: Row, geometry: Geometry) -> Row:
    windows, lead = _windows(w, image, kernel.shape[2:], geometry)
    spatial = len(kernel.shape) - 2
    positions, taps = _axes("y", spatial), _axes("k", spatial)
    a = Labelled(windows.node, windows.index, (*lead, "g", "c", *positions, *taps), True)
    b = Labelled(kernel.node, _grouped(kernel.full_index, geometry.groups), ("g", "o", "c", *taps), False)
    return _image(w, image, a, b, (*lead, "g", "o", *positions))


def image_gradient(w: Writer, gradient: Row, kernel: Row, extents: Sizes, geometry: Geometry) -> Row:
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
    b = Labelled(kernel.node, _grouped(kernel.full_index, geometry.groups), ("g", "o", "c", *taps), False)
    return _image(w, gradient, a, b, (*lead, "g", "c", *positions))


def _weight_gradient(w: Writer, small: Row, large: Row, shape: tuple[int, ...], geometry: Geometry) -> Sum:
    windows, lead = _windows(w, large, shape[2:], geometry)
    spatial = len(shape) - 2
    positions, taps = _axes("y", spatial), _axes("k", spatial)
    apart = _batch_first(small).apart()
    index = apart.full_index
    index = index.reshape(*index.shape[: len(lead)], geometry.groups, -1, *index.shape[len(lead) + 1 :])
    a = Labelled(apart.node, index, (*lead, "g", "o", *positions), True)
    b = Labelled(windows.node, windows.index, (*lead, "g", "c", *positions, *taps), True)
    sizes = {**b.sizes(), **a.sizes()}
    result = sum_of_products(w, a, b, ("g", "o", "c", *taps), sizes)
    return Sum(shape, result.node)


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
