"""Rules for ATen's backward operations, each as primitives: the formulas of torch's own kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.rules.pointwise import split_halves
from fusecell.compiler.frontend.rules.reduction import centred, mean, total
from fusecell.compiler.frontend.traced_values import Row, Value

__all__ = ["BACKWARD", "softmax_backward"]

Rule = Callable[..., Any]
_SIXTH = 0.1666666716337204  # in hardsigmoid's gradient torch has float32's sixth, in float64 too


def _tanh(w: Writer, g: Row, y: Row) -> Row:
    return w.point("mul", g, w.point("sub", 1.0, w.point("mul", y, y)))


def _sigmoid(w: Writer, g: Row, y: Row) -> Row:
    return w.point("mul", w.point("mul", g, w.point("sub", 1.0, y)), y)


def _threshold(w: Writer, g: Row, x: Row, threshold: float) -> Row:
    return w.point("where", w.point("le", x, threshold), 0.0, g)


def _leaky_relu(w: Writer, g: Row, x: Row, slope: float, _is_result: bool) -> Row:
    return w.point("where", w.point("gt", x, 0.0), g, w.point("mul", g, slope))


def _prelu(w: Writer, g: Row, x: Row, slope: Operand) -> tuple[Row, Row]:
    above = w.point("gt", x, 0.0)
    return (
        w.point("where", above, g, w.point("mul", slope, g)),
        w.point("where", above, 0.0, w.point("mul", x, g)),
    )


def _elu(w: Writer, g: Row, alpha: float, scale: float, input_scale: float, is_result: bool, x: Row) -> Row:
    low = alpha * scale
    if is_result:
        below = w.point("mul", w.point("mul", g, input_scale), w.point("add", x, low))
    else:
        below = w.point("mul", w.point("mul", g, input_scale * low), w.point("exp", w.point("mul", x, input_scale)))
    return w.point("where", w.point("le", x, 0.0), below, w.point("mul", g, scale))


def _silu(w: Writer, g: Row, x: Row) -> Row:
    s = w.point("sigmoid", x)
    slope = w.point("add", 1.0, w.point("mul", x, w.point("sub", 1.0, s)))
    return w.point("mul", w.point("mul", g, s), slope)


def _gelu(w: Writer, g: Row, x: Row, approximate: str = "none") -> Row:
    if approximate == "tanh":
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        square = w.point("mul", x, x)
        inner = w.point("mul", w.point("add", x, w.point("mul", w.point("mul", square, x), cubic)), scale)
        t = w.point("tanh", inner)
        rate = w.point("mul", w.point("add", 1.0, w.point("mul", square, 3 * cubic)), scale)
        steep = w.point("mul", w.point("mul", x, 0.5), w.point("sub", 1.0, w.point("mul", t, t)))
        slope = w.point("add", w.point("mul", w.point("add", t, 1.0), 0.5), w.point("mul", steep, rate))
        return w.point("mul", g, slope)
    # x Phi(x) differentiated: Phi(x) + x phi(x), with the normal distribution's Phi and its density phi.
    bell = w.point("exp", w.point("mul", w.point("mul", x, x), -0.5))
    density = w.point("mul", bell, 1 / math.sqrt(2 * math.pi))
    below = w.point("mul", w.point("add", w.point("erf", w.point("mul", x, math.sqrt(0.5))), 1.0), 0.5)
    return w.point("mul", g, w.point("add", below, w.point("mul", x, density)))


def _softplus(w: Writer, g: Row, x: Row, beta: float, threshold: float) -> Row:
    scaled = w.point("mul", x, beta)
    raised = w.point("exp", scaled)
    slope = w.point("div", w.point("mul", g, raised), w.point("add", raised, 1.0))
    return w.point("where", w.point("gt", scaled, threshold), g, slope)


def _log_sigmoid(w: Writer, g: Row, x: Row, tail: Row) -> Row:
    part = w.point("div", tail, w.point("add", 1.0, tail))
    return w.point("mul", g, w.point("where", w.point("lt", x, 0.0), w.point("sub", 1.0, part), part))


def _mish(w: Writer, g: Row, x: Row) -> Row:
    s = w.point("sigmoid", x)
    soft = w.point("where", w.point("gt", x, 20.0), x, w.point("log1p", w.point("exp", x)))
    t = w.point("tanh", soft)
    bend = w.point("mul", w.point("mul", x, s), w.point("sub", 1.0, w.point("mul", t, t)))
    return w.point("mul", g, w.point("add", t, bend))


def _hardtanh(w: Writer, g: Row, x: Row, low: float, high: float) -> Row:
    outside = w.point("or", w.point("le", x, low), w.point("ge", x, high))
    return w.point("where", outside, 0.0, g)


def _hardsigmoid(w: Writer, g: Row, x: Row) -> Row:
    inside = w.point("and", w.point("gt", x, -3.0), w.point("lt", x, 3.0))
    return w.point("where", inside, w.point("mul", g, _SIXTH), 0.0)


def _hardswish(w: Writer, g: Row, x: Row) -> Row:
    bent = w.point("mul", g, w.point("add", w.point("div", x, 3.0), 0.5))
    above = w.point("where", w.point("lt", x, 3.0), bent, g)
    # The comparisons are torch's, and where x is NaN torch takes g.
    return w.point("where", w.point("le", x, -3.0), 0.0, above)


def _shrink(w: Writer, g: Row, x: Row, lambd: float) -> Row:
    inside = w.point("and", w.point("ge", x, -lambd), w.point("le", x, lambd))
    return w.point("where", inside, 0.0, g)


def _glu(w: Writer, g: Row, x: Row, dim: int) -> Row:
    a, b = split_halves(w, x, dim)
    s = w.point("sigmoid", b)
    first = w.point("mul", g, s)
    second = w.point("mul", w.point("mul", first, w.point("sub", 1.0, s)), a)
    joined: Row = w.move(lambda numbers: torch.cat(numbers, dim), [first, second])
    return joined


def softmax_backward(w: Writer, g: Row, y: Row, dim: int, _dtype: object) -> Row:
    gy = w.point("mul", g, y)
    return w.point("sub", gy, w.point("mul", y, w.reduce("sum", gy, [dim], True)))


def _log_softmax(w: Writer, g: Row, y: Row, dim: int, _dtype: object) -> Row:
    return w.point("sub", g, w.point("mul", w.point("exp", y), w.reduce("sum", g, [dim], True)))


def _layer_norm(
    w: Writer,
    g: Row,
    x: Row,
    shape: Sequence[int],
    average: Row,
    scale: Row,
    gain: Operand | None,
    bias: Operand | None,
    output_mask: Sequence[bool],
) -> tuple[Row | None, Value | None, Value | None]:
    dims = list(range(-len(shape), 0))
    normed = w.point("mul", w.point("sub", x, average), scale)
    others = list(range(len(x.shape) - len(shape)))
    x_gradient: Row | None = None
    if output_mask[0]:
        # The gradient of the normed value, less its mean and its component along that value.
        inner = g if gain is None else w.point("mul", g, gain)
        along = w.point("mul", normed, mean(w, w.point("mul", inner, normed), dims, True))
        x_gradient = w.point("mul", w.point("sub", centred(w, inner, dims), along), scale)
    gain_gradient = total(w, w.point("mul", g, normed), others) if output_mask[1] else None
    return x_gradient, gain_gradient, total(w, g, others) if output_mask[2] else None


BACKWARD: Mapping[str, Rule] = {
    "tanh_backward": _tanh,
    "sigmoid_backward": _sigmoid,
    "threshold_backward": _threshold,
    "leaky_relu_backward": _leaky_relu,
    "_prelu_kernel_backward": _prelu,
    "elu_backward": _elu,
    "silu_backward": _silu,
    "gelu_backward": _gelu,
    "softplus_backward": _softplus,
    "log_sigmoid_backward": _log_sigmoid,
    "mish_backward": _mish,
    "hardtanh_backward": _hardtanh,
    "hardsigmoid_backward": _hardsigmoid,
    "hardswish_backward": _hardswish,
    "hardshrink_backward": _shrink,
    "softshrink_backward": _shrink,
    "glu_backward": _glu,
    "_softmax_backward_data": softmax_backward,
    "_log_softmax_backward_data": _log_softmax,
    "native_layer_norm_backward": _layer_norm,
}
