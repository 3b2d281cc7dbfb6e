"""Rules for pooling over windows of an image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusecell.compiler.frontend.graph_writer import Writer
from fusecell.compiler.frontend.rules.convolution import Geometry, image_gradient
from fusecell.compiler.frontend.rules.indexing import gather, scattered
from fusecell.compiler.frontend.rules.interpolation import resized
from fusecell.compiler.frontend.traced_values import Row, Untraceable, arranged

__all__ = ["MOST_TAPS", "POOLING"]

Sizes = Sequence[int]
MOST_TAPS = 64
"""Elements of a window that is folded back, at the most: each is an image of its own."""


def _each(value: Sizes, dims: int) -> tuple[int, ...]:
    return tuple(value) * (dims if len(value) == 1 else 1)


def _max_pool(
    w: Writer,
    x: Row,
    kernel: Sizes,
    stride: Sizes = (),
    padding: Sizes = (0,),
    dilation: Sizes = (1,),
    ceil_mode: bool = False,
) -> tuple[Row, Row]:
    dims = len(kernel)
    steps, pads, gaps = _each(stride or kernel, dims), _each(padding, dims), _each(dilation, dims)
    axes = zip(x.shape[-dims:], kernel, steps, pads, gaps, strict=True)
    return _max_over_windows(
        w, x, [_taps(size, count, step, pad, gap, ceil_mode) for size, count, step, pad, gap in axes]
    )


def _taps(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Tensor:
    """Return the position of each tap of each window along an axis; -1 where it is outside of the image."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if (count - 1) * stride >= size + padding:  # a window that would begin behind the image
        count -= 1
    taps = torch.arange(count)[:, None] * stride - padding + torch.arange(kernel) * dilation
    return torch.where((taps >= 0) & (taps < size), taps, -1)


def _max_over_windows(w: Writer, x: Row, taps: Sequence[Tensor]) -> tuple[Row, Row]:
    """Return the largest element of each window, and its position in the flattened image."""
    dims = len(taps)
    outside = w.const(-math.inf, (x.shape[0], *[1] * (len(x.shape) - 1)), x.axis, x.split)

    def windows(numbers: Sequence[Tensor]) -> Tensor:
        image, filling = numbers
        whole = filling.expand(*image.shape[:-dims], *(size + 1 for size in image.shape[-dims:])).clone()
        inside: Any = (..., *(slice(size) for size in image.shape[-dims:]))
        whole[inside] = image
        for axis, table in enumerate(taps, image.ndim - dims):
            picked = whole.index_select(axis, table.ravel() % whole.shape[axis])  # -1 is the filling, the last
            whole = picked.unflatten(axis, table.shape).movedim(axis + 1, -1)  # type: ignore[no-untyped-call]  # torch's
        return whole.flatten(image.ndim)

    cut: Row = w.move(windows, [x, outside])
    most, place = w.reduce("amax", cut, [-1], False), w.reduce("argmax", cut, [-1], False)
    # The position in the image of each tap of each window, cut from an image of positions as the windows are.
    size = math.prod(x.shape[-dims:])
    counted = w.builder.add("broadcast", w.builder.const(1.0), size=size)
    counted = w.builder.add("scan", counted, op="sum", outer=1, count=size, inner=1, reverse=False)
    positions = Row(tuple(x.shape[-dims:]), w.builder.add("sub", counted, w.builder.const(1.0)), None)
    nowhere = w.const(0.0, (1,) * dims)
    table: Row = w.move(windows, [positions, nowhere])
    spread = w.move(lambda numbers: numbers.expand(*most.shape, numbers.shape[-1]), table)
    at = gather(w, spread, -1, w.move(lambda numbers: numbers.unsqueeze(-1), place))
    return most, w.move(lambda numbers: numbers.squeeze(-1), at)


