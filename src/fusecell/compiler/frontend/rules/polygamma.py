"""The rule for polygamma, the derivatives of digamma: vector functions for orders 0 and 1, and a series for others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.traced_values import Row, Untraceable

__all__ = ["polygamma"]

_HIGHEST_ORDER = 11
_TERMS = 9
"""Those of the sum that are added one by one; the rest is Euler and Maclaurin's."""
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798, -174611 / 330)


def _power(w: Writer, x: Operand, exponent: int) -> Row:
    """Write x to a whole power above 0, by squares."""
    square, result = w.number(x), None
    while True:
        if exponent & 1:
            result = square if result is None else w.point("mul", result, square)
        exponent >>= 1
        if not exponent:
            assert result is not None
            return result
        square = w.point("mul", square, square)


def _hurwitz(w: Writer, s: int, z: Operand) -> Row:
    """Write the sum of (z + k)^-s for all k >= 0, of z >= 0."""
    total = _power(w, w.point("reciprocal", z), s)
    for k in range(1, _TERMS):
        total = w.point("add", total, _power(w, w.point("reciprocal", w.point("add", z, float(k))), s))
    v = w.point("reciprocal", w.point("add", z, float(_TERMS)))
    v2 = w.point("mul", v, v)
    # B(2j) / (2j)! s (s + 1) ... (s + 2j - 2) v^(2j), by Horner's rule; then 1 / 2 and 1 / ((s - 1) v).
    factors = []
    for j, bernoulli in enumerate(_BERNOULLI, 1):
        rising = math.prod(range(s, s + 2 * j - 1))
        factors.append(bernoulli * rising / math.factorial(2 * j))
    tail = w.const(factors.pop())
    for factor in reversed(factors):
        tail = w.point("add", w.point("mul", tail, v2), factor)
    rest = w.point("add", w.point("mul", tail, v), 0.5)
    scaled = w.point("add", w.point("mul", rest, v), 1 / (s - 1))
    return w.point("add", total, w.point("mul", scaled, _power(w, v, s - 1)))


def _cotangent_derivative(order: int) -> list[float]:
    """Return the derivative of cot as a polynomial of cot, from its lowest power up: cot' is -(1 + cot^2)."""
    powers = np.polynomial.Polynomial([0.0, 1.0])
    for _ in range(order):
        powers = powers.deriv() * np.polynomial.Polynomial([-1.0, 0.0, -1.0])
    return [float(each) for each in powers.coef]


def _reflection(w: Writer, order: int, x: Operand) -> Row:
    """Write pi^(order + 1) times a derivative of cot at pi x, of x less the nearest integer."""
    angle = w.point("mul", w.point("sub", x, w.point("round", x)), math.pi)
    cotangent = w.point("div", w.point("cos", angle), w.point("sin", angle))
    coefficients = _cotangent_derivative(order)
    curve = w.const(coefficients.pop())
    for coefficient in reversed(coefficients):
        curve = w.point("mul", curve, cotangent)
        curve = w.point("add", curve, coefficient) if coefficient else curve
    return w.point("mul", curve, math.pi ** (order + 1))


def polygamma(w: Writer, order: Any, x: Any) -> Row:
    """Write a derivative of digamma.

    Raises:
        Untraceable: for one of a high order.
    """
    if isinstance(x, int):  # Tensor.polygamma(n) has them the other way round
        order, x = x, order
    if order > _HIGHEST_ORDER:
        raise Untraceable(
            f"The step uses polygamma of order {order}; orders up to {_HIGHEST_ORDER - 1} are compiled with their "
            "gradients. For a large x it is (-1)**(n + 1) * ((n - 1)! / x**n + n! / (2 * x**(n + 1)))."
        )
    if order < 2:
        return w.point("trigamma" if order else "digamma", x)
    sign = 1.0 if order % 2 else -1.0
    left = w.point("lt", x, 0.0)
    z = w.point("where", left, w.point("sub", 1.0, x), x)
    right = w.point("mul", _hurwitz(w, order + 1, z), sign * math.factorial(order))
    # polygamma(x) = (-1)^n polygamma(1 - x) - pi d^n/dx^n cot(pi x)
    mirrored = w.point("sub", w.point("mul", right, -sign), _reflection(w, order, x))
    is_pole = w.point("and", w.point("le", x, 0.0), w.point("eq", w.point("floor", x), x))
    right = w.point("where", w.point("eq", x, math.inf), math.nan, right)  # as in torch
    return w.point("where", is_pole, sign * math.inf, w.point("where", left, mirrored, right))
