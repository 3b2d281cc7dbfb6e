"""Rules for arithmetic on gradients of weights: sums over rows, and external gradients, which are torch's to compute.

A sum is complete only after the last step. It can be moved, added to others, and multiplied by what all rows share:
a linear operation on it is one on what each row adds to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fusecell.compiler.frontend.contractions import contracted
from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.remedies import AS_INPUT
from fusecell.compiler.frontend.rules.backward import BACKWARD, softmax_backward
from fusecell.compiler.frontend.traced_values import ExternalGrad, Sum, Untraceable, Value, arranged
from fusecell.compiler.frontend.weighted_sums import parts_of_rows, rearranged, spread, weighted

__all__ = ["SUMS"]

Rule = Callable[..., Any]


def _accumulate(w: Writer, left: Value, right: Value, alpha: float = 1) -> Value:
    # What torch adds to an external gradient is torch's to add again, when it runs the prologue's backward.
    if isinstance(left, ExternalGrad) or isinstance(right, ExternalGrad):
        return right if isinstance(left, ExternalGrad) else left
    return w.total(_sum(left), w.scaled(_sum(right), alpha) if alpha != 1 else _sum(right))


def _sum(value: Value) -> Sum:
    if not isinstance(value, Sum):
        raise Untraceable(
            f"The gradient of a weight is combined with a value that is not a weight gradient. {AS_INPUT}"
        )
    return value


def _permute(w: Writer, value: Sum, *order: Any) -> Sum:
    shape = value.shape
    dims = list(range(len(shape)))
    if not order:
        dims.reverse()
    elif isinstance(order[0], list | tuple):
        dims = [dim % len(shape) for dim in order[0]]
    else:
        a, b = order[0] % len(shape), order[1] % len(shape)
        dims[a], dims[b] = b, a
    permuted = tuple(shape[dim] for dim in dims)
    # Dimensions of size 1 may go anywhere: the node has only the others.
    long = [dim for dim in dims if shape[dim] != 1]
    is_matrix = len(shape) == len(w.builder.nodes[value.node].type.shape) == 2
    if long == sorted(long) and not (is_matrix and dims == [1, 0]):
        return Sum(permuted, value.node)
    return Sum(permuted, w.transposed(value).node)


def _view(w: Writer, value: Sum, shape: Sequence[int], **_: Any) -> Sum:
    sizes = list(shape)
    if -1 in sizes:
        sizes[sizes.index(-1)] = math.prod(value.shape) // -math.prod(sizes)
    is_reshaped = [size for size in sizes if size != 1] != [size for size in value.shape if size != 1]
    if is_reshaped and len(w.builder.nodes[value.node].type.shape) > 1:
        return rearranged(w, value, arranged(sizes))
    return Sum(tuple(sizes), value.node)


def _unsqueeze(w: Writer, value: Sum, dim: int) -> Sum:
    position = dim % (len(value.shape) + 1)
    return Sum((*value.shape[:position], 1, *value.shape[position:]), value.node)


def _squeeze(w: Writer, value: Sum, dims: Any = None) -> Sum:
    several = [dims] if isinstance(dims, int) else dims
    squeezed = range(len(value.shape)) if several is None else [dim % len(value.shape) for dim in several]
    return Sum(tuple(n for dim, n in enumerate(value.shape) if n != 1 or dim not in squeezed), value.node)


def _sum_of_elements(w: Writer, value: Sum, dims: Any = None, keepdim: bool = False, **_: Any) -> Sum:
    """Sum over dimensions: of size 1, as autograd does where torch has broadcast, nothing is added."""
    reduced = [dim % len(value.shape) for dim in (range(len(value.shape)) if dims is None else dims)]
    shape = tuple(1 if dim in reduced else n for dim, n in enumerate(value.shape) if keepdim or dim not in reduced)
    if all(value.shape[dim] == 1 for dim in reduced):
        return Sum(shape, value.node)
    each = w.reduce("sum", parts_of_rows(w, value), [dim + 1 for dim in reduced], keepdim)
    return w.rowsum(each, [0], False)


def _elements(take: Callable[..., torch.Tensor]) -> Rule:
    """Return the rule for an operation that only takes elements, or repeats them."""

    def rule(w: Writer, value: Sum, *args: Any, **_: Any) -> Sum:
        order = take(torch.from_numpy(arranged(value.shape)), *args).contiguous().numpy()
        return rearranged(w, value, order)

    return rule


def _softmax_of_sum(w: Writer, value: Sum, y: Operand, dim: int, dtype: object) -> Sum:
    each = softmax_backward(w, parts_of_rows(w, value), w.number(y), dim % len(value.shape) + 1, dtype)
    return w.rowsum(each, [0], False)


def _slope(rule: Rule) -> Rule:
    """Return the rule for the backward of a function of each element: it multiplies a gradient by the slope."""
    return lambda w, value, *args, **options: weighted(w, value, rule(w, w.const(1.0), *args, **options))


def _where(w: Writer, mask: Operand, a: Any, b: Any) -> Sum:
    """Take a gradient where a mask of its elements holds, or doesn't, and zero elsewhere."""
    value, other, mask = (a, b, w.truth(mask)) if isinstance(a, Sum) else (b, a, w.point("not", mask))
    is_zero = other == 0 if isinstance(other, int | float) else getattr(other, "fill", None) == 0
    if not is_zero:
        raise Untraceable(f"The step chooses between the gradient of a weight and another value. {AS_INPUT}")
    return weighted(w, value, mask)


