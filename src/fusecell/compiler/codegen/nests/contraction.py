"""Contractions: sums of products of two arrays along axes, as a loop nest around a tile of accumulators in registers::

    for axes of the result, but two:
        for tile of these two:                  ``height`` x ``width`` accumulators of sixteen lanes
            accumulators = 0
            for summed axes:                    in order, so that each sum has one order of additions
                accumulators += a * b           what is loaded once serves a whole row or column of the tile
            store the accumulators

Lanes run along an axis of the result: neighbours are loaded as a vector, and what they share as one number; each sum is
then from its first term to its last. Or, where neighbours are along a summed axis only, lanes run along that, and the
sixteen partial sums of an element are joined pairwise at the end. Which of them depends on sizes and strides alone, so
that the bits are the same on every machine; the tile's height and width, which the machine decides, change none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_text import Integer, Value
from fusecell.compiler.codegen.nests.lanes import load_lanes, store_lanes
from fusecell.compiler.codegen.stage_body import join_lanes
from fusecell.compiler.codegen.tile_cost import TileCost, split_evenly
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.sizes import ceil_div

__all__ = ["Axis", "Contraction", "Pointers"]

_STRIDED = 12.0
"""Instructions of a load, or store, of sixteen elements that are no neighbours, about: one each, and moves of lanes."""
_JOIN = 10.0
"""Instructions that join sixteen partial sums, and store a number."""
_ENOUGH = 8
"""Accumulators that hide the latency of multiply-adds: four cycles, at two a cycle."""
_MOST = 8
"""Height and width of a tile, at the most."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Axis of a contraction: its extent, and the bytes between its elements in both operands and in the result.

    Attributes:
        out: None for an axis that is summed.
    """

    name: str
    extent: Integer
    a: Integer
    b: Integer
    out: Integer | None


class Pointers(NamedTuple):
    """Addresses in both operands and in the result."""

    a: Value
    b: Value
    out: Value

    def along(self, f: Function, axis: Axis, position: Integer) -> Pointers:
        """Return the addresses at a position of an axis."""
        out = 0 if axis.out is None else axis.out
        strides = (axis.a, axis.b, out)
        return Pointers(*(f.at(at, f.mul(position, stride)) for at, stride in zip(self, strides, strict=True)))


@dataclass(frozen=True, slots=True)
class _Tile:
    """Tile of accumulators.

    Attributes:
        lanes: the axis that lanes run along, of the result or summed.
        tall: the axis that accumulators are below one another along; None for a height of 1.
        wide: the axis that they are side by side along: that of the lanes if it is the result's, by sixteen.
    """

    lanes: Axis
    tall: Axis | None
    wide: Axis | None
    height: int
    width: int

    @property
    def sums_lanes(self) -> bool:
        """Whether each accumulator holds partial sums of one element."""
        return self.lanes.out is None


Body = Callable[[Pointers], None]
Lines = list[Value]


class Contraction:
    """Writer of one contraction into a function.

    Arguments:
        result: axes of the result.
        summed: axes that are summed, in the order of the sums.
        exact: for each operand, whether nothing behind its last element may be read.
        opens: for a sum that goes on: whether it begins in this call; without it there is nothing to go on from.
    """

    def __init__(
        self,
        f: Function,
        result: Sequence[Axis],
        summed: Sequence[Axis],
        exact: tuple[bool, bool] = (False, False),
        opens: Value | None = None,
    ) -> None:
        self.f, self.exact, self.opens = f, exact, opens
        self.item = f.module.itemsize
        self.result, self.summed = list(result), list(summed)
        if not self.result:
            self.result = [Axis("one", 1, 0, 0, self.item)]
        self.tile = self._tile(_lane_axis(self.result, self.summed, self.item))

    @property
    def sums_lanes(self) -> bool:
        """Whether lanes run along a summed axis, and partial sums are joined."""
        return self.tile.sums_lanes

    def emit(self, at: Pointers, shared_by: tuple[Value, Value] | None = None) -> None:
        """Write the nest.

        Arguments:
            shared_by: the number of the thread, and of threads, among which the result is divided.
        """
        tile = self.tile
        inside = [axis for axis in (tile.tall, tile.wide) if axis is not None]
        outside = [axis for axis in self.result if axis not in inside and axis is not tile.lanes]
        shared = max(outside, key=lambda axis: axis.extent if isinstance(axis.extent, int) else 0, default=None)
        if shared_by is not None and shared is None:
            with self.f.if_(self.f.eq(shared_by[0], 0, "is_first_thread"), "alone"):
                self._outer(outside, at, None, None)
        else:
            self._outer(outside, at, shared if shared_by is not None else None, shared_by)

    def _outer(
        self, axes: Sequence[Axis], at: Pointers, shared: Axis | None, threads: tuple[Value, Value] | None
    ) -> None:
        """Write the loops over the axes of the result that are not in the tile."""
        if not axes:
            self._tiles(at)
            return
        axis, f = axes[0], self.f
        first, last = (0, axis.extent) if axis is not shared or threads is None else f.partition(axis.extent, *threads)
        if axis.extent == 1 and axis is not shared:
            self._outer(axes[1:], at, shared, threads)
            return
        with f.for_range(axis.name, first, last) as position:
            self._outer(axes[1:], at.along(f, axis, position), shared, threads)

    # Tiles.

    def _tiles(self, at: Pointers) -> None:
        tile = self.tile
        for height, rows in self._steps(tile.tall, tile.height, at):
            for width, tail, columns in self._portions(rows):
                if tile.sums_lanes:
                    self._partial_sums(columns, height, width)
                else:
                    self._sums(columns, height, width, tail)

    def _steps(self, axis: Axis | None, most: int, at: Pointers) -> Iterator[tuple[int, Pointers]]:
        """Loop over an axis in steps; yield the size of a step and its addresses, once for each size."""
        f = self.f
        if axis is None:
            yield 1, at
        elif isinstance(axis.extent, int):
            first = 0
            for count, size in split_evenly(axis.extent, most):
                if count == 1:
                    yield size, at.along(f, axis, first)
                else:
                    with f.for_range(axis.name, first, first + count * size, size) as position:
                        yield size, at.along(f, axis, position)
                first += count * size
        else:
            # How many there are is known at the call: of what is left over each next step takes the half.
            start: Integer = 0
            while most:
                stop = f.sub(axis.extent, f.urem(f.sub(axis.extent, start), most, "left_over"), "whole")
                with f.for_range(axis.name, start, stop, most) as position:
                    yield most, at.along(f, axis, position)
                start, most = stop, most // 2

    def _portions(self, at: Pointers) -> Iterator[tuple[int, int, Pointers]]:
        """Loop over the columns of a tile; yield its width, the lanes of its last group, and its addresses."""
        f, tile = self.f, self.tile
        if tile.wide is not tile.lanes:
            for width, columns in self._steps(tile.wide, tile.width, at):
                yield width, LANES, columns
            return
        extent = tile.lanes.extent
        assert isinstance(extent, int), "lanes run along an axis of known extent"
        tail, group = extent % LANES, 0
        portions = split_evenly(ceil_div(extent, LANES), tile.width)
        for number, (count, width) in enumerate(portions):
            # The last portion has the group that is not full: it is written apart.
            is_last = bool(tail) and number == len(portions) - 1
            loops = count - is_last
            stop = group + loops * width
            if loops == 1:
                yield width, LANES, at.along(f, tile.lanes, group * LANES)
            elif loops:
                with f.for_range(tile.lanes.name, group * LANES, stop * LANES, width * LANES) as first:
                    yield width, LANES, at.along(f, tile.lanes, first)
            if is_last:
                yield width, tail, at.along(f, tile.lanes, stop * LANES)
            group += count * width

    # Lanes along the result.

    def _sums(self, at: Pointers, height: int, width: int, tail: int) -> None:
        """Write the sums of a tile whose lanes are elements of the result."""
        f, lanes, tall = self.f, self.tile.lanes, self.tile.tall
        counts = [LANES] * (width - 1) + [tail]
        targets = [
            f.at(f.at(at.out, f.mul(line, _out(tall))), group * LANES * _out(lanes))
            for line in range(height)
            for group in range(width)
        ]
        starts = [
            self._start(target, counts[number % width]) for number, target in enumerate(targets)
        ]

        def step(now: Pointers, so_far: Lines) -> Lines:
            a, b = (
                [
                    [
                        load_lanes(f, self._in_tile(now, which, line, group), _known(stride), counts[group], name,
                                   exact=self.exact[which])
                        for group in (range(width) if stride else (0,))
                    ]
                    for line in (range(height) if _stride(tall, which) else (0,))
                ]
                for which, name, stride in ((0, "a", lanes.a), (1, "b", lanes.b))
            )  # fmt: skip
            return [
                f.fma(_item(_item(a, line), group), _item(_item(b, line), group), so_far[line * width + group], "sum")
                for line in range(height)
                for group in range(width)
            ]

        sums = self._summed(self.summed, at, starts, step)
        for number, (total, target) in enumerate(zip(sums, targets, strict=True)):
            store_lanes(f, total, target, _known(_out(lanes)), counts[number % width])

    def _in_tile(self, at: Pointers, which: int, line: int, group: int) -> Value:
        """Return the address of an operand's elements for one accumulator."""
        f, tile = self.f, self.tile
        start = f.at(at[which], f.mul(line, _stride(tile.tall, which)))
        return f.at(start, f.mul(group * LANES, _stride(tile.lanes, which)))

    def _start(self, target: Value, count: int) -> Value:
        """Return what a sum goes on from."""
        f = self.f
        if self.opens is None:
            return f.zero
        so_far = load_lanes(f, target, _known(_out(self.tile.lanes)), count, "so_far")
        return f.select(self.opens, f.zero, so_far, "start")

    def _summed(
        self,
        axes: Sequence[Axis],
        at: Pointers,
        so_far: Lines,
        step: Callable[[Pointers, Lines], Lines],
    ) -> Lines:
        """Write the loops over the summed axes, which carry the accumulators in registers."""
        if not axes:
            return step(at, so_far)
        axis, f = axes[0], self.f
        if axis.extent == 1:
            return self._summed(axes[1:], at, so_far, step)
        with f.for_range_carrying(axis.name, 0, axis.extent, so_far) as (position, carried):
            carried[:] = self._summed(axes[1:], at.along(f, axis, position), list(carried), step)
        return carried

    # Lanes along a summed axis.

    def _partial_sums(self, at: Pointers, height: int, width: int) -> None:
        """Write the sums of a tile whose accumulators are sixteen partial sums each, and join them."""
        f, tile = self.f, self.tile
        lanes, extent = tile.lanes, tile.lanes.extent
        assert isinstance(extent, int), "lanes run along an axis of known extent"
        whole, tail = extent - extent % LANES, extent % LANES

        def group(now: Pointers, so_far: Lines, count: int) -> Lines:
            # Behind the last element of the axis are others: as zeros in both operands they add nothing.
            a, b = (
                [
                    [
                        load_lanes(f, self._of_pair(now, which, line, column), _known(_stride(lanes, which)), count,
                                   name, exact=True)
                        for column in (range(width) if _stride(tile.wide, which) else (0,))
                    ]
                    for line in (range(height) if _stride(tile.tall, which) else (0,))
                ]
                for which, name in ((0, "a"), (1, "b"))
            )  # fmt: skip
            if count < LANES and 0 in (lanes.a, lanes.b):
                which = (a, b)[lanes.b == 0]
                which[:] = [
                    [f.select(f.first_lanes(count), value, f.zero, "valid") for value in line] for line in which
                ]
            return [
                f.fma(_item(_item(a, line), column), _item(_item(b, line), column), so_far[line * width + column], "sum")
                for line in range(height)
                for column in range(width)
            ]

        def step(now: Pointers, so_far: Lines) -> Lines:
            sums = so_far
            if whole:
                with f.for_range_carrying(lanes.name, 0, whole, so_far, step=LANES) as (first, carried):
                    carried[:] = group(now.along(f, lanes, first), list(carried), LANES)
                sums = carried
            return group(now.along(f, lanes, whole), sums, tail) if tail else sums

        others = [axis for axis in self.summed if axis is not lanes]
        sums = self._summed(others, at, [f.zero] * (height * width), step)
        for number, partial in enumerate(sums):
            line, column = divmod(number, width)
            target = f.at(f.at(at.out, f.mul(line, _out(tile.tall))), f.mul(column, _out(tile.wide)))
            total = join_lanes(f, "sum", partial)
            if self.opens is not None:
                so_far = f.load_scalar(target, "so_far")
                start = f.select(self.opens, Value("0.0", f.module.scalar), so_far, "start")
                total = f.fadd(start, total, "total")
            f.store_scalar(total, target)

    def _of_pair(self, at: Pointers, which: int, line: int, column: int) -> Value:
        f, tile = self.f, self.tile
        start = f.at(at[which], f.mul(line, _stride(tile.tall, which)))
        return f.at(start, f.mul(column, _stride(tile.wide, which)))

    # The tile.

    def _tile(self, lanes: Axis) -> _Tile:
        """Choose the tile that loads least for each multiply-add, of those whose accumulators fit into registers."""
        cost = TileCost(self.f.module.target, self.f.module.dtype)
        others = [axis for axis in self.result if axis is not lanes and axis.extent != 1]
        talls: list[Axis | None] = [None, *others]
        best: tuple[tuple[float, int, int], _Tile] | None = None
        for tall in talls:
            wides = [lanes] if lanes.out is not None else [None, *(axis for axis in others if axis is not tall)]
            for wide in wides:
                for height in range(1, _extent(tall, 1) + 1):
                    for width in range(1, _extent(wide, LANES if wide is lanes else 1) + 1):
                        if not cost.fits(height, width):
                            continue
                        tile = _Tile(lanes, tall, wide, height, width)
                        number = height * width
                        key = (round(self._loads(tile) / number, 3), -min(number, _ENOUGH), number)
                        if best is None or key < best[0]:
                            best = key, tile
        assert best is not None, "a tile of one accumulator always fits"
        return best[1]

    def _loads(self, tile: _Tile) -> float:
        """Return the instructions of all loads of one step of a tile."""
        total = 0.0
        for which in range(2):
            loads = (tile.height if _stride(tile.tall, which) else 1) * (tile.width if _stride(tile.wide, which) else 1)
            total += loads * _load_cost(_stride(tile.lanes, which), self.item)
        return total


