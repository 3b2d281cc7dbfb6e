"""Rules for ATen operations that multiply matrices: by a weight, or by one another row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusecell.compiler.frontend.contractions import contracted
from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.remedies import AS_INPUT
from fusecell.compiler.frontend.rules.reduction import total
from fusecell.compiler.frontend.traced_values import Matrix, Row, Sum, Untraceable, Value, Weight

__all__ = ["PRODUCTS"]

Rule = Callable[..., Any]


def _mm(w: Writer, left: Value, right: Value) -> Row | Sum:
    # The gradient of a weight, as autograd computes it: a product over the rows of the batch.
    if isinstance(left, Row) and isinstance(right, Row) and _is_plain(left, 1) and _is_plain(right, 0):
        return w.outer(left, right)
    zeros = _product_with_zeros(w, left, right)
    if zeros is not None:
        return zeros
    if isinstance(right, Weight) and _is_plain(left, 0):
        return w.product(w.number(left), right)
    # W x for x of shape (features, N) is the transpose of x W: a graph has rows first.
    if isinstance(left, Weight) and _is_plain(right, 1):
        product = w.product(_transposed(w, right), _transposed_weight(left))
        return Row(product.shape[::-1], product.node, 1)
    return contracted(w, left, right, "ik", "kj", "ij")


def _product_with_zeros(w: Writer, left: Value, right: Value) -> Row | None:
    """Return the product where an operand is a matrix of zeros that the step makes, such as a tangent that there is
    none of; None elsewhere."""
    if not any(isinstance(each, Weight) and each.fill == 0.0 for each in (left, right)):
        return None
    shape = (left.shape[0], right.shape[1])
    if _is_plain(left, 0) or _is_plain(right, 1):
        return w.const(0.0, shape, 0 if isinstance(left, Row) else 1)
    return None


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
        raise Untraceable(f"The step adds to a sum over rows. {AS_INPUT}")
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


def _trilinear(
    w: Writer,
    a: Operand,
    b: Operand,
    c: Operand,
    expand_a: Sequence[int],
    expand_b: Sequence[int],
    expand_c: Sequence[int],
    summed: Sequence[int],
    _unroll: int = 1,
) -> Row | Sum:
    """Write the product of three tensors over common dimensions, of which some are summed: that of a bilinear layer."""
    letters = "abcdefgh"[: len(w.row(a).shape) + len(expand_a)]
    labels = [
        "".join(letter for place, letter in enumerate(letters) if place not in expanded)
        for expanded in (expand_a, expand_b, expand_c)
    ]
    result = "".join(letter for place, letter in enumerate(letters) if place not in summed)
    # First the pair whose product is no sum over rows: of values of rows and the weight, or of two values of rows.
    pairs = [(0, 1, 2), (0, 2, 1), (1, 2, 0)]
    operands = (a, b, c)
    is_weight = [isinstance(operand, Weight) for operand in operands]
    first, second, third = next((pair for pair in pairs if is_weight[pair[0]] or is_weight[pair[1]]), pairs[0])
    needed = set(result) | set(labels[third])
    between = "".join(letter for letter in letters if letter in labels[first] + labels[second] and letter in needed)
    product = contracted(w, operands[first], operands[second], labels[first], labels[second], between)
    if isinstance(product, Sum):
        raise Untraceable(f"The step multiplies a sum over rows by a value of the step. {AS_INPUT}")
    return contracted(w, product, operands[third], between, labels[third], result)


def _distances(w: Writer, a: Operand, b: Operand, p: float, _mode: int | None = None) -> Row:
    """Write the distances between the points of two sets, by the p-norm."""
    difference = _differences(w, a, b)
    if p == 1:
        return w.reduce("sum", w.point("abs", difference), [-1], False)
    if p != 2:
        raise Untraceable(
            "Distances are compiled for p = 1 and p = 2; others are (x[:, :, None] - y[:, None]).norm(p, dim=-1)."
        )
    return w.point("sqrt", w.reduce("sum", w.point("mul", difference, difference), [-1], False))


def _differences(w: Writer, a: Operand, b: Operand) -> Row:
    x = w.move(lambda numbers: numbers.unsqueeze(-2), w.number(a))
    y = w.move(lambda numbers: numbers.unsqueeze(-3), w.number(b))
    return w.point("sub", x, y)


def _distances_backward(w: Writer, g: Row, a: Operand, b: Operand, p: float, distance: Row) -> Row | Sum:
    difference = _differences(w, a, b)
    gradient: Row = w.move(lambda numbers: numbers.unsqueeze(-1), g)
    if p == 1:
        each = w.point("mul", w.point("sign", difference), gradient)
    else:
        length = w.move(lambda numbers: numbers.unsqueeze(-1), distance)
        slope = w.point("div", w.point("mul", difference, gradient), length)
        each = w.point("where", w.point("eq", length, 0.0), 0.0, slope)
    return total(w, each, [-2])


PRODUCTS: Mapping[str, Rule] = {
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "mv": _matrix_vector,
    "addmv": _addmv,
    "dot": _dot,
    "vdot": _dot,
    "_trilinear": _trilinear,
    "_cdist_forward": _distances,
    "_cdist_backward": _distances_backward,
    "_euclidean_dist": lambda w, a, b: _distances(w, a, b, 2.0),
}
