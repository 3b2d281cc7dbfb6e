"""The register tile: rows of a value times a panel of weights, added to accumulators.

The same tile sums over rows: there its "rows" are features of one value, and k counts rows.

One tile is ``rows`` x ``products`` x ``blocks`` vectors of accumulators. They are loaded, run over all k in order,
each element by one FMA per k, and stored again: whatever the tile, an element's bits are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from fusecell.compiler.backend.target import Target
from fusecell.compiler.codegen.llvm_builder import LANES, Function, Module, Value

__all__ = ["LINE", "StaticStrides", "Tiling", "budget", "outer_name", "shared_out", "tile_name", "tiling"]


def budget(target: Target, dtype: str) -> int:
    """How many 16-lane accumulators the registers hold, beside operands."""
    registers_each = LANES * (4 if dtype == "f32" else 8) * 8 // target.vector_bits
    spare = target.registers // 4
    return max(1, (target.registers - spare) // max(1, registers_each))


_Ahead = Callable[[Function, Value], str]

# The rows from which a tile has loads to spare for asking for memory in advance, and the bytes that come with each.
_ENOUGH_ROWS = 4
LINE = 64


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tiles of a stage: each height in rows goes with a width in blocks that fills the registers.

    Up to ``short`` rows are one tile, the wider the fewer there are. More rows are shared out evenly to tiles of
    about ``most`` rows, all as wide as the highest: so each panel is read once, whatever is left over.

    Attributes:
        most: rows of the highest tile.
        widths: by height, from one row up.
    """

    most: int
    widths: tuple[int, ...]

    @property
    def short(self) -> int:
        return (self.most + 1) // 2 if self.most > 1 else 0

    def width(self, height: int) -> int:
        """The blocks of columns that a tile of so many rows takes at most."""
        return self.widths[(height if height <= self.short else self.most) - 1]

    @property
    def tall(self) -> range:
        """The heights of the tiles that many rows are shared out to."""
        return range(max(1, self.short), self.most + 1)

    @property
    def kinds(self) -> list[int]:
        """The widths of the kinds of tiles: of one row, two, up to ``short``; of the tall."""
        return [*self.widths[: self.short], self.widths[-1]]

    @property
    def text(self) -> str:
        """The tiles for people, rows x blocks."""
        heights = dict.fromkeys((self.most, *range(self.short, 0, -1)))
        return ", ".join(f"{height}x{self.width(height)}" for height in heights)


