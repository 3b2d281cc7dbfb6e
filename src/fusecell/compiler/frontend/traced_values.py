"""What each tensor of a trace is to the compiler: a value of every row, a weight, or a sum over rows.

Each lists the graph nodes that hold its features. A tensor that no graph can hold is `Unsupported`, the gradient of
what the trace doesn't see an `ExternalGrad`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "NEXT_NODE",
    "Complex",
    "ExternalGrad",
    "Masked",
    "Matrix",
    "Row",
    "RowNumbers",
    "Sum",
    "Unsupported",
    "Untraceable",
    "Value",
    "Vector",
    "Weight",
    "arranged",
    "runs",
]

Index = npt.NDArray[np.int64]
NEXT_NODE = 1 << 40
"""Distance of the features of two nodes in an index of several: no run and no stride of one node reaches the next."""
Shape = tuple[int, ...]


class Untraceable(Exception):
    """The step does something that a graph cannot express; the message is a sentence for the user."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A value per row of the batch, as a node and the node's feature behind each of torch's elements.

    Arguments:
        shape: torch's shape, the batch dimension included.
        node: the node of the graph, flat features per row.
        axis: which dimension is the batch; None for what is the same for all rows.
        index: for each element of a row (``shape`` without ``axis``) the feature of ``node``, -1 for zero;
            None where they are the node's features in order.
        split: where a view has merged the batch with other dimensions, their sizes before and after it: dimension
            ``axis`` of h.view(N * 4, 3), the fourth of each row's features, has (1, 4). In ``index`` they are two.
    """

    shape: Shape
    node: int
    axis: int | None = 0
    index: Index | None = None
    split: tuple[int, int] = (1, 1)

    @property
    def features(self) -> Shape:
        """The shape of a row's elements: torch's without the batch."""
        if self.axis is None:
            return self.shape
        return (*self.shape[: self.axis], *(self.split if self.is_merged else ()), *self.shape[self.axis + 1 :])

    @property
    def is_merged(self) -> bool:
        """Whether its batch dimension holds other dimensions too."""
        return self.split != (1, 1)

    def apart(self) -> Row:
        """Return the same elements with the batch as a dimension of its own."""
        if self.axis is None or not self.is_merged:
            return self
        before, after = self.split
        rows = self.shape[self.axis] // (before * after)
        shape = (*self.shape[: self.axis], before, rows, after, *self.shape[self.axis + 1 :])
        return Row(shape, self.node, self.axis + 1, self.index)

    def merged(self, split: tuple[int, int]) -> Row:
        """Return the same elements with the batch and the dimensions beside it as one: the inverse of `apart`."""
        if split == (1, 1):
            return self
        assert self.axis is not None
        assert (self.shape[self.axis - 1], self.shape[self.axis + 1]) == split
        shape = (
            *self.shape[: self.axis - 1],
            math.prod(self.shape[self.axis - 1 : self.axis + 2]),
            *self.shape[self.axis + 2 :],
        )
        return Row(shape, self.node, self.axis - 1, self.index, split)

    @property
    def full_index(self) -> Index:
        """The index, also where it is all features in order."""
        return arranged(self.features) if self.index is None else self.index


@dataclass(frozen=True, slots=True, eq=False)
class Complex:
    """A complex value, as its real and its imaginary part: two rows, or two sums over rows."""

    shape: Shape
    real: Any
    imaginary: Any


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight as a rectangle of a stored matrix, transposed if ``flipped``; ``rows`` and ``cols`` are the stored."""

    slot: int
    rows: tuple[int, int]
    cols: tuple[int, int]
    flipped: bool = False

    def transposed(self) -> Matrix:
        return Matrix(self.slot, self.rows, self.cols, not self.flipped)

    def narrowed(self, dim: int, start: int, stop: int) -> Matrix:
        """Return the part ``start:stop`` of a dimension of this matrix as torch has it."""
        if (dim == 0) != self.flipped:
            return Matrix(self.slot, (self.rows[0] + start, self.rows[0] + stop), self.cols, self.flipped)
        return Matrix(self.slot, self.rows, (self.cols[0] + start, self.cols[0] + stop), self.flipped)


@dataclass(frozen=True, slots=True, eq=False)
class Vector:
    """A weight as elements of a stored vector: for each of torch's elements its index there."""

    slot: int
    index: Index


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A value that depends on parameters alone: a slot of the prologue, and the stored weight that it is a view of.

    Arguments:
        fill: the number it is filled with, where a factory made it so.
    """

    shape: Shape
    slot: int
    view: Matrix | Vector | None = None
    fill: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """A sum over all rows and steps: the gradient of a weight, or a part of it."""

    shape: Shape
    node: int


@dataclass(frozen=True, slots=True, eq=False)
class ExternalGrad:
    """A gradient of what the weight prologue computes from: torch's own autograd computes it at each call."""

    shape: Shape


@dataclass(frozen=True, slots=True, eq=False)
class Unsupported:
    """A value that a graph cannot express; an error only if it is used."""

    shape: Shape
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class RowNumbers(Unsupported):
    """The numbers of the rows, ``torch.arange(N)``, with which a step can only index."""


@dataclass(frozen=True, slots=True, eq=False)
class Masked(Unsupported):
    """The elements of a row at which a mask holds, ``x[mask]``: as many as its values say, so no value of a graph.

    All elements are kept: once written back at the same mask, ``y[mask] = 2 * x[mask]``, they are taken by it.

    Attributes:
        row: the elements, those at which the mask doesn't hold too.
        mask: broadcast to the row.
    """

    row: Row
    mask: Row

    @property
    def of_rows(self) -> bool:
        """Whether the mask picks whole rows."""
        return _is_of_rows(self.mask)

    def is_of(self, mask: Row) -> bool:
        """Whether it is this mask that picks the elements; a mask of rows may be spread over any dimensions."""
        if mask.node != self.mask.node or not np.array_equal(mask.full_index.ravel(), self.mask.full_index.ravel()):
            return False
        return mask.shape == self.mask.shape or (self.of_rows and _is_of_rows(mask))


def _is_of_rows(mask: Row) -> bool:
    return mask.axis == 0 and set(mask.shape[1:]) <= {1}


Value = Row | Complex | Weight | Sum | ExternalGrad | Unsupported


def arranged(shape: Sequence[int]) -> Index:
    """Return 0, 1, 2 ... in ``shape``."""
    return np.arange(math.prod(shape), dtype=np.int64).reshape(tuple(shape))


def runs(flat: Index) -> Iterator[tuple[int, int, int]]:
    """Split ``flat`` into runs (first, length, step) with step 1, or 0 where an element repeats."""
    steps = np.diff(flat)
    cuts = [0]
    position, end = 0, len(flat)
    # A run ends where the step changes, or is neither 0 nor 1.
    while position < end - 1:
        step = int(steps[position])
        if step not in (0, 1) or (step == 1 and flat[position] < 0):
            position += 1
        else:
            same = steps[position:] == step
            position += int(same.argmin()) if not same.all() else len(same)
            position += 1
        if position < end:
            cuts.append(position)
    for start, stop in pairwise([*cuts, end]):
        first = int(flat[start])
        yield first, stop - start, 0 if stop - start > 1 and flat[start + 1] == first else 1


def scalar(value: Any) -> float:
    """Return a Python number as a float."""
    if isinstance(value, complex):
        raise Untraceable("A complex number is filled in where real ones are; use its real and imaginary parts.")
    return float(value)
