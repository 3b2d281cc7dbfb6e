"""Rules for elementwise ATen operations that are rarer: roundings, remainders, hyperbolic, gamma and error functions.

Compositions of primitives wherever these keep the precision, each arranged so that nothing cancels or overflows before
the result does; the rest have vector functions of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.rules.bessel_and_normal import BESSEL_AND_NORMAL
from fusecell.compiler.frontend.rules.pointwise import POINTWISE
from fusecell.compiler.frontend.rules.polygamma import polygamma
from fusecell.compiler.frontend.traced_values import Row
from fusecell.compiler.ir.sizes import DType

__all__ = ["SPECIAL", "SPECIAL_BACKWARD"]

Rule = Callable[..., Any]
_LN2 = math.log(2)
_LARGE = 1e15
"""Beyond it x^2 + 1 is x^2 to the last bit."""


# Roundings and remainders.


def _round(w: Writer, x: Operand, decimals: int = 0) -> Row:
    if decimals == 0:
        return w.point("round", x)
    power = 10.0 ** abs(decimals)
    up, down = ("mul", "div") if decimals > 0 else ("div", "mul")
    return w.point(down, w.point("round", w.point(up, x, power)), power)


def _trunc(w: Writer, x: Operand) -> Row:
    row: Row = POINTWISE["trunc"](w, x)
    return row


def _opposite(w: Writer, a: Operand, b: Operand) -> Row:
    """Write whether two numbers have different signs, and neither is 0."""
    falls = w.point("and", w.point("lt", a, 0.0), w.point("gt", b, 0.0))
    return w.point("or", falls, w.point("and", w.point("gt", a, 0.0), w.point("lt", b, 0.0)))


def _remainder(w: Writer, a: Operand, b: Operand) -> Row:
    """Write a modulo b, with the sign of b, as Python's ``%``."""
    rest = w.point("fmod", a, b)
    return w.point("where", _opposite(w, rest, b), w.point("add", rest, b), rest)


def _floor_divide(w: Writer, a: Operand, b: Operand) -> Row:
    # From the exact remainder, as in Python and torch: floor(a / b) is one too large where a / b is rounded up.
    rest = w.point("fmod", a, b)
    quotient = w.point("div", w.point("sub", a, rest), b)
    quotient = w.point("where", _opposite(w, rest, b), w.point("sub", quotient, 1.0), quotient)
    whole = w.point("floor", quotient)
    whole = w.point("where", w.point("gt", w.point("sub", quotient, whole), 0.5), w.point("add", whole, 1.0), whole)
    direct = w.point("div", a, b)
    result = w.point("where", w.point("eq", quotient, 0.0), w.point("copysign", 0.0, direct), whole)
    return w.point("where", w.point("eq", b, 0.0), direct, result)


def _div(w: Writer, a: Operand, b: Operand, rounding_mode: str | None = None) -> Row:
    if rounding_mode == "floor":
        return _floor_divide(w, a, b)
    row: Row = POINTWISE["div"](w, a, b, rounding_mode=rounding_mode)
    return row


def _fake_quantize(w: Writer, x: Operand, scale: float, zero_point: int, least: int, largest: int) -> tuple[Row, Row]:
    # torch multiplies by the reciprocal; that, the scale and the result are float32 in float64 too.
    inverse = float(np.float32(1.0) / np.float32(scale))
    level = w.point("add", w.point("round", w.point("mul", x, inverse)), float(zero_point))
    inside = w.point("and", w.point("ge", level, float(least)), w.point("le", level, float(largest)))
    # NaN is the least level, as in torch.
    capped = w.point("minimum", level, float(largest))
    clamped = w.point("where", w.point("ge", capped, float(least)), capped, float(least))
    result = w.point("mul", w.point("sub", clamped, float(zero_point)), float(np.float32(scale)))
    return w.point("to_float32", result) if w.builder.dtype == DType.F64 else result, inside


# Signs, and what is not finite.


def _signbit(w: Writer, x: Operand) -> Row:
    return w.point("lt", w.point("copysign", 1.0, x), 0.0)


def _heaviside(w: Writer, x: Operand, at_zero: Operand) -> Row:
    step = w.point("where", w.point("gt", x, 0.0), 1.0, 0.0)
    return w.point("where", w.point("eq", x, 0.0), at_zero, step)


def _fmax(w: Writer, a: Operand, b: Operand) -> Row:
    first = w.point("or", w.point("ge", a, b), w.point("ne", b, b))
    return w.point("where", first, a, b)


