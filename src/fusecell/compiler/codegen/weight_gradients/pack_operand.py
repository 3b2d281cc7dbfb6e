"""Packing of the operands of a weight's gradient, as BLIS packs A and B::

    for row group of 128 rows:
        for tile of a's features:
            packed.a[tile][row] = a[row, the tile's 8 features]
        for portion of b's columns, as wide as a tile:
            packed.b[row] = b[row, the portion's columns]

A tile of ``a^T b`` reads eight neighbouring features of row after row of a, and again for every portion of b's columns;
and it reads a few columns of row after row of b, and again for every tile of a's features. Where rows are long, each of
these reads is in another cache line, soon in another page, and all of them in few sets of L1, from which they evict
each other. Packed, they are contiguous. Of a: 7 to 12 % of training at H of 512 and 800 on a Xeon, nothing on an EPYC.
Of b: 3 to 9 % of the backward with AVX2's narrow tiles, 3 % with AVX-512's. Of rows below 2 kB, or with fewer than 256
columns of b, it is no faster (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator

from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_module import Module
from fusecell.compiler.codegen.llvm_text import Integer, Value, i64, ptr
from fusecell.compiler.codegen.stored_numbers import store_pairs
from fusecell.compiler.codegen.tile_cost import Product, Tiling, cheapest_tiling
from fusecell.compiler.ir.sizes import ceil_div
from fusecell.compiler.schedule.plan import Plan, Sum

__all__ = [
    "PACKED", "PACKED_COLUMNS", "TILE_FEATURES", "emit_pack_column_pairs", "emit_pack_columns", "emit_pack_operand",
    "emit_pack_pairs", "is_packed",
    "micro_panel_bytes", "outer_tiling", "packed_bytes", "strip_bytes",
]  # fmt: skip

PACKED = "packed.a"
"""The buffer of the micro-panels, which one gradient after the other uses."""
PACKED_COLUMNS = "packed.b"
"""The buffer of the strips of the other operand's columns, one for each thread."""
TILE_FEATURES = 8
"""Features of a micro-panel: as many as the tallest tile has rows."""
_ROWS_AT_ONCE = 4
"""Rows copied at a time: the loads of all come before the first store, so that they overlap."""


def is_packed(module: Module, plan: Plan, reduction: Sum) -> bool:
    """Whether a gradient's operands are packed: never a caller's rows, as the last reads may go beyond them.

    By pairs they always are; of the first one nothing is read beyond a row's own features.
    """
    limits = module.target.tuning
    if reduction.pairs:
        return True
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


def strip_bytes(module: Module, reduction: Sum) -> int:
    """Return the bytes of a strip: a tile's columns of a row group."""
    tiling = outer_tiling(module, reduction)
    return module.target.tuning.pack_row_group * max(tiling.widths) * module.vector_bytes


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


def emit_pack_pairs(module: Module, height: int) -> str:
    """Return the name of the function that packs pairs of rows for tiles of one height, emitted on first use.

    A word has a feature of two rows, the first in its upper half: the instruction adds that product first. So a sum has
    the same bits as one of the rounded numbers row by row, and the rows may be divided anywhere. Behind an odd row the
    other half is -0, and 0 in the columns: to add -0 changes no sum, not even -0.
    """
    name = f"pack.pairs.{height}"
    if not module.is_new(name):
        return name
    f = Function(module, name, _TO, _FROM, _FROM_K, _ROWS, _TILES, noalias=(_TO,))
    mask, word_bytes = f.first_lanes(height), TILE_FEATURES * module.itemsize
    for pair, rows in _pairs_of_rows(f):
        target = f.at(_TO, f.mul(pair, word_bytes))
        with f.for_range("tile", 0, _TILES) as tile:
            sources = [f.at(row, f.mul(tile, height * module.itemsize)) for row in rows]
            upper, *others = [f.load_masked(source, mask, "features") for source in sources]
            lower = others[0] if others else f.constant(-0.0)
            to = f.at(target, f.mul(tile, micro_panel_bytes(module)))
            store_pairs(f, lower, upper, to, TILE_FEATURES)
    return f.end()


def _pairs_of_rows(f: Function) -> Iterator[tuple[Integer, list[Value]]]:
    """Write a loop over the pairs of rows, then an odd one: yield its number, and where its rows are."""
    pairs = f.lshr(_ROWS, 1, "pairs")
    with f.for_range("pair", 0, pairs) as pair:
        first = f.at(_FROM, f.mul(f.mul(pair, 2), _FROM_K))
        yield pair, [first, f.at(first, _FROM_K)]
    with f.if_(f.ne(f.and_(_ROWS, 1, "odd"), 0, "is_odd"), "odd_row"):
        yield pairs, [f.at(_FROM, f.mul(f.mul(pairs, 2), _FROM_K))]


def emit_pack_column_pairs(module: Module, groups: int) -> str:
    """Return the name of the function that packs pairs of rows of some column groups, emitted on first use."""
    name = f"pack.column_pairs.{groups}"
    if not module.is_new(name):
        return name
    f = Function(module, name, _TO, _FROM, _FROM_K, _ROWS, noalias=(_TO,))
    for pair, rows in _pairs_of_rows(f):
        target = f.at(_TO, f.mul(pair, groups * module.vector_bytes))
        for group in range(groups):
            offset = group * module.vector_bytes
            upper, *others = [f.load(f.at(row, offset), "columns", module.itemsize) for row in rows]
            store_pairs(f, others[0] if others else f.zero, upper, f.at(target, offset))
    return f.end()


def emit_pack_columns(module: Module, groups: int) -> str:
    """Return the name of the function that packs rows of some column groups, emitted on first use."""
    name = f"pack.columns.{groups}"
    if not module.is_new(name):
        return name
    f = Function(module, name, _TO, _FROM, _FROM_K, _ROWS, noalias=(_TO,))
    whole = f.and_(_ROWS, -_ROWS_AT_ONCE, "rows_by_four")
    row_bytes = groups * module.vector_bytes
    for start, stop, rows in ((0, whole, _ROWS_AT_ONCE), (whole, _ROWS, 1)):
        with f.for_range("k", start, stop, rows) as k:
            source, target = f.at(_FROM, f.mul(k, _FROM_K)), f.at(_TO, f.mul(k, row_bytes))
            places = [(row, group * module.vector_bytes) for row in range(rows) for group in range(groups)]
            vectors = [
                f.load(f.at(f.at(source, f.mul(_FROM_K, row)), offset), "columns", module.itemsize)
                for row, offset in places
            ]
            for (row, offset), vector in zip(places, vectors, strict=True):
                f.store(vector, f.at(target, row * row_bytes + offset), module.vector_bytes)
    f.end()
    return name
