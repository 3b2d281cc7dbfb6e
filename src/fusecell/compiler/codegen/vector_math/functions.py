"""Vector functions, one Python function per primitive, each written once for both number formats.

The scheme is the classical one (Muller, "Elementary Functions", 3rd ed. 2016, ch. 11; Tang, ACM TOMS 1989 and 1992):
reduce the argument to a small interval, evaluate a minimax polynomial there by Horner's rule, undo the reduction::

    exp(x):  n = round(x / ln 2);  r = x - n ln 2  (Cody and Waite);  2^n (1 + r + r^2 p(r))
    log(x):  x = m 2^k with sqrt(1/2) <= m < sqrt(2);  log(m) by atanh;  + k ln 2
    sigmoid, tanh, expm1, erf: from exp's n, r and polynomial, arranged so that nothing cancels

No tables: a gather costs more than the two or three multiply-adds that it saves. No branches: every lane takes the same
way, so its bits don't depend on its neighbours. Divisions are true ones, as approximations of a reciprocal differ
between CPUs. Limits are compare and select, which pass on NaN, where minnum and maxnum would return the other operand.
Fused steps say ``fma``: LLVM contracts nothing later.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan

from fusecell.compiler.codegen.llvm_text import Value
from fusecell.compiler.codegen.vector_math.function_builder import VectorFunction

__all__ = ["ARITHMETIC", "Rule", "exp", "log", "nearest_integer", "subtract_multiple"]

Rule = Callable[..., Value]
"""Writes a function's body: takes the builder and the arguments, returns the result."""


def nearest_integer(f: VectorFunction, x: Value, per_unit: float, biased_by: int = 0) -> tuple[Value, Value]:
    """Return n = round(x * per_unit) as a number, and as bits whose lowest part is n + biased_by.

    Adding 1.5 * 2^mantissa leaves the integer in the lowest bits of the sum, rounded to nearest: no conversion
    instruction, which for 64-bit integers only AVX-512 has.
    """
    rounder = f.precision.rounder + biased_by
    shifted = f.fma(x, per_unit, rounder, "shifted")
    return f.sub(shifted, rounder, "n"), f.bits(shifted, "n.bits")


def subtract_multiple(f: VectorFunction, n: Value, x: Value, parts: tuple[float, ...]) -> Value:
    """Return x - n * (the sum of parts), part by part (Cody and Waite 1980).

    The first part has so few bits that n times it is exact; so the difference, in which most digits cancel, is too.
    """
    for part in parts:
        x = f.fma(n, -part, x, "r")
    return x


def _power_of_two(f: VectorFunction, n_bits: Value) -> Value:
    """Return 2^n from the bits of n + bias: they are its exponent field."""
    return f.from_bits(f.shl(n_bits, f.precision.mantissa, "scale.bits"), "scale")


def _scaled(coefficients: tuple[float, ...], first: float, ratio: float) -> list[float]:
    """Return the coefficients times first, first * ratio, ...: powers of two, so nothing is rounded."""
    return [c * first * ratio**i for i, c in enumerate(coefficients)]


def exp(f: VectorFunction, x: Value) -> Value:
    # Off by at most 1.0 ulp in float32, sigmoid by 2.5 (1.4 million arguments, against float64).
    p = f.precision
    least, largest = p.exp_range
    f.comment("exp(x) = 2^n exp(r), r = x - n ln 2")
    n, n_bits = nearest_integer(f, x, p.log2e)
    r = subtract_multiple(f, n, x, p.ln2)
    poly = f.horner(r, p.exp, "p")
    mantissa = f.horner(r, (1.0, 1.0), "p", start=poly)
    f.comment("n is added to the exponent bits: right up to the last finite result, where 2^n itself is not")
    raised = f.shl(n_bits, p.mantissa, "raised.bits")
    total = f.int_add(f.bits(mantissa, "p.bits"), raised, "total.bits")
    result = f.from_bits(total, "result")
    f.comment("underflow is 0, overflow inf; NaN takes the second way")
    result = f.select(f.fcmp("olt", x, least, "small"), 0.0, result, "result")
    return f.select(f.fcmp("ugt", x, largest, "large"), f.add(x, inf, "infinite"), result, "result")


def sigmoid(f: VectorFunction, x: Value) -> Value:
    # The bottom is built from exp's parts by one fma, so that exp's own result is never rounded.
    p = f.precision
    lowest, highest = p.sigmoid_range
    f.comment("1 / (1 + exp(-x)); exp(-x) = 2 exp(r) 2^(n-1), which overflows to inf where it should")
    y = f.at_most(f.at_least(x, lowest, "y"), highest, "y")
    n, n_bits = nearest_integer(f, y, -p.log2e, p.bias - 1)
    r = subtract_multiple(f, n, f.neg(y, "minus.y"), p.ln2)
    half_scale = _power_of_two(f, n_bits)
    twice = f.horner(r, [2.0, 2.0, *_scaled(p.exp, 2.0, 1.0)], "p")
    return f.div(1.0, f.fma(twice, half_scale, 1.0, "bottom"), "result")


