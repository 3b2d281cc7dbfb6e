"""Inverse trigonometric, gamma and error functions that are written by their own series; remainders and roundings.

atan and atan2 are computed in the format itself; in the others float32 goes through double and is rounded once. The
coefficients are Chebyshev fits in 40 digits; "error" is the largest one that they cause, the arithmetic left out.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, pi

from fusecell.compiler.codegen.llvm_text import Value
from fusecell.compiler.codegen.vector_math.function_builder import Operand, VectorFunction
from fusecell.compiler.codegen.vector_math.functions import log
from fusecell.compiler.codegen.vector_math.via_float64 import by_lane

__all__ = ["SPECIAL", "erfinv_ratio", "in_double"]

ATAN32 = (
    -0.33333331760434554,
    0.1999954031495797,
    -0.14263949753605723,
    0.10743668324830098,
    -0.06451718869358958,
)
"""(atan(q) / q - 1) / q^2 in powers of q^2, for 0 <= q <= tan(pi / 8); error 1.6e-8."""
ATAN64 = (
    -0.3333333333333333,
    0.19999999999995516,
    -0.14285714284665682,
    0.11111111015187018,
    -0.0909090457530649,
    0.07692183125376892,
    -0.06664510525508936,
    0.05858140904866328,
    -0.050854078345894844,
    0.03923044778479309,
    -0.019175404711104935,
)
"""The same for float64: error 3.2e-17."""
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
ERFINV_CENTRE = (
    1.6536545626831027,
    0.2401581824255883,
    -0.00603367087142785,
    -0.000740702534154477,
    0.00018673420802464837,
    -1.3882523394405316e-05,
    -1.3654691850603575e-06,
    4.234788173782339e-07,
    -2.9070382262927266e-08,
    -4.11266082002324e-09,
    1.0512181539804126e-09,
    -5.414287198084716e-11,
    -1.2976885526532075e-11,
    2.6304834740560442e-12,
    -8.118399443074353e-14,
    -4.001237735091896e-14,
    6.596407712420834e-15,
    -4.0282154327661744e-17,
    -1.3016928016796445e-16,
    1.557432024623325e-17,
    1.150022252066253e-18,
    -3.4996044354754177e-19,
    -1.113483769832702e-21,
    3.240704459379902e-21,
)
"""erfinv(x) / x in powers of w - 3.125 with w = -log(1 - x^2) up to 6.25 (Giles 2010): error 3.5e-17."""
ERFINV_MIDDLE = (
    3.0838856104922208,
    1.0052589676941652,
    0.00537091455357168,
    -0.003751208508215561,
    0.0024914420969817607,
    -0.0016882755357337071,
    0.0009532893637435638,
    -0.00035503780975963814,
    2.4031257015092525e-05,
    6.828708654753377e-05,
    -4.731898412011245e-05,
    1.2465167157087251e-05,
    2.9257291901789823e-06,
    -3.986084395214756e-06,
    1.4987130784186127e-06,
    -2.7004219280868947e-08,
    -2.713451105439456e-07,
    1.3104351499972014e-07,
    6.969241977629694e-10,
    -1.5102695423335065e-08,
)
"""The same in powers of sqrt(w) - 3.25, for w up to 16: error 5.1e-17."""
ERFINV_TAIL = (
    4.849906401408584,
    1.0103004648645444,
    -0.00013871931835245796,
    -0.00021503011977853077,
    7.599527736707556e-05,
    -1.9681771416677265e-05,
    4.526059928540178e-06,
    -9.930247367388698e-07,
    2.2901520416224806e-07,
    -6.757211610278426e-08,
    2.9126009508163138e-08,
    -1.5224238609644573e-08,
    7.641409580649255e-09,
    -3.505255051963352e-09,
    1.4919661433971803e-09,
    -4.1778208203116587e-10,
    -2.321727393192301e-11,
    3.812499213948142e-11,
)
"""The same in powers of sqrt(w) - 5, as far as float64 goes: error 2.3e-16."""

PI = (3.141592653589793, 1.2246467991473532e-16)
"""pi as a sum of two doubles; float32 has a sum of its own."""
PI32 = (3.1415927410125732, -8.742277657347586e-08)


# Roundings and remainders: exact.


def round_(f: VectorFunction, x: Value) -> Value:
    return f.lanewise("roundeven", x, name="result")


def copysign(f: VectorFunction, x: Value, y: Value) -> Value:
    return f.copysign(x, y, "result")


def fmod(f: VectorFunction, x: Value, y: Value) -> Value:
    """Write x - n y with n = trunc(x / y), which one fused step gives exactly as long as n has no more than 52 bits."""

    def near(w: VectorFunction, x: Value, y: Value) -> tuple[Value, Value]:
        a, b = w.fabs(x, "a"), w.fabs(y, "b")
        quotient = w.div(a, b, "quotient")
        n = w.lanewise("trunc", quotient, name="n")
        rest = w.fma(w.neg(n, "minus.n"), b, a, "rest")
        w.comment("a quotient that was rounded up to an integer leaves a negative rest")
        rest = w.select(w.fcmp("olt", rest, 0.0, "over"), w.add(rest, b, "put.back"), rest, "rest")
        rest = w.select(w.fcmp("olt", quotient, 1.0, "smaller"), a, rest, "rest")
        return w.copysign(rest, x, "signed"), w.fcmp("oge", quotient, 2.0**52, "far")

    if f.precision.scalar == "double":
        result, far = near(f, x, y)
    else:
        wide = f.widened()
        result, far = near(wide, f.extended(x, wide.vector, "wide"), f.extended(y, wide.vector, "wide"))
        result = f.truncated(result, f.vector, "narrow")
    # Out of line, as sixteen calls and their shuffles are long and hardly ever run.
    helper = VectorFunction(f.precision, ("x", "y"))
    f.helpers.append(helper.definition("fmod.far", by_lane(helper, "fmod", *helper.arguments), "noinline nounwind"))
    f.declares.update(helper.declares)
    return f.where_rare(far, "fmod.far", (x, y), result)


def _rounded_to(f: VectorFunction, x: Value, mantissa: int, least: float, beyond: float) -> Value:
    """Round to the nearest number, or to even between two, of a format with fewer bits.

    Arguments:
        mantissa: its stored bits of the significand.
        least: its smallest normal number.
        beyond: the power of two above its largest number.
    """
    p = f.precision
    drop = p.mantissa - mantissa
    bits = f.bits(x, "x.bits")
    odd = f.and_(f.lshr(bits, drop, "kept.bits"), 1, "odd")
    up = f.int_add(f.int_add(bits, (1 << (drop - 1)) - 1, "half"), odd, "up")
    result = f.from_bits(f.and_(up, -(1 << drop), "cut"), "rounded")
    size = f.fabs(x, "size")
    quantum = least * 2.0**-mantissa
    if quantum >= p.smallest_normal:
        f.comment("denormal numbers of that format: all have the same spacing")
        far = quantum * p.rounder
        small = f.copysign(f.sub(f.add(size, far, "shifted"), far, "small"), x, "small")
        result = f.select(f.fcmp("olt", size, least, "denormal"), small, result, "result")
    large = f.fcmp("oge", f.fabs(result, "large"), beyond, "overflow")
    result = f.select(large, f.copysign(inf, x, "infinite"), result, "result")
    return f.select(f.fcmp("uno", x, x, "nan"), x, result, "result")


def to_float16(f: VectorFunction, x: Value) -> Value:
    return _rounded_to(f, x, 10, 2.0**-14, 2.0**16)


def to_bfloat16(f: VectorFunction, x: Value) -> Value:
    # Twice the largest power of two of float32 is no number of it: infinity is what is compared with there.
    return _rounded_to(f, x, 7, 2.0**-126, inf if f.precision.scalar == "float" else 2.0**128)


def to_float32(f: VectorFunction, x: Value) -> Value:
    if f.precision.scalar == "float":
        return x
    narrow = f.truncated(x, f.vector.replace("double", "float"), "narrow")
    return f.extended(narrow, f.vector, "result")


# Angles.


def _angle(f: VectorFunction, y: Value, x: Operand) -> tuple[Value, Value]:
    """Return the angle of (|x|, |y|), between 0 and pi / 2, and |y|.

    By one division: of the smaller by the larger, or, beyond pi / 8, of their difference by their sum.
    """
    double = f.precision.scalar == "double"
    high, low = PI if double else PI32
    a, b = f.fabs(x, "a"), f.fabs(y, "b")
    steep = f.fcmp("ogt", b, a, "steep")
    larger, lesser = f.select(steep, b, a, "larger"), f.select(steep, a, b, "lesser")
    f.comment("two infinities are at pi / 4, two zeros at 0")
    both = f.fcmp("oeq", lesser, inf, "both")
    lesser, larger = f.select(both, 1.0, lesser, "lesser"), f.select(both, 1.0, larger, "larger")
    larger = f.select(f.fcmp("oeq", larger, 0.0, "none"), 1.0, larger, "larger")
    f.comment("scaled, so that sums of the largest numbers are finite and differences of the least no denormals")
    tiny, large = 2.0 ** -(f.precision.bias // 2), 2.0 ** (f.precision.bias - 2)
    up = f.select(f.fcmp("olt", larger, tiny, "short"), 1 / tiny, 1.0, "scale")
    scale = f.select(f.fcmp("ogt", larger, large, "long"), 0.5, up, "scale")
    lesser, larger = f.mul(lesser, scale, "lesser"), f.mul(larger, scale, "larger")
    wide = f.fcmp("ogt", lesser, f.mul(larger, 0.41421356237309503, "eighth"), "wide")
    top = f.select(wide, f.sub(lesser, larger, "difference"), lesser, "top")
    bottom = f.select(wide, f.add(lesser, larger, "sum"), larger, "bottom")
    q = f.div(top, bottom, "q")
    z = f.mul(q, q, "z")
    curve = f.fma(f.mul(q, z, "cube"), f.horner(z, ATAN64 if double else ATAN32, "p"), q, "curve")
    curve = f.select(wide, f.add(f.add(curve, low / 4, "rest"), high / 4, "turned"), curve, "curve")
    complement = f.sub(high / 2, f.sub(curve, low / 2, "rest"), "complement")
    return f.select(steep, complement, curve, "angle"), b


def atan(f: VectorFunction, x: Value) -> Value:
    angle, _ = _angle(f, x, 1.0)
    result = f.copysign(angle, x, "result")
    return f.select(f.fcmp("uno", x, x, "nan"), x, result, "result")


def atan2(f: VectorFunction, y: Value, x: Value) -> Value:
    high, low = PI if f.precision.scalar == "double" else PI32
    angle, _ = _angle(f, y, x)
    f.comment("to the left, -0 included, the supplement")
    left = f.fcmp("olt", f.copysign(1.0, x, "side"), 0.0, "left")
    angle = f.select(left, f.sub(high, f.sub(angle, low, "rest"), "supplement"), angle, "angle")
    result = f.copysign(angle, y, "result")
    return f.select(f.fcmp("uno", x, y, "nan"), f.add(x, y, "either"), result, "result")


# Gamma and error functions, in double.


def in_double(rule: Callable[[VectorFunction, Value], Value]) -> Callable[[VectorFunction, Value], Value]:
    """Return a function of doubles as one of either format: float32 is extended before and rounded once after."""

    def rounded_once(f: VectorFunction, x: Value) -> Value:
        if f.precision.scalar == "double":
            return rule(f, x)
        wide = f.widened()
        return f.truncated(rule(wide, f.extended(x, wide.vector, "wide")), f.vector, "narrow")

    return rounded_once


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


def _erfinv(f: VectorFunction, x: Value) -> Value:
    a = f.fabs(x, "a")
    inside = f.mul(f.sub(1.0, a, "right"), f.add(1.0, a, "left"), "inside")
    w = f.neg(log(f, inside), "w")
    root = f.lanewise("sqrt", w, name="root")
    return f.mul(x, erfinv_ratio(f, w, root), "result")


def erfinv_ratio(f: VectorFunction, w: Value, root: Value, beyond: Value | None = None) -> Value:
    """Return erfinv(x) / x by w = -log(1 - x^2).

    Arguments:
        root: the root of w.
        beyond: the result for a w above 36, where there are such.
    """
    centre = f.horner(f.sub(w, 3.125, "t"), ERFINV_CENTRE, "centre")
    middle = f.horner(f.sub(root, 3.25, "t"), ERFINV_MIDDLE, "middle")
    tail = f.horner(f.sub(root, 5.0, "t"), ERFINV_TAIL, "tail")
    if beyond is not None:
        tail = f.select(f.fcmp("olt", w, 36.0, "is.tail"), tail, beyond, "tail")
    ratio = f.select(f.fcmp("olt", w, 16.0, "is.middle"), middle, tail, "ratio")
    ratio = f.select(f.fcmp("olt", w, 6.25, "is.central"), centre, ratio, "ratio")
    f.comment("1 is at infinity; beyond it the logarithm was NaN")
    ratio = f.select(f.fcmp("oeq", w, inf, "edge"), inf, ratio, "ratio")
    return f.select(f.fcmp("uno", w, w, "outside"), w, ratio, "ratio")


SPECIAL: dict[str, Callable[..., Value]] = {
    "round": round_,
    "to_float16": to_float16,
    "to_bfloat16": to_bfloat16,
    "to_float32": to_float32,
    "atan": atan,
    "lgamma": in_double(_lgamma),
    "digamma": in_double(_digamma),
    "trigamma": in_double(_trigamma),
    "erfinv": in_double(_erfinv),
    "atan2": atan2,
    "fmod": fmod,
    "copysign": copysign,
}
"""The functions of this file, by the primitive they compute."""