def _fmin(w: Writer, a: Operand, b: Operand) -> Row:
    first = w.point("or", w.point("le", a, b), w.point("ne", b, b))
    return w.point("where", first, a, b)


# Angles and lengths.


def _hypot(w: Writer, a: Operand, b: Operand) -> Row:
    a, b = w.point("abs", a), w.point("abs", b)
    larger, lesser = w.point("maximum", a, b), w.point("minimum", a, b)
    ratio = w.point("div", lesser, w.point("where", w.point("eq", larger, 0.0), 1.0, larger))
    length = w.point("mul", larger, w.point("sqrt", w.point("add", w.point("mul", ratio, ratio), 1.0)))
    endless = w.point("or", w.point("eq", a, math.inf), w.point("eq", b, math.inf))
    return w.point("where", endless, math.inf, length)


def _angle(w: Writer, x: Operand) -> Row:
    """Write the angle of a real number in the complex plane: 0 or pi, and NaN of NaN."""
    number = w.number(x)
    turned = w.point("where", w.point("lt", number, 0.0), math.pi, 0.0)
    return w.point("where", w.point("ne", number, number), number, turned)


def _complement(w: Writer, x: Operand) -> Row:
    """Write sqrt(1 - x^2)."""
    return w.point("sqrt", w.point("mul", w.point("sub", 1.0, x), w.point("add", 1.0, x)))


def _sinc(w: Writer, x: Operand) -> Row:
    angle = w.point("mul", x, math.pi)
    wave = w.point("div", w.point("sin", angle), angle)
    return w.point("where", w.point("eq", x, 0.0), 1.0, wave)


# Hyperbolic functions.


def _cosh(w: Writer, x: Operand) -> Row:
    # The square of exp(x / 2) overflows where the result does, exp(x) before.
    root = w.point("exp", w.point("mul", w.point("abs", x), 0.5))
    half = w.point("mul", root, 0.5)
    return w.point("add", w.point("mul", half, root), w.point("div", w.point("div", 0.5, root), root))


def _sinh(w: Writer, x: Operand) -> Row:
    # With u = exp(|x| / 2) - 1: u (u + 2) (1 + 1 / (1 + u)^2) / 2.
    u = w.point("expm1", w.point("mul", w.point("abs", x), 0.5))
    inverse = w.point("reciprocal", w.point("add", u, 1.0))
    rise = w.point("mul", w.point("mul", u, 0.5), w.point("add", u, 2.0))
    return w.point("copysign", w.point("mul", rise, w.point("add", w.point("mul", inverse, inverse), 1.0)), x)


def _log1p_or_doubled(w: Writer, x: Row, is_large: Row, small: Row) -> Row:
    """Write log1p(small), or where x is large log(2 x): x + sqrt(x^2 + 1) would overflow."""
    logarithm = w.point("log1p", w.point("where", is_large, x, small))
    return w.point("add", logarithm, w.point("where", is_large, _LN2, 0.0))


def _asinh(w: Writer, x: Operand) -> Row:
    a = w.point("abs", x)
    is_large = w.point("gt", a, _LARGE)
    root = w.point("add", w.point("sqrt", w.point("add", w.point("mul", a, a), 1.0)), 1.0)
    small = w.point("add", a, w.point("mul", a, w.point("div", a, root)))
    return w.point("copysign", _log1p_or_doubled(w, a, is_large, small), x)


def _acosh(w: Writer, x: Operand) -> Row:
    x = w.number(x)
    less = w.point("sub", x, 1.0)
    root = w.point("mul", w.point("sqrt", less), w.point("sqrt", w.point("add", x, 1.0)))
    return _log1p_or_doubled(w, x, w.point("gt", x, _LARGE), w.point("add", less, root))


def _atanh(w: Writer, x: Operand) -> Row:
    a = w.point("abs", x)
    ratio = w.point("div", w.point("add", a, a), w.point("sub", 1.0, a))
    return w.point("copysign", w.point("mul", w.point("log1p", ratio), 0.5), x)


# Logarithms.


def _logaddexp(base: float) -> Rule:
    unit = math.log(base) if base != math.e else 1.0

    def rule(w: Writer, a: Operand, b: Operand) -> Row:
        larger = w.point("maximum", a, b)
        distance = w.point("abs", w.point("sub", a, b))
        exponent = w.point("neg", distance if unit == 1 else w.point("mul", distance, unit))
        soft = w.point("log1p", w.point("exp", exponent))
        result = w.point("add", larger, soft if unit == 1 else w.point("mul", soft, 1 / unit))
        # Two equal infinities, whose difference is NaN.
        same = w.point("and", w.point("eq", a, b), w.point("eq", w.point("abs", a), math.inf))
        return w.point("where", same, a, result)

    return rule


