"""Rules for norms over groups of channels, and for batch norms by running statistics, and for their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.rules.reduction import centred, mean, total
from fusecell.compiler.frontend.traced_values import Row, Sum, Untraceable

__all__ = ["NORMS"]


def _reshaped(w: Writer, value: Operand, *shape: int) -> Row:
    row: Row = w.move(lambda numbers: numbers.reshape(shape), w.row(value))
    return row


def _per_channel(w: Writer, value: Operand, dims: int) -> Row:
    """Return a value per channel so that it broadcasts to (N, channels, ...)."""
    return _reshaped(w, value, -1, *[1] * (dims - 2))


def _group_norm(
    w: Writer, x: Row, gain: Operand | None, bias: Operand | None, n: int, c: int, area: int, groups: int, eps: float
) -> tuple[Row, Row, Row]:
    grouped = _reshaped(w, x, x.shape[0], groups, -1)
    average = mean(w, grouped, [2], True)
    deviation = w.point("sub", grouped, average)
    variance = mean(w, w.point("mul", deviation, deviation), [2], True)
    scale = w.point("rsqrt", w.point("add", variance, eps))
    normed = _reshaped(w, w.point("mul", deviation, scale), *x.shape)
    if gain is not None:
        normed = w.point("mul", normed, _per_channel(w, gain, len(x.shape)))
    if bias is not None:
        normed = w.point("add", normed, _per_channel(w, bias, len(x.shape)))
    return normed, _reshaped(w, average, x.shape[0], groups), _reshaped(w, scale, x.shape[0], groups)


def _group_norm_backward(
    w: Writer,
    g: Row,
    x: Row,
    average: Row,
    scale: Row,
    gain: Operand | None,
    n: int,
    c: int,
    area: int,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Row | None, Row | Sum | None, Row | Sum | None]:
    grouped = _reshaped(w, x, x.shape[0], groups, -1)
    spread = _reshaped(w, scale, x.shape[0], groups, 1)
    normed = w.point("mul", w.point("sub", grouped, _reshaped(w, average, x.shape[0], groups, 1)), spread)
    x_gradient: Row | None = None
    if output_mask[0]:
        inner = g if gain is None else w.point("mul", g, _per_channel(w, gain, len(x.shape)))
        inner = _reshaped(w, inner, x.shape[0], groups, -1)
        along = w.point("mul", normed, mean(w, w.point("mul", inner, normed), [2], True))
        deviation = w.point("sub", centred(w, inner, [2]), along)
        x_gradient = _reshaped(w, w.point("mul", deviation, spread), *x.shape)
    others = [dim for dim in range(len(x.shape)) if dim != 1]
    gains = w.point("mul", g, _reshaped(w, normed, *x.shape))
    return (
        x_gradient,
        total(w, gains, others) if output_mask[1] else None,
        total(w, g, others) if output_mask[2] else None,
    )


def _batch_norm(
    w: Writer,
    x: Row,
    gain: Operand | None,
    bias: Operand | None,
    average: Operand | None,
    variance: Operand | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Row, Row, Row]:
    _check_evaluation(training or average is None or variance is None)
    assert average is not None
    assert variance is not None
    dims = len(x.shape)
    scale = w.point("rsqrt", w.point("add", variance, eps))
    normed = w.point("sub", x, _per_channel(w, average, dims))
    normed = w.point("mul", normed, _per_channel(w, scale, dims))
    if gain is not None:
        normed = w.point("mul", normed, _per_channel(w, gain, dims))
    if bias is not None:
        normed = w.point("add", normed, _per_channel(w, bias, dims))
    return normed, w.const(0.0, (0,)), w.const(0.0, (0,))


def _batch_norm_no_training(w: Writer, x: Row, *args: Any) -> tuple[Row, Row, Row]:
    gain, bias, average, variance, momentum, eps = args
    return _batch_norm(w, x, gain, bias, average, variance, False, momentum, eps)


def _batch_norm_backward(
    w: Writer,
    g: Row,
    x: Row,
    gain: Operand | None,
    average: Operand,
    variance: Operand,
    _mean: Any,
    _scale: Any,
    training: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Row | None, Row | Sum | None, Row | Sum | None]:
    _check_evaluation(training)
    dims = len(x.shape)
    scale = _per_channel(w, w.point("rsqrt", w.point("add", variance, eps)), dims)
    others = [dim for dim in range(dims) if dim != 1]
    x_gradient: Row | None = None
    if output_mask[0]:
        inner = g if gain is None else w.point("mul", g, _per_channel(w, gain, dims))
        x_gradient = w.point("mul", inner, scale)
    gain_gradient: Row | Sum | None = None
    if output_mask[1]:
        normed = w.point("mul", w.point("sub", x, _per_channel(w, average, dims)), scale)
        gain_gradient = total(w, w.point("mul", g, normed), others)
    return x_gradient, gain_gradient, total(w, g, others) if output_mask[2] else None


def _check_evaluation(training: bool) -> None:
    if training:
        raise Untraceable(
            "The step norms by the statistics of the batch, which mixes its rows; call .eval() on the BatchNorm to use "
            "its running statistics, or take LayerNorm or GroupNorm, whose statistics are each row's own."
        )


NORMS: Mapping[str, Callable[..., Any]] = {
    "native_group_norm": _group_norm,
    "native_group_norm_backward": _group_norm_backward,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm_no_training,
    "native_batch_norm_backward": _batch_norm_backward,
}
