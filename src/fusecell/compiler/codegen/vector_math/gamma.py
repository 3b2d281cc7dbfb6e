"""The gamma function's logarithm and its derivatives, in double: float32 goes through double and is rounded once.

The coefficients are Chebyshev fits in 40 digits; "error" is the largest one that they cause, the arithmetic left out.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, pi

from fusecell.compiler.codegen.llvm_text import Value
from fusecell.compiler.codegen.vector_math.function_builder import VectorFunction
from fusecell.compiler.codegen.vector_math.functions import log
from fusecell.compiler.codegen.vector_math.via_float64 import in_double

__all__ = ["GAMMA"]

SINPI = (
    3.141592653589793,
    -5.16771278004997,
    2.5501640398773455,
    -0.5992645293207869,
    0.08214588661099356,
    -0.007370430943702136,
    0.0004663027874593273,
    -2.1915250301851375e-05,
    7.94853903737232e-07,
    -2.228371216069697e-08,
)
"""sin(pi r) / r in powers of r^2, for |r| <= 1 / 2: error 9.6e-22."""
LGAMMA = (
    0.42278433509846713,
    0.3224670334241132,
    -0.06735230105319814,
    0.02058080842778457,
    -0.0073855510286681535,
    0.002890510330738737,
    -0.0011927539120010226,
    0.0005096695248853096,
    -0.00022315475074520367,
    9.945750909889392e-05,
    -4.4926351103833334e-05,
    2.050726741605779e-05,
    -9.438458716242811e-06,
    4.374374916915131e-06,
    -2.0449201467015115e-06,
    9.578663334114758e-07,
    -4.303558760359961e-07,
    2.0304806751615227e-07,
    -1.3412819758517287e-07,
    6.379047507619774e-08,
)
"""log(gamma(2 + d)) / d, for |d| <= 1 / 2: error 7.2e-20."""
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)
"""log(gamma(w)) - (w - 1/2) log(w) + w - log(2 pi) / 2, times w, in powers of 1 / w^2: Stirling's series."""
DIGAMMA = (-1 / 12, 1 / 120, -1 / 252, 1 / 240, -1 / 132, 691 / 32760, -1 / 12, 3617 / 8160)
"""digamma(w) - log(w) + 1 / (2 w), times w^2, in powers of 1 / w^2."""
TRIGAMMA = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510)
"""trigamma(w) - 1 / w - 1 / (2 w^2), times w^3, in powers of 1 / w^2: the Bernoulli numbers."""


def _sin_pi(f: VectorFunction, r: Value) -> Value:
    """Return sin(pi r) for 0 <= r <= 1 / 2."""
    return f.mul(r, f.horner(f.mul(r, r, "r2"), SINPI, "s"), "sine")


def _from_pole(f: VectorFunction, x: Value) -> Value:
    """Return x less the nearest integer, which is exact."""
    return f.sub(x, f.lanewise("roundeven", x, name="pole"), "r")


def _reflected(f: VectorFunction, x: Value) -> tuple[Value, Value, Value]:
    """Return whether x < 1 / 2, the argument z to compute with, 1 - x there, and whether that is to be raised by 8."""
    left = f.fcmp("olt", x, 0.5, "left")
    z = f.select(left, f.sub(1.0, x, "mirrored"), x, "z")
    return left, z, f.fcmp("olt", z, 8.0, "short")


def _lgamma(f: VectorFunction, x: Value) -> Value:
    f.comment("gamma(z) = gamma(z + 8) / (z (z + 1) ... (z + 7)); near 1 and 2, where the logarithm is 0, a series")
    left, z, short = _reflected(f, x)
    product = z
    for k in range(1, 8):
        product = f.mul(product, f.add(z, float(k), "factor"), "product")
    w = f.select(short, f.add(z, 8.0, "raised"), z, "w")
    near = f.fcmp("olt", z, 2.5, "near")
    below = f.fcmp("olt", z, 1.5, "below")
    f.comment("Stirling's series")
    v = f.div(1.0, w, "v")
    tail = f.mul(v, f.horner(f.mul(v, v, "v2"), STIRLING, "p"), "tail")
    steep = f.mul(f.sub(w, 0.5, "half.less"), f.sub(log(f, w), 1.0, "log.less"), "steep")
    series = f.add(steep, f.add(tail, 0.4189385332046727, "rest"), "series")
    d = f.sub(z, f.select(below, 1.0, 2.0, "root"), "d")
    series = f.select(near, f.mul(d, f.horner(d, LGAMMA, "g"), "root.series"), series, "series")
    f.comment("and gamma(x) gamma(1 - x) = pi / sin(pi x)")
    side = f.select(near, f.select(below, z, 1.0, "side"), f.select(short, product, 1.0, "side"), "side")
    distance = f.fabs(_from_pole(f, x), "r")
    sine = _sin_pi(f, distance)
    mirrored = f.mul(side, f.div(pi, sine, "mirror"), "mirrored")
    factor = log(f, f.select(left, mirrored, side, "factor"))
    plus, minus = f.sub(series, factor, "plus"), f.sub(factor, series, "minus")
    minus = f.select(f.fcmp("oeq", distance, 0.0, "pole"), inf, minus, "minus")
    result = f.select(left, minus, plus, "result")
    return f.select(f.fcmp("oeq", f.fabs(x, "size"), inf, "endless"), inf, result, "result")