def tiling(target: Target, dtype: str, products: int, blocks: int) -> Tiling:
    """The tiles for a stage of so many products at once and blocks of columns."""
    room = max(1, budget(target, dtype) // products)
    most = min(8, room)
    return Tiling(most, tuple(max(1, min(room // rows, blocks, 8)) for rows in range(1, most + 1)))


def shared_out(count: int, most: int) -> list[tuple[int, int]]:
    """``count`` in as few portions of at most ``most`` as there can be, all about equal: how many of which size."""
    portions = -(-count // most)
    least, more = divmod(count, portions)
    return [(many, size) for many, size in ((more, least + 1), (portions - more, least)) if many]


@dataclass(frozen=True, slots=True)
class StaticStrides:
    """What is known of all operands and panels of a kernel's tiles: the bytes between rows, the depth."""

    row: int | None = None
    depth: int | None = None


def tile_name(module: Module, rows: int, products: int, blocks: int, known: StaticStrides) -> str:
    """The tile's function, emitted on first use.

    It takes the accumulators and the bytes between their rows, the operand and the bytes between its rows, the panel
    and the bytes between its blocks, the depth, and memory that will be read later with its bytes for every k.
    """
    name = f"tile.{rows}x{products}x{blocks}"
    if name not in module.made:
        module.made.add(name)
        head = (
            "ptr noalias %acc",
            "i64 %acc.row",
            "ptr %a",
            "i64 %a.row",
            "ptr %panel",
            "i64 %panel.block",
            "i64 %depth",
            "ptr %ahead",
            "i64 %ahead.k",
        )
        f = Function(module, name, *head)
        f.comment(f"{rows} rows x {products} products x {blocks} blocks of {LANES} columns")
        # A distance that is a number costs no addition.
        panel_k = products * module.block
        row: Value = "%a.row" if known.row is None else known.row
        panel_block: Value = "%panel.block" if known.depth is None else known.depth * panel_k
        walk = _Walk(row, module.bytes, "%panel", panel_block, panel_k, module.block)
        _Tile(f, walk, rows, products, blocks, _next_panel if rows >= _ENOUGH_ROWS else None).write()
    return name


def outer_name(module: Module, rows: int, blocks: int) -> str:
    """The tile of a sum over rows, emitted on first use: ``rows`` features of one value by ``blocks`` of another.

    It takes the accumulators; from where these begin; and the two values. Then the bytes between rows of all four, how
    many rows to add; how many such runs of rows there are, and the bytes from one to the next of each value.
    """
    name = f"outer.{rows}x{blocks}"
    if name not in module.made:
        module.made.add(name)
        numbers = ("%acc.row", "%start.row", "%a.k", "%b.k", "%depth", "%runs", "%a.run", "%b.run")
        head = ("ptr %acc", "ptr %start", "ptr %a", "ptr %b", *(f"i64 {number}" for number in numbers))
        f = Function(module, name, *head)
        f.comment(f"{rows} features x {blocks} blocks of {LANES} features")
        walk = _Walk(module.bytes, "%a.k", "%b", module.block, "%b.k", module.bytes)
        tile = _Tile(f, walk, rows, 1, blocks, _next_sums(rows) if rows >= _ENOUGH_ROWS else None)
        tile.write(runs=("%a.run", "%b.run"), start=("%start", "%start.row"))
    return name


def _next_panel(f: Function, turn: Value) -> str:
    return f.at("%ahead", f.mul(turn, "%ahead.k"), "ahead")


def _next_sums(rows: int) -> _Ahead:
    """The accumulators of the tile below, a line for every k: eight rows of them, then what is right of it."""

    def line(f: Function, turn: Value) -> str:
        row, right = f.let("row", f"and i64 {turn}, 7"), f.let("right", f"lshr i64 {turn}, 3")
        below = f.at("%acc", f.mul("%acc.row", f.add(row, rows)), "below")
        return f.at(below, f.mul(right, LINE), "ahead")

    return line


@dataclass(frozen=True, slots=True)
class _Walk:
    """How a tile walks over its operands: bytes between rows and between k of %a; blocks and k of the other."""

    row: Value
    k: Value
    panel: str
    block: Value
    panel_k: Value
    align: int


@dataclass
class _Tile:
    """The body of a tile's function: loads, multiply-adds over all k, stores.

    Attributes:
        ahead: memory that is asked for meanwhile, a line for every k.
    """

    f: Function
    walk: _Walk
    rows: int
    products: int
    blocks: int
    ahead: _Ahead | None

    def write(self, runs: tuple[Value, Value] | None = None, start: tuple[str, Value] = ("%acc", "%acc.row")) -> None:
        """All of it.

        Arguments:
            runs: k goes on in runs, so many bytes from one to the next of %a and of the other.
            start: from where the accumulators begin, and the bytes between its rows.
        """
        f, block = self.f, self.f.module.block
        axes = (range(self.rows), range(self.products), range(self.blocks))
        self._keys = list(itertools.product(*axes))
        where, begin = self._vectors("%acc", "%acc.row"), self._vectors(*start)
        sums = [f.load(place, f"first.{_label(key)}", block) for key, place in zip(self._keys, begin, strict=True)]
        if runs is None:
            sums = self._multiply(sums, "%a", self.walk.panel, 0)
        else:
            names = [f"run.{_label(key)}" for key in self._keys]
            with f.loop_carrying("run", 0, "%runs", sums, some=True, names=names) as (run, carried):
                a, other = f.at("%a", f.mul(run, runs[0])), f.at(self.walk.panel, f.mul(run, runs[1]))
                carried[:] = self._multiply(carried[:], a, other, f.mul(run, "%depth"))
            sums = carried
        for place, value in zip(where, sums, strict=True):
            f.store(value, place, block)
        f.end()

    def _vectors(self, start: str, row: Value) -> list[str]:
        """Where each accumulator is in memory, rows so many bytes apart."""
        f = self.f
        rows = [f.at(start, f.mul(row, r), f"{start[1:]}.r{r}") for r in range(self.rows)]
        return [f.at(rows[r], (p * self.blocks + b) * f.module.block) for r, p, b in self._keys]

    def _multiply(self, sums: list[str], a: str, panel: str, turn: Value) -> list[str]:
        """The loop over k; ``turn`` counts those before."""
        f, walk = self.f, self.walk
        names = [f"c.{_label(key)}" for key in self._keys]
        own_rows = [f.mul(walk.row, r) for r in range(self.rows)]
        own_blocks = [f.mul(walk.block, b) for b in range(self.blocks)]
        with f.loop_carrying("k", 0, "%depth", sums, some=True, names=names) as (k, carried):
            # Constant distances go last: they become part of the instruction's address.
            a_here, panel_here = f.at(a, f.mul(k, walk.k), "a.k"), f.at(panel, f.mul(k, walk.panel_k), "panel.k")
            if self.ahead is not None:
                f.prefetch(self.ahead(f, f.add(k, turn)))

            def weight(p: int, b: int) -> str:
                row = f.at(panel_here, own_blocks[b], f"panel.b{b}")
                return f.load(f.at(row, p * f.module.block), f"w{p}.{b}", walk.align)

            def number(r: int) -> str:
                return f.load_splat(f.at(a_here, own_rows[r], f"a.r{r}"), f"a{r}")

            # The fewer of the two operands stay in registers, the others come one by one.
            columns = [(p, b) for b in range(self.blocks) for p in range(self.products)]
            rows = range(self.rows)
            if self.rows < len(columns):
                numbers = [number(r) for r in rows]
                pairs = ((r, p, b, numbers[r], w) for p, b in columns for w in (weight(p, b),) for r in rows)
            else:
                vectors = {(p, b): weight(p, b) for p, b in columns}
                pairs = ((r, p, b, each, vectors[p, b]) for r in rows for each in (number(r),) for p, b in columns)
            places = {key: place for place, key in enumerate(self._keys)}
            for r, p, b, value, w in pairs:
                place = places[r, p, b]
                carried[place] = f.fma(value, w, carried[place], f"n.{_label((r, p, b))}")
        return carried


def _label(key: tuple[int, int, int]) -> str:
    return f"r{key[0]}p{key[1]}b{key[2]}"