def tanh(f: VectorFunction, x: Value) -> Value:
    # By expm1, as (e^2x - 1) / (e^2x + 1) cancels near 0, and so does 2 sigmoid(2x) - 1. A rational approximation of
    # degrees 13 and 6 needs no exponential, but is off by up to 4.5 ulp in float32, where this is by 2.3.
    p = f.precision
    f.comment("h / (h + 1) with h = expm1(2|x|) / 2; g = expm1(2r) / 2, |x| = r + n ln 2 / 2")
    a = f.at_most(f.fabs(x, "a"), p.tanh_limit, "a")
    n, n_bits = nearest_integer(f, a, 2.0 * p.log2e, p.bias)
    r = subtract_multiple(f, n, a, tuple(part / 2.0 for part in p.ln2_for_small_n))
    scale = _power_of_two(f, n_bits)
    poly = f.horner(r, _scaled(p.exp, 2.0, 2.0), "p")
    g = f.fma(f.mul(r, r, "r2"), poly, r, "g")
    h = f.fma(scale, g, f.fma(scale, 0.5, -0.5, "rest"), "h")
    magnitude = f.div(h, f.add(h, 1.0, "bottom"), "magnitude")
    return f.copysign(magnitude, x, "result")


def _itself_if_tiny(f: VectorFunction, x: Value, result: Value) -> Value:
    f.comment("a tiny x is its own result: the halves above could be denormal, and -0 would lose its sign")
    tiny = f.fcmp("olt", f.fabs(x, "magnitude"), 2.0 ** -(f.precision.mantissa + 2), "tiny")
    return f.select(tiny, x, result, "result")


def expm1(f: VectorFunction, x: Value) -> Value:
    p = f.precision
    lowest, highest = p.expm1_range
    f.comment("2 (2^(n-1) expm1(r) + 2^(n-1) - 1/2), r = x - n ln 2: the doubling overflows where it should")
    y = f.at_most(f.at_least(x, lowest, "y"), highest, "y")
    n, n_bits = nearest_integer(f, y, p.log2e, p.bias - 1)
    r = subtract_multiple(f, n, y, p.ln2)
    half_scale = _power_of_two(f, n_bits)
    q = f.fma(f.mul(r, r, "r2"), f.horner(r, p.exp, "p"), r, "q")
    half = f.fma(half_scale, q, f.sub(half_scale, 0.5, "rest"), "half")
    return _itself_if_tiny(f, x, f.add(half, half, "doubled"))


def _split(f: VectorFunction, x: Value) -> tuple[Value, Value, Value]:
    """Return m, k and the bits of k + bias with x = m 2^k, sqrt(1/2) <= m < sqrt(2), for a positive normal x.

    Around 1, so that log(x) near x = 1 is the logarithm of m alone and keeps its relative precision.
    """
    p = f.precision
    one = p.bias << p.mantissa
    shifted_bits = f.int_add(f.bits(x, "x.bits"), one - p.sqrt_half_bits, "shifted.bits")
    k_bits = f.lshr(shifted_bits, p.mantissa, "k.bits")
    rest = f.and_(shifted_bits, (1 << p.mantissa) - 1, "m.rest")
    m = f.from_bits(f.int_add(rest, p.sqrt_half_bits, "m.bits"), "m")
    f.comment("k as a number: its bits go under those of 2^mantissa (a conversion from 64 bits needs AVX-512)")
    integer = (p.bias + p.mantissa) << p.mantissa
    shifted = f.from_bits(f.or_(k_bits, integer, "k.under"), "k.shifted")
    return m, f.sub(shifted, 2.0**p.mantissa + p.bias, "k"), k_bits


def _log_of_parts(f: VectorFunction, m_minus_1: Value, k: Value) -> Value:
    """Return log(1 + f) + k ln 2, by log(1 + f) = 2 atanh(s) with s = f / (2 + f).

    Written as f - (f^2/2 - s (f^2/2 + ...)), as in FDLIBM's e_log.c: f is exact, so only the small rest is rounded.
    """
    p = f.precision
    high, low = p.ln2
    s = f.div(m_minus_1, f.add(m_minus_1, 2.0, "bottom"), "s")
    z = f.mul(s, s, "z")
    half_square = f.mul(f.mul(m_minus_1, 0.5, "half"), m_minus_1, "half.square")
    tail = f.fma(z, f.horner(z, p.log, "p"), half_square, "tail")
    small = f.fma(s, tail, f.mul(k, low, "k.low"), "small")
    near = f.sub(m_minus_1, f.sub(half_square, small, "drop"), "near")
    return f.fma(k, high, near, "result")


