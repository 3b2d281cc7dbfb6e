"""Fit the polynomials of ``codegen/vector_math/bessel.py`` and ``normal.py``: ``python -m benchmarks.fit_special``.

Chebyshev interpolation in 40 digits, written out in powers of the interval's own variable. Printed are the
coefficients and the largest relative error that they cause, the arithmetic left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath

__all__ = ["FITS", "Fit", "main"]

_DIGITS = 40


@dataclass(frozen=True)
class Fit:
    """One polynomial.

    Attributes:
        function: what is fitted, of t.
        interval: the least and largest t.
        degree: of the polynomial.
    """

    function: Callable[[Any], Any]
    interval: tuple[float, float]
    degree: int


def _bessel_near(order: int, t: Any) -> Any:
    x = 4 * t + 4
    if order == 0:
        return mpmath.exp(-x) * mpmath.besseli(0, x)
    return mpmath.exp(-x) * (mpmath.besseli(1, x) / x if x else mpmath.mpf(1) / 2)


def _bessel_far(order: int, t: Any) -> Any:
    if t <= -1:
        return 1 / mpmath.sqrt(2 * mpmath.pi)
    x = 16 / (t + 1)
    return mpmath.sqrt(x) * mpmath.exp(-x) * mpmath.besseli(order, x)


def _erfcx(t: Any) -> Any:
    if t >= 1:
        return 2 / mpmath.sqrt(mpmath.pi)
    x = mpmath.mpf(3.75) * (1 + t) / (1 - t)
    # The continued fraction, where exp(x^2) would overflow.
    if x > 50:
        square = 2 * x * x
        value = sum((-1) ** k * mpmath.fac2(2 * k - 1) / square**k for k in range(12)) / (x * mpmath.sqrt(mpmath.pi))
    else:
        value = mpmath.exp(x * x) * mpmath.erfc(x)
    return (1 + 2 * x) * value


def _normal_tail(centre: float) -> Callable[[Any], Any]:
    def ratio(t: Any) -> Any:
        """erfinv(x) / x by w = -log(1 - x^2), where 1 - x is far below the last place of 1."""
        w = (t + centre) ** 2
        # With y = erfinv(x) and c = erfc(y): exp(-w) = c (2 - c).
        c = -mpmath.expm1(mpmath.log1p(-mpmath.exp(-w)) / 2)
        y = mpmath.findroot(lambda y: mpmath.log(mpmath.erfc(y)) - mpmath.log(c), mpmath.sqrt(w - mpmath.log(w) / 2))
        return y / (1 - c)

    return ratio


FITS = {
    "I0E_NEAR": Fit(lambda t: _bessel_near(0, t), (-1, 1), 29),
    "I1E_NEAR": Fit(lambda t: _bessel_near(1, t), (-1, 1), 29),
    "I0E_FAR": Fit(lambda t: _bessel_far(0, t), (-1, 1), 22),
    "I1E_FAR": Fit(lambda t: _bessel_far(1, t), (-1, 1), 22),
    "ERFCX": Fit(_erfcx, (-1, 1), 26),
    "NDTRI_LOW": Fit(_normal_tail(8.5), (-2.6, 2.6), 18),
    "NDTRI_LOWEST": Fit(_normal_tail(18.9), (-7.9, 7.9), 21),
}


def fitted(fit: Fit) -> tuple[list[float], float]:
    """Return the coefficients in powers of t, and their largest relative error."""
    with mpmath.workdps(_DIGITS):
        low, high = map(mpmath.mpf, fit.interval)
        powers, _ = mpmath.chebyfit(fit.function, [low, high], fit.degree + 1, error=True)
        coefficients = [float(each) for each in reversed(powers)]
        worst = mpmath.mpf(0)
        for k in range(400):
            t = low + (high - low) * (1 - mpmath.cos(mpmath.pi * (k + mpmath.mpf(1) / 2) / 400)) / 2
            value = fit.function(t)
            worst = max(worst, abs(mpmath.polyval(list(map(mpmath.mpf, reversed(coefficients))), t) / value - 1))
        return coefficients, float(worst)


def main() -> None:
    """Print the tables."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for name, fit in FITS.items():
        coefficients, error = fitted(fit)
        print(f"{name} = (  # error {error:.1e}")
        for each in coefficients:
            print(f"    {each!r},")
        print(")")


if __name__ == "__main__":
    main()
