"""The numbers behind the vector functions: one table for float32, one for float64.

The coefficients are minimax fits made for this file: least squares at Chebyshev nodes in 50 to 60 digits,
reweighted until the error is level (Lawson); the polynomials' are rounded to the format from the lowest order
up, with the rest fitted again after each rounding. "Error" is the largest relative error of the function that
the coefficients cause, without that of the arithmetic; an ulp is 1.2e-7 or 2.2e-16.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """A floating-point format and the constants that its functions use."""

    dtype: str
    """The name in function names and in LLVM's mangling: f32, f64."""
    scalar: str
    bits: int
    mantissa: int
    bias: int
    ln2: tuple[float, ...]
    """ln 2 as a sum; the first term is short, so that n times it is exact."""
    half_ln2: tuple[float, ...]
    """ln 2 / 2 for tanh, where n is small."""
    exp_range: tuple[float, float]
    """The least and the largest argument whose exponential is a finite normal number."""
    sigmoid_range: tuple[float, float]
    """Beyond it the sigmoid is 0 and 1 to the last bit."""
    expm1_range: tuple[float, float]
    """Beyond it expm1 is -1 and infinite."""
    tanh_limit: float
    """Beyond it tanh is 1."""
    erf_limit: float
    """Beyond it erf is 1."""
    exp: tuple[float, ...]
    """(exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2."""
    log: tuple[float, ...]
    """(2 atanh(s) / s - 2) / s^2 in powers of s^2, for |s| <= (sqrt 2 - 1) / (sqrt 2 + 1)."""
    sqrt_half_bits: int
    erf_top: tuple[float, ...]
    erf_bottom: tuple[float, ...]
    """erf(x) / x = top / bottom in powers of x^2, all positive, so that nothing cancels."""

    @property
    def rounder(self) -> float:
        """Added to a number, it leaves the nearest integer in the lowest bits of the sum."""
        return 1.5 * 2.0**self.mantissa

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def log2e(self) -> float:
        return 1.4426950408889634


F32 = Precision(
    dtype="f32",
    scalar="float",
    bits=32,
    mantissa=23,
    bias=127,
    ln2=(0.693145751953125, 1.428606765330187e-06),
    half_ln2=(0.3465735912322998,),
    exp_range=(-87.33654022216797, 88.72283172607422),
    sigmoid_range=(-89.0, 20.0),
    expm1_range=(-20.0, 89.0),
    tanh_limit=10.0,
    erf_limit=3.92,
    # error 1.4e-8
    exp=(
        0.4999999701976776,
        0.1666654646396637,
        0.04166743904352188,
        0.008366254158318043,
        0.0013870287220925093,
    ),
    # error 8.1e-10
    log=(0.6666677594184875, 0.39977580308914185, 0.29870927333831787),
    sqrt_half_bits=0x3F3504F3,
    # error 2.2e-9
    erf_top=(
        1.1283791695718042,
        0.19242508408065992,
        0.055569060757194914,
        0.004191983750098819,
        0.00040530092449467405,
        6.572403844443582e-06,
    ),
    erf_bottom=(
        1.0,
        0.5038657110781602,
        0.117201466448368,
        0.016206615566672765,
        0.0014064463653342381,
        7.099547523557234e-05,
        2.480758032256679e-07,
    ),
)

F64 = Precision(
    dtype="f64",
    scalar="double",
    bits=64,
    mantissa=52,
    bias=1023,
    ln2=(0.6931471803691238, 1.9082149292705877e-10),
    half_ln2=(0.3465735901845619, 9.541074646352939e-11),
    exp_range=(-708.3964185322641, 709.782712893384),
    sigmoid_range=(-710.0, 40.0),
    expm1_range=(-40.0, 710.0),
    tanh_limit=20.0,
    erf_limit=5.93,
    # error 1.9e-17
    exp=(
        0.5000000000000006,
        0.16666666666666635,
        0.041666666666575675,
        0.008333333333367018,
        0.0013888888931609716,
        0.00019841269758395924,
        2.4801505355176568e-05,
        2.7557378128733626e-06,
        2.7625983155329874e-07,
        2.5061757111971027e-08,
    ),
    # error 1.3e-18
    log=(
        0.6666666666666734,
        0.3999999999941656,
        0.2857142874205921,
        0.22222198600823717,
        0.1818356311961819,
        0.15314076827530917,
        0.14795724389678716,
    ),
    sqrt_half_bits=0x3FE6A09E667F3BCD,
    # error 3.1e-17
    erf_top=(
        1.1283791670955126,
        0.22020228884104104,
        0.06612715348295238,
        0.006891256052216803,
        0.0008558266640948902,
        5.69643961384194e-05,
        3.90166122495625e-06,
        1.6956320495464972e-07,
        6.762750294318972e-09,
        1.7207899523716662e-10,
        3.3372976476547465e-12,
        2.226310425606325e-14,
        1.5703969381288452e-17,
    ),
    erf_bottom=(
        1.0,
        0.5284825307505867,
        0.13476450750370297,
        0.021989989899182095,
        0.002565290285628684,
        0.00022615727730795218,
        1.550386663663692e-05,
        8.353580693125427e-07,
        3.517158302260112e-08,
        1.1251292704391585e-09,
        2.5506625157249957e-11,
        3.3190861621937986e-13,
        8.847152383076262e-16,
    ),
)

PRECISIONS = {"f32": F32, "f64": F64}
