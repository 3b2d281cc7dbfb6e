"""Primitives that compute along axes: their arguments are flat rows, whose axes the attributes name.

An *access* says where in a flat value the elements of an array of some shape are: element (i, j, ...) is feature
``offset + i * strides[0] + j * strides[1] + ...``. So every transpose, expand, flip, slice with a step, diagonal and
sliding window is one access, and costs nothing until something reads it.

Axes before and after the one that is computed along are two numbers: (outer, count, inner), row-major, is an array with
``count`` elements along the axis, ``inner`` features apart.

============  ==========================================================================================
view          an access of a value; read in place by pointwise values
gather        an access of a value, copied to memory of its own
interleave    arrays of (outer, n_i), joined along their second axis
reduce        sum, prod, amax, amin, argmax or argmin along an axis
scan          running sum, product, maximum or minimum along an axis
contract      sum of products of two values over some axes: out[i...] = sum over k... of a[i.., k..] * b[i.., k..]
take          elements of a value along an axis, by positions that are a value too
scatter_add   the gradient of take: zeros, to which values are added at positions along an axis
argsort       positions that sort along the last axis, or the first few of them; of equals the first comes first
contract_sum  contract, summed over all rows and steps too: the gradient of a weight
scatter_sum   scatter_add, summed over all rows and steps too
============  ==========================================================================================

Every sum has one order, whatever the machine: along an axis of at least two lines, and no longer than there are lines,
from its first element to its last; else sixteen partial results, of every sixteenth element, joined pairwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fusecell.compiler.ir.types import Attrs, Primitive, Type, expect, features_of, integer, integers, shape_of
from fusecell.errors import CompilerError, quoted

__all__ = ["AXIS_PRIMITIVES", "REDUCTIONS", "SCANS", "is_sequential", "work_of"]

MOST_AXES = 12
REDUCTIONS = ("sum", "prod", "amax", "amin", "argmax", "argmin")
SCANS = ("sum", "prod", "amax", "amin")
_AXES = frozenset({"outer", "count", "inner"})
_ACCESS = frozenset({"offset", "strides"})


def is_sequential(op: str, outer: int, count: int, inner: int) -> bool:
    """Whether a reduction combines elements from first to last, and not in sixteen partial results."""
    lines = outer * inner
    # The position of an extreme is that of the first of equals: found in order.
    return op in ("argmax", "argmin") or (lines > 1 and count <= lines)


def _flat(arg: Type) -> int:
    """Return the numbers of a value, a matrix as its rows one after the other."""
    return math.prod(arg.shape)


def work_of(op: str, args: Sequence[Type], attrs: Attrs) -> int:
    """Return how many elements a primitive of axes combines for a row: its time grows with them, not with its sizes."""
    if op in ("contract", "contract_sum"):
        return math.prod((*attrs["shape"], *attrs["count"]))
    if op == "argsort":  # each element is compared with all of its line, or with the best so far of each pass
        return int(attrs["outer"] * attrs["count"] * attrs.get("first", attrs["count"]))
    return sum(_flat(arg) for arg in args)


def _check_access(access: Attrs, shape: Sequence[int], size: int) -> None:
    """Check that an access stays within a value of ``size`` features."""
    offset = integer("offset", access["offset"], 0)
    strides = access["strides"]
    if not isinstance(strides, list | tuple) or len(strides) != len(shape):
        raise CompilerError(f"an access of {len(shape)} axes with the strides {quoted(strides)}")
    low = high = offset
    for extent, stride in zip(shape, strides, strict=True):
        integer("a stride", abs(stride) if type(stride) is int else stride, 0)
        reach = stride * (extent - 1)
        low, high = low + min(reach, 0), high + max(reach, 0)
    if low < 0 or high >= size:
        raise CompilerError(f"an access of features {low} to {high} of a value of {size}")


def _array(attrs: Attrs, *, least_rank: int = 1) -> tuple[int, ...]:
    return shape_of(attrs, range(least_rank, MOST_AXES + 1))


def _like(arg: Type, size: int) -> Type:
    """Return the type of a value of ``size`` features that holds elements of another."""
    return Type(arg.kind, (features_of(size),))


def _computed(args: Sequence[Type], size: int) -> Type:
    """Return the type of ``size`` numbers that are computed: of weights alone they are a weight, too."""
    is_weight = all(arg.kind == "weight" for arg in args)
    return Type("weight" if is_weight else "row", (features_of(size),))


def _view(args: Sequence[Type], attrs: Attrs) -> Type:
    expect(args[0], "row", "mask", "weight")
    shape = _array(attrs)
    _check_access(attrs, shape, _flat(args[0]))
    return _like(args[0], math.prod(shape))


def _interleave(args: Sequence[Type], attrs: Attrs) -> Type:
    outer = integer("outer", attrs["outer"], 1)
    if len({arg.kind for arg in args}) != 1:
        raise CompilerError("interleave joins values of one kind, and at least one")
    expect(args[0], "row", "mask", "weight")
    for arg in args:
        if _flat(arg) % outer:
            raise CompilerError(f"{arg} is no array of {outer} rows")
    return _like(args[0], sum(_flat(arg) for arg in args))


def _axes(arg: Type, attrs: Attrs) -> tuple[int, int, int]:
    """Return (outer, count, inner) of a value."""
    outer, count, inner = (integer(name, attrs[name], 1) for name in ("outer", "count", "inner"))
    if outer * count * inner != _flat(arg):
        raise CompilerError(f"{arg} has no axes ({outer}, {count}, {inner})")
    return outer, count, inner


def _reduce(args: Sequence[Type], attrs: Attrs) -> Type:
    expect(args[0], "row", "weight")
    if attrs["op"] not in REDUCTIONS:
        raise CompilerError(f"a reduction is one of {', '.join(REDUCTIONS)}, got {quoted(attrs['op'])}")
    outer, _, inner = _axes(args[0], attrs)
    return _computed(args, outer * inner)


def _scan(args: Sequence[Type], attrs: Attrs) -> Type:
    expect(args[0], "row", "weight")
    if attrs["op"] not in SCANS:
        raise CompilerError(f"a scan is one of {', '.join(SCANS)}, got {quoted(attrs['op'])}")
    if type(attrs["reverse"]) is not bool:
        raise CompilerError(f"reverse is true or false, got {quoted(attrs['reverse'])}")
    return _computed(args, math.prod(_axes(args[0], attrs)))


def _contraction(args: Sequence[Type], attrs: Attrs) -> tuple[int, ...]:
    """Check a contraction; return the shape of its result."""
    shape = _array(attrs)
    count = integers("count", attrs["count"], 1, range(MOST_AXES + 1))
    for arg, name in zip(args, ("a", "b"), strict=True):
        expect(arg, "row", "weight")
        access = attrs[name]
        if not isinstance(access, Mapping) or access.keys() != _ACCESS:
            raise CompilerError(f"{name} has an offset and strides, got {quoted(access)}")
        _check_access(access, (*shape, *count), _flat(arg))
    return shape


def _contract(args: Sequence[Type], attrs: Attrs) -> Type:
    return _computed(args, math.prod(_contraction(args, attrs)))


def _contract_sum(args: Sequence[Type], attrs: Attrs) -> Type:
    shape = _contraction(args, attrs)
    result = integers("result", attrs["result"], 1, (1, 2))
    # Each axis belongs to one dimension of the weight: rows are a prefix of the axes.
    prefixes = [math.prod(shape[:axes]) for axes in range(len(shape) + 1)]
    if math.prod(result) != math.prod(shape) or (len(result) == 2 and result[0] not in prefixes):
        raise CompilerError(f"a contraction of shape {list(shape)} is no weight of shape {list(result)}")
    return Type("sum", result)


def _positions(arg: Type, attrs: Attrs) -> int:
    """Check the positions of a take or scatter; return how many there are for each outer and inner index."""
    expect(arg, "row", "weight")
    outer, inner, picks = (integer(name, attrs[name], 1) for name in ("outer", "inner", "picks"))
    if attrs["positions"] not in ("shared", "each"):
        raise CompilerError(f"positions are shared or each, got {quoted(attrs['positions'])}")
    expected = picks if attrs["positions"] == "shared" else outer * picks * inner
    if _flat(arg) != expected:
        raise CompilerError(f"{arg} holds the positions of {expected} elements")
    return picks


def _take(args: Sequence[Type], attrs: Attrs) -> Type:
    expect(args[0], "row", "weight")
    outer, _, inner = _axes(args[0], attrs)
    return _computed(args, outer * _positions(args[1], attrs) * inner)


def _scatter_add(args: Sequence[Type], attrs: Attrs) -> Type:
    expect(args[1], "row", "weight")
    outer, inner = integer("outer", attrs["outer"], 1), integer("inner", attrs["inner"], 1)
    if _flat(args[1]) != outer * _positions(args[0], attrs) * inner:
        raise CompilerError(f"{args[1]} has not as many values as positions")
    return _computed(args, outer * integer("count", attrs["count"], 1) * inner)


def _scatter_sum(args: Sequence[Type], attrs: Attrs) -> Type:
    expect(args[1], "row", "weight")
    count, inner, picks = (integer(name, attrs[name], 1) for name in ("count", "inner", "picks"))
    if _flat(args[0]) != picks or _flat(args[1]) != picks * inner:
        raise CompilerError(f"{args[0]} and {args[1]} are no {picks} positions, and rows of {inner} values")
    return Type("sum", (count, features_of(count * inner) // count))


def _argsort(args: Sequence[Type], attrs: Attrs) -> Type:
    expect(args[0], "row", "weight")
    outer, count = integer("outer", attrs["outer"], 1), integer("count", attrs["count"], 1)
    if outer * count != _flat(args[0]) or type(attrs["descending"]) is not bool:
        raise CompilerError(f"{args[0]} is no {outer} arrays of {count}, to be sorted up or down")
    first = integer("first", attrs.get("first", count), 1)
    if first > count:
        raise CompilerError(f"the first {first} of {count} positions")
    return _computed(args, outer * first)


_ARRAY = frozenset({"shape", *_ACCESS})
_TAKE = frozenset({*_AXES, "picks", "positions"})
_CONTRACTION = frozenset({"shape", "count", "a", "b"})

AXIS_PRIMITIVES: Mapping[str, Primitive] = {
    "view": Primitive(1, _view, "movement", attributes=_ARRAY),
    "gather": Primitive(1, _view, "nest", attributes=_ARRAY),
    "interleave": Primitive(None, _interleave, "nest", attributes=frozenset({"outer"})),
    "reduce": Primitive(1, _reduce, "nest", expensive=True, label="r", attributes=_AXES | {"op"}),
    "scan": Primitive(1, _scan, "nest", expensive=True, attributes=_AXES | {"op", "reverse"}),
    "contract": Primitive(2, _contract, "nest", expensive=True, label="p", attributes=_CONTRACTION),
    "take": Primitive(2, _take, "nest", expensive=True, attributes=_TAKE),
    "scatter_add": Primitive(2, _scatter_add, "nest", expensive=True, attributes=_TAKE),
    "argsort": Primitive(
        1,
        _argsort,
        "nest",
        expensive=True,
        attributes=frozenset({"outer", "count", "descending"}),
        optional=frozenset({"first"}),
    ),
    "contract_sum": Primitive(2, _contract_sum, "row sum", attributes=_CONTRACTION | {"result"}, reads_values=True),
    "scatter_sum": Primitive(
        2, _scatter_sum, "row sum", attributes=frozenset({"count", "inner", "picks"}), reads_values=True
    ),
}