def _extent(axis: Axis | None, unit: int) -> int:
    """Return how many accumulators a tile may have along an axis."""
    if axis is None:
        return 1
    return min(_MOST, ceil_div(axis.extent, unit)) if isinstance(axis.extent, int) else _MOST


def _lane_axis(result: Sequence[Axis], summed: Sequence[Axis], item: int) -> Axis:
    """Choose the axis that lanes run along: the one with the least instructions for each term."""
    terms = 1
    for axis in summed:
        terms *= axis.extent if isinstance(axis.extent, int) else 1

    def cost(axis: Axis) -> float:
        assert isinstance(axis.extent, int)
        vectors = ceil_div(axis.extent, LANES)
        each = 1.0 + _load_cost(axis.a, item) + _load_cost(axis.b, item)
        use = axis.extent / (vectors * LANES)
        if axis.out is not None:
            return (each + (1.0 if axis.out == item else _STRIDED) / terms) / use
        return each / use + _JOIN * LANES / terms

    known = [axis for axis in (*result, *summed) if isinstance(axis.extent, int)]
    return min(known, key=cost)


def _load_cost(stride: Integer, item: int) -> float:
    return 1.0 if stride in (0, item) else _STRIDED


def _stride(axis: Axis | None, which: int) -> Integer:
    if axis is None:
        return 0
    return axis.b if which else axis.a


def _out(axis: Axis | None) -> Integer:
    return 0 if axis is None or axis.out is None else axis.out


def _known(stride: Integer) -> int:
    assert isinstance(stride, int), "lanes have a stride that is known when the kernel is written"
    return stride


def _item(items: list[Any], position: int) -> Any:
    """Return an item of a list, or the only one that serves all positions."""
    return items[position if len(items) > 1 else 0]
