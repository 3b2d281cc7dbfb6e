"""Table of the primitives: what each takes, the type of its result, and the properties that passes use.

``PRIMITIVES`` has one row for each; those that compute along axes are in `axes`. Three other tables read it, and a test
holds their keys to it: how torch spells a primitive is in ``frontend.rules``, what it computes in ``ir.interpreter``,
its machine code in ``codegen.pointwise_ops``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence

from fusecell.compiler.ir.axes import AXIS_PRIMITIVES
from fusecell.compiler.ir.storage import Storage
from fusecell.compiler.ir.types import (
    LANES,
    MOST_ELEMENTS,
    Attrs,
    Category,
    Kind,
    Primitive,
    Type,
    expect,
    features_of,
    integer,
    integers,
    names_of,
    row,
    shape_of,
)
from fusecell.errors import CompilerError, quoted

__all__ = ["ARGUMENTS", "LANES", "MOST_ELEMENTS", "PRIMITIVES", "Category", "Kind", "Primitive", "Type"]


_STORED = tuple(storage.value for storage in Storage)

# The rules.


def _row_leaf(args: Sequence[Type], attrs: Attrs) -> Type:
    return Type("row", shape_of(attrs, (1,)))


def _weight_leaf(args: Sequence[Type], attrs: Attrs) -> Type:
    shape = shape_of(attrs, (1, 2))
    stored = attrs.get("stored", Storage.BF16.value)
    if stored not in _STORED or len(shape) != (2 if "stored" in attrs else len(shape)):
        raise CompilerError(f"a matrix is stored as {', '.join(_STORED)}, got {quoted(stored)} for {list(shape)}")
    _check_numbers(attrs, "a weight")
    return Type("weight", shape)


def _check_numbers(attrs: Attrs, what: str) -> None:
    if attrs.get("numbers", Storage.BF16.value) != Storage.BF16.value:
        raise CompilerError(f"the numbers of {what} are {Storage.BF16.value}, got {quoted(attrs['numbers'])}")


def _const(args: Sequence[Type], attrs: Attrs) -> Type:
    # Infinity and NaN are numbers too: masks of attention are filled with them.
    if type(attrs["value"]) is not float:
        raise CompilerError(f"the value of a const is a number with a point, got {quoted(attrs['value'])}")
    return row(1)


def _common_size(args: Sequence[Type]) -> int:
    sizes = {arg.size for arg in args} - {1}
    if len(sizes) > 1:
        raise CompilerError(f"sizes {sorted(sizes)} don't broadcast")
    return sizes.pop() if sizes else 1


def _numbers(args: Sequence[Type], attrs: Attrs) -> Type:
    """Return the type of arithmetic on numbers: a weight if all arguments are weights, else a row."""
    for arg in args:
        expect(arg, "row", "weight")
    size = _common_size(args)
    if args and all(arg.kind == "weight" for arg in args):
        return Type("weight", (size,))
    return row(size)


def _comparison(args: Sequence[Type], attrs: Attrs) -> Type:
    return Type("mask", (_numbers(args, attrs).size,))


def _logic(args: Sequence[Type], attrs: Attrs) -> Type:
    for arg in args:
        expect(arg, "mask")
    return Type("mask", (_common_size(args),))


def _where(args: Sequence[Type], attrs: Attrs) -> Type:
    expect(args[0], "mask")
    _numbers(args[1:], attrs)
    return row(_common_size(args))


def _reduce(args: Sequence[Type], attrs: Attrs) -> Type:
    expect(args[0], "row")
    return row(1)


def _slice(args: Sequence[Type], attrs: Attrs) -> Type:
    expect(args[0], "row", "mask", "weight")
    start, stop = integer("start", attrs["start"], 0), integer("stop", attrs["stop"], 1)
    if not start < stop <= args[0].size:
        raise CompilerError(f"slice {start}:{stop} of {args[0]}")
    return Type(args[0].kind, (stop - start,))


def _concat(args: Sequence[Type], attrs: Attrs) -> Type:
    if len({arg.kind for arg in args}) != 1:
        raise CompilerError("concat joins values of one kind, and at least one")
    expect(args[0], "row", "mask", "weight")
    return Type(args[0].kind, (features_of(sum(arg.size for arg in args)),))


def _broadcast(args: Sequence[Type], attrs: Attrs) -> Type:
    expect(args[0], "row", "mask", "weight")
    size = integer("size", attrs["size"], 1)
    if args[0].size not in (1, size):
        raise CompilerError(f"{args[0]} doesn't broadcast to {size}")
    return Type("mask" if args[0].kind == "mask" else "row", (size,))


def region(weight: Type, attrs: Attrs) -> tuple[int, int]:
    """Return (K, F), the shape of the part of a weight that a product reads, transposed if the product says so."""
    expect(weight, "weight")
    k0, k1 = integers("rows", attrs["rows"], 0, (2,))
    f0, f1 = integers("cols", attrs["cols"], 0, (2,))
    if type(attrs["transposed"]) is not bool:
        raise CompilerError(f"transposed is true or false, got {quoted(attrs['transposed'])}")
    shape = weight.shape[::-1] if attrs["transposed"] else weight.shape
    if len(shape) != 2 or not (0 <= k0 < k1 <= shape[0] and 0 <= f0 < f1 <= shape[1]):
        raise CompilerError(f"product with rows {k0}:{k1} and columns {f0}:{f1} of {weight}")
    return k1 - k0, f1 - f0


def _product(args: Sequence[Type], attrs: Attrs) -> Type:
    depth, features = region(args[1], attrs)
    if args[0].kind != "row" or args[0].size != depth:
        raise CompilerError(f"product of {args[0]} with {depth} rows of a weight")
    return row(features)


def _affine(args: Sequence[Type], attrs: Attrs) -> Type:
    """Return the type of init + sum of products, of [init,] row, weight, row, weight ...; terms has each product's."""
    if type(attrs["init"]) is not bool:
        raise CompilerError(f"init is true or false, got {quoted(attrs['init'])}")
    terms, start = attrs["terms"], 1 if attrs["init"] else 0
    if not isinstance(terms, list | tuple) or not terms or len(args) != start + 2 * len(terms):
        raise CompilerError(f"an affine of {len(args)} arguments with the terms {quoted(terms)}")
    sizes = set()
    for position, term in enumerate(terms):
        if not isinstance(term, Mapping) or term.keys() != _REGION:
            raise CompilerError(f"a term of an affine has {names_of(_REGION)}, got {quoted(term)}")
        sizes.add(_product(args[start + 2 * position : start + 2 * position + 2], term).size)
    if start:
        expect(args[0], "row", "weight")
        sizes.add(args[0].size)
    if len(sizes) != 1:
        raise CompilerError(f"an affine of sizes {sorted(sizes)}")
    return row(sizes.pop())


