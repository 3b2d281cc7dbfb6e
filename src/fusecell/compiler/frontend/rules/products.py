"""Rules for ATen operations that multiply matrices: by a weight, or by one another row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fusecell.compiler.frontend.contractions import contracted
from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.rules.reduction import total
from fusecell.compiler.frontend.traced_values import Matrix, Row, Sum, Untraceable, Value, Weight

__all__ = ["PRODUCTS"]

Rule = Callable[..., Any]


def _mm(w: Writer, left: Value, right: Value) -> Row | Sum:
    if isinstance(left, Row) and isinstance(right, Row) and not (left.is_merged or right.is_merged):
        # The gradient of a weight, as autograd computes it: a product over the rows of the batch.
        if left.axis == 1 and right.axis == 0:
            return w.outer(left, right)
    if isinstance(right, Weight) and _is_plain(left, 0):
        return w.product(w.number(left), right)
    # W x for x of shape (features, N) is the transpose of x W: a graph has rows first.
    if isinstance(left, Weight) and _is_plain(right, 1):
        product = w.product(_transposed(w, right), _transposed_weight(left))
        return Row(product.shape[::-1], product.node, 1)
    return contracted(w, left, right, "ik", "kj", "ij")


def _is_plain(value: Value, axis: int) -> bool:
    """Whether a value is rows of features: the batch is dimension ``axis``, and nothing is merged with it."""
    return isinstance(value, Row) and value.axis == axis and not value.is_merged


def _transposed(w: Writer, row: Value) -> Row:
    result: Row = w.move(lambda numbers: numbers.t(), row)
    return result


def _transposed_weight(weight: Weight) -> Weight:
    view = weight.view
    if not isinstance(view, Matrix):
        view = Matrix(weight.slot, (0, weight.shape[-2]), (0, weight.shape[-1]))
    return Weight(weight.shape[::-1], weight.slot, view.transposed())


def _plus(w: Writer, base: Operand, product: Row | Sum, beta: float, alpha: float) -> Row:
    if isinstance(product, Sum):
        raise Untraceable("The step adds to a sum over rows.")
    scaled: Operand = product if alpha == 1 else w.point("mul", product, alpha)
    if beta == 0:
        return w.row(scaled)
    return w.point("add", scaled, base if beta == 1 else w.point("mul", base, beta))


def _addmm(w: Writer, base: Operand, left: Value, right: Value, beta: float = 1, alpha: float = 1) -> Row:
    return _plus(w, base, _mm(w, left, right), beta, alpha)


def _baddbmm(w: Writer, base: Operand, left: Value, right: Value, beta: float = 1, alpha: float = 1) -> Row:
    return _plus(w, base, _bmm(w, left, right), beta, alpha)


def _addmv(w: Writer, base: Operand, left: Value, right: Value, beta: float = 1, alpha: float = 1) -> Row:
    return _plus(w, base, _matrix_vector(w, left, right), beta, alpha)


def _bmm(w: Writer, left: Value, right: Value) -> Any:
    """Write a batched product: of one matrix, or of a matrix per row, per head, or both."""
    if left.shape[0] == 1 and not any(isinstance(each, Row) and each.axis == 0 for each in (left, right)):
        product = _mm(w, _first(w, left), _first(w, right))
        if isinstance(product, Sum):
            return Sum((1, *product.shape), product.node)
        index = None if product.index is None else product.index[None]
        return Row(
            (1, *product.shape), product.node, None if product.axis is None else product.axis + 1, index, product.split
        )
    return contracted(w, left, right, "bik", "bkj", "bij")


def _first(w: Writer, value: Value) -> Value:
    if isinstance(value, Weight):
        return Weight(value.shape[1:], value.slot, None)
    result: Row = w.move(lambda numbers: numbers[0], value)
    return result


def _matrix_vector(w: Writer, a: Value, b: Operand) -> Row | Sum:
    """Write (N, K) rows times a vector, or (K, N) rows times a number per row, which is a sum over rows."""
    if isinstance(a, Row) and not a.is_merged:
        if isinstance(b, Row) and b.axis is not None and a.axis == 1:
            return w.rowsum(w.point("mul", a, b), [1], False)
        if a.axis == 0:
            return w.reduce("sum", w.point("mul", a, b), [1], False)
    return contracted(w, a, b, "ik", "k", "i")


def _dot(w: Writer, a: Operand, b: Operand) -> Row | Sum:
    return total(w, w.point("mul", a, b))


PRODUCTS: Mapping[str, Rule] = {
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "mv": _matrix_vector,
    "addmv": _addmv,
    "dot": _dot,
    "vdot": _dot,
}
