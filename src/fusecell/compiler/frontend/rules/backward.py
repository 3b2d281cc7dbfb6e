"""Rules for ATen's backward operations, each as primitives: the formulas of torch's own kernels.

``SUMS`` are rules for arithmetic on gradients of weights. These are sums over rows that are complete only after the
last step: they can be scaled, moved and added to each other, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.rules.pointwise import split_halves
from fusecell.compiler.frontend.rules.reduction import centred, mean, total
from fusecell.compiler.frontend.sums_over_rows import reordered
from fusecell.compiler.frontend.traced_values import ExternalGrad, Row, Sum, Untraceable, Value, arranged

__all__ = ["BACKWARD", "SUMS"]

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


def _softmax(w: Writer, g: Row, y: Row, dim: int, _dtype: object) -> Row:
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
    "_softmax_backward_data": _softmax,
    "_log_softmax_backward_data": _log_softmax,
    "native_layer_norm_backward": _layer_norm,
}


# Gradients of weights: sums over rows, and external gradients, which are torch's to compute.


def _accumulate(w: Writer, left: Value, right: Value, alpha: float = 1) -> Value:
    # What torch adds to an external gradient is torch's to add again, when it runs the prologue's backward.
    if isinstance(left, ExternalGrad) or isinstance(right, ExternalGrad):
        return right if isinstance(left, ExternalGrad) else left
    return w.total(_sum(left), w.scaled(_sum(right), alpha) if alpha != 1 else _sum(right))


def _sum(value: Value) -> Sum:
    if not isinstance(value, Sum):
        raise Untraceable("The gradient of a weight is combined with a value that is not a weight gradient.")
    return value


def _permute(w: Writer, value: Sum, *order: Any) -> Sum:
    shape = value.shape
    dims = list(range(len(shape)))
    if not order:
        dims.reverse()
    elif isinstance(order[0], list | tuple):
        dims = [dim % len(shape) for dim in order[0]]
    else:
        a, b = order[0] % len(shape), order[1] % len(shape)
        dims[a], dims[b] = b, a
    permuted = tuple(shape[dim] for dim in dims)
    # Dimensions of size 1 may go anywhere: the node has only the others.
    long = [dim for dim in dims if shape[dim] != 1]
    is_matrix = len(shape) == len(w.builder.nodes[value.node].type.shape) == 2
    if long == sorted(long) and not (is_matrix and dims == [1, 0]):
        return Sum(permuted, value.node)
    return Sum(permuted, w.transposed(value).node)


def _view(w: Writer, value: Sum, shape: Sequence[int], **_: Any) -> Sum:
    sizes = list(shape)
    if -1 in sizes:
        sizes[sizes.index(-1)] = math.prod(value.shape) // -math.prod(sizes)
    is_reshaped = [size for size in sizes if size != 1] != [size for size in value.shape if size != 1]
    if is_reshaped and len(w.builder.nodes[value.node].type.shape) > 1:
        raise Untraceable("The step reshapes the gradient of a matrix.")
    return Sum(tuple(sizes), value.node)


def _unsqueeze(w: Writer, value: Sum, dim: int) -> Sum:
    position = dim % (len(value.shape) + 1)
    return Sum((*value.shape[:position], 1, *value.shape[position:]), value.node)


def _squeeze(w: Writer, value: Sum, dims: Any = None) -> Sum:
    several = [dims] if isinstance(dims, int) else dims
    squeezed = range(len(value.shape)) if several is None else [dim % len(value.shape) for dim in several]
    return Sum(tuple(n for dim, n in enumerate(value.shape) if n != 1 or dim not in squeezed), value.node)


def _sum_of_units(w: Writer, value: Sum, dims: Any = None, keepdim: bool = False, **_: Any) -> Sum:
    """Sum over dimensions of size 1, as autograd does where torch has broadcast: nothing is added."""
    reduced = [dim % len(value.shape) for dim in (range(len(value.shape)) if dims is None else dims)]
    if any(value.shape[dim] != 1 for dim in reduced):
        raise Untraceable("The step sums the gradient of a weight over a dimension.")
    return Sum(tuple(n for dim, n in enumerate(value.shape) if keepdim or dim not in reduced), value.node)


def _place(w: Writer, value: Sum, shape: Sequence[int], dim: int, start: int, stop: int, step: int = 1) -> Sum:
    """Put the gradient of a slice where the slice was, among zeros."""
    if step != 1:
        raise Untraceable(f"The step takes a slice of a weight with a step of {step}: only steps of 1 are compiled.")
    dim = dim % len(shape)
    begin = start + shape[dim] if start < 0 else start
    if value.shape == tuple(shape):
        return value
    stored, node = len(w.builder.nodes[value.node].type.shape), value.node
    if len(shape) < stored:  # a vector whose part is used as a matrix of one row or column
        stored, node = 1, reordered(w.builder, node, arranged(value.shape))
    if stored == 1:
        size, corner = [math.prod(shape)], [begin * math.prod(shape[dim + 1 :])]
        if math.prod(shape[:dim]) != 1:
            raise Untraceable("The step takes columns of a weight that is used element by element.")
    else:
        size, corner = list(shape), [begin if position == dim else 0 for position in range(len(shape))]
    return Sum(tuple(shape), w.builder.add("place", node, shape=size, corner=corner))


def _place_one(w: Writer, value: Sum, shape: Sequence[int], dim: int, index: int) -> Sum:
    if len(shape) != 1:
        raise Untraceable("The step takes a row of a weight that is also used whole.")
    return _place(w, Sum((1,), value.node), shape, dim, index % shape[0], index % shape[0] + 1)


def _join(w: Writer, values: Sequence[Value], dim: int = 0) -> Sum:
    """Join gradients of the parts of a weight: each is placed in the whole, and these are added."""
    sums = [value for value in values if isinstance(value, Sum)]
    if any(not isinstance(value, Sum | ExternalGrad) and getattr(value, "fill", None) != 0 for value in values):
        raise Untraceable("The gradient of a part of a weight is no sum over rows.")
    dim = dim % len(sums[0].shape)
    whole = list(sums[0].shape)
    whole[dim] = sum(value.shape[dim] for value in values)
    joined, start = None, 0
    for value in values:
        if isinstance(value, Sum):
            part = _place(w, value, whole, dim, start, start + value.shape[dim])
            joined = part if joined is None else w.total(joined, part)
        start += value.shape[dim]
    return _sum(joined)  # type: ignore[arg-type]  # one of the values is a sum


def _same(w: Writer, value: Sum, *_: Any, **__: Any) -> Sum:
    return value


def _cast(w: Writer, value: Sum, *, dtype: Any = None, **_: Any) -> Sum:
    """Keep a sum as it is where autograd casts it to the dtype of its weight: the prologue casts the kernel's."""
    if dtype is not None and not dtype.is_floating_point:
        raise Untraceable(f"The gradient of a weight is cast to {dtype}.")
    return value


def _times(w: Writer, a: Any, b: Any) -> Sum:
    value, factor = (a, b) if isinstance(a, Sum) else (b, a)
    if not isinstance(factor, int | float):
        raise Untraceable(
            "The step multiplies a weight by numbers that are others at each step, such as a dropout mask of it, and "
            "its gradient is a sum over all steps. Mask the values that the weight is multiplied by instead."
        )
    return w.scaled(value, factor)


SUMS: Mapping[str, Rule] = {
    **dict.fromkeys(("clone", "detach", "alias", "contiguous"), _same),
    **dict.fromkeys(("t", "transpose", "permute"), _permute),
    "_to_copy": _cast,
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "expand"), _view),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "sum": _sum_of_units,
    "cat": _join,
    "add": _accumulate,
    "slice_backward": _place,
    "select_backward": _place_one,
    "neg": lambda w, value: w.scaled(value, -1.0),
    "_neg_view": lambda w, value: w.scaled(value, -1.0),
    "mul": _times,
    "div": lambda w, value, factor: w.scaled(value, 1.0 / factor),
}
