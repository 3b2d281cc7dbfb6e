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
    normed = _scaled(w, _reshaped(w, w.point("mul", deviation, scale), *x.shape), gain, bias)
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
    dims = len(x.shape)
    if _is_by_instance(x) and average is None:
        image, channels = _by_instance(w, x)
        normed, averages, scales = _group_norm(w, image, None, None, 0, 0, 0, channels, eps)
        normed = _scaled(w, _reshaped(w, normed, *x.shape), gain, bias)
        return normed, _reshaped(w, averages, -1), _reshaped(w, scales, -1)
    _check_evaluation(training or average is None or variance is None)
    assert average is not None
    assert variance is not None
    scale = w.point("rsqrt", w.point("add", variance, eps))
    normed = w.point("sub", x, _per_channel(w, average, dims))
    normed = _scaled(w, w.point("mul", normed, _per_channel(w, scale, dims)), gain, bias)
    return normed, w.const(0.0, (0,)), w.const(0.0, (0,))


def _scaled(w: Writer, normed: Row, gain: Operand | None, bias: Operand | None) -> Row:
    if gain is not None:
        normed = w.point("mul", normed, _per_channel(w, gain, len(normed.shape)))
    return normed if bias is None else w.point("add", normed, _per_channel(w, bias, len(normed.shape)))


def _is_by_instance(x: Row) -> bool:
    """Whether a batch norm is an instance norm's: of (1, N * channels, ...), each row's channels by themselves."""
    return x.axis == 1 and x.shape[0] == 1


def _batch_norm_no_training(w: Writer, x: Row, *args: Any) -> tuple[Row, Row, Row]:
    gain, bias, average, variance, momentum, eps = args
    return _batch_norm(w, x, gain, bias, average, variance, False, momentum, eps)


def _batch_norm_backward(
    w: Writer,
    g: Row,
    x: Row,
    gain: Operand | None,
    average: Operand | None,
    variance: Operand | None,
    saved_mean: Any,
    saved_scale: Any,
    training: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Row | None, Row | Sum | None, Row | Sum | None]:
    dims = len(x.shape)
    if _is_by_instance(x) and average is None:
        return _instance_norm_backward(w, g, x, gain, saved_mean, saved_scale, output_mask)
    _check_evaluation(training)
    assert average is not None
    assert variance is not None
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


def _by_instance(w: Writer, x: Row) -> tuple[Row, int]:
    """Return the images (N, channels, ...) of which an instance norm makes (1, N * channels, ...), and the channels."""
    channels = x.shape[1] // w.rows
    return _reshaped(w, x, -1, channels, *x.shape[2:]), channels


def _instance_norm_backward(
    w: Writer, g: Row, x: Row, gain: Operand | None, average: Row, scale: Row, output_mask: Sequence[bool]
) -> tuple[Row | None, Row | Sum | None, Row | Sum | None]:
    image, channels = _by_instance(w, x)
    gradient, _ = _by_instance(w, g)
    inner = gradient if gain is None else _by_instance(w, w.point("mul", g, _per_channel(w, gain, len(x.shape))))[0]
    averages, scales = (_reshaped(w, value, -1, channels) for value in (average, scale))
    of_x, _, _ = _group_norm_backward(
        w, inner, image, averages, scales, None, 0, 0, 0, channels, (output_mask[0], False, False)
    )
    spatial = list(range(2, len(x.shape)))
    spread = [_per_instance(w, value, len(spatial)) for value in (averages, scales)]
    normed = w.point("mul", w.point("sub", image, spread[0]), spread[1])
    gains = w.reduce("sum", w.point("mul", gradient, normed), spatial, False)
    return (
        None if of_x is None else _reshaped(w, of_x, *x.shape),
        _reshaped(w, gains, -1) if output_mask[1] else None,
        _reshaped(w, w.reduce("sum", gradient, spatial, False), -1) if output_mask[2] else None,
    )


def _per_instance(w: Writer, value: Row, dims: int) -> Row:
    return _reshaped(w, value, *value.shape, *[1] * dims)


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
