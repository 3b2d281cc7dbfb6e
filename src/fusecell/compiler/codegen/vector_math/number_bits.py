"""Functions of the bits of numbers, which are exact: the next number, and a number less its power of two."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from fusecell.compiler.codegen.llvm_text import Value
from fusecell.compiler.codegen.vector_math.function_builder import VectorFunction

__all__ = ["NUMBER_BITS"]


def _nextafter(f: VectorFunction, x: Value, y: Value) -> Value:
    p = f.precision
    bits = f.bits(x, "bits")
    outwards = f.from_bits(f.int_add(bits, 1, "bits.out"), "outwards")
    inwards = f.from_bits(f.int_sub(bits, 1, "bits.in"), "inwards")
    positive = f.fcmp("ogt", x, 0.0, "positive")
    up, down = f.select(positive, outwards, inwards, "up"), f.select(positive, inwards, outwards, "down")
    result = f.select(f.fcmp("ogt", y, x, "rises"), up, down, "result")
    least = f.copysign(2.0 ** (1 - p.bias - p.mantissa), y, "least")
    result = f.select(f.fcmp("oeq", x, 0.0, "zero"), least, result, "result")
    result = f.select(f.fcmp("oeq", x, y, "there"), y, result, "result")
    return f.select(f.fcmp("uno", x, y, "nan"), f.add(x, y, "either"), result, "result")


def _mantissa(f: VectorFunction, x: Value) -> Value:
    p = f.precision
    f.comment("the exponent's bits become those of 1/2")
    rest = f.and_(f.bits(x, "bits"), (1 << (p.bits - 1)) | ((1 << p.mantissa) - 1), "rest")
    fraction = f.from_bits(f.or_(rest, (p.bias - 1) << p.mantissa, "fraction.bits"), "fraction")
    a = f.fabs(x, "a")
    fraction = f.select(f.fcmp("olt", a, p.smallest_normal, "zero"), f.copysign(0.0, x, "signed"), fraction, "fraction")
    return f.select(f.fcmp("olt", a, inf, "finite"), fraction, x, "result")


NUMBER_BITS: dict[str, Callable[..., Value]] = {"nextafter": _nextafter, "mantissa": _mantissa}
"""The functions of this file, by the primitive they compute."""
