"""Cost model of the tiles of a matrix product on one core, by which the cheapest are chosen.

A tile of ``rows`` x ``columns`` vectors of 16 lanes, each ``v`` registers wide, takes for one k the longest of::

    rows * columns * v / fma units                  cycles of multiply-adds
    (rows + columns * v) / load units               cycles of loads: a broadcast number a row, a vector a column
    the latency of a multiply-add                   as each accumulator waits for its last sum
    columns * bytes of a vector / bytes from L2     where the panel doesn't stay in L1 between two tiles

and, once for all k, the passing of its accumulators through memory and its calls. Wide tiles load fewer numbers for
each weight, tall ones fewer weights for each number: which is cheaper depends on the registers, on whether the panel
fits in L1, and on how many rows there are. That is the trade of Goto and van de Geijn (ACM TOMS 2008) and of the
analytical model for BLIS (Low, Igual, Smith and Quintana-Orti, ACM TOMS 2016).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from fusecell.compiler.backend.target import Target
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.sizes import DType, ceil_div

__all__ = [
    "MAX_GROUPS", "MAX_ROWS", "Product", "TileCost", "TileReport", "Tiling", "cheapest", "cheapest_tiling",
    "split_evenly",
]  # fmt: skip

MAX_ROWS = MAX_GROUPS = 8
"""Limits of a tile's rows and column groups, and so of the number of functions to compile."""

_TYPICAL_ROWS = (1, 2, 4, 16)
"""A kernel is compiled once for any number of rows: what it costs is the geometric mean over these."""
_INDIFFERENT = 0.02
_MANY_TILES = 4
"""Tiles below one another for which the width of the tallest is chosen: the first reads a panel, the others again."""


