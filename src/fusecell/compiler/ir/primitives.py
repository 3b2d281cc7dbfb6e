"""The primitives: what each is called, what it takes, and the type of what it gives.

A value of a graph has a kind and a size:

======  ==========================================================================================
row     (N, size) numbers: a value per row of the batch and feature. Size 1 broadcasts over features.
mask    (N, size) truth values, from comparisons.
weight  what depends on parameters alone, the same for all rows and steps: a matrix or a vector.
sum     a weight-shaped sum over all rows and steps: the gradient of a weight, or a part of it.
======  ==========================================================================================

This table is one of four with the same keys: how torch spells a primitive is in ``frontend.rules``, what it
computes in ``ir.interpreter``, its machine code in ``codegen.pointwise_ops``. Row vectors are flat: a step's
(N, 3, H) is size 3H, row-major.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fusecell.errors import CompilerError

__all__ = ["LANES", "PRIMITIVES", "Kind", "Primitive", "Type"]

LANES = 16
"""Features computed together, on every target: reductions keep as many partial results."""
Kind = Literal["row", "mask", "weight", "sum"]


@dataclass(frozen=True, slots=True)
class Type:
    """A value's kind, and its features per row (row, mask) or its shape (weight, sum)."""

    kind: Kind
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Features per row; a vector weight broadcasts over rows with as many."""
        if len(self.shape) > 1:
            raise CompilerError(f"a matrix of shape {self.shape} stands where a value per feature is needed")
        return self.shape[0] if self.shape else 1

    def __str__(self) -> str:
        return f"{self.kind}[{', '.join(map(str, self.shape))}]"


Attrs = Mapping[str, Any]
Rule = Callable[[Sequence[Type], Attrs], Type]


@dataclass(frozen=True, slots=True)
class Primitive:
    """One primitive: how many arguments it takes (None: any number), and the type of its result."""

    arity: int | None
    rule: Rule
    pointwise: bool = False
    commutes: bool = False


def row(size: int) -> Type:
    return Type("row", (size,))


def _leaf(kind: Kind) -> Rule:
    return lambda args, attrs: Type(kind, tuple(attrs["shape"]))


def _common_size(args: Sequence[Type]) -> int:
    sizes = {arg.size for arg in args} - {1}
    if len(sizes) > 1:
        raise CompilerError(f"sizes {sorted(sizes)} don't broadcast")
    return sizes.pop() if sizes else 1


def _numbers(args: Sequence[Type], attrs: Attrs) -> Type:
    """Numbers in, numbers out; of weights alone, a weight."""
    for arg in args:
        if arg.kind in ("mask", "sum"):
            raise CompilerError(f"arithmetic on {arg}")
    size = _common_size(args)
    if args and all(arg.kind == "weight" for arg in args):
        return Type("weight", (size,))
    return row(size)


def _comparison(args: Sequence[Type], attrs: Attrs) -> Type:
    return Type("mask", (_numbers(args, attrs).size,))


def _logic(args: Sequence[Type], attrs: Attrs) -> Type:
    if any(arg.kind != "mask" for arg in args):
        raise CompilerError("logic on what is no truth value")
    return Type("mask", (_common_size(args),))


def _where(args: Sequence[Type], attrs: Attrs) -> Type:
    if args[0].kind != "mask":
        raise CompilerError("where needs a mask first")
    _numbers(args[1:], attrs)
    return row(_common_size(args))


def _reduce(args: Sequence[Type], attrs: Attrs) -> Type:
    if args[0].kind != "row":
        raise CompilerError(f"a reduction over the features of {args[0]}")
    return row(1)


def _slice(args: Sequence[Type], attrs: Attrs) -> Type:
    start, stop = attrs["start"], attrs["stop"]
    if not 0 <= start < stop <= args[0].size:
        raise CompilerError(f"slice {start}:{stop} of {args[0]}")
    return Type(args[0].kind, (stop - start,))


def _concat(args: Sequence[Type], attrs: Attrs) -> Type:
    if len({arg.kind for arg in args}) != 1:
        raise CompilerError("concat of different kinds")
    return Type(args[0].kind, (sum(arg.size for arg in args),))


def _broadcast(args: Sequence[Type], attrs: Attrs) -> Type:
    if args[0].size not in (1, attrs["size"]):
        raise CompilerError(f"{args[0]} doesn't broadcast to {attrs['size']}")
    return Type("mask" if args[0].kind == "mask" else "row", (attrs["size"],))


def region(weight: Type, attrs: Attrs) -> tuple[int, int]:
    """The (K, F) of the part of a weight that a product reads, as it multiplies."""
    (k0, k1), (f0, f1) = attrs["rows"], attrs["cols"]
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
    """init + sum of products: [init,] row, weight, row, weight ... with attrs["terms"] a product's attrs each."""
    start = 1 if attrs["init"] else 0
    sizes = {_product(args[start + 2 * i : start + 2 * i + 2], term).size for i, term in enumerate(attrs["terms"])}
    if start and args[0].kind in ("row", "weight"):
        sizes.add(args[0].size)
    if len(sizes) != 1 or len(args) != start + 2 * len(attrs["terms"]):
        raise CompilerError(f"an affine of sizes {sorted(sizes)}")
    return row(sizes.pop())


