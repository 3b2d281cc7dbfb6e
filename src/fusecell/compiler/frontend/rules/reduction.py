"""Rules for ATen operations that reduce features: sums, norms, softmaxes, variances.

Written as torch computes them, where it matters: a variance takes two passes, mean first, as one pass over squares
cancels; exponentials are taken of differences from the maximum, and so do not overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.rules.pointwise import power
from fusecell.compiler.frontend.traced_values import Row, Sum, Untraceable

__all__ = ["REDUCTIONS", "centred", "count", "mean"]

Rule = Callable[..., Any]
Dims = Sequence[int] | int | None


def _dims(dims: Dims) -> Sequence[int] | None:
    return [dims] if isinstance(dims, int) else dims


def count(w: Writer, x: Row, dims: Dims) -> int:
    """Count the features that a reduction joins."""
    return math.prod(x.shape[dim] for dim in w.dims(x, _dims(dims)))


def total(w: Writer, x: Operand, dims: Dims = None, keepdim: bool = False, **_: Any) -> Row | Sum:
    """Write a sum; over the batch dimension it is the gradient of a weight."""
    row = w.row(x)
    reduced = w.dims(row, _dims(dims))
    if row.axis in reduced:
        return w.rowsum(row, reduced, keepdim)
    return w.reduce("sum", row, reduced, keepdim)


def mean(w: Writer, x: Row, dims: Dims = None, keepdim: bool = False, **_: Any) -> Row:
    return w.point("div", w.reduce("sum", x, _dims(dims), keepdim), float(count(w, x, dims)))


def centred(w: Writer, x: Row, dims: Dims) -> Row:
    """Write x less its mean."""
    return w.point("sub", x, mean(w, x, dims, True))


def _variance(w: Writer, x: Row, dims: Dims = None, correction: float | None = 1, keepdim: bool = False) -> Row:
    deviation = centred(w, x, dims)
    freedom = count(w, x, dims) - (1 if correction is None else correction)
    squares = w.reduce("sum", w.point("mul", deviation, deviation), _dims(dims), keepdim)
    return w.point("div", squares, float(max(freedom, 0)))


def _var_mean(w: Writer, x: Row, dims: Dims = None, **options: Any) -> tuple[Row, Row]:
    return _variance(w, x, dims, **options), mean(w, x, dims, options.get("keepdim", False))


def _std_mean(w: Writer, x: Row, dims: Dims = None, **options: Any) -> tuple[Row, Row]:
    return w.point("sqrt", _variance(w, x, dims, **options)), mean(w, x, dims, options.get("keepdim", False))


def _nan_sum(w: Writer, x: Row, dims: Dims = None, keepdim: bool = False, **_: Any) -> Row | Sum:
    return total(w, w.point("where", w.point("ne", x, x), 0.0, x), dims, keepdim)


def _aminmax(w: Writer, x: Row, dim: int | None = None, keepdim: bool = False) -> tuple[Row, Row]:
    return w.reduce("amin", x, _dims(dim), keepdim), w.reduce("amax", x, _dims(dim), keepdim)


def _extreme(op: str) -> Rule:
    return lambda w, x, dims=None, keepdim=False: w.reduce(op, x, _dims(dims), keepdim)


def _vector_norm(w: Writer, x: Row, order: float = 2, dims: Dims = None, keepdim: bool = False, **_: Any) -> Row:
    magnitude = w.point("abs", x)
    if order in (math.inf, -math.inf):
        return w.reduce("amax" if order > 0 else "amin", magnitude, _dims(dims), keepdim)
    if order == 0:
        return w.reduce("sum", w.point("where", w.point("ne", x, 0.0), 1.0, 0.0), _dims(dims), keepdim)
    powers = magnitude if order == 1 else power(w, x if order == 2 else magnitude, order)
    return power(w, w.reduce("sum", powers, _dims(dims), keepdim), 1 / order)


def _softmax(w: Writer, x: Row, dim: int, _half: bool = False) -> Row:
    exponentials = w.point("exp", w.point("sub", x, w.reduce("amax", x, [dim], True)))
    return w.point("div", exponentials, w.reduce("sum", exponentials, [dim], True))


def _safe_softmax(w: Writer, x: Row, dim: int, _dtype: object = None) -> Row:
    # As attention has it: where all is masked off nothing is attended to.
    is_masked = w.point("eq", w.reduce("amax", x, [dim], True), -math.inf)
    return w.point("where", is_masked, 0.0, _softmax(w, x, dim))


def _log_softmax(w: Writer, x: Row, dim: int, _half: bool = False) -> Row:
    shifted = w.point("sub", x, w.reduce("amax", x, [dim], True))
    return w.point("sub", shifted, w.point("log", w.reduce("sum", w.point("exp", shifted), [dim], True)))


def _logsumexp(w: Writer, x: Row, dims: Dims, keepdim: bool = False) -> Row:
    most = w.reduce("amax", x, _dims(dims), True)
    # As torch: from an infinite maximum nothing is subtracted, as inf - inf is NaN.
    finite = w.point("where", w.point("eq", w.point("abs", most), math.inf), 0.0, most)
    summed = w.reduce("sum", w.point("exp", w.point("sub", x, finite)), _dims(dims), keepdim)
    shift = finite if keepdim else w.move(lambda numbers: numbers.squeeze(_dims(dims)), finite)
    return w.point("add", w.point("log", summed), shift)


def _layer_norm(
    w: Writer, x: Row, shape: Sequence[int], gain: Operand | None, bias: Operand | None, eps: float
) -> tuple[Row, Row, Row]:
    dims = list(range(-len(shape), 0))
    average = mean(w, x, dims, True)
    deviation = w.point("sub", x, average)
    variance = mean(w, w.point("mul", deviation, deviation), dims, True)
    scale = w.point("rsqrt", w.point("add", variance, eps))
    normed = w.point("mul", deviation, scale)
    if gain is not None:
        normed = w.point("mul", normed, gain)
    if bias is not None:
        normed = w.point("add", normed, bias)
    return normed, average, scale


def _all(w: Writer, x: Operand, dims: Dims = None, keepdim: bool = False, op: str = "amin") -> Row:
    """Write whether all truth values are true along dimensions, or by the maximum any."""
    if dims is None:
        raise Untraceable(
            "The step asks whether all or any elements of the batch are true, which mixes its rows; give the dimension "
            "of features, and use torch.where in place of a branch."
        )
    return w.truth(w.reduce(op, w.number(w.truth(x)), _dims(dims), keepdim))


def _any(w: Writer, x: Operand, dims: Dims = None, keepdim: bool = False) -> Row:
    return _all(w, x, dims, keepdim, "amax")


REDUCTIONS: Mapping[str, Rule] = {
    "sum": total,
    "mean": mean,
    "var": _variance,
    "std": lambda w, x, *args, **options: w.point("sqrt", _variance(w, x, *args, **options)),
    "var_mean": _var_mean,
    "std_mean": _std_mean,
    "all": _all,
    "any": _any,
    "amax": _extreme("amax"),
    "amin": _extreme("amin"),
    "nansum": _nan_sum,
    "aminmax": _aminmax,
    "count_nonzero": lambda w, x, dims=None: w.reduce("sum", w.number(w.truth(x)), _dims(dims), False),
    "linalg_vector_norm": _vector_norm,
    "norm": lambda w, x, order=2, *args, **options: _vector_norm(w, x, 2 if order is None else order, *args, **options),
    "_softmax": _softmax,
    "_safe_softmax": _safe_softmax,
    "_log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "native_layer_norm": _layer_norm,
}
