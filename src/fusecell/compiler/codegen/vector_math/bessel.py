"""Modified Bessel functions of the first kind, of orders 0 and 1, less their growth: exp(-|x|) I(x).

As in Cephes (Moshier 1989) in two pieces, up to 8 by x and beyond by 1 / x, with coefficients of this project's own:
``python -m benchmarks.fit_special``. In double; float32 goes through it and is rounded once. "Error" is the largest
relative one that the coefficients cause, the arithmetic left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fusecell.compiler.codegen.llvm_text import Value
from fusecell.compiler.codegen.vector_math.function_builder import VectorFunction
from fusecell.compiler.codegen.vector_math.via_float64 import in_double

__all__ = ["BESSEL"]

I0E_NEAR = (
    0.2070019212239867,
    -0.11300432688620549,
    0.09451562853995103,
    -0.08904344136075991,
    0.08734341617552291,
    -0.08496338091615124,
    0.07927522590716898,
    -0.06954119561742342,
    0.056777032019843215,
    -0.04298594945226738,
    0.03017791202356886,
    -0.019682654708082413,
    0.011960077903963348,
    -0.006792399792271578,
    0.0036171264596770616,
    -0.0018118870527295522,
    0.0008563152483951447,
    -0.0003829015089457559,
    0.0001624054672701359,
    -6.550956130635514e-05,
    2.5202271984440893e-05,
    -9.25059710625537e-06,
    3.2293850630678377e-06,
    -1.0891964284507317e-06,
    3.675592893288293e-07,
    -1.1339523685907105e-07,
    2.6273368345256394e-08,
    -7.860369707508212e-09,
    4.469372581856615e-09,
    -1.1662904878442954e-09,
)
"""exp(-x) I0(x) in powers of x / 4 - 1, for x up to 8: error 7.0e-17."""
I0E_FAR = (
    0.4021765094450081,
    0.0033605519836677235,
    0.00013621607439187193,
    1.1143033802583682e-05,
    1.4838475863096976e-06,
    2.9735956581528157e-07,
    8.872154618944625e-08,
    3.932926571091252e-08,
    2.155681110989874e-08,
    7.532386417555123e-09,
    -6.805980075129678e-09,
    -1.331979859201994e-08,
    -5.162517880939013e-09,
    7.323310735122893e-09,
    6.789790403895736e-09,
    -3.11851456121224e-09,
    -4.8482509221176966e-09,
    1.0924527246468664e-09,
    2.3981927228949238e-09,
    -2.748111637276033e-10,
    -7.473844621887592e-10,
    3.525321019700796e-11,
    1.0881994785468934e-10,
)
"""sqrt(x) exp(-x) I0(x) in powers of 16 / x - 1, for x from 8 on: error 1.0e-16."""
I1E_NEAR = (
    0.044687709875608835,
    -0.06112433802966629,
    0.0680575999095116,
    -0.0684826062058255,
    0.0637674037134072,
    -0.05528003922705058,
    0.044674572621255064,
    -0.03367135551994034,
    0.023686016957724227,
    -0.01557130925657511,
    0.00958396215077406,
    -0.005534567760544582,
    0.003005762419557192,
    -0.0015388749636515487,
    0.000744512345281566,
    -0.0003411747437353928,
    0.00014842124144631648,
    -6.142651349494123e-05,
    2.4233756432468166e-05,
    -9.131846315273642e-06,
    3.2938951625746042e-06,
    -1.1380759138279984e-06,
    3.759400376008922e-07,
    -1.2000364861910367e-07,
    3.8028049651067336e-08,
    -1.1191257727176943e-08,
    2.6037822441041467e-09,
    -7.379291130374042e-10,
    3.727630409237771e-10,
    -9.365751909742237e-11,
)
"""exp(-x) I1(x) / x, as of order 0: error 1.9e-16."""
I1E_FAR = (
    0.38939845902587233,
    -0.009749577193235609,
    -0.000219235763833829,
    -1.503854721127423e-05,
    -1.8349101539664522e-06,
    -3.483853071371078e-07,
    -1.0001220638799958e-07,
    -4.31323156237458e-08,
    -2.3382691353601083e-08,
    -8.407326839577817e-09,
    6.795073490187386e-09,
    1.3952625102162603e-08,
    5.722677527454156e-09,
    -7.432535335623792e-09,
    -7.222524178953976e-09,
    3.0717395650769477e-09,
    5.094016301574338e-09,
    -1.0476127785270019e-09,
    -2.5062162405593894e-09,
    2.582169443152386e-10,
    7.79067217908059e-10,
    -3.2677656089803323e-11,
    -1.13288885034257e-10,
)
"""sqrt(x) exp(-x) I1(x), as of order 0: error 5.5e-17."""
_BOUNDARY = 8.0


def _pieces(f: VectorFunction, a: Value, near: Sequence[float], far: Sequence[float]) -> tuple[Value, Value]:
    """Return both polynomials of |x|, the second over the root of |x|."""
    below = f.horner(f.fma(a, 0.25, -1.0, "t"), near, "near")
    beyond = f.horner(f.sub(f.div(2 * _BOUNDARY, a, "inverse"), 1.0, "t"), far, "far")
    return below, f.div(beyond, f.lanewise("sqrt", a, name="root"), "decayed")


def _i0e(f: VectorFunction, x: Value) -> Value:
    a = f.fabs(x, "a")
    near, far = _pieces(f, a, I0E_NEAR, I0E_FAR)
    return f.select(f.fcmp("olt", a, _BOUNDARY, "is.near"), near, far, "result")


def _i1e(f: VectorFunction, x: Value) -> Value:
    a = f.fabs(x, "a")
    near, far = _pieces(f, a, I1E_NEAR, I1E_FAR)
    size = f.select(f.fcmp("olt", a, _BOUNDARY, "is.near"), f.mul(a, near, "rise"), far, "size")
    f.comment("odd, but for -0, of which torch's is 0")
    return f.select(f.fcmp("olt", x, 0.0, "negative"), f.neg(size, "mirrored"), size, "result")


BESSEL: dict[str, Callable[..., Value]] = {"i0e": in_double(_i0e), "i1e": in_double(_i1e)}
"""The functions of this file, by the primitive they compute."""
