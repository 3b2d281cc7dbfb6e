"""sin, cos and pow: float32 in double arithmetic, rounded once; float64 by the C library, lane by lane.

In double the simplest methods leave float32 sin and cos within 0.5001 ulp (of 8 million arguments 2 in 100 000
were not the nearest float32) and pow the nearest float32 in all of 8 million cases.
float64 (and float32 sin and cos beyond 2^45) take the C library's bits, which are equal wherever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from math import nan

from fusecell.compiler.codegen.llvm_text import Value
from fusecell.compiler.codegen.vector_math.function_builder import VectorFunction
from fusecell.compiler.codegen.vector_math.functions import exp, log, nearest_integer, subtract_multiple
from fusecell.compiler.ir.primitives import LANES

__all__ = ["by_lane", "cos", "in_double", "power", "sin"]

HALF_PI = (1.5707963267948966, 6.123233995736766e-17)
"""pi / 2 as a sum of two doubles, for Cody and Waite's reduction."""
TWO_OVER_PI = 0.6366197723675814
FAR = 2.0**45
"""Up to here two terms of pi / 2 leave float32 its relative precision even next to a zero."""

# Minimax on |r| <= pi / 4 in powers of r^2: sin(r) / r to 5.2e-12, cos(r) to 1.2e-13.
SIN = (1.0, -0.1666666664078606, 0.008333329303553183, -0.00019839311833925048, 2.718117266398742e-06)
COS = (
    1.0,
    -0.5,
    0.04166666661947341,
    -0.0013888883498526447,
    2.4799459745928797e-05,
    -2.7205720468248566e-07,
)


def by_lane(f: VectorFunction, function: str, *args: Value) -> Value:
    """Call the C library's double function lane by lane; float32 is extended before and rounded once after."""
    scalar = f.precision.scalar
    result = Value("poison", f.vector)
    for lane in range(LANES):
        scalars = [f.lane(arg, lane, "lane") for arg in args]
        if scalar == "float":
            scalars = [f.extended(each, "double", "wide") for each in scalars]
        y = f.call_scalar(function, *scalars, name="y")
        if scalar == "float":
            y = f.truncated(y, "float", "narrow")
        result = f.with_lane(result, lane, y, "result")
    return result


def _sine(f: VectorFunction, x: Value, quarters: int) -> Value:
    """Return sin(x + quarters pi / 2).

    With x = n pi / 2 + r, (n + quarters) mod 4 chooses among +-sin(r), +-cos(r): its lowest bit which of the two, the
    next the sign.
    """
    n, turn = nearest_integer(f, x, TWO_OVER_PI, quarters)
    r = subtract_multiple(f, n, x, HALF_PI)
    z = f.mul(r, r, "z")
    sine = f.mul(r, f.horner(z, SIN, "s"), "sine")
    cosine = f.horner(z, COS, "c")
    odd = f.is_nonzero(f.and_(turn, 1, "odd.bit"), "odd")
    magnitude = f.bits(f.select(odd, cosine, sine, "magnitude"), "magnitude")
    lowest_on_top = f.shl(turn, f.precision.bits - 2, "turn")
    sign = f.and_(lowest_on_top, 1 << (f.precision.bits - 1), "sign")
    return f.from_bits(f.xor(magnitude, sign, "signed"), "result")


def _periodic(f: VectorFunction, function: str, x: Value, quarters: int) -> Value:
    """Return sin or cos: in double near zero, by the C library's ``function`` for lanes beyond `FAR`."""
    if f.precision.scalar == "double":
        return by_lane(f, function, x)
    wide = f.widened()
    near = f.truncated(_sine(wide, f.extended(x, wide.vector, "wide"), quarters), f.vector, "narrow")
    # Out of line, as sixteen calls and their shuffles are long and hardly ever run.
    helper = VectorFunction(f.precision, ("x",))
    far_name = f"{function}.far"
    far_result = by_lane(helper, function, *helper.arguments)
    f.helpers.append(helper.definition(far_name, far_result, "noinline nounwind"))
    f.declares.update(helper.declares)
    far = f.fcmp("ogt", f.fabs(x, "magnitude"), FAR, "far")
    return f.where_rare(far, far_name, (x,), near)


def sin(f: VectorFunction, x: Value) -> Value:
    return _periodic(f, "sin", x, 0)


def cos(f: VectorFunction, x: Value) -> Value:
    return _periodic(f, "cos", x, 1)


def power(f: VectorFunction, x: Value, y: Value) -> Value:
    if f.precision.scalar == "double":
        return by_lane(f, "pow", x, y)
    # The relative error grows with y log |x|, which is at most 89 where a float32 is neither 0 nor infinite: 2e-14,
    # where half an ulp of float32 is 6e-8.
    f.comment("exp(y log |x|); a finite y for an infinite one, so that 1 to its power is 1")
    wide = f.widened()
    base, exponent = f.extended(x, wide.vector, "wide"), f.extended(y, wide.vector, "wide")
    exponent = wide.at_most(wide.at_least(exponent, -1e30, "exponent"), 1e30, "exponent")
    logarithm = log(wide, wide.fabs(base, "base.abs"))
    result = exp(wide, wide.mul(exponent, logarithm, "product"))
    f.comment("a negative base: the sign of an odd power, NaN for a fraction")
    half = wide.mul(exponent, 0.5, "half")
    whole = wide.fcmp("oeq", wide.lanewise("floor", exponent, name="floor"), exponent, "whole")
    even = wide.fcmp("oeq", wide.lanewise("floor", half, name="half.floor"), half, "even")
    fraction = wide.select(wide.fcmp("olt", base, 0.0, "negative"), nan, result, "fraction")
    finite = wide.fcmp("ogt", base, float("-inf"), "finite")
    fraction = wide.select(finite, fraction, result, "fraction")
    odd = wide.select(whole, wide.copysign(result, base, "odd"), fraction, "odd")
    result = wide.select(even, result, odd, "result")
    f.comment("x^0 and 1^y are 1, NaN or not")
    result = wide.select(wide.fcmp("oeq", exponent, 0.0, "nothing"), 1.0, result, "result")
    return f.truncated(wide.select(wide.fcmp("oeq", base, 1.0, "one"), 1.0, result, "result"), f.vector, "narrow")


def in_double(rule: Callable[[VectorFunction, Value], Value]) -> Callable[[VectorFunction, Value], Value]:
    """Return a function of doubles as one of either format: float32 is extended before and rounded once after."""

    def rounded_once(f: VectorFunction, x: Value) -> Value:
        if f.precision.scalar == "double":
            return rule(f, x)
        wide = f.widened()
        return f.truncated(rule(wide, f.extended(x, wide.vector, "wide")), f.vector, "narrow")

    return rounded_once
