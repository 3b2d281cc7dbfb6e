"""The scaled complement of the error function, and the quantiles of the normal distribution.

In double; float32 goes through it and is rounded once. The coefficients are Chebyshev fits of this project's own
(``python -m benchmarks.fit_special``); "error" is the largest relative one that they cause, the arithmetic left out.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, sqrt

from fusecell.compiler.codegen.llvm_text import Value
from fusecell.compiler.codegen.vector_math.function_builder import VectorFunction
from fusecell.compiler.codegen.vector_math.functions import exp, log
from fusecell.compiler.codegen.vector_math.special import erfinv_ratio
from fusecell.compiler.codegen.vector_math.via_float64 import in_double

__all__ = ["NORMAL"]

ERFCX = (
    1.2375126308378275,
    -0.14024059858554702,
    0.003585415485463656,
    0.08227673849015103,
    -0.10880393014170556,
    0.09230432116019804,
    -0.05869339859058929,
    0.028362277421519668,
    -0.009746579547145438,
    0.0017556258323895534,
    0.000293713591593492,
    -0.0002901539791322486,
    5.1649421745236465e-05,
    2.2383911531916976e-05,
    -1.144508983794941e-05,
    -9.728484952656482e-07,
    1.7535246298697825e-06,
    -5.826439766695699e-08,
    -2.6125820988901525e-07,
    2.429131177189471e-08,
    4.107398937332565e-08,
    -4.390251943140879e-09,
    -6.606829477916605e-09,
    5.460657473630792e-10,
    9.234867707529155e-10,
    -3.7587308035623257e-11,
    -7.666209795998098e-11,
)
"""(1 + 2 x) erfcx(x) in powers of (x - 3.75) / (x + 3.75) (Shepherd and Laframboise 1981), x >= 0: error
1.0e-16."""
NDTRI_LOW = (
    8.380802014398702,
    1.0071517831284824,
    -0.0004399014794740062,
    2.0554683082975112e-05,
    2.917573353338423e-07,
    -2.828335448076964e-07,
    5.6678482949099446e-08,
    -8.893869054376132e-09,
    1.2574266661398214e-09,
    -1.6766616336343384e-10,
    2.1517320543118933e-11,
    -2.684465517394522e-12,
    3.2807805974409243e-13,
    -3.982469488048475e-14,
    4.707231604644793e-15,
    -4.911962463693065e-16,
    5.68650854796218e-17,
    -1.0770155058370295e-17,
    1.2026221834035032e-18,
)
"""erfinv(x) / x in powers of sqrt(w) - 8.5 with w = -log(1 - x^2), for w from 36 to 121: error 1.2e-16."""
NDTRI_LOWEST = (
    18.8253597956341,
    1.002554376381521,
    -9.837411955653163e-05,
    3.911171234952181e-06,
    -1.5571102178924167e-07,
    6.074641896295505e-09,
    -2.262094455516623e-10,
    7.663826019778298e-12,
    -2.0696935409929104e-13,
    1.6648143690621339e-15,
    3.501504158432664e-16,
    -3.944200579416923e-17,
    3.1244111216636814e-18,
    -2.1358002001237978e-19,
    1.2572736348085828e-20,
    -7.762430687958729e-22,
    6.673955430365369e-23,
    -3.81773205401434e-24,
    -2.664038320225183e-26,
    1.0788621514015581e-27,
    1.5946130707243582e-27,
    -8.739084332730137e-29,
)
"""The same in powers of sqrt(w) - 18.9, for w from 121 to 708: error 7.7e-17."""
_OVERFLOWS = 27.0
"""The exponential of its square is infinite."""


def _exp_of_square(f: VectorFunction, a: Value) -> Value:
    """Return exp(a^2) for a >= 0, with the part of the square that rounding loses."""
    b = f.at_most(a, _OVERFLOWS, "b")
    high = f.mul(b, b, "high")
    low = f.fma(b, b, f.neg(high, "minus.high"), "low")
    power = exp(f, high)
    overflow = f.fcmp("oeq", power, inf, "overflow")
    return f.select(overflow, power, f.fma(power, low, power, "corrected"), "power")


def _erfcx(f: VectorFunction, x: Value) -> Value:
    a = f.fabs(x, "a")
    b = f.at_most(a, 1e300, "b")
    t = f.div(f.sub(b, 3.75, "top"), f.add(b, 3.75, "bottom"), "t")
    right = f.div(f.horner(t, ERFCX, "p"), f.fma(a, 2.0, 1.0, "scale"), "right")
    f.comment("erfcx(-x) = 2 exp(x^2) - erfcx(x)")
    left = f.fma(_exp_of_square(f, a), 2.0, f.neg(right, "minus.right"), "left")
    return f.select(f.fcmp("olt", x, 0.0, "negative"), left, right, "result")


def _ndtri(f: VectorFunction, p: Value) -> Value:
    f.comment("sqrt(2) erfinv(x) with x = 2 p - 1, and 1 - x^2 as 4 p (1 - p), which next to 0 and 1 loses nothing")
    twice = f.add(p, p, "twice")
    x = f.sub(twice, 1.0, "x")
    inside = f.mul(twice, f.sub(2.0, twice, "rest"), "inside")
    w = f.neg(log(f, inside), "w")
    root = f.lanewise("sqrt", w, name="root")
    low = f.horner(f.sub(root, 8.5, "t"), NDTRI_LOW, "low")
    lowest = f.horner(f.sub(root, 18.9, "t"), NDTRI_LOWEST, "lowest")
    far = f.select(f.fcmp("olt", w, 121.0, "is.low"), low, lowest, "far")
    ratio = erfinv_ratio(f, w, root, far)
    return f.mul(f.mul(x, ratio, "inverse"), sqrt(2.0), "result")


NORMAL: dict[str, Callable[..., Value]] = {"erfcx": in_double(_erfcx), "ndtri": in_double(_ndtri)}
"""The functions of this file, by the primitive they compute."""
