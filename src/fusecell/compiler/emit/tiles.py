"""The register tile: rows of a value times a panel of weights, added to accumulators.

The same tile sums over rows: there its "rows" are features of one value, and k counts rows.

One tile is ``rows`` x ``products`` x ``blocks`` vectors of accumulators. They are loaded, run over all k in order,
each element by one FMA per k, and stored again: whatever the tile, an element's bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fusecell.compiler.emit.text import LANES, Function, Module, Value
from fusecell.compiler.target import Target

__all__ = ["LINE", "KnownWalk", "Tiling", "budget", "outer_name", "shared_out", "tile_name", "tiling"]


def budget(target: Target, dtype: str) -> int:
    """How many 16-lane accumulators the registers hold, beside operands."""
    registers_each = LANES * (4 if dtype == "f32" else 8) * 8 // target.vector_bits
    spare = target.registers // 4
    return max(1, (target.registers - spare) // max(1, registers_each))


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
class KnownWalk:
    """What is known of all operands and panels of a kernel's tiles: the bytes between rows, the depth."""

    row: int | None = None
    depth: int | None = None


def tile_name(module: Module, rows: int, products: int, blocks: int, known: KnownWalk) -> str:
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
        _tile(f, walk, rows, products, blocks, _next_panel if rows >= _ENOUGH_ROWS else None)
    return name


def outer_name(module: Module, rows: int, blocks: int) -> str:
    """The tile of a sum over rows, emitted on first use: ``rows`` features of one value by ``blocks`` of another.

    It takes the accumulators and the bytes between their rows, the two values and the bytes between the rows of each,
    and how many rows to add.
    """
    name = f"outer.{rows}x{blocks}"
    if name not in module.made:
        module.made.add(name)
        head = ("ptr noalias %acc", "i64 %acc.row", "ptr %a", "i64 %a.k", "ptr %b", "i64 %b.k", "i64 %depth")
        f = Function(module, name, *head)
        f.comment(f"{rows} features x {blocks} blocks of {LANES} features")
        walk = _Walk(module.bytes, "%a.k", "%b", module.block, "%b.k", module.bytes)
        _tile(f, walk, rows, 1, blocks, _next_sums(rows) if rows >= _ENOUGH_ROWS else None)
    return name


def _next_panel(f: Function) -> str:
    return f.at("%ahead", f.mul("%k", "%ahead.k"), "ahead")


def _next_sums(rows: int) -> Callable[[Function], str]:
    """The accumulators of the tile below, a line for every k: eight rows of them, then what is right of it."""

    def line(f: Function) -> str:
        row, right = f.let("row", "and i64 %k, 7"), f.let("right", "lshr i64 %k, 3")
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


def _tile(
    f: Function, walk: _Walk, rows: int, products: int, blocks: int, ahead: Callable[[Function], str] | None
) -> None:
    """Loads, multiply-adds over all k, stores; ``ahead`` is memory that is asked for meanwhile, a line for every k."""
    block = f.module.block
    keys = [(r, p, b) for r in range(rows) for p in range(products) for b in range(blocks)]
    acc_rows = [f.at("%acc", f.mul("%acc.row", r), f"acc.r{r}") for r in range(rows)]
    where = {(r, p, b): f.at(acc_rows[r], (p * blocks + b) * block) for r, p, b in keys}
    sums = [f.load(where[key], f"first.{_label(key)}", block) for key in keys]
    names = [f"c.{_label(key)}" for key in keys]
    own_rows = [f.mul(walk.row, r) for r in range(rows)]
    own_blocks = [f.mul(walk.block, b) for b in range(blocks)]
    with f.loop_carrying("k", 0, "%depth", sums, some=True, names=names) as (k, carried):
        # Constant distances go last: they become part of the instruction's address.
        a_here, panel_here = f.at("%a", f.mul(k, walk.k), "a.k"), f.at(walk.panel, f.mul(k, walk.panel_k), "panel.k")
        if ahead is not None:
            f.prefetch(ahead(f))

        def weight(p: int, b: int) -> str:
            row = f.at(panel_here, own_blocks[b], f"panel.b{b}")
            return f.load(f.at(row, p * block), f"w{p}.{b}", walk.align)

        def number(r: int) -> str:
            return f.load_splat(f.at(a_here, own_rows[r], f"a.r{r}"), f"a{r}")

        # The fewer of the two operands stay in registers, the others come one by one.
        columns = [(p, b) for b in range(blocks) for p in range(products)]
        if rows < len(columns):
            numbers = [number(r) for r in range(rows)]
            pairs = ((r, p, b, numbers[r], w) for p, b in columns for w in (weight(p, b),) for r in range(rows))
        else:
            vectors = {(p, b): weight(p, b) for p, b in columns}
            pairs = ((r, p, b, a, vectors[p, b]) for r in range(rows) for a in (number(r),) for p, b in columns)
        places = {key: place for place, key in enumerate(keys)}
        for r, p, b, a, w in pairs:
            key = (r, p, b)
            carried[places[key]] = f.fma(a, w, carried[places[key]], f"n.{_label(key)}")
    for key, value in zip(keys, carried, strict=True):
        f.store(value, where[key], block)
    f.end()


def _label(key: tuple[int, int, int]) -> str:
    return f"r{key[0]}p{key[1]}b{key[2]}"
