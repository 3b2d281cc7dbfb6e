"""Vector math as LLVM text: the functions that kernels call on 16 lanes at a time.

Sixteen lanes on every target: LLVM splits the vector into the machine's registers, and as each lane goes through the
same operations everywhere, its bits are the same everywhere. Denormals count as zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from fusecell.compiler.codegen.vector_math.bessel import BESSEL
from fusecell.compiler.codegen.vector_math.constants import PRECISIONS, Precision
from fusecell.compiler.codegen.vector_math.function_builder import VectorFunction, function_name
from fusecell.compiler.codegen.vector_math.functions import ARITHMETIC, Rule
from fusecell.compiler.codegen.vector_math.gamma import GAMMA
from fusecell.compiler.codegen.vector_math.normal import NORMAL
from fusecell.compiler.codegen.vector_math.number_bits import NUMBER_BITS
from fusecell.compiler.codegen.vector_math.special import SPECIAL
from fusecell.compiler.codegen.vector_math.via_float64 import cos, power, sin

__all__ = ["BINARY_OPS", "OPS", "UNARY_OPS", "declarations", "definitions", "function_name"]

RULES: dict[str, Rule] = {
    **ARITHMETIC,
    "sin": sin,
    "cos": cos,
    "pow": power,
    **SPECIAL,
    **GAMMA,
    **BESSEL,
    **NORMAL,
    **NUMBER_BITS,
}
BINARY_OPS: tuple[str, ...] = ("pow", "maximum", "minimum", "atan2", "fmod", "copysign", "nextafter")
UNARY_OPS: tuple[str, ...] = tuple(op for op in RULES if op not in BINARY_OPS)
OPS: tuple[str, ...] = UNARY_OPS + BINARY_OPS


@cache
def _build(op: str, dtype: str, attributes: str = "alwaysinline nounwind") -> tuple[str, frozenset[str]]:
    """Return the text of a function and the declarations it needs."""
    precisions: dict[str, Precision] = {each.dtype: each for each in PRECISIONS}
    if dtype not in precisions:
        raise ValueError(f"no vector functions for dtype {dtype!r}: expected one of {', '.join(precisions)}")
    if op not in OPS:
        raise ValueError(f"no vector function {op!r}: expected one of {', '.join(OPS)}")
    function = VectorFunction(precisions[dtype], ("x", "y") if op in BINARY_OPS else ("x",))
    result = RULES[op](function, *function.arguments)
    return function.definition(op, result, attributes), frozenset(function.declares)


def definitions(ops: Iterable[str], dtype: str, *, inline: bool = True) -> str:
    """Return the text that defines ``ops`` for ``dtype``, in the order of `OPS`, each once.

    Example:
        >>> print(definitions(["abs"], "f32"))
        define internal <16 x float> @fc.abs.f32(<16 x float> %x) alwaysinline nounwind {
          %result = call <16 x float> @llvm.fabs.v16f32(<16 x float> %x)
          ret <16 x float> %result
        }
        <BLANKLINE>

    Args:
        ops: names out of `OPS`.
        dtype: "f32" or "f64".
        inline: whether each call becomes the function's instructions; the bits are the same.

    Raises:
        ValueError: an op or dtype that doesn't exist.
    """
    attributes = "alwaysinline nounwind" if inline else "noinline nounwind"
    return "\n".join(_build(op, dtype, attributes)[0] for op in sorted(set(ops), key=_position))


def declarations(ops: Iterable[str], dtype: str) -> frozenset[str]:
    """Return the ``declare`` lines that the definitions of ``ops`` rely on, for a module to merge.

    Example:
        >>> sorted(declarations(["abs"], "f32"))
        ['declare <16 x float> @llvm.fabs.v16f32(<16 x float>)']
    """
    return frozenset[str]().union(*(_build(op, dtype)[1] for op in ops))


def _position(op: str) -> int:
    return OPS.index(op) if op in OPS else len(OPS)
