"""Rules for resizing: by weighted means, linear, cubic and of windows, a product along each axis with a table.

The table of an axis is torch's own operation, applied to each unit vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fusecell.compiler.frontend.contractions import contracted
from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.traced_values import Row, Sum, Untraceable

__all__ = ["INTERPOLATIONS", "resized"]

Sizes = Sequence[int]
_AXES = "yxz"
_NEAREST = {
    "nearest": torch.ops.aten.upsample_nearest1d.default,
    "nearest_exact": torch.ops.aten._upsample_nearest_exact1d.default,
}


def _table(kind: str, size: int, result: int, align: bool, scale: float | None) -> torch.Tensor:
    """Return the (size, result) weights of one axis: each element of the result is a mean over a column."""
    unit = torch.eye(size, dtype=torch.float64)
    if kind == "bicubic":
        # One axis of two: the other has one element, which stays as it is.
        op = torch.ops.aten.upsample_bicubic2d.default
        plane: torch.Tensor = op(unit[None, :, :, None], [result, 1], align, scale, None)
        return plane[0, :, :, 0]
    if kind != "linear":
        copied: torch.Tensor = _NEAREST[kind](unit[None], [result], scale)
        return copied[0]
    lines: torch.Tensor = torch.ops.aten.upsample_linear1d.default(unit[None], [result], align, scale)
    return lines[0]


def _tables(kind: str, sizes: Sizes, results: Sizes, align: bool, scales: Sequence[float | None]) -> list[torch.Tensor]:
    scales = (*scales, *[None] * (len(sizes) - len(scales)))
    axes = zip(sizes, results, scales, strict=True)
    return [_table(kind, size, result, align, scale) for size, result, scale in axes]


def resized(w: Writer, x: Operand, tables: Sequence[torch.Tensor]) -> Row:
    """Return an image multiplied along each of its axes, the last dimensions, by a table (size, result)."""
    row = w.number(x)
    dims = len(row.shape) - len(tables)
    dtype = torch.float32 if w.builder.dtype == "f32" else torch.float64
    for axis, table in enumerate(tables):
        labels = "abc"[:dims] + _AXES[: len(tables)]
        out = labels.replace(_AXES[axis], "w")
        result = contracted(w, row, w.row(w.literal(table.to(dtype))), labels, _AXES[axis] + "w", out)
        if isinstance(result, Sum):
            raise Untraceable("The step mixes the rows of the batch: it resizes along them.")
        row = result
    return row


def _forward(kind: str) -> Callable[..., Row]:
    def rule(w: Writer, x: Row, size: Sizes, align: bool, *scales: float | None) -> Row:
        sizes = x.shape[-len(size) :]
        return resized(w, x, _tables(kind, sizes, size, align, scales))

    return rule


def _backward(kind: str) -> Callable[..., Row]:
    def rule(w: Writer, g: Row, size: Sizes, whole: Sizes, align: bool, *scales: float | None) -> Row:
        sizes = whole[-len(size) :]
        return resized(w, g, [table.T for table in _tables(kind, sizes, size, align, scales)])

    return rule


def _nearest_backward(kind: str) -> Callable[..., Row]:
    """Write the sums of what each element was copied to."""

    def rule(w: Writer, g: Row, output: Sizes, whole: Sizes, *scales: float | None) -> Row:
        dims = len(output)
        sizes = whole[-dims:]
        factors = [large / small for large, small in zip(output, sizes, strict=True)]
        is_whole = all(factor.is_integer() for factor in factors)
        # A scale that is given counts, and not what it makes of the size.
        if not is_whole or any(scale not in (None, factor) for scale, factor in zip(scales, factors, strict=False)):
            return resized(w, g, [table.T for table in _tables(kind, sizes, output, False, scales)])
        split = [n for large, small in zip(output, sizes, strict=True) for n in (small, large // small)]
        parts: Row = w.move(lambda numbers: numbers.reshape(*numbers.shape[:-dims], *split), g)
        first = len(g.shape) - dims
        return w.reduce("sum", parts, [first + 1 + 2 * axis for axis in range(dims)], False)

    return rule


def _pooled_tables(sizes: Sizes, results: Sizes) -> list[torch.Tensor]:
    pool = torch.nn.functional.adaptive_avg_pool1d
    pairs = zip(sizes, results, strict=True)
    return [pool(torch.eye(size, dtype=torch.float64)[None], result)[0] for size, result in pairs]


def _adaptive_average_pool(w: Writer, x: Row, output: Sizes) -> Row:
    return resized(w, x, _pooled_tables(x.shape[-len(output) :], output))


def _adaptive_average_pool_backward(dims: int) -> Callable[..., Row]:
    def rule(w: Writer, g: Row, x: Row) -> Row:
        return resized(w, g, [table.T for table in _pooled_tables(x.shape[-dims:], g.shape[-dims:])])

    return rule


_KINDS = {"linear1d": "linear", "bilinear2d": "linear", "trilinear3d": "linear", "bicubic2d": "bicubic"}
INTERPOLATIONS: Mapping[str, Callable[..., Any]] = {
    **{f"upsample_{name}": _forward(kind) for name, kind in _KINDS.items()},
    **{f"upsample_{name}_backward": _backward(kind) for name, kind in _KINDS.items()},
    **{f"upsample_nearest{dims}d_backward": _nearest_backward("nearest") for dims in (1, 2, 3)},
    **{f"_upsample_nearest_exact{dims}d_backward": _nearest_backward("nearest_exact") for dims in (1, 2, 3)},
    **{f"_adaptive_avg_pool{dims}d": _adaptive_average_pool for dims in (2, 3)},
    **{f"_adaptive_avg_pool{dims}d_backward": _adaptive_average_pool_backward(dims) for dims in (2, 3)},
}
