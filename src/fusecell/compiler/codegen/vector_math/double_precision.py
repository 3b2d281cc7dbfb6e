"""sin, cos and pow: float32 in double arithmetic, rounded once; float64 by the C library, lane by lane.

In double the simplest methods leave float32 sin and cos within 0.5001 ulp (of 8 million arguments 2 in 100 000
were not the nearest float32) and pow the nearest float32 in all of 8 million cases.
float64 (and float32 sin and cos beyond 2^45) take the C library's bits, which are equal wherever it is.
"""

from __future__ import annotations

from math import nan

from fusecell.compiler.codegen.vector_math.function_builder import VectorFunction
from fusecell.compiler.codegen.vector_math.functions import exp, log, nearest_integer, reduce
from fusecell.compiler.ir.primitives import LANES

HALF_PI = (1.5707963267948966, 6.123233995736766e-17)
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


def _by_lane(f: VectorFunction, function: str, *args: str) -> str:
    """The C library's double function, lane by lane; float32 is widened before and rounded once after."""
    scalar = f.precision.scalar
    f.declares.add(f"declare double @{function}({', '.join(['double'] * len(args))})")
    result = "poison"
    for lane in range(LANES):
        given = [f.value("lane", f"extractelement {f.vector} {a}, i32 {lane}") for a in args]
        if scalar == "float":
            given = [f.value("wide", f"fpext float {a} to double") for a in given]
        y = f.value("y", f"call double @{function}({', '.join(f'double {a}' for a in given)})")
        if scalar == "float":
            y = f.value("narrow", f"fptrunc double {y} to float")
        result = f.value("result", f"insertelement {f.vector} {result}, {scalar} {y}, i32 {lane}")
    return result


def _sine(f: VectorFunction, x: str, quarters: int) -> str:
    """sin(x + quarters pi / 2), x = n pi / 2 + r: n + quarters mod 4 chooses among +-sin(r), +-cos(r)."""
    n, turn = nearest_integer(f, x, TWO_OVER_PI, quarters)
    r = reduce(f, n, x, HALF_PI)
    z = f.mul("z", r, r)
    sine = f.mul("sine", r, f.horner("s", z, SIN))
    cosine = f.horner("c", z, COS)
    odd = f.value("odd", f"icmp ne {f.ints} {f.int_op('odd.bit', 'and', turn, 1)}, zeroinitializer")
    magnitude = f.bits("magnitude", f.select("magnitude", odd, cosine, sine))
    lowest_on_top = f.int_op("turn", "shl", turn, f.precision.bits - 2)
    sign = f.int_op("sign", "and", lowest_on_top, 1 << (f.precision.bits - 1))
    return f.from_bits("result", f.int_op("signed", "xor", magnitude, sign))


def _periodic(f: VectorFunction, function: str, x: str, quarters: int) -> str:
    if f.precision.scalar == "double":
        return _by_lane(f, function, x)
    wide = f.widened()
    near = f.narrowed(wide, _sine(wide, wide.widen(f, x), quarters))
    helper = VectorFunction(f.precision, ("%x",))
    far_name = f"{function}.far"
    f.helpers.append(helper.definition(far_name, _by_lane(helper, function, "%x"), "noinline nounwind"))
    f.declares.update(helper.declares)
    far = f.compare("far", "ogt", f.intrinsic("magnitude", "fabs", x), FAR)
    return f.where_rare(far, far_name, x, near)


def sin(f: VectorFunction, x: str) -> str:
    return _periodic(f, "sin", x, 0)


def cos(f: VectorFunction, x: str) -> str:
    return _periodic(f, "cos", x, 1)


def power(f: VectorFunction, x: str, y: str) -> str:
    if f.precision.scalar == "double":
        return _by_lane(f, "pow", x, y)
    f.note("exp(y log |x|); a finite y for an infinite one, so that 1 to its power is 1")
    wide = f.widened()
    base, exponent = wide.widen(f, x), wide.widen(f, y)
    exponent = wide.at_most("exponent", wide.at_least("exponent", exponent, -1e30), 1e30)
    logarithm = log(wide, wide.intrinsic("base.abs", "fabs", base))
    result = exp(wide, wide.mul("product", exponent, logarithm))
    f.note("a negative base: the sign of an odd power, NaN for a fraction")
    half = wide.mul("half", exponent, 0.5)
    whole = wide.compare("whole", "oeq", wide.intrinsic("floor", "floor", exponent), exponent)
    even = wide.compare("even", "oeq", wide.intrinsic("half.floor", "floor", half), half)
    fraction = wide.select("fraction", wide.compare("negative", "olt", base, 0.0), nan, result)
    finite = wide.compare("finite", "ogt", base, float("-inf"))
    fraction = wide.select("fraction", finite, fraction, result)
    odd = wide.select("odd", whole, wide.intrinsic("odd", "copysign", result, base), fraction)
    result = wide.select("result", even, result, odd)
    f.note("x^0 and 1^y are 1, NaN or not")
    result = wide.select("result", wide.compare("nothing", "oeq", exponent, 0.0), 1.0, result)
    return f.narrowed(wide, wide.select("result", wide.compare("one", "oeq", base, 1.0), 1.0, result))
