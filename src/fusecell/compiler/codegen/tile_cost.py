"""What a tile of a matrix product costs, and the tiles that cost least: a small model of a core.

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

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fusecell.compiler.backend.target import Target
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.sizes import DType, ceil_div

__all__ = ["MAX_GROUPS", "MAX_ROWS", "Product", "TileCost", "Tiling", "split_evenly"]

MAX_ROWS = MAX_GROUPS = 8
"""Limits of a tile's rows and column groups, and so of the functions there are to compile."""

_TYPICAL_ROWS = (1, 2, 4, 8, 16, 32)
"""A kernel is compiled once for any number of rows: what it costs is the geometric mean over these."""
_MANY_TILES = 4
"""Tiles below one another for which the width of the tallest is chosen."""


@dataclass(frozen=True, slots=True)
class Product:
    """Products computed by one microkernel call: how many share the operand, and its depth."""

    fused: int
    depth: int


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
        """The tiles for people, rows x column groups."""
        heights = dict.fromkeys((self.max_rows, *range(self.short, 0, -1)))
        return ", ".join(f"{height}x{self.width(height)}" for height in heights)


@dataclass(frozen=True, slots=True)
class TileCost:
    """The cycles of tiles on a target.

    Attributes:
        target: the CPU: its registers, their width, and its rates (`Tuning`).
        dtype: of all numbers.
    """

    target: Target
    dtype: DType

    @property
    def registers_each(self) -> int:
        """Registers of a vector of 16 lanes."""
        return max(1, LANES * self.dtype.itemsize * 8 // self.target.vector_bits)

    @property
    def accumulators(self) -> int:
        """The accumulators of 16 lanes that the registers hold; a quarter of these is left to operands."""
        registers = self.target.registers - self.target.registers // 4
        return max(1, registers // self.registers_each)

    def fits(self, rows: int, columns: int) -> bool:
        """Whether the registers hold a tile's accumulators and the operands of one k."""
        if rows == columns == 1:
            return True
        # The rows' numbers and a vector of weights; or all vectors of weights and a number. One register too many, and
        # LLVM moves accumulators through memory for every k: a tile of 3 x 2 takes 1.7 times as long on AVX2.
        operands = min(rows + self.registers_each, columns * self.registers_each + 1)
        accumulators = rows * columns
        return accumulators <= self.accumulators and accumulators * self.registers_each + operands <= (
            self.target.registers
        )

    def per_k(self, rows: int, columns: int, *, from_l2: bool) -> float:
        """Return the cycles of one k.

        Arguments:
            columns: vectors of 16 lanes of all its products.
            from_l2: whether the panel comes from L2; else it is in L1.
        """
        rates, registers = self.target.tuning, self.registers_each
        cycles = max(
            rows * columns * registers / rates.fma_units,
            (rows + columns * registers) / rates.load_units,
            rates.fma_latency,
        )
        if from_l2:
            cycles = max(cycles, columns * LANES * self.dtype.itemsize / rates.l2_bytes_per_cycle)
        return cycles

    def stage(self, tiling: Tiling, products: Sequence[Product], groups: int, rows: int) -> float:
        """Return the cycles of a stage's products over some rows and all column groups.

        Arguments:
            groups: the stage's column groups.
        """
        rates = self.target.tuning
        width = tiling.width(min(rows, tiling.max_rows) if rows <= tiling.short else tiling.max_rows)
        heights = split_evenly(rows, tiling.short if rows <= tiling.short else tiling.max_rows)
        cycles = 0.0
        for portions, portion in split_evenly(groups, width):
            for product in products:
                columns = product.fused * portion
                panel_bytes = product.depth * columns * LANES * self.dtype.itemsize
                # Half of L1: the other holds the operand's rows, and the accumulators on their way.
                stays = panel_bytes <= rates.l1_bytes / 2
                for position, (tiles, height) in enumerate(heights):
                    moved = 2 * height * columns * self.registers_each / rates.load_units
                    fixed = tiles * (rates.call_cycles + moved)
                    first = 1 if position == 0 else 0  # the first tile reads the panel from L2 in any case
                    fresh, again = (tiles, 0) if not stays else (first, tiles - first)
                    cycles += portions * (
                        fixed
                        + product.depth * fresh * self.per_k(height, columns, from_l2=True)
                        + product.depth * again * self.per_k(height, columns, from_l2=False)
                    )
        return cycles

    def best(
        self, products: Sequence[Product], groups: int, rows: Sequence[int] = _TYPICAL_ROWS
    ) -> tuple[float, Tiling]:
        """Return the cheapest tiling of products, and the logarithm of what it costs, on the average.

        Arguments:
            groups: the column groups of their results.
            rows: the numbers of rows to average over.
        """
        fused = max(product.fused for product in products)
        tallest = max(rows for rows in range(1, MAX_ROWS + 1) if rows == 1 or self.fits(rows, fused))

        def mean(tiling: Tiling) -> float:
            return sum(math.log(self.stage(tiling, products, groups, each)) for each in rows) / len(rows)

        tilings = self._tilings(products, fused, groups, tallest)
        return min(
            ((mean(tiling), tiling) for tiling in tilings), key=lambda pair: (round(pair[0], 9), -pair[1].max_rows)
        )

    def _tilings(self, products: Sequence[Product], fused: int, groups: int, tallest: int) -> list[Tiling]:
        """List the tilings to choose from, by their tallest tile, each height in its best width."""
        tilings = []
        for max_rows in range(1, tallest + 1):
            lower = [self._width(products, fused, groups, rows, rows) for rows in range(1, max_rows)]
            widest = self._width(products, fused, groups, max_rows, _MANY_TILES * max_rows)
            tilings.append(Tiling(max_rows, (*lower, widest)))
        return tilings

    def _width(self, products: Sequence[Product], fused: int, groups: int, height: int, rows: int) -> int:
        """Return the cheapest width of tiles of a height, of which ``rows`` are to be computed."""
        widths = [
            width for width in range(1, min(groups, MAX_GROUPS) + 1) if width == 1 or self.fits(height, width * fused)
        ]
        # A tiling that has this height alone.
        costs = {width: self.stage(Tiling(height, (width,) * height), products, groups, rows) for width in widths}
        return min(widths, key=lambda width: (round(costs[width], 6), -width))


def split_evenly(count: int, most: int) -> list[tuple[int, int]]:
    """Split ``count`` into as few portions of at most ``most`` as there can be: (portions, size), larger ones first."""
    portions = ceil_div(count, most)
    size, larger = divmod(count, portions)
    return [(number, each) for number, each in ((larger, size + 1), (portions - larger, size)) if number]
