"""Rules for ATen operations that move features, multiply by weights, or fill tensors with a number."""

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
"""Operations whose results hold their argument's elements, or zeros, and nothing else."""

# Operations whose result has the value of their argument.
KEEPS = ("clone", "detach", "alias", "contiguous", "lift_fresh", "_conj", "resolve_conj", "resolve_neg")

# The number each factory fills with; None where it is an argument. Memory that torch leaves as it is counts as zeros.
CONSTANTS: Mapping[str, float | None] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "zero"), 0.0),
    **dict.fromkeys(("empty_strided", "new_empty_strided"), 0.0),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), 1.0),
    **dict.fromkeys(("full", "full_like", "new_full", "scalar_tensor", "fill"), None),
}


def filled(w: Writer, name: str, args: Sequence[Any], result: torch.Tensor) -> Row:
    """Return the tensor of a factory: filled with a number, the same for all rows."""
    value = CONSTANTS[name]
    number = args[0] if name == "scalar_tensor" else args[-1] if args else None
    if value is None:
        if not isinstance(number, int | float):
            raise Untraceable("The step fills a tensor with the value of another.")
        value = float(number)
    shape = tuple(result.shape)
    return w.const(value, shape, shape.index(w.rows) if w.rows in shape else None)


def _mm(w: Writer, left: Value, right: Value) -> Row | Sum:
    if isinstance(left, Row) and isinstance(right, Row):
        # The gradient of a weight, as autograd computes it: a product over the rows of the batch.
        if left.axis == 1 and right.axis == 0:
            return w.outer(left, right)
        raise Untraceable("The step multiplies two values of the step with one another across rows or features.")
    if isinstance(right, Weight):
        return w.product(left, right)
    # W x for x of shape (features, N) is the transpose of x W: a graph has rows first.
    if isinstance(left, Weight) and isinstance(right, Row) and right.axis == 1:
        product = w.product(_transposed(w, right), _transposed_weight(left))
        return Row(product.shape[::-1], product.node, 1)
    raise Untraceable("The step multiplies two values of the step with one another across rows or features.")


def _transposed(w: Writer, row: Row) -> Row:
    result: Row = w.move(lambda numbers: numbers.t(), row)
    return result


def _transposed_weight(weight: Weight) -> Weight:
    view = weight.view
    if not isinstance(view, Matrix):
        view = Matrix(weight.slot, (0, weight.shape[-2]), (0, weight.shape[-1]))
    return Weight(weight.shape[::-1], weight.slot, view.transposed())


def _addmm(w: Writer, base: Operand, left: Value, right: Value, beta: float = 1, alpha: float = 1) -> Row:
    product = _mm(w, left, right)
    if isinstance(product, Sum):
        raise Untraceable("The step adds to a sum over rows.")
    scaled: Operand = product if alpha == 1 else w.point("mul", product, alpha)
    return w.point("add", scaled, base if beta == 1 else w.point("mul", base, beta))


def _bmm(w: Writer, left: Value, right: Value) -> Any:
    """Write a batched product: of one matrix, or of a small matrix per row."""
    if left.shape[0] == 1:
        product = _mm(w, _first(w, left), _first(w, right))
        if isinstance(product, Sum):
            return Sum((1, *product.shape), product.node)
        index = None if product.index is None else product.index[None]
        return Row((1, *product.shape), product.node, None if product.axis is None else product.axis + 1, index)
    # A matrix per row, as attention within a step has, is no product with a weight: it becomes pointwise products and
    # sums over features.
    if isinstance(left, Row) and isinstance(right, Row) and (left.axis, right.axis) == (0, 0):
        a = w.move(lambda numbers: numbers.unsqueeze(3), left)
        b = w.move(lambda numbers: numbers.unsqueeze(1), right)
        return w.reduce("sum", w.point("mul", a, b), [2], False)
    raise Untraceable("The step multiplies a batch of matrices that is neither one matrix nor one per row.")


def _first(w: Writer, value: Value) -> Value:
    if isinstance(value, Weight):
        return Weight(value.shape[1:], value.slot, None)
    result: Row = w.move(lambda numbers: numbers[0], value)
    return result


PRODUCTS: Mapping[str, Rule] = {"mm": _mm, "addmm": _addmm, "bmm": _bmm}