def _outer(args: Sequence[Type], attrs: Attrs) -> Type:
    return Type("sum", (args[0].size, args[1].size))


def _rowsum(args: Sequence[Type], attrs: Attrs) -> Type:
    return Type("sum", (args[0].size,))


def _transpose(args: Sequence[Type], attrs: Attrs) -> Type:
    return Type(args[0].kind, args[0].shape[::-1])


def _total(args: Sequence[Type], attrs: Attrs) -> Type:
    if {arg.kind for arg in args} != {"sum"} or len({arg.shape for arg in args}) != 1:
        raise CompilerError(f"total of {', '.join(map(str, args))}")
    return args[0]


def _place(args: Sequence[Type], attrs: Attrs) -> Type:
    """A sum at an offset inside zeros of attrs["shape"]: the gradient of a slice."""
    return Type("sum", tuple(attrs["shape"]))


_UNARY = [
    "neg",
    "abs",
    "sign",
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "sin",
    "cos",
    "tanh",
    "sigmoid",
    "erf",
    "floor",
]
_BINARY = {"add": True, "sub": False, "mul": True, "div": False, "pow": False, "maximum": True, "minimum": True}
_COMPARISONS = ["lt", "le", "gt", "ge", "eq", "ne"]

PRIMITIVES: Mapping[str, Primitive] = {
    # leaves
    "input": Primitive(0, _leaf("row")),
    "state": Primitive(0, _leaf("row")),
    "weight": Primitive(0, _leaf("weight")),
    "const": Primitive(0, lambda args, attrs: row(1)),
    # a value per row and feature
    **{name: Primitive(1, _numbers, pointwise=True) for name in _UNARY},
    **{name: Primitive(2, _numbers, True, commutes) for name, commutes in _BINARY.items()},
    **{name: Primitive(2, _comparison, pointwise=True) for name in _COMPARISONS},
    "and": Primitive(2, _logic, True, True),
    "or": Primitive(2, _logic, True, True),
    "not": Primitive(1, _logic, pointwise=True),
    "where": Primitive(3, _where, pointwise=True),
    "broadcast": Primitive(1, _broadcast, pointwise=True),
    # over the features of a row
    "sum": Primitive(1, _reduce),
    "amax": Primitive(1, _reduce),
    "amin": Primitive(1, _reduce),
    # bookkeeping
    "slice": Primitive(1, _slice),
    "concat": Primitive(None, _concat),
    # products of rows with weights
    "product": Primitive(2, _product),
    "affine": Primitive(None, _affine),
    # sums over all rows and steps
    "outer": Primitive(2, _outer),
    "rowsum": Primitive(1, _rowsum),
    "total": Primitive(None, _total),
    "transpose": Primitive(1, _transpose),
    "place": Primitive(1, _place),
}
