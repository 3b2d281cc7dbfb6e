"""Numbers of narrower dtypes than the step's: integers of 8 and 16 bits, which wrap around, and rounded floats."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fusecell.compiler.frontend.dtypes import widens
from fusecell.compiler.frontend.graph_writer import Writer
from fusecell.compiler.frontend.rules import ELEMENTWISE, OVER_FEATURES
from fusecell.compiler.frontend.rules.integers import INTEGER_RULES
from fusecell.compiler.frontend.rules.movement import MOVES
from fusecell.compiler.frontend.traced_values import Row, Value
from fusecell.compiler.frontend.whole_numbers import NARROW_INTEGERS

__all__ = ["HOLD_NARROW_INTEGERS", "NARROW_INTEGERS", "ROUNDED", "WRAPPED", "in_dtype", "other_dtype", "wrapped"]

ROUNDED = ELEMENTWISE | OVER_FEATURES | {"scatter"}
"""Operations whose results are rounded to a narrower dtype: each element of a result once, as the exact one."""
_CHOICES = {"where", "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "masked_fill", "fmax", "fmin"}
WRAPPED = (ELEMENTWISE | INTEGER_RULES.keys()) - _CHOICES
"""Operations whose results may be beyond the integers of the arguments' dtype."""
HOLD_NARROW_INTEGERS = (
    ELEMENTWISE
    | INTEGER_RULES.keys()
    | MOVES
    | {"_to_copy", "to", "copy", "gather", "index_select", "index", "amax", "amin", "max", "min", "sort"}
)
"""Operations that compute in narrow integers as torch does."""


def wrapped(w: Writer, whole: Row, dtype: torch.dtype) -> Row:
    """Write a whole number modulo the count of a dtype's integers, as one of them."""
    size = float(2 ** torch.iinfo(dtype).bits)
    turns = w.point("floor", w.point("mul", whole, 1 / size))
    rest = w.point("sub", whole, w.point("mul", turns, size))
    if not dtype.is_signed:
        return rest
    return w.point("where", w.point("ge", rest, size / 2), w.point("sub", rest, size), rest)


def in_dtype(w: Writer, value: Value, dtype: torch.dtype, name: str, casts: Mapping[torch.dtype, str]) -> Value:
    """Return the result of an operation as a number of its narrower dtype, as torch has it each time.

    Arguments:
        name: the operation's.
        casts: the narrower floats that the step may go through, and the primitive that rounds to each.
    """
    if not isinstance(value, Row) or w.is_mask(value):
        return value
    if dtype in casts and name in ROUNDED:
        return w.point(casts[dtype], value)
    return wrapped(w, value, dtype) if dtype in NARROW_INTEGERS and name in WRAPPED else value


def other_dtype(used: torch.dtype, dtype: torch.dtype, name: str) -> str:
    """Return the sentences that refuse an operation in another dtype than the cell's."""
    reason = f"The step computes in {used} where the cell is {dtype}."
    if widens(dtype, used):
        return (
            f"{reason} A kernel has one dtype, and would give fewer digits than were asked for: make the cell "
            "double(), or leave the cast out."
        )
    if used.is_floating_point and name not in ("_to_copy", "to"):
        return (
            f"{reason} In narrower dtypes sums, means, norms and elementwise functions are compiled: cast back, "
            f".to({dtype}), before {name}."
        )
    if not used.is_floating_point and not used.is_complex:
        return f"{reason} Integers that wrap around are compiled elementwise: use .long() before {name}."
    return f"{reason} Compute in the cell's dtype, or convert the cell, .to({used})."
