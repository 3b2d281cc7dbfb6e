"""How each primitive of a step's graph is written in ONNX operators; `compiler.ir.interpreter` says what it computes.

Values are (N, features), or (1, features) where they are the same for all rows; masks are of bool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from fusecell.errors import ExportError
from fusecell.onnx.writer import INT64, Writer

__all__ = ["RULES"]

Attrs = Mapping[str, Any]
Rule = Callable[[Writer, Sequence[str], Attrs], str]
_MOST_UNROLLED = 64
"""Elements of a running product or maximum, for which ONNX has no operator: each is a few nodes."""


def _op(name: str, **attributes: Any) -> Rule:
    return lambda w, args, attrs: w.node(name, *args, **attributes)


def _expm1(w: Writer, args: Sequence[str], attrs: Attrs) -> str:
    """exp(x) - 1 = tanh(x / 2) (exp(x) + 1), in which nothing cancels."""
    (x,) = args
    above = w.node("Add", w.node("Exp", x), w.constant(1.0, "one"))
    return w.node("Mul", w.node("Tanh", w.node("Mul", x, w.constant(0.5, "half"))), above)


def _log1p(w: Writer, args: Sequence[str], attrs: Attrs) -> str:
    """log(u) x / (u - 1) with u = 1 + x as it is rounded, whose error u - 1 has too (Kahan); x where u is 1."""
    (x,) = args
    one = w.constant(1.0, "one")
    u = w.node("Add", x, one)
    less = w.node("Sub", u, one)
    small, large = w.node("Equal", less, w.constant(0.0, "zero")), w.node("Equal", less, u)
    ratio = w.node("Div", x, w.node("Where", small, one, less))
    return w.node("Where", small, x, w.node("Mul", w.node("Log", u), w.node("Where", large, one, ratio)))


def _through(element: int) -> Rule:
    return lambda w, args, attrs: w.cast(w.cast(args[0], element))


def _missing(name: str) -> Rule:
    def rule(w: Writer, args: Sequence[str], attrs: Attrs) -> str:
        raise ExportError(f"The step computes {name}, for which ONNX has no operator; see fusecell.export instead.")

    return rule


def _is_negative(w: Writer, value: str) -> str:
    """Return where a value is negative, -0 too, which ONNX has no operator for: 1 / -0 is."""
    zero, one = w.constant(0.0, "zero"), w.constant(1.0, "one")
    at_zero = w.node("Equal", value, zero)
    return w.node("Less", w.node("Where", at_zero, w.node("Div", one, value), value), zero)


def _with_sign_of(w: Writer, size: str, sign: str) -> str:
    # A factor, as ONNX Runtime's Where makes 0 of -0.
    factor = w.node("Where", _is_negative(w, sign), w.constant(-1.0, "minus"), w.constant(1.0, "one"))
    return w.node("Mul", size, factor)


def _copysign(w: Writer, args: Sequence[str], attrs: Attrs) -> str:
    return _with_sign_of(w, w.node("Abs", args[0]), args[1])


def _atan2(w: Writer, args: Sequence[str], attrs: Attrs) -> str:
    """The angle in the first quadrant, of |y| / |x|, put where the signs are; those of 0, too."""
    y, x = args
    height, width = w.node("Abs", y), w.node("Abs", x)
    zero, one, half_turn = w.constant(0.0, "zero"), w.constant(1.0, "one"), w.constant(math.pi, "pi")
    # 0 / 0 is 0 here, and infinity / infinity is 1.
    ratio = w.node("Where", w.node("Equal", height, width), one, w.node("Div", height, width))
    angle = w.node("Atan", w.node("Where", w.node("Equal", height, zero), zero, ratio))
    angle = w.node("Where", _is_negative(w, x), w.node("Sub", half_turn, angle), angle)
    return _with_sign_of(w, angle, y)


def _concat(w: Writer, args: Sequence[str], attrs: Attrs) -> str:
    return w.node("Concat", *args, axis=1)


def _accessed(w: Writer, value: str, shape: Sequence[int], access: Attrs) -> str:
    """Return the elements that an access reads of each row: (rows, elements)."""
    where = np.full(tuple(shape), access["offset"], dtype=np.int64)
    for axis, (extent, stride) in enumerate(zip(shape, access["strides"], strict=True)):
        steps = np.arange(extent) * stride
        where = where + steps.reshape([-1 if dim == axis else 1 for dim in range(len(shape))])
    return w.node("Gather", value, w.integers(where.reshape(-1), "positions"), axis=1)


def _view(w: Writer, args: Sequence[str], attrs: Attrs) -> str:
    return _accessed(w, args[0], attrs["shape"], attrs)


def _interleave(w: Writer, args: Sequence[str], attrs: Attrs) -> str:
    parts = [w.reshape(arg, 0, attrs["outer"], -1) for arg in args]
    return w.reshape(w.node("Concat", *parts, axis=2), 0, -1)


def _by_axes(w: Writer, value: str, attrs: Attrs, count: str = "count") -> str:
    return w.reshape(value, -1, attrs["outer"], attrs[count], attrs["inner"])


_REDUCTIONS = {"sum": "ReduceSum", "prod": "ReduceProd", "amax": "ReduceMax", "amin": "ReduceMin"}


def _reduce(w: Writer, args: Sequence[str], attrs: Attrs) -> str:
    value, op = _by_axes(w, args[0], attrs), attrs["op"]
    if op in _REDUCTIONS:
        return w.reshape(w.reduced(_REDUCTIONS[op], value, 2, False), 0, -1)
    place = w.node("ArgMax" if op == "argmax" else "ArgMin", value, axis=2, keepdims=0)
    return w.reshape(w.cast(place), 0, -1)


def _scan(w: Writer, args: Sequence[str], attrs: Attrs) -> str:
    value, count = _by_axes(w, args[0], attrs), attrs["count"]
    if attrs["op"] == "sum":
        total = w.node("CumSum", value, w.integers(2, "axis"), reverse=int(attrs["reverse"]))
        return w.reshape(total, 0, -1)
    if count > _MOST_UNROLLED:
        raise ExportError(
            f"The step has a running {attrs['op']} over {count} elements: ONNX has none, and at most {_MOST_UNROLLED} "
            "are unrolled."
        )
    op = {"prod": "Mul", "amax": "Max", "amin": "Min"}[attrs["op"]]
    parts = [w.slice(value, place, place + 1, 2) for place in range(count)]
    order = range(count - 1, -1, -1) if attrs["reverse"] else range(count)
    so_far = ""
    for place in order:
        so_far = w.node(op, so_far, parts[place]) if so_far else parts[place]
        parts[place] = so_far
    return w.reshape(w.node("Concat", *parts, axis=2), 0, -1)


def _contract(w: Writer, args: Sequence[str], attrs: Attrs) -> str:
    shape, outputs = (*attrs["shape"], *attrs["count"]), math.prod(attrs["shape"])
    a, b = (_accessed(w, arg, shape, attrs[name]) for arg, name in zip(args, ("a", "b"), strict=True))
    terms = w.reshape(w.node("Mul", a, b), 0, outputs, -1)
    return w.reduced("ReduceSum", terms, 2, False)


def _positions(w: Writer, value: str, attrs: Attrs) -> str:
    """Return positions as int64 (rows, outer, picks, inner), put in range."""
    outer, inner, picks = attrs["outer"], attrs["inner"], attrs["picks"]
    limits = w.constant(0.0, "zero"), w.constant(attrs["count"] - 1.0, "last")
    places = w.cast(w.node("Clip", value, *limits), INT64)
    if attrs["positions"] != "shared":
        return w.reshape(places, -1, outer, picks, inner)
    places = w.reshape(places, -1, 1, picks, 1)
    return w.node("Expand", places, w.integers([1, outer, 1, inner], "shape"))


def _take(w: Writer, args: Sequence[str], attrs: Attrs) -> str:
    value, places = _by_axes(w, args[0], attrs), _positions(w, args[1], attrs)
    value = w.node("Expand", value, _rows_of(w, places, 4))
    places = w.node("Expand", places, _rows_of(w, value, 4))
    return w.reshape(w.node("GatherElements", value, places, axis=2), 0, -1)


def _scatter_add(w: Writer, args: Sequence[str], attrs: Attrs) -> str:
    places, values = _positions(w, args[0], attrs), _by_axes(w, args[1], attrs, "picks")
    values = w.node("Expand", values, _rows_of(w, places, 4))
    places = w.node("Expand", places, _rows_of(w, values, 4))
    sizes = w.integers([attrs["outer"], attrs["count"], attrs["inner"]], "shape")
    rows = w.node("Shape", values, start=0, end=1)
    zeros = w.node("Expand", w.constant(0.0, "zero"), w.node("Concat", rows, sizes, axis=0))
    return w.reshape(w.node("ScatterElements", zeros, places, values, axis=2, reduction="add"), 0, -1)


def _rows_of(w: Writer, value: str, dims: int) -> str:
    """Return the shape (rows, 1, ...), to expand another value by."""
    return w.node("Concat", w.node("Shape", value, start=0, end=1), w.integers([1] * (dims - 1), "ones"), axis=0)


def _argsort(w: Writer, args: Sequence[str], attrs: Attrs) -> str:
    value = w.reshape(args[0], -1, attrs["outer"], attrs["count"])
    count = w.integers([attrs.get("first", attrs["count"])], "count")
    _, order = w.several(
        "TopK", [value, count], ["ordered", "order"], axis=2, largest=int(attrs["descending"]), sorted=1
    )
    return w.reshape(w.cast(order), 0, -1)


def _negated(op: str) -> Rule:
    return lambda w, args, attrs: w.node("Not", w.node(op, *args))


_SAME_NAME = "neg abs sign exp log sqrt reciprocal sin cos tanh sigmoid erf floor round atan add sub mul div pow and or"
RULES: Mapping[str, Rule] = {
    **{name: _op(name.capitalize()) for name in _SAME_NAME.split()},
    "not": _op("Not"),
    "where": _op("Where"),
    "expm1": _expm1,
    "log1p": _log1p,
    "rsqrt": lambda w, args, attrs: w.node("Reciprocal", w.node("Sqrt", args[0])),
    "to_float16": _through(TensorProto.FLOAT16),
    "to_bfloat16": _through(TensorProto.BFLOAT16),
    "to_float32": _through(TensorProto.FLOAT),
    **{name: _missing(name) for name in ("lgamma", "digamma", "trigamma", "erfinv", "i0e", "i1e", "erfcx", "ndtri")},
    **{name: _missing(name) for name in ("mantissa", "nextafter")},
    "atan2": _atan2,
    "fmod": _op("Mod", fmod=1),
    "copysign": _copysign,
    "maximum": _op("Max"),
    "minimum": _op("Min"),
    "lt": _op("Less"),
    "le": _op("LessOrEqual"),
    "gt": _op("Greater"),
    "ge": _op("GreaterOrEqual"),
    "eq": _op("Equal"),
    "ne": _negated("Equal"),
    "broadcast": lambda w, args, attrs: w.node("Expand", args[0], w.integers([1, attrs["size"]], "shape")),
    "sum": lambda w, args, attrs: w.reduced("ReduceSum", args[0], 1, True),
    "amax": lambda w, args, attrs: w.reduced("ReduceMax", args[0], 1, True),
    "amin": lambda w, args, attrs: w.reduced("ReduceMin", args[0], 1, True),
    "slice": lambda w, args, attrs: w.slice(args[0], attrs["start"], attrs["stop"], 1),
    "concat": _concat,
    "view": _view,
    "gather": _view,
    "interleave": _interleave,
    "reduce": _reduce,
    "scan": _scan,
    "contract": _contract,
    "take": _take,
    "scatter_add": _scatter_add,
    "argsort": _argsort,
}