def _logit(w: Writer, x: Operand, eps: float | None = None) -> Row:
    if eps is not None:
        x = w.point("minimum", w.point("maximum", x, eps), 1.0 - eps)
    return w.point("log", w.point("div", x, w.point("sub", 1.0, x)))


def _times_log(op: str) -> Rule:
    def rule(w: Writer, x: Operand, y: Operand) -> Row:
        product = w.point("where", w.point("eq", x, 0.0), 0.0, w.point("mul", x, w.point(op, y)))
        return w.point("where", w.point("ne", y, y), math.nan, product)

    return rule


def _entropy(w: Writer, x: Operand) -> Row:
    inner = w.point("neg", w.point("mul", x, w.point("log", x)))
    return w.point("where", w.point("eq", x, 0.0), 0.0, w.point("where", w.point("lt", x, 0.0), -math.inf, inner))


def _frexp(w: Writer, x: Operand) -> tuple[Row, Row]:
    fraction = w.point("mantissa", x)
    # Half the power of two, as 2^1024 would not fit.
    half_power = w.point("div", x, w.point("add", fraction, fraction))
    exponent = w.point("add", w.point("round", w.point("div", w.point("log", half_power), _LN2)), 1.0)
    size = w.point("abs", x)
    regular = w.point("and", w.point("gt", size, 0.0), w.point("lt", size, math.inf))
    return fraction, w.point("where", regular, exponent, 0.0)


def _rrelu(
    w: Writer, x: Operand, noise: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, *_: Any
) -> Row:
    slope = (lower + upper) / 2
    return w.point("where", w.point("le", x, 0.0), w.point("mul", x, slope), x)


SPECIAL: Mapping[str, Rule] = {
    "round": _round,
    "frac": lambda w, x: w.point("sub", x, _trunc(w, x)),
    "remainder": _remainder,
    "floor_divide": _floor_divide,
    "div": _div,
    "fake_quantize_per_tensor_affine_cachemask": _fake_quantize,
    "signbit": _signbit,
    "isposinf": lambda w, x: w.point("eq", x, math.inf),
    "isneginf": lambda w, x: w.point("eq", x, -math.inf),
    "heaviside": _heaviside,
    "fmax": _fmax,
    "fmin": _fmin,
    "hypot": _hypot,
    "angle": _angle,
    "asin": lambda w, x: w.point("atan2", x, _complement(w, x)),
    "acos": lambda w, x: w.point("atan2", _complement(w, x), x),
    "sinc": _sinc,
    "cosh": _cosh,
    "sinh": _sinh,
    "asinh": _asinh,
    "acosh": _acosh,
    "atanh": _atanh,
    "logaddexp": _logaddexp(math.e),
    "logaddexp2": _logaddexp(2),
    "logit": _logit,
    "xlogy": _times_log("log"),
    "special_xlog1py": _times_log("log1p"),
    "special_entr": _entropy,
    "deg2rad": lambda w, x: w.point("mul", x, math.pi / 180),
    "rad2deg": lambda w, x: w.point("mul", x, 180 / math.pi),
    "polygamma": polygamma,
    "rrelu_with_noise": _rrelu,
    "nextafter": lambda w, x, y: w.point("nextafter", x, y),
    "frexp": _frexp,
    **BESSEL_AND_NORMAL,
}
"""The function of each of these operations, by its name in ATen; beside `POINTWISE`."""


def _logit_backward(w: Writer, g: Row, x: Row, eps: float | None = None) -> Row:
    slope = w.point("div", g, w.point("mul", x, w.point("sub", 1.0, x)))
    steepest = w.point("or", w.point("eq", x, 0.0), w.point("eq", x, 1.0))
    slope = w.point("where", steepest, w.point("mul", g, math.inf), slope)
    low, outside = (0.0, math.nan) if eps is None else (eps, 0.0)
    beyond = w.point("or", w.point("lt", x, low), w.point("gt", x, 1.0 - low))
    return w.point("where", beyond, outside, slope)


def _rrelu_backward(
    w: Writer, g: Row, x: Row, noise: Any, lower: float, upper: float, training: bool, is_result: bool
) -> Row:
    slope = (lower + upper) / 2
    return w.point("where", w.point("gt", x, 0.0), g, w.point("mul", g, slope))


SPECIAL_BACKWARD: Mapping[str, Rule] = {
    "logit_backward": _logit_backward,
    "rrelu_with_noise_backward": _rrelu_backward,
}
"""The same for the operations that autograd calls in their backward."""
