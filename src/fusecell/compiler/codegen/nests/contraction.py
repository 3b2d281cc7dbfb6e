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

__all__ = ["Axis", "Contraction", "Pointers", "lane_axis"]

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
        wide: the axis that they are side by side along: another, or that of the lanes, by sixteen.
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
        # Lanes need an axis whose extent the text knows; rows, whose number a call decides, are none.
        if not any(isinstance(axis.extent, int) for axis in (*self.result, *self.summed)):
            self.result.append(Axis("one", 1, 0, 0, self.item))
        self.tile = self._tile(lane_axis(self.result, self.summed, self.item))

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
            for counts, columns in self._portions(rows):
                if tile.sums_lanes:
                    self._partial_sums(columns, height, len(counts))
                else:
                    self._sums(columns, height, counts)

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

    def _portions(self, at: Pointers) -> Iterator[tuple[list[int], Pointers]]:
        """Loop over the columns of a tile; yield the lanes that each of its columns uses, and its addresses."""
        f, tile = self.f, self.tile
        if tile.wide is not tile.lanes:
            for count, of_group in [(LANES, at)] if tile.sums_lanes else self._groups(at):
                for width, columns in self._steps(tile.wide, tile.width, of_group):
                    yield [count] * width, columns
            return
        extent = _known(tile.lanes.extent)
        tail, group = extent % LANES, 0
        portions = split_evenly(ceil_div(extent, LANES), tile.width)
        for number, (count, width) in enumerate(portions):
            # The last portion has the group that is not full: it is written apart.
            is_last = bool(tail) and number == len(portions) - 1
            loops = count - is_last
            stop = group + loops * width
            if loops == 1:
                yield [LANES] * width, at.along(f, tile.lanes, group * LANES)
            elif loops:
                with f.for_range(tile.lanes.name, group * LANES, stop * LANES, width * LANES) as first:
                    yield [LANES] * width, at.along(f, tile.lanes, first)
            if is_last:
                yield [*[LANES] * (width - 1), tail], at.along(f, tile.lanes, stop * LANES)
            group += count * width

    def _groups(self, at: Pointers) -> Iterator[tuple[int, Pointers]]:
        """Loop over groups of sixteen lanes; yield how many of them are used, and their addresses."""
        f, lanes = self.f, self.tile.lanes
        extent = _known(lanes.extent)
        whole = extent - extent % LANES
        if whole == LANES:
            yield LANES, at
        elif whole:
            with f.for_range(lanes.name, 0, whole, LANES) as first:
                yield LANES, at.along(f, lanes, first)
        if extent % LANES:
            yield extent % LANES, at.along(f, lanes, whole)

    # Lanes along the result.

    def _sums(self, at: Pointers, height: int, counts: Sequence[int]) -> None:
        """Write the sums of a tile whose lanes are elements of the result.

        Arguments:
            counts: the lanes that each of its columns uses.
        """
        f, lanes, width = self.f, self.tile.lanes, len(counts)
        places = [(line, column) for line in range(height) for column in range(width)]
        targets = [self._of_pair(at.out, line, column, 2) for line, column in places]
        starts = [self._start(target, counts[column]) for target, (_, column) in zip(targets, places, strict=True)]

        def step(now: Pointers, so_far: Lines) -> Lines:
            a, b = (self._loaded(now, which, height, counts, exact=self.exact[which]) for which in range(2))
            return [
                f.fma(_item(_item(a, line), column), _item(_item(b, line), column), total, "sum")
                for total, (line, column) in zip(so_far, places, strict=True)
            ]

        sums = self._summed(self.summed, at, starts, step)
        for total, target, (_, column) in zip(sums, targets, places, strict=True):
            store_lanes(f, total, target, _known(_out(lanes)), counts[column])

    def _loaded(
        self, at: Pointers, which: int, height: int, counts: Sequence[int], *, exact: bool
    ) -> list[list[Value]]:
        """Load an operand's elements for all accumulators: once for those that share them."""
        tile = self.tile
        columns = range(len(counts)) if self._unit(tile.wide, which) != 0 else (0,)
        lines = range(height) if self._unit(tile.tall, which) != 0 else (0,)
        stride, name = _known(_stride(tile.lanes, which)), "ab"[which]
        return [
            [
                load_lanes(
                    self.f, self._of_pair(at[which], line, column, which), stride, counts[column], name, exact=exact
                )
                for column in columns
            ]
            for line in lines
        ]

    def _of_pair(self, start: Value, line: int, column: int, which: int) -> Value:
        """Return the address of the elements of one accumulator: of a, b, or the result."""
        f, tile = self.f, self.tile
        return f.at(f.at(start, f.mul(line, self._unit(tile.tall, which))), f.mul(column, self._unit(tile.wide, which)))

    def _unit(self, axis: Axis | None, which: int) -> Integer:
        """Return the bytes between the elements of neighbouring accumulators along an axis of the tile."""
        stride = _out(axis) if which == 2 else _stride(axis, which)
        return self.f.mul(stride, LANES if axis is self.tile.lanes else 1)

    def _start(self, target: Value, count: int) -> Value:
        """Return what a sum goes on from."""
        f = self.f
        if self.opens is None:
            return f.zero
        # Accumulators may be the caller's gradient itself.
        so_far = load_lanes(f, target, _known(_out(self.tile.lanes)), count, "so_far", exact=True)
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
        f, lanes = self.f, self.tile.lanes
        extent = _known(lanes.extent)
        whole, tail = extent - extent % LANES, extent % LANES
        places = [(line, column) for line in range(height) for column in range(width)]

        def group(now: Pointers, so_far: Lines, count: int) -> Lines:
            # Behind the last element of the axis are others: as zeros in both operands they add nothing.
            a, b = (self._loaded(now, which, height, [count] * width, exact=True) for which in range(2))
            for operand, stride in ((a, lanes.a), (b, lanes.b)):
                # Both, where both are one number for all lanes: zero times infinity would be NaN.
                if count < LANES and stride == 0:
                    valid = f.first_lanes(count)
                    operand[:] = [[f.select(valid, each, f.zero, "valid") for each in line] for line in operand]
            return [
                f.fma(_item(_item(a, line), column), _item(_item(b, line), column), total, "sum")
                for total, (line, column) in zip(so_far, places, strict=True)
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
        targets = [self._of_pair(at.out, line, column, 2) for line, column in places]
        for first in range(0, len(sums), LANES):
            totals = _joined(f, sums[first : first + LANES])
            for total, target in zip(totals, targets[first : first + LANES], strict=True):
                f.store_scalar(self._gone_on(total, target), target)

    def _gone_on(self, total: Value, target: Value) -> Value:
        """Return a sum added to what it goes on from."""
        f = self.f
        if self.opens is None:
            return total
        so_far = f.load_scalar(target, "so_far")
        return f.fadd(f.select(self.opens, Value("0.0", f.module.scalar), so_far, "start"), total, "total")

    # The tile.

    def _tile(self, lanes: Axis) -> _Tile:
        """Choose the tile that loads least for each multiply-add, of those whose accumulators fit into registers."""
        cost = TileCost(self.f.module.target, self.f.module.dtype)
        others = [axis for axis in self.result if axis is not lanes and axis.extent != 1]
        talls: list[Axis | None] = [None, *others]
        best: tuple[tuple[float, int, int], _Tile] | None = None
        for tall in talls:
            beside = [axis for axis in others if axis is not tall]
            wides = [lanes, *beside] if lanes.out is not None else [None, *beside]
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


def lane_axis(result: Sequence[Axis], summed: Sequence[Axis], item: int) -> Axis:
    """Choose the axis that lanes run along: the one with the least instructions for each term, on any machine."""
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


def _known(number: Integer) -> int:
    assert isinstance(number, int), "lanes run along an axis whose extent and strides are known in the text"
    return number


def _joined(f: Function, partials: Sequence[Value]) -> list[Value]:
    """Return the sums of up to sixteen vectors' lanes: lanes l and l + 8, then l + 4, l + 2, l + 1.

    Two vectors are joined as one, half by half, so that an addition serves as many of them as it has room for.
    """
    vectors, width = list(partials), LANES
    if len(vectors) == 1:
        return [join_lanes(f, "sum", vectors[0])]
    while width > 1:
        width //= 2
        pairs = [vectors[first : first + 2] for first in range(0, len(vectors), 2)]
        # Lanes of the blocks of 2 * width that belong to one sum each: their lower halves, and their upper ones.
        lower = [lane for block in range(0, LANES, 2 * width) for lane in range(block, block + width)]
        upper = [lane + width for lane in lower]
        vectors = []
        for pair in pairs:
            second = pair[1] if len(pair) == 2 else None
            orders = [
                [*half, *(lane + LANES if second is not None else lane for lane in half)] for half in (lower, upper)
            ]
            halves = [f.shuffle(pair[0], second, order, "half") for order in orders]
            vectors.append(f.fadd(halves[0], halves[1], "joined"))
    assert len(vectors) == 1, "sixteen vectors at the most are joined"
    return [f.lane(vectors[0], number, "total") for number in range(len(partials))]


def _item(items: list[Any], position: int) -> Any:
    """Return an item of a list, or the only one that serves all positions."""
    return items[position if len(items) > 1 else 0]