def _log_edges(f: VectorFunction, x: Value, result: Value) -> Value:
    """Set the logarithm of everything but positive normal numbers; denormals of either sign count as zero."""
    smallest = f.precision.smallest_normal
    result = f.select(f.fcmp("olt", x, smallest, "zero"), -inf, result, "result")
    result = f.select(f.fcmp("ole", x, -smallest, "negative"), nan, result, "result")
    return f.select(f.fcmp("uge", x, inf, "unbounded"), x, result, "result")


def log(f: VectorFunction, x: Value) -> Value:
    m, k, _ = _split(f, x)
    return _log_edges(f, x, _log_of_parts(f, f.sub(m, 1.0, "f"), k))


def log1p(f: VectorFunction, x: Value) -> Value:
    # What rounding 1 + x loses is recovered exactly (Fast2Sum, Dekker 1971) and added to the mantissa.
    p = f.precision
    f.comment("u + c = 1 + x exactly")
    u = f.add(x, 1.0, "u")
    larger, lesser = f.at_least(x, 1.0, "larger"), f.at_most(x, 1.0, "lesser")
    c = f.sub(lesser, f.sub(u, larger, "u.rest"), "c")
    m, k, k_bits = _split(f, u)
    f.comment("f = m - 1 + c 2^-k; the scale is 2^(1-k), as 2^-128 would not fit")
    exponent = f.int_sub(2 * p.bias + 1, k_bits, "scale.bits")
    scale = f.from_bits(f.shl(exponent, p.mantissa, "scale.bits"), "scale")
    m_minus_1 = f.fma(f.mul(c, 0.5, "half.c"), scale, f.sub(m, 1.0, "m.minus.1"), "f")
    return _itself_if_tiny(f, x, _log_edges(f, u, _log_of_parts(f, m_minus_1, k)))


def erf(f: VectorFunction, x: Value) -> Value:
    p = f.precision
    f.comment("-expm1(-g(|x|)) with g = -log(1 - erf): relative precision at both ends, and no division")
    a = f.at_most(f.fabs(x, "a"), p.erf_limit, "a")
    g = f.fma(a, f.horner(a, p.erf, "g"), a, "g")
    n, n_bits = nearest_integer(f, g, -p.log2e, p.bias)
    r = subtract_multiple(f, n, f.neg(g, "minus.g"), p.ln2_for_small_n)
    scale = _power_of_two(f, n_bits)
    q = f.fma(f.mul(r, r, "r2"), f.horner(r, p.exp, "p"), r, "q")
    return f.copysign(f.fma(scale, q, f.sub(scale, 1.0, "rest"), "negated"), x, "result")


def sqrt(f: VectorFunction, x: Value) -> Value:
    return f.lanewise("sqrt", x, name="result")


def rsqrt(f: VectorFunction, x: Value) -> Value:
    return f.div(1.0, f.lanewise("sqrt", x, name="root"), "result")


def reciprocal(f: VectorFunction, x: Value) -> Value:
    return f.div(1.0, x, "result")


def absolute(f: VectorFunction, x: Value) -> Value:
    return f.fabs(x, "result")


def neg(f: VectorFunction, x: Value) -> Value:
    return f.neg(x, "result")


def floor(f: VectorFunction, x: Value) -> Value:
    return f.lanewise("floor", x, name="result")


def sign(f: VectorFunction, x: Value) -> Value:
    f.comment("0 for NaN, as in torch")
    positive = f.select(f.fcmp("ogt", x, 0.0, "above"), 1.0, 0.0, "positive")
    return f.select(f.fcmp("olt", x, 0.0, "below"), -1.0, positive, "result")


def maximum(f: VectorFunction, x: Value, y: Value) -> Value:
    # NaN if either is, as torch.maximum: a NaN y fails the comparison and so is taken, a NaN x is put back.
    larger = f.select(f.fcmp("ogt", x, y, "x.wins"), x, y, "larger")
    return f.select(f.fcmp("uno", x, x, "x.nan"), x, larger, "result")


def minimum(f: VectorFunction, x: Value, y: Value) -> Value:
    lesser = f.select(f.fcmp("olt", x, y, "x.wins"), x, y, "lesser")
    return f.select(f.fcmp("uno", x, x, "x.nan"), x, lesser, "result")


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