@dataclass(frozen=True, slots=True)
class Product:
    """Products computed by one microkernel call.

    Attributes:
        fused: how many share the operand.
        depth: of the operand.
        pairs: whether a panel's word has the weights of two k, and so two numbers of a row are in use at a time.
    """

    fused: int
    depth: int
    pairs: bool = False


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of a stage: each height in rows goes with a width in column groups.

    Up to ``short`` rows are one tile, the wider the fewer rows it has. More rows are split evenly into tall tiles of
    about ``max_rows``, all as wide as the tallest: so each panel is read once, however many rows are left over.

    Attributes:
        max_rows: rows of the tallest tile.
        widths: by height, from one row up.
    """

    max_rows: int
    widths: tuple[int, ...]

    @property
    def short(self) -> int:
        """The most rows that are one tile."""
        return (self.max_rows + 1) // 2 if self.max_rows > 1 else 0

    def width(self, height: int) -> int:
        """Return the column groups of a tile of ``height`` rows, at most."""
        return self.widths[(height if height <= self.short else self.max_rows) - 1]

    @property
    def tall(self) -> range:
        """The heights of the tiles that many rows are split into."""
        return range(max(1, self.short), self.max_rows + 1)

    @property
    def kinds(self) -> list[int]:
        """The widths of the kinds of tiles: of one row, of two, up to ``short``; then of the tall."""
        return [*self.widths[: self.short], self.widths[-1]]

    @property
    def text(self) -> str:
        """The tiles as text, rows x column groups."""
        heights = dict.fromkeys((self.max_rows, *range(self.short, 0, -1)))
        return ", ".join(f"{height}x{self.width(height)}" for height in heights)


class TileReport(NamedTuple):
    """What was chosen for a stage, and what it costs by the model.

    Attributes:
        tiles: rows x column groups of each kind of tile.
        fused: products computed at once.
        rows: the number of rows that the next two are of.
        cycles: of all products of the stage.
        share: of these cycles, those in which every unit for multiply-adds would be busy.
    """

    tiles: str
    fused: int
    rows: int
    cycles: float
    share: float


class TileCost:
    """The cycles of tiles on a target.

    Attributes:
        rates: of the target.
        registers: vector registers it has.
        l1_bytes: bytes of its first cache.
        registers_each: registers of a vector of 16 lanes.
        vector_bytes: bytes of such a vector.
        accumulators: those of 16 lanes that the registers hold; a quarter of these is left to operands.
    """

    def __init__(self, target: Target, dtype: DType) -> None:
        self.rates, self.registers, self.l1_bytes = target.tuning, target.registers, target.l1_bytes
        self.vector_bytes = LANES * dtype.itemsize
        self.registers_each = max(1, self.vector_bytes * 8 // target.vector_bits)
        self.accumulators = max(1, (target.registers - target.registers // 4) // self.registers_each)

    def fits(self, rows: int, columns: int, *, pairs: bool = False) -> bool:
        """Whether the registers hold a tile's accumulators and the operands of one k, or of a pair."""
        if rows == columns == 1:
            return True
        # The rows' numbers and a vector of weights; or all vectors of weights and a number. One register too many, and
        # LLVM moves accumulators through memory for every k: a tile of 3 x 2 takes 1.7 times as long on AVX2.
        operands = min(rows + self.registers_each, columns * self.registers_each + 1)
        if pairs:  # two numbers a row, a word, and the weights made of it
            operands = 2 * rows + self.registers_each + 1
        accumulators = rows * columns
        needed = accumulators * self.registers_each + operands
        return accumulators <= self.accumulators and needed <= self.registers

    def per_k(self, rows: int, columns: int, *, from_l2: bool) -> float:
        """Return the cycles of one k.

        Arguments:
            columns: vectors of 16 lanes of all its products.
            from_l2: whether the panel comes from L2; else it is in L1.
        """
        rates, registers = self.rates, columns * self.registers_each
        cycles = max(
            rows * registers / rates.fma_units,
            (rows + registers) / rates.load_units,
            rates.fma_latency,
        )
        if from_l2:
            cycles = max(cycles, columns * self.vector_bytes / rates.l2_bytes_per_cycle)
        return cycles

    def stage(self, tiling: Tiling, products: Sequence[Product], groups: int, rows: int) -> float:
        """Return the cycles of a stage's products over some rows and all column groups.

        Arguments:
            groups: the stage's column groups.
        """
        is_one_tile = rows <= tiling.short
        heights = [(1, rows)] if is_one_tile else split_evenly(rows, tiling.max_rows)
        width = tiling.width(rows if is_one_tile else tiling.max_rows)
        return sum(
            portions * self.portion(heights, product, portion)
            for portions, portion in split_evenly(groups, width)
            for product in products
        )

    def describe(self, tiling: Tiling, products: Sequence[Product], groups: int) -> TileReport:
        """Return the tiles of a stage and what they cost, for people."""
        rows = _TYPICAL_ROWS[-1]
        cycles = self.stage(tiling, products, groups, rows)
        columns = sum(product.fused * product.depth for product in products) * groups
        ideal = rows * columns * self.registers_each / self.rates.fma_units
        return TileReport(tiling.text, max(product.fused for product in products), rows, cycles, ideal / cycles)

    def portion(self, heights: Sequence[tuple[int, int]], product: Product, groups: int) -> float:
        """Return the cycles of all tiles over some column groups.

        Arguments:
            heights: how many tiles of which height there are.
        """
        rates, columns = self.rates, product.fused * groups
        registers = columns * self.registers_each
        # Half of L1: the other holds the operand's rows, and the accumulators on their way.
        stays_in_l1 = product.depth * columns * self.vector_bytes <= self.l1_bytes / 2
        cycles = 0.0
        for position, (tiles, height) in enumerate(heights):
            from_l2 = 0 if stays_in_l1 and position else 1 if stays_in_l1 else tiles
            per_k = from_l2 * self.per_k(height, columns, from_l2=True)
            if tiles > from_l2:
                per_k += (tiles - from_l2) * self.per_k(height, columns, from_l2=False)
            transfer = 2 * height * registers / rates.load_units
            cycles += product.depth * per_k + tiles * (rates.call_cycles + transfer)
        return cycles

    def best(self, products: Sequence[Product], groups: int, rows: Sequence[int]) -> tuple[float, Tiling]:
        """Return the cheapest tiling of products, and the logarithm of what it costs, on the average.

        Arguments:
            groups: the column groups of their results.
            rows: the numbers of rows to average over.
        """
        fused, pairs = max(product.fused for product in products), any(product.pairs for product in products)
        heights = range(1, MAX_ROWS + 1)
        tallest = max(height for height in heights if height == 1 or self.fits(height, fused, pairs=pairs))
        # Of one row up: the widths of a tile alone, and of one among many.
        alone = [self._width(products, fused, groups, height, 1) for height in range(1, tallest)]
        candidates = []
        for max_rows in range(tallest, tallest // 2, -1):
            widest = self._width(products, fused, groups, max_rows, _MANY_TILES)
            tiling = Tiling(max_rows, (*alone[: max_rows - 1], widest))
            logarithms = [math.log(self.stage(tiling, products, groups, each)) for each in rows]
            candidates.append((sum(logarithms) / len(logarithms), tiling))
        return cheapest(candidates)

    def _width(self, products: Sequence[Product], fused: int, groups: int, height: int, tiles: int) -> int:
        """Return the cheapest width of tiles of a height, of which there are ``tiles`` below one another."""
        widest, pairs = min(groups, MAX_GROUPS), any(product.pairs for product in products)
        costs = {}
        for width in range(widest, 0, -1):
            if width > 1 and not self.fits(height, width * fused, pairs=pairs):
                continue
            portions = split_evenly(groups, width)
            if portions[0][1] < width:
                continue  # as many portions as of a narrower tile
            costs[width] = sum(
                count * self.portion([(tiles, height)], product, portion)
                for count, portion in portions
                for product in products
            )
        # Of equals the first: the widest.
        return min(costs, key=lambda width: round(costs[width], 6))


T = TypeVar("T")


def cheapest(candidates: Sequence[tuple[float, T]]) -> tuple[float, T]:
    """Return the first of the candidates that costs no more than 2 % above the least: the model knows no better.

    Arguments:
        candidates: the logarithm of what each costs, and it.
    """
    least = min(cost for cost, _ in candidates)
    return next(candidate for candidate in candidates if candidate[0] <= least + _INDIFFERENT)


@functools.lru_cache(maxsize=1024)
def cheapest_tiling(
    target: Target, dtype: DType, products: tuple[Product, ...], groups: int, rows: tuple[int, ...] = _TYPICAL_ROWS
) -> tuple[float, Tiling]:
    """Return `TileCost.best`, worked out once."""
    return TileCost(target, dtype).best(products, groups, rows)


def split_evenly(count: int, most: int) -> list[tuple[int, int]]:
    """Split ``count`` evenly into as few portions of at most ``most`` as possible: (portions, size), larger first."""
    portions = ceil_div(count, most)
    size, larger = divmod(count, portions)
    return [(number, each) for number, each in ((larger, size + 1), (portions - larger, size)) if number]