def _outer(args: Sequence[Type], attrs: Attrs) -> Type:
    _check_numbers(attrs, "the weight of a sum")
    if attrs.get("stored", Storage.BF16_BF16.value) != Storage.BF16_BF16.value:
        raise CompilerError(f"a sum is of {Storage.BF16_BF16.value} numbers, got {quoted(attrs['stored'])}")
    for arg in args:
        expect(arg, "row")
    features_of(args[0].size * args[1].size)
    return Type("sum", (args[0].size, args[1].size))


def _rowsum(args: Sequence[Type], attrs: Attrs) -> Type:
    expect(args[0], "row")
    return Type("sum", (args[0].size,))


def _transpose(args: Sequence[Type], attrs: Attrs) -> Type:
    expect(args[0], "sum")
    return Type("sum", args[0].shape[::-1])


def _total(args: Sequence[Type], attrs: Attrs) -> Type:
    if {arg.kind for arg in args} != {"sum"} or len({arg.shape for arg in args}) != 1:
        raise CompilerError(f"total of {', '.join(map(str, args[:8])) or 'nothing'}: it adds sums of one shape")
    return args[0]


def _place(args: Sequence[Type], attrs: Attrs) -> Type:
    """Return the type of a sum at an offset inside zeros of attrs["shape"]: the gradient of a slice."""
    expect(args[0], "sum")
    rank = len(args[0].shape)
    shape, corner = shape_of(attrs, (rank,)), integers("corner", attrs["corner"], 0, (rank,))
    for size, offset, whole in zip(args[0].shape, corner, shape, strict=True):
        if offset + size > whole:
            raise CompilerError(f"{args[0]} at {list(corner)} doesn't lie inside a sum of shape {list(shape)}")
    return Type("sum", shape)


_SHAPE = frozenset({"shape"})
_REGION = frozenset({"transposed", "rows", "cols"})


def _unary(*, expensive: bool = False, fold: Callable[..., float] | None = None) -> Primitive:
    return Primitive(1, _numbers, "pointwise", expensive=expensive, fold=fold)


_COMPARISON = Primitive(2, _comparison, "pointwise")
_REDUCTION = Primitive(1, _reduce, "reduction")

