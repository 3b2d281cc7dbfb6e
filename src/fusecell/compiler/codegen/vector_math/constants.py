"""Constants of the vector functions: one table for float32, one for float64.

The coefficients are minimax fits made for this file: least squares at Chebyshev nodes in 50 to 60 digits,
reweighted until the error is level (Lawson 1961); they are rounded to the format from the lowest order up, with the
rest fitted again after each rounding (as Brisebarre and Chevillard's fpminimax does by lattices). "Error" is the
largest relative error of the function that the coefficients cause, without that of the arithmetic; an ulp is 1.2e-7 or
2.2e-16. What comes of both together is measured in tests/compiler/codegen/test_vector_math.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusecell.compiler.ir.sizes import DType

__all__ = ["F32", "F64", "PRECISIONS", "Precision"]


@dataclass(frozen=True)
class Precision:
    """A floating-point format and the constants that its functions use."""

    dtype: DType
    mantissa: int
    """Stored bits of the significand: 23 or 52."""
    bias: int
    """Added to the exponent where it is stored."""
    ln2: tuple[float, ...]
    """ln 2 as a sum (Cody and Waite); the first term has so few bits that n times it is exact."""
    ln2_for_small_n: tuple[float, ...]
    """The same for tanh and erf, where n is small and the result's error shrinks as n grows."""
    exp_range: tuple[float, float]
    """Least and largest argument whose exponential is a finite normal number."""
    sigmoid_range: tuple[float, float]
    """Beyond it the sigmoid is 0 and 1 to the last bit."""
    expm1_range: tuple[float, float]
    """Beyond it expm1 is -1 and infinite."""
    tanh_limit: float
    """Beyond it tanh is 1 to the last bit."""
    erf_limit: float
    """Beyond it erf is 1 to the last bit."""
    exp: tuple[float, ...]
    """(exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2."""
    log: tuple[float, ...]
    """(2 atanh(s) / s - 2) / s^2 in powers of s^2, for |s| <= (sqrt 2 - 1) / (sqrt 2 + 1)."""
    sqrt_half_bits: int
    """Bits of sqrt(1/2), where the logarithm's interval begins."""
    erf: tuple[float, ...]
    """-log(1 - erf(x)) / x - 1 for 0 <= x <= erf_limit."""

    @property
    def scalar(self) -> str:
        """LLVM's type of a number."""
        return self.dtype.llvm

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return 8 * self.dtype.itemsize

    @property
    def rounder(self) -> float:
        """Number whose sum with another has the nearest integer in its lowest bits."""
        return 1.5 * 2.0**self.mantissa

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def log2e(self) -> float:
        return 1.4426950408889634


F32 = Precision(
    dtype=DType.F32,
    mantissa=23,
    bias=127,
    ln2=(0.693145751953125, 1.428606765330187e-06),
    ln2_for_small_n=(0.6931471824645996,),
    exp_range=(-87.33654022216797, 88.72283172607422),
    sigmoid_range=(-89.0, 20.0),
    expm1_range=(-20.0, 89.0),
    tanh_limit=10.0,
    erf_limit=3.94,
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
    # error 4.3e-9
    erf=(
        0.12837916612625122,
        0.6366195678710938,
        0.10277628153562546,
        -0.01914766989648342,
        -0.0001698887353995815,
        0.0016761429142206907,
        -0.0006376557284966111,
        0.0001189520480693318,
        -9.398956535733305e-06,
    ),
)

F64 = Precision(
    dtype=DType.F64,
    mantissa=52,
    bias=1023,
    ln2=(0.6931471803691238, 1.9082149292705877e-10),
    ln2_for_small_n=(0.6931471803691238, 1.9082149292705877e-10),
    exp_range=(-708.3964185322641, 709.782712893384),
    sigmoid_range=(-710.0, 40.0),
    expm1_range=(-40.0, 710.0),
    tanh_limit=20.0,
    erf_limit=5.94,
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
    # error 7.1e-17
    erf=(
        0.1283791670955125,
        0.6366197723676106,
        0.10277260330009506,
        -0.019128446963626387,
        -0.00020919522528003531,
        0.0016962105017528152,
        -0.0005901467061599822,
        2.5954920524523868e-05,
        6.429056959525452e-05,
        -2.93243469481774e-05,
        2.796741586840018e-06,
        3.5639656268745227e-06,
        -2.4293539293421823e-06,
        8.535132056958978e-07,
        -1.7402904001697458e-07,
        8.358788732208646e-09,
        7.782665271329604e-09,
        -3.152382596847134e-09,
        6.808309480092511e-10,
        -9.543193860865531e-11,
        8.715220777994427e-12,
        -4.750984756247681e-13,
        1.1788627690838831e-14,
    ),
)

PRECISIONS = (F32, F64)
