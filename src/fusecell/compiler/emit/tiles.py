"""The register tile: rows of a value times a panel of weights, added to accumulators; and the packing of panels.

The same tile sums over rows: there its "rows" are features of one value, and k counts rows.

One tile is ``rows`` x ``products`` x ``blocks`` vectors of accumulators. They are loaded, run over all k in order,
each element by one FMA per k, and stored again: whatever the tile, an element's bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fusecell.compiler.emit.text import LANES, Function, Module, Value
from fusecell.compiler.target import Target

__all__ = ["LINE", "Tiling", "budget", "outer_name", "pack_name", "shared_out", "tile_name", "tiling"]


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


def tile_name(module: Module, rows: int, products: int, blocks: int) -> str:
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
        walk = _Walk("%a.row", module.bytes, "%panel", "%panel.block", products * module.block, module.block)
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
    module, block = f.module, f.module.block
    keys = [(r, p, b) for r in range(rows) for p in range(products) for b in range(blocks)]
    acc_rows = [f.at("%acc", f.mul("%acc.row", r), f"acc.r{r}") for r in range(rows)]
    where = {(r, p, b): f.at(acc_rows[r], (p * blocks + b) * block) for r, p, b in keys}
    first = {key: f.load(where[key], f"first.{_label(key)}", block) for key in keys}
    f.do("br label %k.head")
    vector, scalar = module.vector, module.scalar
    lines = [
        "k.head:",
        "  %k = phi i64 [ 0, %entry ], [ %k.next, %k.body ]",
        *(f"  %c.{_label(key)} = phi {vector} [ {first[key]}, %entry ], [ %n.{_label(key)}, %k.body ]" for key in keys),
        "  %k.more = icmp slt i64 %k, %depth",
        "  br i1 %k.more, label %k.body, label %k.done",
        "k.body:",
    ]
    f.raw(lines)
    # Constant distances go last: they become part of the instruction's address.
    a_here, panel_here = f.at("%a", f.mul("%k", walk.k), "a.k"), f.at(walk.panel, f.mul("%k", walk.panel_k), "panel.k")
    weights = {}
    for b in range(blocks):
        row = f.at(panel_here, f.mul(walk.block, b), f"panel.b{b}")
        for p in range(products):
            weights[p, b] = f.load(f.at(row, p * block), f"w{p}.{b}", walk.align)
    if ahead is not None:
        f.prefetch(ahead(f))
    for r in range(rows):
        pointer = f.at(a_here, f.mul(walk.row, r), f"a.r{r}")
        value = f.let(f"a{r}.scalar", f"load {scalar}, ptr {pointer}, align {module.bytes}")
        a = f.splat(value, f"a{r}")
        for p in range(products):
            for b in range(blocks):
                f.fma(a, weights[p, b], f"%c.{_label((r, p, b))}", f"n.{_label((r, p, b))}")
    f.do("%k.next = add nsw i64 %k, 1")
    f.do("br label %k.head")
    f.raw(["k.done:"])
    for key in keys:
        f.store(f"%c.{_label(key)}", where[key], block)
    f.end()


def _label(key: tuple[int, int, int]) -> str:
    return f"r{key[0]}p{key[1]}b{key[2]}"


def pack_name(module: Module) -> str:
    """The function that brings up to 16 columns of a weight into a panel; emitted on first use."""
    name = "pack"
    if name not in module.made:
        module.made.add(name)
        _pack(module, name)
    return name


def _pack(module: Module, name: str) -> None:
    """Column by column where k is contiguous, row by row where columns are; columns beyond the weight's are zero."""
    f = Function(
        module, name, "ptr noalias %to", "i64 %to.k", "ptr %from", "i64 %from.k", "i64 %from.column",
        "i64 %columns", "i64 %depth",
    )  # fmt: skip
    scalar, size = module.scalar, module.bytes
    contiguous = f.let("contiguous", f"icmp eq i64 %from.column, {size}")
    mask = f.first_lanes("%columns")
    with f.when("rows", contiguous), f.loop("k", 0, "%depth") as k:
        value = f.load_masked(f.at("%from", f.mul(k, "%from.k")), mask, "row")
        f.store(value, f.at("%to", f.mul(k, "%to.k")), module.block)
    other = f.let("other", f"xor i1 {contiguous}, true")
    with f.when("columns", other):
        by_k = f.let("by.k", f"icmp eq i64 %from.k, {size}")
        whole = f.let("whole", f"icmp eq i64 %columns, {LANES}")
        squares = f.let("squares", f"and i1 {by_k}, {whole}")
        most = f.let("most", f"and i64 %depth, {-LANES}")
        done = f.let("done", f"select i1 {squares}, i64 {most}, i64 0")
        with f.loop("square", 0, done, LANES) as k:
            _transpose(f, k)
        with f.loop("k", done, "%depth") as k:
            f.store("zeroinitializer", f.at("%to", f.mul(k, "%to.k")), module.block)
        with f.loop("column", 0, "%columns") as column:
            source = f.at("%from", f.mul(column, "%from.column"))
            target = f.at("%to", f.mul(column, size))
            with f.loop("k", done, "%depth") as k:
                pointer = f.at(source, f.mul(k, "%from.k"))
                value = f.let("value", f"load {scalar}, ptr {pointer}, align {size}")
                f.do(f"store {scalar} {value}, ptr {f.at(target, f.mul(k, '%to.k'))}, align {size}")
    f.end()


def _transpose(f: Function, k: str) -> None:
    """Sixteen columns of sixteen k each, turned over in registers: pairs of rows 8, 4, 2 and 1 apart trade halves."""
    module = f.module
    offset = f.mul(k, module.bytes, "k.offset")
    rows = [
        f.load(f.at(f.at("%from", f.mul("%from.column", lane)), offset), f"column{lane}", module.bytes)
        for lane in range(LANES)
    ]
    apart = LANES // 2
    while apart:
        low = [lane if not lane & apart else LANES + lane - apart for lane in range(LANES)]
        high = [lane + apart if not lane & apart else LANES + lane for lane in range(LANES)]
        for row in range(LANES):
            if not row & apart:
                a, b = rows[row], rows[row + apart]
                rows[row], rows[row + apart] = (_shuffle(f, a, b, lanes) for lanes in (low, high))
        apart //= 2
    for row in range(LANES):
        f.store(rows[row], f.at("%to", f.mul(f.add(k, row), "%to.k")), module.block)


def _shuffle(f: Function, a: str, b: str, lanes: list[int]) -> str:
    vector = f.module.vector
    chosen = ", ".join(f"i32 {lane}" for lane in lanes)
    return f.let("turned", f"shufflevector {vector} {a}, {vector} {b}, <{LANES} x i32> <{chosen}>")
