"""Packing of weights into panels, in the order in which microkernels read them (BLIS's packing of B)::

    for product in the panel's products:
        for group in its column groups:            16 columns, those beyond the weight's zero
            for k in depth:
                panel[group][k][product] = weight[k, columns of the group]

Weights have any strides. Where columns are contiguous, a vector of them is copied for each k; where k is, as in torch's
(out, in) weights, squares of 16 x 16 are transposed in registers; else number by number. Every call packs anew, as the
caller may have changed the weights since; to compare them with the packed ones would read both from L3.
"""

from __future__ import annotations

from collections.abc import Iterable

from fusecell.compiler.codegen.kernel_abi import ARGS, Layout, Panel, stored_vector_bytes
from fusecell.compiler.codegen.llvm_builder import Function, Module
from fusecell.compiler.codegen.llvm_text import i64, ptr
from fusecell.compiler.codegen.pack_pairs import (
    COLUMNS,
    DEPTH,
    FROM,
    FROM_COLUMN,
    FROM_K,
    PACK_PARAMS,
    TO,
    pack_pairs,
    squares,
    transpose,
)
from fusecell.compiler.codegen.stored_numbers import store_byte, store_half_word, store_stored
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
    return pack_pairs(module, products) if stored.multiplies_pairs else _pack_stored(module, products, stored)


def _pack(module: Module, products: int) -> str:
    """Return the name of the function that packs one column group of one of ``products``, emitted on first use."""
    name = f"pack.{products}"
    if not module.is_new(name):
        return name
    to_k = products * module.vector_bytes
    f = Function(module, name, *PACK_PARAMS, noalias=(TO,))
    itemsize = module.itemsize
    by_rows = f.eq(FROM_COLUMN, itemsize, "columns_contiguous")
    # Memory behind the weight's last column may not be readable.
    mask = f.first_lanes(COLUMNS)
    with f.if_(by_rows, "by_rows"), f.for_range("k", 0, DEPTH) as k:
        row = f.load_masked(f.at(FROM, f.mul(k, FROM_K)), mask, "row")
        f.store(row, f.at(TO, f.mul(k, to_k)), module.vector_bytes)
    with f.unless(by_rows, "by_columns"):
        # Squares take whole vectors in both directions: contiguous k, and 16 columns.
        by_k = f.eq(FROM_K, itemsize, "k_contiguous")
        is_whole = f.eq(COLUMNS, LANES, "is_whole")
        has_squares = f.and_(by_k, is_whole, "has_squares")
        whole_squares = f.and_(DEPTH, -LANES, "whole_squares")
        in_squares = f.select(has_squares, whole_squares, 0, "k_in_squares")
        for k, columns in squares(f, in_squares):
            square = f.at(TO, f.mul(k, to_k))
            for position, row in enumerate(transpose(f, columns)):
                f.store(row, f.at(square, position * to_k), f.module.vector_bytes)
        # The rest number by number: zeros first, which columns beyond the weight's keep.
        with f.for_range("k", in_squares, DEPTH) as k:
            f.store(f.zero, f.at(TO, f.mul(k, to_k)), module.vector_bytes)
        with f.for_range("column", 0, COLUMNS) as column:
            source = f.at(FROM, f.mul(column, FROM_COLUMN))
            target = f.at(TO, f.mul(column, itemsize))
            with f.for_range("k", in_squares, DEPTH) as k:
                value = f.load_scalar(f.at(source, f.mul(k, FROM_K)), "value")
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
    f = Function(module, name, *PACK_PARAMS, noalias=(TO,))
    columns = f.alloca_bytes(module.vector_bytes, "columns.at")
    f.store(f.zero, columns, module.vector_bytes)
    if stored.packs_fours:
        f.store(f.zero, TO, module.vector_bytes)  # of integers as of numbers
    with f.for_range("k", 0, DEPTH) as k:
        with f.for_range("column", 0, COLUMNS) as column:
            source = f.at(f.at(FROM, f.mul(column, FROM_COLUMN)), f.mul(k, FROM_K))
            f.store_scalar(f.load_scalar(source, "value"), f.at(columns, f.mul(column, module.itemsize)))
        vector = f.load(columns, "columns", module.vector_bytes)
        if stored.packs_fours:
            word = f.add(f.lshr(k, 2, "word"), 1)
            store_byte(f, vector, f.at(TO, f.mul(word, to_word)), f.and_(k, 3, "place"), first=TO)
        elif stored.packs_pairs:
            store_half_word(f, vector, f.at(TO, f.mul(f.lshr(k, 1, "word"), to_word)), f.and_(k, 1, "half"))
        else:
            store_stored(f, vector, f.at(TO, f.mul(k, to_word)), stored)
    f.end()
    return name