def _unfolded(image: Tensor, kernel: Sizes, stride: Sizes, dilation: Sizes) -> Tensor:
    """Return the windows of an image: all dimensions of a window flattened as the last one."""
    dims = len(kernel)
    first = image.ndim - dims
    for axis, (taps, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        image = image.unfold(first + axis, gap * (taps - 1) + 1, step)[..., ::gap]
    return image.flatten(first + dims)


def _max_pool_backward(w: Writer, g: Row, x: Row, kernel: Sizes, *args: Any) -> Row:
    indices = args[-1]
    dims = len(kernel)
    flat = [w.move(lambda numbers: numbers.flatten(-dims), each) for each in (indices, g)]
    shape = (*x.shape[:-dims], math.prod(x.shape[-dims:]))
    row = scattered(w, shape, -1, flat[0], flat[1])
    result: Row = w.move(lambda numbers: numbers.reshape(x.shape), row)
    return result


def _adaptive_max_pool(w: Writer, x: Row, output: Sizes) -> tuple[Row, Row]:
    sizes = x.shape[-len(output) :]
    return _max_over_windows(w, x, [_parts(size, count) for size, count in zip(sizes, output, strict=True)])


def _parts(size: int, count: int) -> Tensor:
    """Return the positions of each of some parts of an axis, as torch cuts it; -1 beyond the end of shorter ones."""
    part = torch.arange(count)
    begin, end = part * size // count, -(-(part + 1) * size // count)
    taps = begin[:, None] + torch.arange(int((end - begin).max()))
    return torch.where(taps < end[:, None], taps, -1)


def _average_pool(
    w: Writer,
    x: Row,
    kernel: Sizes,
    stride: Sizes = (),
    padding: Sizes = (0,),
    ceil_mode: bool = False,
    count_padding: bool = True,
    divisor: int | None = None,
) -> Row:
    dims = len(kernel)
    pads = _each(padding, dims)
    steps = _each(stride or kernel, dims)
    tables = _average_tables(x.shape[-dims:], kernel, steps, pads, ceil_mode, count_padding, divisor)
    if tables is not None:
        return resized(w, x, tables)

    def windows(numbers: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(numbers, [amount for p in reversed(pads) for amount in (p, p)])
        return _unfolded(padded, kernel, steps, (1,) * dims)

    total = w.reduce("sum", w.move(windows, x), [-1], False)
    return w.point("div", total, float(divisor or math.prod(kernel)))


def _average_pool_backward(
    w: Writer,
    g: Row,
    x: Row,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    ceil_mode: bool,
    count_padding: bool,
    divisor: int | None,
) -> Row:
    dims = len(kernel)
    pads = _each(padding, dims)
    steps = _each(stride or kernel, dims)
    tables = _average_tables(x.shape[-dims:], kernel, steps, pads, ceil_mode, count_padding, divisor)
    if tables is not None:
        return resized(w, g, [table.T for table in tables])
    # Each channel is convolved by itself, with a kernel of equal numbers.
    channels = math.prod(x.shape[1:-dims])
    shape = (channels, 1, *kernel)
    node = w.builder.add("broadcast", w.builder.const(1.0 / (divisor or math.prod(kernel))), size=math.prod(shape))
    kernel_row = Row(shape, node, None, arranged(shape))
    geometry = Geometry(steps, pads, (1,) * dims, channels)
    flat: Row = w.move(lambda numbers: numbers.reshape(numbers.shape[0], channels, *numbers.shape[-dims:]), g)
    image = image_gradient(w, flat, kernel_row, x.shape[-dims:], geometry)
    result: Row = w.move(lambda numbers: numbers.reshape(x.shape), image)
    return result


def _average_tables(
    sizes: Sizes,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    ceil_mode: bool,
    count_padding: bool,
    divisor: int | None,
) -> list[Tensor] | None:
    """Return the (size, windows) weights of each axis; None where all windows count as many elements.

    A window's number of elements is a product of its sides.
    """
    if not ceil_mode and (count_padding or not any(padding)):
        return None
    tables = [
        torch.nn.functional.avg_pool1d(
            torch.eye(size, dtype=torch.float64)[None], taps, step, pad, ceil_mode, count_padding
        )[0]
        for size, taps, step, pad in zip(sizes, kernel, stride, padding, strict=True)
    ]
    if divisor is None:
        return tables
    first, *others = [(table != 0).double() for table in tables]
    return [first / divisor, *others]


def _windows(w: Writer, x: Row, kernel: Sizes, dilation: Sizes, padding: Sizes, stride: Sizes) -> Row:
    """Write the windows of images as columns, (N, channels * taps, windows): ``unfold``."""
    dims = len(kernel)
    pads = _each(padding, dims)

    def columns(numbers: Tensor) -> Tensor:
        image = torch.nn.functional.pad(numbers, [amount for p in reversed(pads) for amount in (p, p)])
        cut = _unfolded(image, kernel, _each(stride, dims), _each(dilation, dims))
        return cut.flatten(2, -2).transpose(2, 3).flatten(1, 2)

    result: Row = w.move(columns, x)
    return result


def _image_of_windows(
    w: Writer, x: Row, output: Sizes, kernel: Sizes, dilation: Sizes, padding: Sizes, stride: Sizes
) -> Row:
    """Add the windows of images up where they lie over one another: ``fold``, and the gradient of ``unfold``."""
    dims = len(kernel)
    pads, steps, gaps = _each(padding, dims), _each(stride, dims), _each(dilation, dims)
    if math.prod(kernel) > MOST_TAPS:
        raise Untraceable(
            f"fold over windows of more than {MOST_TAPS} elements is not compiled; fold along one side, then along "
            "the other."
        )
    counts = [
        (size + 2 * p - gap * (taps - 1) - 1) // step + 1
        for size, p, gap, taps, step in zip(output, pads, gaps, kernel, steps, strict=True)
    ]
    image: Row | None = None
    for place, taps in enumerate(itertools.product(*map(range, kernel))):

        def laid(numbers: Tensor, place: int = place, taps: Sequence[int] = taps) -> Tensor:
            part = numbers.unflatten(1, (-1, math.prod(kernel)))[:, :, place].unflatten(-1, counts)  # type: ignore[no-untyped-call]  # torch's
            whole = part.new_zeros(*part.shape[:2], *(n + 2 * p for n, p in zip(output, pads, strict=True)))
            starts = [tap * gap for tap, gap in zip(taps, gaps, strict=True)]
            at: Any = (..., *(slice(s, s + n * step, step) for s, n, step in zip(starts, counts, steps, strict=True)))
            whole[at] = part
            inside: Any = (..., *(slice(p, p + n) for n, p in zip(output, pads, strict=True)))
            image: Tensor = whole[inside]
            return image

        layer: Row = w.move(laid, x)
        image = layer if image is None else w.point("add", image, layer)
    assert image is not None
    return image


POOLING: Mapping[str, Callable[..., Any]] = {
    "max_pool2d_with_indices": _max_pool,
    "max_pool2d_with_indices_backward": _max_pool_backward,
    "max_pool3d_with_indices": _max_pool,
    "max_pool3d_with_indices_backward": _max_pool_backward,
    "adaptive_max_pool2d": _adaptive_max_pool,
    "adaptive_max_pool2d_backward": lambda w, g, x, indices: _max_pool_backward(w, g, x, (1, 1), indices),
    "adaptive_max_pool3d": _adaptive_max_pool,
    "adaptive_max_pool3d_backward": lambda w, g, x, indices: _max_pool_backward(w, g, x, (1, 1, 1), indices),
    "avg_pool3d": _average_pool,
    "avg_pool3d_backward": _average_pool_backward,
    "avg_pool2d": _average_pool,
    "avg_pool2d_backward": _average_pool_backward,
    "im2col": _windows,
    "col2im": _image_of_windows,
}
