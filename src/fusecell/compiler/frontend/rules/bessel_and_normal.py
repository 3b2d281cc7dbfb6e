"""Rules for Bessel functions, scaled error functions, and logarithms and quantiles of the normal distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.traced_values import Row

__all__ = ["BESSEL_AND_NORMAL"]


def _grown(op: str) -> Callable[..., Row]:
    """Return the rule of a function that is another times exp(|x|)."""
    return lambda w, x: w.point("mul", w.point(op, x), w.point("exp", w.point("abs", x)))


def _log_ndtr(w: Writer, x: Operand) -> Row:
    # To the left log(erfcx / 2) less the square, which loses nothing; else from erfc = erfcx times exp(-t^2), which is
    # small to the right.
    t = w.point("mul", x, math.sqrt(0.5))
    scaled = w.point("erfcx", w.point("abs", t))
    square = w.point("mul", t, t)
    left = w.point("sub", w.point("log", w.point("mul", scaled, 0.5)), square)
    beyond = w.point("mul", scaled, w.point("exp", w.point("neg", square)))
    beyond = w.point("where", w.point("lt", t, 0.0), w.point("sub", 2.0, beyond), beyond)
    right = w.point("log1p", w.point("mul", beyond, -0.5))
    return w.point("where", w.point("lt", x, -1.0), left, right)


BESSEL_AND_NORMAL: Mapping[str, Callable[..., Any]] = {
    "i0": _grown("i0e"),
    "special_i0e": lambda w, x: w.point("i0e", x),
    "special_i1": _grown("i1e"),
    "special_i1e": lambda w, x: w.point("i1e", x),
    "special_erfcx": lambda w, x: w.point("erfcx", x),
    "special_ndtri": lambda w, x: w.point("ndtri", x),
    "special_log_ndtr": _log_ndtr,
}
"""The function of each of these operations, by its name in ATen; part of `special.SPECIAL`."""
