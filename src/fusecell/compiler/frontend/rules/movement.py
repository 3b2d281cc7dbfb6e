"""Ops that move features about, products with weights, and tensors filled with a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.traced_values import Matrix, Row, Sum, Untraceable, Value, Weight

__all__ = ["CONSTANTS", "KEEPS", "MOVES", "PRODUCTS", "filled"]

Rule = Callable[..., Any]

_MOVES = (
    "view _unsafe_view _reshape_alias reshape permute transpose t expand unsqueeze squeeze slice select split "
    "split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk chunk unbind cat stack flip roll repeat "
    "slice_backward select_backward constant_pad_nd diagonal unfold"
)
MOVES = frozenset(_MOVES.split())
"""Ops whose results hold their argument's elements, or zeros, and nothing else."""

KEEPS = ("clone", "detach", "alias", "contiguous", "lift_fresh", "_conj", "resolve_conj", "resolve_neg")

# The number each factory fills with; None where it is an argument.
CONSTANTS: Mapping[str, float | None] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "zero"), 0.0),
    **dict.fromkeys(("empty_strided", "new_empty_strided"), 0.0),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), 1.0),
    **dict.fromkeys(("full", "full_like", "new_full", "scalar_tensor", "fill"), None),
}


def filled(w: Writer, name: str, args: Sequence[Any], made: torch.Tensor) -> Row:
    """The tensor of a factory: filled with a number, for each row alike."""
    value = CONSTANTS[name]
    given = args[0] if name == "scalar_tensor" else args[-1] if args else None
    if value is None:
        if not isinstance(given, int | float):
            raise Untraceable("It fills a tensor with the value of another.")
        value = float(given)
    shape = tuple(made.shape)
    return w.const(value, shape, shape.index(w.rows) if w.rows in shape else None)


def _mm(w: Writer, left: Value, right: Value) -> Row | Sum:
    if isinstance(left, Row) and isinstance(right, Row):
        if left.axis == 1 and right.axis == 0:
            return w.outer(left, right)
        raise Untraceable("It multiplies two values of the step with one another across rows or features.")
    if isinstance(right, Weight):
        return w.product(left, right)
    if isinstance(left, Weight) and isinstance(right, Row) and right.axis == 1:
        made = w.product(_turned(w, right), _turned_weight(left))
        return Row(made.shape[::-1], made.node, 1)
    raise Untraceable("It multiplies two values of the step with one another across rows or features.")


def _turned(w: Writer, row: Row) -> Row:
    found: Row = w.move(lambda places: places.t(), row)
    return found


def _turned_weight(weight: Weight) -> Weight:
    view = weight.view
    if not isinstance(view, Matrix):
        view = Matrix(weight.slot, (0, weight.shape[-2]), (0, weight.shape[-1]))
    return Weight(weight.shape[::-1], weight.slot, view.transposed())


def _addmm(w: Writer, base: Operand, left: Value, right: Value, beta: float = 1, alpha: float = 1) -> Row:
    product = _mm(w, left, right)
    if isinstance(product, Sum):
        raise Untraceable("It adds to a sum over rows.")
    scaled: Operand = product if alpha == 1 else w.point("mul", product, alpha)
    return w.point("add", scaled, base if beta == 1 else w.point("mul", base, beta))


def _bmm(w: Writer, left: Value, right: Value) -> Any:
    """Batched products: of one matrix, or of a small matrix per row."""
    if left.shape[0] == 1:
        made = _mm(w, _first(w, left), _first(w, right))
        if isinstance(made, Sum):
            return Sum((1, *made.shape), made.node)
        return Row((1, *made.shape), made.node, None if made.axis is None else made.axis + 1, _unit(made))
    if isinstance(left, Row) and isinstance(right, Row) and (left.axis, right.axis) == (0, 0):
        a = w.move(lambda places: places.unsqueeze(3), left)
        b = w.move(lambda places: places.unsqueeze(1), right)
        return w.reduce("sum", w.point("mul", a, b), [2], False)
    raise Untraceable("It multiplies a batch of matrices that is neither one matrix nor one per row.")


def _first(w: Writer, value: Value) -> Value:
    if isinstance(value, Weight):
        return Weight(value.shape[1:], value.slot, None)
    found: Row = w.move(lambda places: places[0], value)
    return found


def _unit(row: Row) -> Any:
    return None if row.index is None else row.index[None]


PRODUCTS: Mapping[str, Rule] = {"mm": _mm, "addmm": _addmm, "bmm": _bmm}