PRIMITIVES: Mapping[str, Primitive] = {
    "input": Primitive(0, _row_leaf, "argument", attributes=_SHAPE),
    "state": Primitive(0, _row_leaf, "argument", attributes=_SHAPE),
    "weight": Primitive(0, _weight_leaf, "argument", attributes=_SHAPE, optional=frozenset({"stored", "numbers"})),
    "const": Primitive(0, _const, "constant", label="c", attributes=frozenset({"value"})),
    # Expensive are functions of some twenty vector instructions and more, and square roots. Only what Python computes
    # exactly as torch does is folded: of the others the last bit may differ, and a constant would not be the kernel's.
    # x + 0, x - 0, x * 1 and x / 1 are x for every number but -0.
    "neg": _unary(fold=operator.neg),
    "abs": _unary(),
    "sign": _unary(),
    "exp": _unary(expensive=True),
    "expm1": _unary(expensive=True),
    "log": _unary(expensive=True),
    "log1p": _unary(expensive=True),
    "sqrt": _unary(expensive=True, fold=math.sqrt),
    "rsqrt": _unary(expensive=True),
    "reciprocal": _unary(),
    "sin": _unary(expensive=True),
    "cos": _unary(expensive=True),
    "tanh": _unary(expensive=True),
    "sigmoid": _unary(expensive=True),
    "erf": _unary(expensive=True),
    "floor": _unary(),
    "round": _unary(),
    "to_float16": _unary(),
    "to_bfloat16": _unary(),
    "to_float32": _unary(),
    "atan": _unary(expensive=True),
    "lgamma": _unary(expensive=True),
    "digamma": _unary(expensive=True),
    "trigamma": _unary(expensive=True),
    "erfinv": _unary(expensive=True),
    "i0e": _unary(expensive=True),
    "i1e": _unary(expensive=True),
    "erfcx": _unary(expensive=True),
    "ndtri": _unary(expensive=True),
    "mantissa": _unary(),
    "add": Primitive(2, _numbers, "pointwise", commutes=True, fold=operator.add, identities=((0, 0.0), (1, 0.0))),
    "sub": Primitive(2, _numbers, "pointwise", fold=operator.sub, identities=((1, 0.0),), label="d"),
    "mul": Primitive(2, _numbers, "pointwise", commutes=True, fold=operator.mul, identities=((0, 1.0), (1, 1.0))),
    "div": Primitive(2, _numbers, "pointwise", fold=operator.truediv, identities=((1, 1.0),)),
    "pow": Primitive(2, _numbers, "pointwise", expensive=True),
    "atan2": Primitive(2, _numbers, "pointwise", expensive=True),
    "fmod": Primitive(2, _numbers, "pointwise", expensive=True),
    "copysign": Primitive(2, _numbers, "pointwise"),
    "nextafter": Primitive(2, _numbers, "pointwise"),
    "maximum": Primitive(2, _numbers, "pointwise", commutes=True),
    "minimum": Primitive(2, _numbers, "pointwise", commutes=True),
    "lt": _COMPARISON,
    "le": _COMPARISON,
    "gt": _COMPARISON,
    "ge": _COMPARISON,
    "eq": _COMPARISON,
    "ne": _COMPARISON,
    "and": Primitive(2, _logic, "pointwise", commutes=True),
    "or": Primitive(2, _logic, "pointwise", commutes=True),
    "not": Primitive(1, _logic, "pointwise"),
    "where": Primitive(3, _where, "pointwise"),
    "broadcast": Primitive(1, _broadcast, "pointwise", attributes=frozenset({"size"})),
    "sum": _REDUCTION,
    "amax": _REDUCTION,
    "amin": _REDUCTION,
    "slice": Primitive(1, _slice, "movement", label="part", attributes=frozenset({"start", "stop"})),
    "concat": Primitive(None, _concat, "movement"),
    "product": Primitive(2, _product, "product", label="p", attributes=_REGION),
    "affine": Primitive(None, _affine, "product", label="a", attributes=frozenset({"init", "terms"})),
    "outer": Primitive(2, _outer, "row sum", optional=frozenset({"stored", "numbers"}), reads_values=True),
    "rowsum": Primitive(1, _rowsum, "row sum", reads_values=True),
    "total": Primitive(None, _total, "row sum"),
    "transpose": Primitive(1, _transpose, "row sum"),
    "place": Primitive(1, _place, "row sum", attributes=frozenset({"shape", "corner"})),
    **AXIS_PRIMITIVES,
}
ARGUMENTS = frozenset(name for name, primitive in PRIMITIVES.items() if primitive.category == "argument")
"""The primitives whose values are passed to a call: they stay in a graph even if nothing needs them."""