def _digamma(f: VectorFunction, x: Value) -> Value:
    f.comment("digamma(z) = digamma(z + 8) - 1/z - 1/(z + 1) ... - 1/(z + 7), over one denominator")
    left, z, short = _reflected(f, x)
    bottom, top = z, f.operand(1.0)
    for k in range(1, 8):
        factor = f.add(z, float(k), "factor")
        top = f.fma(top, factor, bottom, "top")
        bottom = f.mul(bottom, factor, "bottom")
    w = f.select(short, f.add(z, 8.0, "raised"), z, "w")
    v = f.div(1.0, w, "v")
    v2 = f.mul(v, v, "v2")
    tail = f.fma(v2, f.horner(v2, DIGAMMA, "p"), f.mul(v, -0.5, "half"), "tail")
    series = f.add(log(f, w), tail, "series")
    lowered = f.sub(series, f.div(top, bottom, "sum"), "lowered")
    result = f.select(short, lowered, series, "result")
    f.comment("digamma(x) = digamma(1 - x) - pi / tan(pi x)")
    r = _from_pole(f, x)
    size = f.fabs(r, "size")
    cosine = _sin_pi(f, f.sub(0.5, size, "complement"))
    cotangent = f.div(cosine, f.copysign(_sin_pi(f, size), r, "sine"), "cotangent")
    # A pole is infinite at 0 and undefined at the others, as in torch.
    mirrored = f.fma(cotangent, -pi, result, "mirrored")
    pole = f.select(f.fcmp("oeq", x, 0.0, "zero"), f.neg(f.copysign(inf, x, "sign"), "pole"), float("nan"), "pole")
    mirrored = f.select(f.fcmp("oeq", r, 0.0, "at.pole"), pole, mirrored, "mirrored")
    return f.select(left, mirrored, result, "result")


def _trigamma(f: VectorFunction, x: Value) -> Value:
    f.comment("trigamma(z) = trigamma(z + 8) + 1/z^2 ... + 1/(z + 7)^2, over one denominator")
    left, z, short = _reflected(f, x)
    bottom, top = f.mul(z, z, "bottom"), f.operand(1.0)
    for k in range(1, 8):
        factor = f.add(z, float(k), "factor")
        square = f.mul(factor, factor, "square")
        top = f.fma(top, square, bottom, "top")
        bottom = f.mul(bottom, square, "bottom")
    w = f.select(short, f.add(z, 8.0, "raised"), z, "w")
    v = f.div(1.0, w, "v")
    v2 = f.mul(v, v, "v2")
    tail = f.fma(f.mul(v, v2, "v3"), f.horner(v2, TRIGAMMA, "p"), f.mul(v2, 0.5, "half"), "tail")
    series = f.add(v, tail, "series")
    result = f.select(short, f.add(series, f.div(top, bottom, "sum"), "lowered"), series, "result")
    f.comment("trigamma(x) = (pi / sin(pi x))^2 - trigamma(1 - x)")
    steep = f.div(pi, _sin_pi(f, f.fabs(_from_pole(f, x), "r")), "steep")
    return f.select(left, f.sub(f.mul(steep, steep, "steep2"), result, "mirrored"), result, "result")


GAMMA: dict[str, Callable[..., Value]] = {
    "lgamma": in_double(_lgamma),
    "digamma": in_double(_digamma),
    "trigamma": in_double(_trigamma),
}
"""The functions of this file, by the primitive they compute."""
