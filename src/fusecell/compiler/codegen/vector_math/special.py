"""Inverse trigonometric and error functions that are written by their own series; remainders and roundings.

atan and atan2 are computed in the format itself; in the others float32 goes through double and is rounded once. The
coefficients are Chebyshev fits in 40 digits; "error" is the largest one that they cause, the arithmetic left out.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from fusecell.compiler.codegen.llvm_text import Value
from fusecell.compiler.codegen.vector_math.function_builder import Operand, VectorFunction
from fusecell.compiler.codegen.vector_math.functions import log
from fusecell.compiler.codegen.vector_math.via_float64 import by_lane, in_double

__all__ = ["SPECIAL", "erfinv_ratio"]

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


# Error functions, in double.


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
    "erfinv": in_double(_erfinv),
    "atan2": atan2,
    "fmod": fmod,
    "copysign": copysign,
}
"""The functions of this file, by the primitive they compute."""
