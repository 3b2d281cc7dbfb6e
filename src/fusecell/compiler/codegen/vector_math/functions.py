"""How each function is computed: one Python function per op, written once for both formats.

All divide truly, scale by exponent bits, and limit by compare and select, which let NaN through where
minnum and maxnum would swallow it. Fused steps say ``fma``, because nothing is contracted later.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan

from fusecell.compiler.codegen.vector_math.function_builder import VectorFunction

Rule = Callable[..., str]


def nearest_integer(f: VectorFunction, x: str, per_unit: float, biased_by: int = 0) -> tuple[str, str]:
    """n = round(x * per_unit), as a number and as bits whose lowest part is n + biased_by."""
    rounder = f.precision.rounder + biased_by
    shifted = f.fma("shifted", x, per_unit, rounder)
    return f.sub("n", shifted, rounder), f.bits("n.bits", shifted)


def reduce(f: VectorFunction, n: str, x: str, parts: tuple[float, ...]) -> str:
    """x - n * (the sum of parts), part by part (Cody and Waite)."""
    for part in parts:
        x = f.fma("r", n, -part, x)
    return x


def _power_of_two(f: VectorFunction, n_bits: str) -> str:
    """2^n from the bits of the biased n."""
    return f.from_bits("scale", f.int_op("scale.bits", "shl", n_bits, f.precision.mantissa))


def _scaled(coefficients: tuple[float, ...], first: float, ratio: float) -> list[float]:
    """The coefficients times first, first * ratio, ...: powers of two, so nothing is rounded."""
    return [c * first * ratio**i for i, c in enumerate(coefficients)]


def exp(f: VectorFunction, x: str) -> str:
    p = f.precision
    least, largest = p.exp_range
    f.note("exp(x) = 2^n exp(r), r = x - n ln 2")
    n, n_bits = nearest_integer(f, x, p.log2e)
    r = reduce(f, n, x, p.ln2)
    poly = f.horner("p", r, p.exp)
    mantissa = f.horner("p", r, (1.0, 1.0), start=poly)
    f.note("n is added to the exponent bits: right up to the last finite result, where 2^n itself is not")
    raised = f.int_op("raised.bits", "shl", n_bits, p.mantissa)
    total = f.int_op("total.bits", "add", f.bits("p.bits", mantissa), raised)
    result = f.from_bits("result", total)
    f.note("underflow is 0, overflow inf; NaN takes the second way")
    result = f.select("result", f.compare("small", "olt", x, least), 0.0, result)
    return f.select("result", f.compare("large", "ugt", x, largest), f.add("infinite", x, inf), result)


def sigmoid(f: VectorFunction, x: str) -> str:
    p = f.precision
    lowest, highest = p.sigmoid_range
    f.note("1 / (1 + exp(-x)); exp(-x) = 2 exp(r) 2^(n-1), which overflows to inf where it should")
    y = f.at_most("y", f.at_least("y", x, lowest), highest)
    n, n_bits = nearest_integer(f, y, -p.log2e, p.bias - 1)
    r = reduce(f, n, f.neg("minus.y", y), p.ln2)
    half_scale = _power_of_two(f, n_bits)
    twice = f.horner("p", r, [2.0, 2.0, *_scaled(p.exp, 2.0, 1.0)])
    return f.div("result", 1.0, f.fma("bottom", twice, half_scale, 1.0))


def tanh(f: VectorFunction, x: str) -> str:
    p = f.precision
    f.note("h / (h + 1) with h = expm1(2|x|) / 2; g = expm1(2r) / 2, |x| = r + n ln 2 / 2")
    a = f.at_most("a", f.intrinsic("a", "fabs", x), p.tanh_limit)
    n, n_bits = nearest_integer(f, a, 2.0 * p.log2e, p.bias)
    r = reduce(f, n, a, tuple(part / 2.0 for part in p.ln2_for_small_n))
    scale = _power_of_two(f, n_bits)
    poly = f.horner("p", r, _scaled(p.exp, 2.0, 2.0))
    g = f.fma("g", f.mul("r2", r, r), poly, r)
    h = f.fma("h", scale, g, f.fma("rest", scale, 0.5, -0.5))
    magnitude = f.div("magnitude", h, f.add("bottom", h, 1.0))
    return f.intrinsic("result", "copysign", magnitude, x)


def _itself_if_tiny(f: VectorFunction, x: str, result: str) -> str:
    f.note("a tiny x is its own result: the halves above could be denormal, and -0 would lose its sign")
    tiny = f.compare("tiny", "olt", f.intrinsic("magnitude", "fabs", x), 2.0 ** -(f.precision.mantissa + 2))
    return f.select("result", tiny, x, result)


def expm1(f: VectorFunction, x: str) -> str:
    p = f.precision
    lowest, highest = p.expm1_range
    f.note("2 (2^(n-1) expm1(r) + 2^(n-1) - 1/2), r = x - n ln 2: the doubling overflows where it should")
    y = f.at_most("y", f.at_least("y", x, lowest), highest)
    n, n_bits = nearest_integer(f, y, p.log2e, p.bias - 1)
    r = reduce(f, n, y, p.ln2)
    half_scale = _power_of_two(f, n_bits)
    q = f.fma("q", f.mul("r2", r, r), f.horner("p", r, p.exp), r)
    half = f.fma("half", half_scale, q, f.sub("rest", half_scale, 0.5))
    return _itself_if_tiny(f, x, f.add("doubled", half, half))


def _split(f: VectorFunction, x: str) -> tuple[str, str, str]:
    """x = m 2^k with sqrt(1/2) <= m < sqrt(2): m, k, bits of k + bias. x is a positive normal."""
    p = f.precision
    one = p.bias << p.mantissa
    moved = f.int_op("moved", "add", f.bits("x.bits", x), one - p.sqrt_half_bits)
    k_bits = f.int_op("k.bits", "lshr", moved, p.mantissa)
    rest = f.int_op("m.rest", "and", moved, (1 << p.mantissa) - 1)
    m = f.from_bits("m", f.int_op("m.bits", "add", rest, p.sqrt_half_bits))
    f.note("k as a number: its bits go under those of 2^mantissa (a conversion from 64 bits needs AVX-512)")
    integer = (p.bias + p.mantissa) << p.mantissa
    shifted = f.from_bits("k.shifted", f.int_op("k.under", "or", k_bits, integer))
    return m, f.sub("k", shifted, 2.0**p.mantissa + p.bias), k_bits


def _log_of_parts(f: VectorFunction, m_minus_1: str, k: str) -> str:
    """log(1 + f) + k ln 2 with log(1 + f) = 2 atanh(s), s = f / (2 + f); f - f^2/2 leads."""
    p = f.precision
    high, low = p.ln2
    s = f.div("s", m_minus_1, f.add("bottom", m_minus_1, 2.0))
    z = f.mul("z", s, s)
    half_square = f.mul("half.square", f.mul("half", m_minus_1, 0.5), m_minus_1)
    tail = f.fma("tail", z, f.horner("p", z, p.log), half_square)
    small = f.fma("small", s, tail, f.mul("k.low", k, low))
    near = f.sub("near", m_minus_1, f.sub("drop", half_square, small))
    return f.fma("result", k, high, near)


def _log_edges(f: VectorFunction, x: str, result: str) -> str:
    """log of what is no positive normal number; denormals of either sign are zero in every mode."""
    smallest = f.precision.smallest_normal
    result = f.select("result", f.compare("zero", "olt", x, smallest), -inf, result)
    result = f.select("result", f.compare("negative", "ole", x, -smallest), nan, result)
    return f.select("result", f.compare("unbounded", "uge", x, inf), x, result)


def log(f: VectorFunction, x: str) -> str:
    m, k, _ = _split(f, x)
    return _log_edges(f, x, _log_of_parts(f, f.sub("f", m, 1.0), k))


def log1p(f: VectorFunction, x: str) -> str:
    p = f.precision
    f.note("u + c = 1 + x exactly")
    u = f.add("u", x, 1.0)
    larger, lesser = f.at_least("larger", x, 1.0), f.at_most("lesser", x, 1.0)
    c = f.sub("c", lesser, f.sub("u.rest", u, larger))
    m, k, k_bits = _split(f, u)
    f.note("f = m - 1 + c 2^-k; the scale is 2^(1-k), as 2^-128 would not fit")
    exponent = f.int_op("scale.bits", "sub", 2 * p.bias + 1, k_bits)
    scale = f.from_bits("scale", f.int_op("scale.bits", "shl", exponent, p.mantissa))
    m_minus_1 = f.fma("f", f.mul("half.c", c, 0.5), scale, f.sub("m.minus.1", m, 1.0))
    return _itself_if_tiny(f, x, _log_edges(f, u, _log_of_parts(f, m_minus_1, k)))


def erf(f: VectorFunction, x: str) -> str:
    p = f.precision
    f.note("-expm1(-g(|x|)) with g = -log(1 - erf): relative precision at both ends, and no division")
    a = f.at_most("a", f.intrinsic("a", "fabs", x), p.erf_limit)
    g = f.fma("g", a, f.horner("g", a, p.erf), a)
    n, n_bits = nearest_integer(f, g, -p.log2e, p.bias)
    r = reduce(f, n, f.neg("minus.g", g), p.ln2_for_small_n)
    scale = _power_of_two(f, n_bits)
    q = f.fma("q", f.mul("r2", r, r), f.horner("p", r, p.exp), r)
    return f.intrinsic("result", "copysign", f.fma("negated", scale, q, f.sub("rest", scale, 1.0)), x)


def sqrt(f: VectorFunction, x: str) -> str:
    return f.intrinsic("result", "sqrt", x)


def rsqrt(f: VectorFunction, x: str) -> str:
    return f.div("result", 1.0, f.intrinsic("root", "sqrt", x))


def reciprocal(f: VectorFunction, x: str) -> str:
    return f.div("result", 1.0, x)


def absolute(f: VectorFunction, x: str) -> str:
    return f.intrinsic("result", "fabs", x)


def neg(f: VectorFunction, x: str) -> str:
    return f.neg("result", x)


def floor(f: VectorFunction, x: str) -> str:
    return f.intrinsic("result", "floor", x)


def sign(f: VectorFunction, x: str) -> str:
    f.note("0 for NaN, as in torch")
    positive = f.select("positive", f.compare("above", "ogt", x, 0.0), 1.0, 0.0)
    return f.select("result", f.compare("below", "olt", x, 0.0), -1.0, positive)


def maximum(f: VectorFunction, x: str, y: str) -> str:
    larger = f.select("larger", f.compare("x.wins", "ogt", x, y), x, y)
    return f.select("result", f.compare("x.nan", "uno", x, x), x, larger)


def minimum(f: VectorFunction, x: str, y: str) -> str:
    lesser = f.select("lesser", f.compare("x.wins", "olt", x, y), x, y)
    return f.select("result", f.compare("x.nan", "uno", x, x), x, lesser)


ARITHMETIC: dict[str, Rule] = {
    "exp": exp,
    "expm1": expm1,
    "log": log,
    "log1p": log1p,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "sqrt": sqrt,
    "rsqrt": rsqrt,
    "erf": erf,
    "abs": absolute,
    "neg": neg,
    "sign": sign,
    "floor": floor,
    "reciprocal": reciprocal,
    "maximum": maximum,
    "minimum": minimum,
}
