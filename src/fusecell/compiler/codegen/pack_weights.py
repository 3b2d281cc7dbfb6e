"""Packing of weights into panels, in the order in which microkernels read them (BLIS's packing of B)::

    for product in the panel's products:
        for group in its column groups:            16 columns, those beyond the weight's zero
            for k in depth:
                panel[group][k][product] = weight[k, columns of the group]

Weights have any strides. Where columns are contiguous, a vector of them is copied for each k; where k is, as in torch's
(out, in) weights, squares of 16 x 16 are transposed in registers; else number by number. Every call packs anew, as the
caller may have changed the weights since; to compare them with the packed ones would read both from L3.

A word of a panel of pairs has the bfloat16 numbers of two neighbouring k of a column; the upper half of the last word
is zero where the depth is odd.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fusecell.compiler.codegen.kernel_abi import ARGS, Layout
from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_module import Module
from fusecell.compiler.codegen.llvm_text import Integer, Value, i64, ptr
from fusecell.compiler.codegen.panel import Panel, stored_vector_bytes
from fusecell.compiler.codegen.stored_numbers import (
    as_pairs,
    store_byte,
    store_half_word,
    store_narrow,
    store_pairs,
    store_stored,
)
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.storage import Storage

__all__ = ["emit_packing", "pack_panel_name"]


def emit_packing(module: Module, layout: Layout, panels: Iterable[Panel]) -> None:
    """Write a function for every panel that packs ``groups`` of its column groups, from one on, to an address."""
    first_group, groups, to = i64("first_group"), i64("groups"), ptr("to")
    for panel in panels:
        f = Function(module, pack_panel_name(panel), ARGS, first_group, groups, to)
        f.comment(", ".join(name for name, *_ in panel.weights))
        count, stored = len(panel.weights), panel.stored
        pack = _packing_function(module, count, stored)
        for product, (name, transposed, (k0, _), (column0, _)) in enumerate(panel.weights):
            strides = [layout.integer(f, f"weight.{name}.stride{dim}") for dim in (0, 1)]
            column_bytes, k_bytes = strides if transposed else strides[::-1]
            source = f.at(layout.pointer(f, f"weight.{name}.ptr"), f.mul(k_bytes, k0))
            source = f.at(source, f.mul(column_bytes, column0))
            with f.for_range("group", 0, groups) as group:
                columns_before = f.mul(f.add(first_group, group), LANES)
                columns = f.minimum(f.sub(panel.width, columns_before), LANES, "columns")
                target = f.at(
                    f.at(to, f.mul(group, panel.group_bytes(module))), product * stored_vector_bytes(module, stored)
                )
                first_column = f.at(source, f.mul(column_bytes, columns_before))
                f.call(pack, target, first_column, k_bytes, column_bytes, columns, panel.depth)
        f.end()


def pack_panel_name(panel: Panel) -> str:
    """Name the function that packs a panel."""
    return f"pack.{panel.name}"


def _packing_function(module: Module, products: int, stored: Storage | None) -> str:
    if stored is None:
        return _pack(module, products)
    return _pack_pairs(module, products) if stored.multiplies_pairs else _pack_stored(module, products, stored)


_TO, _FROM, _FROM_K, _FROM_COLUMN = ptr("to"), ptr("from"), i64("from.k"), i64("from.column")
_COLUMNS, _DEPTH = i64("columns"), i64("depth")
_PACK_PARAMS = (_TO, _FROM, _FROM_K, _FROM_COLUMN, _COLUMNS, _DEPTH)
"""Parameters of a function that packs a column group: where to; the weight's first number, the bytes from one k to the
next and from one column to the next; how many columns there are, and how many k."""


def _pack(module: Module, products: int) -> str:
    """Return the name of the function that packs one column group of one of ``products``, emitted on first use."""
    name = f"pack.{products}"
    if not module.is_new(name):
        return name
    to_k = products * module.vector_bytes
    f = Function(module, name, *_PACK_PARAMS, noalias=(_TO,))
    itemsize = module.itemsize
    by_rows = f.eq(_FROM_COLUMN, itemsize, "columns_contiguous")
    # Memory behind the weight's last column may not be readable.
    mask = f.first_lanes(_COLUMNS)
    with f.if_(by_rows, "by_rows"), f.for_range("k", 0, _DEPTH) as k:
        row = f.load_masked(f.at(_FROM, f.mul(k, _FROM_K)), mask, "row")
        f.store(row, f.at(_TO, f.mul(k, to_k)), module.vector_bytes)
    with f.unless(by_rows, "by_columns"):
        # Squares take whole vectors in both directions: contiguous k, and 16 columns.
        by_k = f.eq(_FROM_K, itemsize, "k_contiguous")
        is_whole = f.eq(_COLUMNS, LANES, "is_whole")
        has_squares = f.and_(by_k, is_whole, "has_squares")
        whole_squares = f.and_(_DEPTH, -LANES, "whole_squares")
        in_squares = f.select(has_squares, whole_squares, 0, "k_in_squares")
        for k, columns in _squares(f, in_squares):
            square = f.at(_TO, f.mul(k, to_k))
            for position, row in enumerate(_transpose(f, columns)):
                f.store(row, f.at(square, position * to_k), f.module.vector_bytes)
        # The rest number by number: zeros first, which columns beyond the weight's keep.
        with f.for_range("k", in_squares, _DEPTH) as k:
            f.store(f.zero, f.at(_TO, f.mul(k, to_k)), module.vector_bytes)
        with f.for_range("column", 0, _COLUMNS) as column:
            source = f.at(_FROM, f.mul(column, _FROM_COLUMN))
            target = f.at(_TO, f.mul(column, itemsize))
            with f.for_range("k", in_squares, _DEPTH) as k:
                value = f.load_scalar(f.at(source, f.mul(k, _FROM_K)), "value")
                f.store_scalar(value, f.at(target, f.mul(k, to_k)))
    f.end()
    return name


def _pack_stored(module: Module, products: int, stored: Storage) -> str:
    """Return the name of the function that packs a column group in another format, emitted on first use.

    Number by number into a vector: such panels are packed once for very many steps.
    """
    name = f"pack.{products}.{stored.value}"
    if not module.is_new(name):
        return name
    to_word = products * stored_vector_bytes(module, stored)
    f = Function(module, name, *_PACK_PARAMS, noalias=(_TO,))
    columns = f.alloca_bytes(module.vector_bytes, "columns.at")
    f.store(f.zero, columns, module.vector_bytes)
    if stored.packs_fours:
        f.store(f.zero, _TO, module.vector_bytes)  # of integers as of numbers
    with f.for_range("k", 0, _DEPTH) as k:
        with f.for_range("column", 0, _COLUMNS) as column:
            source = f.at(f.at(_FROM, f.mul(column, _FROM_COLUMN)), f.mul(k, _FROM_K))
            f.store_scalar(f.load_scalar(source, "value"), f.at(columns, f.mul(column, module.itemsize)))
        vector = f.load(columns, "columns", module.vector_bytes)
        if stored.packs_fours:
            word = f.add(f.lshr(k, 2, "word"), 1)
            store_byte(f, vector, f.at(_TO, f.mul(word, to_word)), f.and_(k, 3, "place"), first=_TO)
        elif stored.packs_pairs:
            store_half_word(f, vector, f.at(_TO, f.mul(f.lshr(k, 1, "word"), to_word)), f.and_(k, 1, "half"))
        else:
            store_stored(f, vector, f.at(_TO, f.mul(k, to_word)), stored)
    f.end()
    return name


def _pack_pairs(module: Module, products: int) -> str:
    """Return the name of the function that packs one column group of one of ``products``, emitted on first use."""
    name = f"pack.{products}.{Storage.BF16_BF16.value}"
    if not module.is_new(name):
        return name
    to_word = products * module.vector_bytes
    f = Function(module, name, *_PACK_PARAMS, noalias=(_TO,))
    by_rows = f.eq(_FROM_COLUMN, module.itemsize, "columns_contiguous")
    with f.if_(by_rows, "by_rows"):
        _pack_rows(f, to_word)
    with f.unless(by_rows, "by_columns"):
        by_k = f.eq(_FROM_K, module.itemsize, "k_contiguous")
        has_squares = f.and_(by_k, f.eq(_COLUMNS, LANES, "is_whole"), "has_squares")
        in_squares = f.select(has_squares, f.and_(_DEPTH, -2 * LANES, "whole_squares"), 0, "k_in_squares")
        for k, columns in _squares(f, in_squares, 2):
            target = f.at(_TO, f.mul(f.lshr(k, 1, "word"), to_word))
            # Neighbouring k of a column are words already, which a transposed square has where they belong.
            for word, vector in enumerate(_transpose(f, [as_pairs(f, column, "words") for column in columns])):
                f.store(vector, f.at(target, word * to_word), module.vector_bytes)
        _pack_numbers(f, to_word, in_squares)
    f.end()
    return name


def _pack_rows(f: Function, to_word: int) -> None:
    """Pack rows whose columns are neighbours, two at a time."""
    # Memory behind the weight's last column may not be readable.
    mask = f.first_lanes(_COLUMNS)

    def row(word: Value, half: int) -> Value:
        k = f.add(f.mul(word, 2), half)
        return f.load_masked(f.at(_FROM, f.mul(k, _FROM_K)), mask, f"row{half}")

    pairs = f.lshr(_DEPTH, 1, "pairs")
    with f.for_range("word", 0, pairs) as word:
        store_pairs(f, row(word, 0), row(word, 1), f.at(_TO, f.mul(word, to_word)))
    with f.for_range("last", pairs, f.sub(_DEPTH, pairs)) as word:
        store_pairs(f, row(word, 0), f.zero, f.at(_TO, f.mul(word, to_word)))


def _pack_numbers(f: Function, to_word: int, start: Integer) -> None:
    """Pack number by number from a k on: zeros first, which columns and a k beyond the weight's keep."""
    module = f.module
    last_word = f.lshr(f.add(_DEPTH, 1), 1, "words")
    with f.for_range("word", f.lshr(start, 1, "first_word"), last_word) as word:
        f.store(f.zero, f.at(_TO, f.mul(word, to_word)), module.vector_bytes)
    with f.for_range("column", 0, _COLUMNS) as column:
        source = f.at(_FROM, f.mul(column, _FROM_COLUMN))
        target = f.at(_TO, f.mul(column, module.itemsize))
        with f.for_range("k", start, _DEPTH) as k:
            word, half = f.lshr(k, 1, "word"), f.and_(k, 1, "half")
            place = f.at(f.at(target, f.mul(word, to_word)), f.mul(half, module.itemsize // 2))
            store_narrow(f, f.load_scalar(f.at(source, f.mul(k, _FROM_K)), "value"), place)


def _squares(f: Function, depth: Integer, numbers: int = 1) -> Iterator[tuple[Value, list[Value]]]:
    """Loop over some k at a time of 16 columns; yield the first of them, and the columns.

    Arguments:
        numbers: how many k a column of a square has for each of the 16 lanes of a vector.
    """
    column_offsets = [f.mul(_FROM_COLUMN, lane) for lane in range(LANES)]
    with f.for_range("square", 0, depth, numbers * LANES) as k:
        source = f.at(_FROM, f.mul(k, f.module.itemsize))
        lanes = numbers * LANES
        yield k, [f.load(f.at(source, offset), "column", f.module.itemsize, lanes) for offset in column_offsets]


def _transpose(f: Function, rows: list[Value]) -> list[Value]:
    """Transpose a square in registers: rows 8, 4, 2, 1 apart exchange halves, in 64 shuffles (Eklundh 1972)."""
    distance = LANES // 2
    while distance:
        low = [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)]
        high = [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)]
        for row in range(LANES):
            if not row & distance:
                a, b = rows[row], rows[row + distance]
                rows[row], rows[row + distance] = (f.shuffle(a, b, lanes, "transposed") for lanes in (low, high))
        distance //= 2
    return rows
