"""Types of a graph's values, and what the table of primitives says of each primitive.

A value of a graph has a kind and a size:

======  ==========================================================================================
row     (N, size) numbers: a value per row of the batch and feature. Size 1 broadcasts over features.
mask    (N, size) truth values, from comparisons.
weight  what depends on parameters alone, the same for all rows and steps: a matrix or a vector.
sum     a weight-shaped sum over all rows and steps: the gradient of a weight, or a part of it.
======  ==========================================================================================

Row vectors are flat: a step's (N, 3, H) is size 3H, row-major. Primitives that compute along axes name these axes
themselves (`axes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fusecell.errors import CompilerError, quoted

__all__ = ["LANES", "MOST_ELEMENTS", "Attrs", "Category", "Kind", "Primitive", "Rule", "Type"]

LANES = 16
"""Features computed together, on every target: a reduction has as many partial results, whose number decides bits."""
MOST_ELEMENTS = 1 << 40
"""Features of a value, and elements of a weight, at the most: offsets in bytes are then far from 64 bits."""
Kind = Literal["row", "mask", "weight", "sum"]
Category = Literal["argument", "constant", "pointwise", "reduction", "movement", "product", "nest", "row sum"]
"""Kind of computation of a primitive.

argument   a value that is passed to a call: an input, a state or a weight.
constant   a number written in the step.
pointwise  computes each feature of a row from the same feature of its arguments.
reduction  computes one number of all features of a row.
movement   moves features and computes nothing.
product    multiplies rows by a weight.
nest       computes along axes, by a loop nest of its own that reads its arguments from memory.
row sum    adds up all rows and steps for the gradient of a weight, or combines such sums.
"""


@dataclass(frozen=True, slots=True)
class Type:
    """A value's kind, and its features per row (row, mask) or its shape (weight, sum)."""

    kind: Kind
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Features per row; a vector weight broadcasts over rows with as many."""
        if len(self.shape) > 1:
            raise CompilerError(f"a matrix of shape {self.shape} is used where a value per feature is needed")
        return self.shape[0] if self.shape else 1

    def __str__(self) -> str:
        return f"{self.kind}[{', '.join(map(str, self.shape))}]"


Attrs = Mapping[str, Any]
Rule = Callable[[Sequence[Type], Attrs], Type]


@dataclass(frozen=True, slots=True)
class Primitive:
    """Properties of one primitive; the defaults are those of most.

    Attributes:
        arity: how many arguments it takes; None stands for any number.
        rule: the type of its result, from the types of its arguments and its attributes.
        category: the kind of its computation.
        commutes: whether its two arguments may change places without changing a bit.
        expensive: whether the backward should rather read a value from memory than recompute it.
        fold: its function of Python's numbers. Done in double precision and rounded once, as torch does it.
        identities: (position, number) of each argument that leaves the other one unchanged.
        label: the name of its values where the user gave them none; by default the primitive's.
        attributes: the names of all its attributes.
        optional: the names of those that it may have besides.
        reads_values: of a row sum, whether its arguments are values per row.
    """

    arity: int | None
    rule: Rule
    category: Category
    commutes: bool = False
    expensive: bool = False
    fold: Callable[..., float] | None = None
    identities: tuple[tuple[int, float], ...] = ()
    label: str = ""
    attributes: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    reads_values: bool = False

    @property
    def leaf(self) -> bool:
        """Whether it has no arguments: a tensor of the call, or a number."""
        return self.category in ("argument", "constant")

    @property
    def pointwise(self) -> bool:
        """Whether each feature of its result needs the same feature of its arguments only."""
        return self.category == "pointwise"

    @property
    def reduction(self) -> bool:
        """Whether it joins all features of a row."""
        return self.category == "reduction"

    @property
    def movement(self) -> bool:
        """Whether it moves features and computes nothing."""
        return self.category == "movement"

    @property
    def in_place(self) -> bool:
        """Whether its result is a part of its argument, and read there."""
        return self.movement and self.arity == 1

    @property
    def nest(self) -> bool:
        """Whether it is computed by a loop nest of its own, from all features of its arguments."""
        return self.category == "nest"

    @property
    def reads_rows(self) -> bool:
        """Whether it adds up all rows and steps of its arguments; others of its category combine such sums."""
        return self.category == "row sum" and self.reads_values

    @property
    def is_whole(self) -> bool:
        """Whether each feature of its result may need all features of its arguments, in memory."""
        return self.nest or self.reads_rows

    @property
    def cheap(self) -> bool:
        """Whether computing its result again costs less than reading it from memory."""
        return self.movement or (self.category in ("pointwise", "nest") and not self.expensive)

    def result(self, op: str, args: Sequence[Type], attrs: Attrs) -> Type:
        """Return the type of its result.

        Raises:
            CompilerError: for arguments or attributes that it is not defined for.
        """
        if self.arity is not None and self.arity != len(args):
            raise CompilerError(f"{op} takes {self.arity} arguments, got {len(args)}")
        if attrs.keys() - self.optional != self.attributes:
            raise CompilerError(f"{op} has {names_of(self.attributes)}, got {names_of(attrs)}")
        return self.rule(args, attrs)


def row(size: int) -> Type:
    return Type("row", (size,))


# Checks that the rules share. Graphs come from files as well: whatever a text holds, they raise CompilerError.


def names_of(names: Iterable[object]) -> str:
    listed = sorted(map(quoted, names))
    return f"the attributes {', '.join(listed[:8])}" if listed else "no attributes"


def integer(name: str, value: object, least: int) -> int:
    """Return a size or an offset if it is an integer in range; True and 1.0 are none."""
    if type(value) is not int or not least <= value <= MOST_ELEMENTS:
        raise CompilerError(f"{name} is an integer from {least} to {MOST_ELEMENTS}, got {quoted(value)}")
    return value


def integers(name: str, value: object, least: int, counts: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) not in counts:
        expected = " or ".join(map(str, counts))
        raise CompilerError(f"{name} is a list of {expected} integers, got {quoted(value)}")
    return tuple([integer(name, item, least) for item in value])


def shape_of(attrs: Attrs, ranks: Sequence[int]) -> tuple[int, ...]:
    shape = integers("shape", attrs["shape"], 1, ranks)
    if math.prod(shape) > MOST_ELEMENTS:
        raise CompilerError(f"the shape {list(shape)} has more than {MOST_ELEMENTS} elements")
    return shape


def expect(arg: Type, *kinds: Kind) -> None:
    if arg.kind not in kinds:
        raise CompilerError(f"{arg} is an argument where a {' or a '.join(kinds)} is needed")


def features_of(size: int) -> int:
    if size > MOST_ELEMENTS:
        raise CompilerError(f"{size} features are more than {MOST_ELEMENTS}")
    return size