def _product(w: Writer, left: Any, right: Any) -> Sum:
    """Multiply the matrix of a gradient by one that all rows share."""
    a, b = (parts_of_rows(w, each) if isinstance(each, Sum) else w.number(each) for each in (left, right))
    labels = ["nik" if isinstance(left, Sum) else "ik", "nkj" if isinstance(right, Sum) else "kj"]
    if isinstance(left, Sum) and isinstance(right, Sum):
        raise Untraceable(f"The gradient of a weight is multiplied by a sum over rows. {AS_INPUT}")
    each = contracted(w, a, b, labels[0], labels[1], "nij")
    return w.rowsum(each, [0], False)


def _place(w: Writer, value: Sum, shape: Sequence[int], dim: int, start: int, stop: int, step: int = 1) -> Sum:
    """Put the gradient of a slice where the slice was, among zeros."""
    dim = dim % len(shape)
    begin = start + shape[dim] if start < 0 else start
    if value.shape == tuple(shape):
        return value
    stored, node = len(w.builder.nodes[value.node].type.shape), value.node
    # A vector whose part is used as a matrix of one row or column, or one of several matrices.
    if len(shape) < stored or (stored == 2 < len(shape)):
        stored, node = 1, rearranged(w, value, arranged((math.prod(value.shape),))).node
    if step != 1 or (stored == 1 and math.prod(shape[:dim]) != 1):
        places = arranged(shape)[(*[slice(None)] * dim, slice(begin, begin + step * value.shape[dim], step))]
        return spread(w, value, shape, places)
    if stored == 1:
        size, corner = [math.prod(shape)], [begin * math.prod(shape[dim + 1 :])]
    else:
        size, corner = list(shape), [begin if position == dim else 0 for position in range(len(shape))]
    return Sum(tuple(shape), w.builder.add("place", node, shape=size, corner=corner))


def _place_one(w: Writer, value: Sum, shape: Sequence[int], dim: int, index: int) -> Sum:
    """Put the gradient of a vector, row or column of a weight where it was, among zeros."""
    dim, position = dim % len(shape), index % shape[dim]
    part = (*shape[:dim], 1, *shape[dim + 1 :])
    whole = rearranged(w, value, arranged(part)) if len(shape) == 2 else Sum(part, value.node)
    return _place(w, whole, shape, dim, position, position + 1)


