"""Rules for elementwise ATen operations: each as primitives, with torch's results for NaN and at kinks.

A comparison with NaN is false, and a ``where`` then takes its last argument: each rule has its comparison the way
round in which NaN comes out as torch's kernel lets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.traced_values import Row
from fusecell.compiler.ir.primitives import PRIMITIVES

__all__ = ["POINTWISE", "power"]

Rule = Callable[..., Any]


def _same(op: str) -> Rule:
    return lambda w, *operands: w.point(op, *operands)


def _add(w: Writer, a: Operand, b: Operand, alpha: float = 1) -> Row:
    return w.point("add", a, b if alpha == 1 else w.point("mul", b, alpha))


def _sub(w: Writer, a: Operand, b: Operand, alpha: float = 1) -> Row:
    return w.point("sub", a, b if alpha == 1 else w.point("mul", b, alpha))


def _rsub(w: Writer, a: Operand, b: Operand, alpha: float = 1) -> Row:
    return _sub(w, b, a, alpha)


def _div(w: Writer, a: Operand, b: Operand, rounding_mode: str | None = None) -> Row:
    quotient = w.point("div", a, b)
    if rounding_mode is None:
        return quotient
    return _trunc(w, quotient)


def power(w: Writer, base: Operand, exponent: Operand) -> Row:
    """Write base to the exponent; exponents that torch computes without pow are computed like that here, too."""
    if isinstance(exponent, int | float):
        special: dict[float, Callable[[], Row]] = {
            1: lambda: w.number(base),
            2: lambda: _square(w, base),
            3: lambda: _cube(w, base),
        }
        special |= {0.5: lambda: w.point("sqrt", base), -0.5: lambda: w.point("rsqrt", base)}
        special |= {-1: lambda: w.point("reciprocal", base), -2: lambda: w.point("reciprocal", _square(w, base))}
        if exponent in special:
            return special[exponent]()
    return w.point("pow", base, exponent)


def _square(w: Writer, x: Operand) -> Row:
    return w.point("mul", x, x)


def _cube(w: Writer, x: Operand) -> Row:
    return w.point("mul", _square(w, x), x)


def _ceil(w: Writer, x: Operand) -> Row:
    return w.point("neg", w.point("floor", w.point("neg", x)))


def _trunc(w: Writer, x: Operand) -> Row:
    return w.point("where", w.point("lt", x, 0.0), _ceil(w, x), w.point("floor", x))


def _exp2(w: Writer, x: Operand) -> Row:
    return w.point("pow", 2.0, x)


def _relu(w: Writer, x: Operand) -> Row:
    return w.point("where", w.point("le", x, 0.0), 0.0, x)


def _leaky_relu(w: Writer, x: Operand, slope: float = 0.01) -> Row:
    return w.point("where", w.point("gt", x, 0.0), x, w.point("mul", x, slope))


def _prelu(w: Writer, x: Operand, slope: Operand) -> Row:
    return w.point("where", w.point("gt", x, 0.0), x, w.point("mul", slope, x))


def _elu(w: Writer, x: Operand, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Row:
    low = w.point("mul", w.point("expm1", _times(w, x, input_scale)), alpha * scale)
    return w.point("where", w.point("le", x, 0.0), low, _times(w, x, scale))


def _times(w: Writer, x: Operand, factor: float) -> Operand:
    return x if factor == 1 else w.point("mul", x, factor)


def _silu(w: Writer, x: Operand) -> Row:
    return w.point("mul", x, w.point("sigmoid", x))


def _gelu(w: Writer, x: Operand, approximate: str = "none") -> Row:
    if approximate == "tanh":
        inner = w.point("mul", _add(w, x, w.point("mul", _cube(w, x), 0.044715)), math.sqrt(2 / math.pi))
        curve = w.point("tanh", inner)
    else:
        curve = w.point("erf", w.point("mul", x, math.sqrt(0.5)))
    return w.point("mul", w.point("mul", x, 0.5), w.point("add", curve, 1.0))


def _softplus(w: Writer, x: Operand, beta: float = 1, threshold: float = 20) -> Row:
    scaled = _times(w, x, beta)
    soft = w.point("log1p", w.point("exp", scaled))
    soft = soft if beta == 1 else w.point("div", soft, beta)
    return w.point("where", w.point("gt", scaled, threshold), x, soft)


def _log_sigmoid(w: Writer, x: Operand) -> tuple[Row, Row]:
    # min(x, 0) - log1p(exp(-|x|)): the exponential never overflows. torch returns it too, for the backward.
    tail = w.point("exp", w.point("neg", w.point("abs", x)))
    return w.point("sub", w.point("minimum", x, 0.0), w.point("log1p", tail)), tail


def _mish(w: Writer, x: Operand) -> Row:
    return w.point("mul", x, w.point("tanh", _softplus(w, x)))


def _clamp(w: Writer, x: Operand, low: Operand | None = None, high: Operand | None = None) -> Row:
    value = w.number(x)
    if low is not None:
        value = w.point("maximum", value, low)
    return value if high is None else w.point("minimum", value, high)


def _hardsigmoid(w: Writer, x: Operand) -> Row:
    return w.point("div", _clamp(w, w.point("add", x, 3.0), 0.0, 6.0), 6.0)


def _hardswish(w: Writer, x: Operand) -> Row:
    return w.point("div", w.point("mul", x, _clamp(w, w.point("add", x, 3.0), 0.0, 6.0)), 6.0)


def _hardshrink(w: Writer, x: Operand, lambd: float = 0.5) -> Row:
    inside = w.point("and", w.point("ge", x, -lambd), w.point("le", x, lambd))
    return w.point("where", inside, 0.0, x)


def _softshrink(w: Writer, x: Operand, lambd: float = 0.5) -> Row:
    # x * 0 in the middle, not 0: NaN stays NaN.
    low = w.point("where", w.point("lt", x, -lambd), w.point("add", x, lambd), w.point("mul", x, 0.0))
    return w.point("where", w.point("gt", x, lambd), w.point("sub", x, lambd), low)


def _threshold(w: Writer, x: Operand, threshold: float, value: float) -> Row:
    return w.point("where", w.point("le", x, threshold), value, x)


def _glu(w: Writer, x: Row, dim: int = -1) -> Row:
    a, b = split_halves(w, x, dim)
    return w.point("mul", a, w.point("sigmoid", b))


def split_halves(w: Writer, x: Row, dim: int) -> list[Row]:
    """Split a dimension in two halves."""
    both: list[Row] = w.move(lambda numbers: numbers.chunk(2, dim), x)
    return both


def _lerp(w: Writer, a: Operand, b: Operand, weight: Operand) -> Row:
    """Interpolate from the nearer end, as torch does: a weight of 1 gives b exactly."""
    distance = w.point("sub", b, a)
    near = w.point("add", a, w.point("mul", weight, distance))
    far = w.point("sub", b, w.point("mul", distance, w.point("sub", 1.0, weight)))
    if isinstance(weight, int | float):
        return near if abs(weight) < 0.5 else far
    return w.point("where", w.point("lt", w.point("abs", weight), 0.5), near, far)


def _addcmul(w: Writer, base: Operand, a: Operand, b: Operand, value: float = 1) -> Row:
    return w.point("add", base, w.point("mul", _times(w, a, value), b))


def _addcdiv(w: Writer, base: Operand, a: Operand, b: Operand, value: float = 1) -> Row:
    return w.point("add", base, w.point("div", _times(w, a, value), b))


def _masked_fill(w: Writer, x: Operand, mask: Operand, value: Operand) -> Row:
    return w.point("where", mask, value, x)


def _xor(w: Writer, a: Operand, b: Operand) -> Row:
    a, b = w.truth(a), w.truth(b)
    return w.point("and", w.point("or", a, b), w.point("not", w.point("and", a, b)))


def _nan_to_num(
    w: Writer,
    x: Operand,
    nan: float | None = None,
    high: float | None = None,
    low: float | None = None,
    *,
    largest: float = math.inf,
) -> Row:
    high, low = largest if high is None else high, -largest if low is None else low
    number = w.point("where", w.point("ne", x, x), nan or 0.0, x)
    number = w.point("where", w.point("eq", number, math.inf), high, number)
    return w.point("where", w.point("eq", number, -math.inf), low, number)


def _named_as_in_aten() -> Mapping[str, Rule]:
    """Return the rules of operations whose name and meaning in ATen are those of a primitive."""
    names = (name for name, primitive in PRIMITIVES.items() if primitive.pointwise and hasattr(torch.ops.aten, name))
    return {name: _same(name) for name in names}


POINTWISE: Mapping[str, Rule] = {
    **_named_as_in_aten(),
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "div": _div,
    "pow": power,
    "sgn": _same("sign"),
    "_neg_view": _same("neg"),
    "ceil": _ceil,
    "trunc": _trunc,
    "exp2": _exp2,
    "ldexp": lambda w, x, exponent: w.point("mul", x, _exp2(w, exponent)),
    "log2": lambda w, x: w.point("div", w.point("log", x), math.log(2)),
    "log10": lambda w, x: w.point("div", w.point("log", x), math.log(10)),
    "tan": lambda w, x: w.point("div", w.point("sin", x), w.point("cos", x)),
    "erfc": lambda w, x: w.point("sub", 1.0, w.point("erf", x)),
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "_prelu_kernel": _prelu,
    "elu": _elu,
    "celu": lambda w, x, alpha=1.0: _elu(w, x, alpha, 1.0, 1.0 / alpha),
    "silu": _silu,
    "gelu": _gelu,
    "softplus": _softplus,
    "log_sigmoid_forward": _log_sigmoid,
    "mish": _mish,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda w, x, high: _clamp(w, x, None, high),
    "hardtanh": lambda w, x, low=-1.0, high=1.0: _clamp(w, x, low, high),
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
    "hardshrink": _hardshrink,
    "softshrink": _softshrink,
    "threshold": _threshold,
    "glu": _glu,
    "lerp": _lerp,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "masked_fill": _masked_fill,
    "logical_and": _same("and"),
    "logical_or": _same("or"),
    "logical_not": _same("not"),
    "logical_xor": _xor,
    "bitwise_and": _same("and"),
    "bitwise_or": _same("or"),
    "bitwise_not": _same("not"),
    "bitwise_xor": _xor,
    "isnan": lambda w, x: w.point("ne", x, x),
    "isinf": lambda w, x: w.point("eq", w.point("abs", x), math.inf),
    "nan_to_num": _nan_to_num,
}
