"""Packing of one operand of a weight's gradient into micro-panels (BLIS's packing of A)::

    for row in a row group of 128:
        for tile of the features:
            packed[tile][row] = operand[row, the tile's 8 features]

A tile of ``a^T b`` reads eight neighbouring features of row after row, and again for every portion of b's columns.
Where rows are long, each of these reads is in another cache line, soon in another page, and all of them in few sets of
L1, from which they evict each other. Packed, they are contiguous: 7 to 12 % of training at H of 512 and 800 on a Xeon,
nothing on an EPYC; of rows below 2 kB, or with fewer than 256 columns of b, it is no faster (docs/performance.md).
"""

from __future__ import annotations

from fusecell.compiler.codegen.llvm_builder import Function, Module
from fusecell.compiler.codegen.llvm_text import Integer, Value, i64, ptr
from fusecell.compiler.codegen.tile_cost import Product, Tiling, cheapest_tiling
from fusecell.compiler.ir.sizes import ceil_div
from fusecell.compiler.schedule.plan import Plan, Sum

__all__ = [
    "PACKED", "TILE_FEATURES", "emit_pack_operand", "is_packed", "micro_panel_bytes", "outer_tiling",
    "packed_bytes",
]  # fmt: skip

PACKED = "packed.a"
"""The buffer of the micro-panels, which one gradient after the other uses."""
TILE_FEATURES = 8
"""Features of a micro-panel: as many as the tallest tile has rows."""
_ROWS_AT_ONCE = 4
"""Rows copied at a time: the loads of all come before the first store, so that they overlap."""


def is_packed(module: Module, plan: Plan, reduction: Sum) -> bool:
    """Whether a gradient's first operand is packed: never a caller's rows, as the last reads may go beyond them."""
    limits = module.target.tuning
    if (
        reduction.a is None
        or reduction.nest is not None
        or reduction.height * module.itemsize < limits.pack_min_row_bytes
    ):
        return False
    if module.groups(reduction.width) < limits.pack_min_groups:
        return False
    return reduction.operands[reduction.a].buffer not in plan.gathered.values()


def outer_tiling(module: Module, reduction: Sum) -> Tiling:
    """Choose the tiles of a weight's gradient: their rows are features of one operand, and k counts a row group."""
    product = Product(fused=1, depth=module.target.tuning.pack_row_group)
    groups = module.groups(reduction.width)
    return cheapest_tiling(module.target, module.dtype, (product,), groups, (reduction.height,))[1]


def micro_panel_bytes(module: Module) -> int:
    """Return the bytes of a micro-panel: a tile's features of a row group."""
    return module.target.tuning.pack_row_group * TILE_FEATURES * module.itemsize


def packed_bytes(module: Module, reduction: Sum) -> int:
    """Return the bytes of all micro-panels of a gradient's operand."""
    max_rows = outer_tiling(module, reduction).max_rows
    return ceil_div(reduction.height, max_rows) * micro_panel_bytes(module)


_TO, _FROM, _FROM_K, _ROWS = ptr("to"), ptr("from"), i64("from.k"), i64("rows")
_TILES, _TILE_BYTES = i64("tiles"), i64("tile.bytes")


def emit_pack_operand(module: Module) -> str:
    """Return the name of the function that packs rows of an operand for some of its tiles, emitted on first use."""
    name = "pack.operand"
    if not module.is_new(name):
        return name
    f = Function(module, name, _TO, _FROM, _FROM_K, _ROWS, _TILES, _TILE_BYTES, noalias=(_TO,))
    whole = f.and_(_ROWS, -_ROWS_AT_ONCE, "rows_by_four")
    for start, stop, rows in ((0, whole, _ROWS_AT_ONCE), (whole, _ROWS, 1)):
        with f.for_range("k", start, stop, rows) as k:
            source = f.at(_FROM, f.mul(k, _FROM_K))
            target = f.at(_TO, f.mul(k, TILE_FEATURES * module.itemsize))
            with f.for_range("tile", 0, _TILES) as tile:
                tile_source = f.at(source, f.mul(tile, _TILE_BYTES))
                _copy(f, tile_source, f.at(target, f.mul(tile, micro_panel_bytes(module))), rows)
    f.end()
    return name


def _copy(f: Function, source: Value, target: Value, rows: int) -> None:
    """Copy a tile's features of a few rows."""
    itemsize = f.module.itemsize
    offsets: list[Integer] = [f.mul(_FROM_K, row) for row in range(rows)]
    # All loads before the stores, so that cache misses overlap.
    features = [f.load(f.at(source, offset), "features", itemsize, TILE_FEATURES) for offset in offsets]
    for row, vector in enumerate(features):
        f.store(vector, f.at(target, row * TILE_FEATURES * itemsize), TILE_FEATURES * itemsize)