def _join(w: Writer, values: Sequence[Value], dim: int = 0) -> Sum:
    """Join gradients of the parts of a weight: each is placed in the whole, and these are added."""
    sums = [value for value in values if isinstance(value, Sum)]
    if any(not isinstance(value, Sum | ExternalGrad) and getattr(value, "fill", None) != 0 for value in values):
        raise Untraceable(f"The gradient of a part of a weight is no sum over rows. {AS_INPUT}")
    dim = dim % len(sums[0].shape)
    whole = list(sums[0].shape)
    whole[dim] = sum(value.shape[dim] for value in values)
    joined, start = None, 0
    for value in values:
        if isinstance(value, Sum):
            part = _place(w, value, whole, dim, start, start + value.shape[dim])
            joined = part if joined is None else w.total(joined, part)
        start += value.shape[dim]
    return _sum(joined)  # type: ignore[arg-type]  # one of the values is a sum


def _same(w: Writer, value: Sum, *_: Any, **__: Any) -> Sum:
    return value


def _cast(w: Writer, value: Sum, *, dtype: Any = None, **_: Any) -> Sum:
    """Keep a sum as it is where autograd casts it to the dtype of its weight: the prologue casts the kernel's."""
    if dtype is not None and not dtype.is_floating_point:
        raise Untraceable(f"The gradient of a weight is cast to {dtype}. {AS_INPUT}")
    return value


def _times(w: Writer, a: Any, b: Any) -> Sum:
    value, factor = (a, b) if isinstance(a, Sum) else (b, a)
    if isinstance(factor, int | float):
        return w.scaled(value, factor)
    if isinstance(factor, Sum | ExternalGrad):
        raise Untraceable(f"The gradient of a weight is multiplied by a sum over rows. {AS_INPUT}")
    return weighted(w, value, factor)


def _over(w: Writer, value: Sum, factor: Any) -> Sum:
    if isinstance(factor, int | float):
        return w.scaled(value, 1.0 / factor)
    return weighted(w, value, w.point("reciprocal", factor))


def _triangle(cut: Callable[..., torch.Tensor]) -> Rule:
    """Return the rule for the part of a matrix's gradient above or below a diagonal."""

    def rule(w: Writer, value: Sum, diagonal: int = 0) -> Sum:
        inside = w.literal(cut(torch.ones(value.shape[-2:], dtype=torch.bool), diagonal))
        return weighted(w, value, inside)

    return rule


_SLOPES = (
    "tanh_backward", "sigmoid_backward", "threshold_backward", "leaky_relu_backward", "elu_backward", "silu_backward",
    "gelu_backward", "softplus_backward", "hardtanh_backward",
)  # fmt: skip
SUMS: Mapping[str, Rule] = {
    **dict.fromkeys(("clone", "detach", "alias", "contiguous"), _same),
    **dict.fromkeys(("t", "transpose", "permute"), _permute),
    "_to_copy": _cast,
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _view),
    "expand": _elements(lambda numbers, shape: numbers.expand(shape)),
    "select": _elements(torch.select),
    "slice": _elements(torch.ops.aten.slice.Tensor),
    "mm": _product,
    "where": _where,
    "masked_fill": lambda w, value, mask, filler: _where(w, mask, filler, value),
    "_softmax_backward_data": _softmax_of_sum,
    **{name: _slope(BACKWARD[name]) for name in _SLOPES},
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "sum": _sum_of_elements,
    "cat": _join,
    "add": _accumulate,
    "slice_backward": _place,
    "select_backward": _place_one,
    "neg": lambda w, value: w.scaled(value, -1.0),
    "_neg_view": lambda w, value: w.scaled(value, -1.0),
    "mul": _times,
    "div": _over,
    "tril": _triangle(torch.tril),
    "triu": _triangle(torch.triu),
}
