"""Packing of weights into panels of pairs: a word of a panel has the bfloat16 numbers of two neighbouring k::

    for word in depth / 2:
        panel[group][word][product] = weight[2 word, columns of the group], weight[2 word + 1, ...]

The upper half of the last word is zero where the depth is odd. The loops are those of `pack_weights`, whose squares are
transposed here.
"""

from __future__ import annotations

from collections.abc import Iterator

from fusecell.compiler.codegen.llvm_builder import Function, Module
from fusecell.compiler.codegen.llvm_text import Integer, Value, i64, ptr
from fusecell.compiler.codegen.stored_numbers import as_pairs, store_narrow, store_pairs
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.storage import Storage

__all__ = [
    "COLUMNS",
    "DEPTH",
    "FROM",
    "FROM_COLUMN",
    "FROM_K",
    "PACK_PARAMS",
    "TO",
    "pack_pairs",
    "squares",
    "transpose",
]

TO, FROM, FROM_K, FROM_COLUMN = ptr("to"), ptr("from"), i64("from.k"), i64("from.column")
COLUMNS, DEPTH = i64("columns"), i64("depth")
PACK_PARAMS = (TO, FROM, FROM_K, FROM_COLUMN, COLUMNS, DEPTH)
"""Parameters of a function that packs a column group: where to; the weight's first number, the bytes from one k to the
next and from one column to the next; how many columns there are, and how many k."""


def pack_pairs(module: Module, products: int) -> str:
    """Return the name of the function that packs one column group of one of ``products``, emitted on first use."""
    name = f"pack.{products}.{Storage.BF16_BF16.value}"
    if not module.is_new(name):
        return name
    to_word = products * module.vector_bytes
    f = Function(module, name, *PACK_PARAMS, noalias=(TO,))
    by_rows = f.eq(FROM_COLUMN, module.itemsize, "columns_contiguous")
    with f.if_(by_rows, "by_rows"):
        _pack_rows(f, to_word)
    with f.unless(by_rows, "by_columns"):
        by_k = f.eq(FROM_K, module.itemsize, "k_contiguous")
        has_squares = f.and_(by_k, f.eq(COLUMNS, LANES, "is_whole"), "has_squares")
        in_squares = f.select(has_squares, f.and_(DEPTH, -2 * LANES, "whole_squares"), 0, "k_in_squares")
        for k, columns in squares(f, in_squares, 2):
            target = f.at(TO, f.mul(f.lshr(k, 1, "word"), to_word))
            # Neighbouring k of a column are words already, which a transposed square has where they belong.
            for word, vector in enumerate(transpose(f, [as_pairs(f, column, "words") for column in columns])):
                f.store(vector, f.at(target, word * to_word), module.vector_bytes)
        _pack_numbers(f, to_word, in_squares)
    f.end()
    return name


def _pack_rows(f: Function, to_word: int) -> None:
    """Pack rows whose columns are neighbours, two at a time."""
    # Memory behind the weight's last column may not be readable.
    mask = f.first_lanes(COLUMNS)

    def row(word: Value, half: int) -> Value:
        k = f.add(f.mul(word, 2), half)
        return f.load_masked(f.at(FROM, f.mul(k, FROM_K)), mask, f"row{half}")

    pairs = f.lshr(DEPTH, 1, "pairs")
    with f.for_range("word", 0, pairs) as word:
        store_pairs(f, row(word, 0), row(word, 1), f.at(TO, f.mul(word, to_word)))
    with f.for_range("last", pairs, f.sub(DEPTH, pairs)) as word:
        store_pairs(f, row(word, 0), f.zero, f.at(TO, f.mul(word, to_word)))


def _pack_numbers(f: Function, to_word: int, start: Integer) -> None:
    """Pack number by number from a k on: zeros first, which columns and a k beyond the weight's keep."""
    module = f.module
    last_word = f.lshr(f.add(DEPTH, 1), 1, "words")
    with f.for_range("word", f.lshr(start, 1, "first_word"), last_word) as word:
        f.store(f.zero, f.at(TO, f.mul(word, to_word)), module.vector_bytes)
    with f.for_range("column", 0, COLUMNS) as column:
        source = f.at(FROM, f.mul(column, FROM_COLUMN))
        target = f.at(TO, f.mul(column, module.itemsize))
        with f.for_range("k", start, DEPTH) as k:
            word, half = f.lshr(k, 1, "word"), f.and_(k, 1, "half")
            place = f.at(f.at(target, f.mul(word, to_word)), f.mul(half, module.itemsize // 2))
            store_narrow(f, f.load_scalar(f.at(source, f.mul(k, FROM_K)), "value"), place)


def squares(f: Function, depth: Integer, numbers: int = 1) -> Iterator[tuple[Value, list[Value]]]:
    """Loop over some k at a time of 16 columns; yield the first of them, and the columns.

    Arguments:
        numbers: how many k a column of a square has for each of the 16 lanes of a vector.
    """
    column_offsets = [f.mul(FROM_COLUMN, lane) for lane in range(LANES)]
    with f.for_range("square", 0, depth, numbers * LANES) as k:
        source = f.at(FROM, f.mul(k, f.module.itemsize))
        lanes = numbers * LANES
        yield k, [f.load(f.at(source, offset), "column", f.module.itemsize, lanes) for offset in column_offsets]


def transpose(f: Function, rows: list[Value]) -> list[Value]:
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
