"""Rules for the bits of integers, which a graph has as floating-point numbers without a fraction.

A number below 0 has all higher bits set, as in two's complement: its quotients by powers of two are rounded down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.traced_values import Row
from fusecell.compiler.ir.sizes import DType

__all__ = ["INTEGER_RULES"]

Rule = Callable[..., Any]
_MOST_SHIFT_BITS = 6


def _above(w: Writer, x: Operand, bit: int) -> Row:
    """Return the part of a number from a bit on."""
    return w.point("mul", w.point("floor", w.point("mul", x, 2.0**-bit)), 2.0**bit)


def _runs(mask: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of bits that are set in a number that is not negative."""
    bit = 0
    while mask >> bit:
        if not mask >> bit & 1:
            bit += 1
            continue
        first = bit
        while mask >> bit & 1:
            bit += 1
        yield first, bit


def _masked(w: Writer, x: Operand, mask: int) -> Row:
    """Return the bits of a number at which a constant has bits, too."""
    if mask < 0:
        return w.point("sub", x, _masked(w, x, ~mask))
    result = w.const(0.0)
    for first, last in _runs(mask):
        part = w.point("sub", _above(w, x, first) if first else x, _above(w, x, last))
        result = w.point("add", result, part)
    return result


def _both(w: Writer, a: Operand, b: Operand) -> Row:
    """Return the bits that two numbers have in common."""
    for x, mask in ((a, b), (b, a)):
        if isinstance(mask, int):
            return _masked(w, x, mask)
    # Of all bits that an exact number may have the highest stand for the sign.
    count = 53 if w.builder.dtype == DType.F64 else 24
    above = [[_above(w, x, bit) if bit else w.number(x) for bit in range(count + 1)] for x in (a, b)]
    total = w.point("where", w.point("and", w.point("lt", a, 0.0), w.point("lt", b, 0.0)), -(2.0**count), 0.0)
    for bit in range(count):
        first, second = (w.point("ne", each[bit], each[bit + 1]) for each in above)
        total = w.point("add", total, w.point("where", w.point("and", first, second), 2.0**bit, 0.0))
    return total


def _either(w: Writer, a: Operand, b: Operand) -> Row:
    return w.point("sub", w.point("add", a, b), _both(w, a, b))


def _one_of_both(w: Writer, a: Operand, b: Operand) -> Row:
    return w.point("sub", w.point("add", a, b), w.point("mul", _both(w, a, b), 2.0))


def _neither(w: Writer, a: Operand) -> Row:
    return w.point("sub", -1.0, a)


def _power_of_two(w: Writer, exponent: Operand) -> Operand:
    """Return 2 to a number of bits, exactly."""
    if isinstance(exponent, int):
        return 2.0**exponent
    power = w.const(1.0)
    for bit in range(_MOST_SHIFT_BITS):
        is_set = w.point("ne", _masked(w, exponent, 1 << bit), 0.0)
        power = w.point("mul", power, w.point("where", is_set, 2.0 ** (1 << bit), 1.0))
    return power


def _shifted_left(w: Writer, x: Operand, bits: Operand) -> Row:
    return w.point("mul", x, _power_of_two(w, bits))


def _shifted_right(w: Writer, x: Operand, bits: Operand) -> Row:
    return w.point("floor", w.point("div", x, _power_of_two(w, bits)))


def _gcd(w: Writer, a: Operand, b: Operand) -> Row:
    # By remainders of the least size, each less than the one before it by 1 + sqrt(2) at least. The quotients of exact
    # numbers are rounded to no integer that they don't reach.
    larger, lesser = w.point("abs", a), w.point("abs", b)
    for _ in range(45 if w.builder.dtype == DType.F64 else 22):
        is_done = w.point("eq", lesser, 0.0)
        quotient = w.point("floor", w.point("div", larger, lesser))
        rest = w.point("sub", larger, w.point("mul", quotient, lesser))
        rest = w.point("minimum", rest, w.point("sub", lesser, rest))
        larger = w.point("where", is_done, larger, lesser)
        lesser = w.point("where", is_done, 0.0, rest)
    return larger


def _lcm(w: Writer, a: Operand, b: Operand) -> Row:
    divisor = _gcd(w, a, b)
    multiple = w.point("abs", w.point("mul", w.point("div", a, divisor), b))
    return w.point("where", w.point("eq", divisor, 0.0), 0.0, multiple)


INTEGER_RULES: Mapping[str, Rule] = {
    "bitwise_and": _both,
    "bitwise_or": _either,
    "bitwise_xor": _one_of_both,
    "bitwise_not": _neither,
    **dict.fromkeys(("bitwise_left_shift", "__lshift__"), _shifted_left),
    **dict.fromkeys(("bitwise_right_shift", "__rshift__"), _shifted_right),
    "gcd": _gcd,
    "lcm": _lcm,
}
"""Rules for operations on integers; those on truth values with the same name are in `pointwise`."""
