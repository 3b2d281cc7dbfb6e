"""Microkernels: register tiles that multiply rows of an operand by a panel of packed weights.

The innermost loops of BLIS (Van Zee and van de Geijn, ACM TOMS 2015; Goto and van de Geijn, ACM TOMS 2008)::

    load acc[row][product][group]                  all of a tile's accumulators, in registers
    for k in depth:
        prefetch a line of the next panel              tiles of enough rows
        for each (row, product, group) of the tile:
            acc[row][product][group] += a[row][k] * panel[group][k][product]
    store acc

A tile is ``rows`` x ``products`` x ``groups`` vectors of accumulators; products that share an operand, as a GRU's
gates do, share its loads. Every element takes one multiply-add per k, in order: whatever the tile, its bits are the
same. Weights that are stored in another format become numbers as they are loaded. The same loops sum over rows for the
gradients of weights: there a tile's "rows" are features of one value, and k counts rows of the batch (`outer_product`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_module import Module
from fusecell.compiler.codegen.llvm_text import Integer, Value, i64, ptr
from fusecell.compiler.codegen.panel import stored_vector_bytes
from fusecell.compiler.codegen.stored_numbers import (
    as_numbers,
    dot_bytes,
    dot_pairs,
    first_of_dots,
    half_word,
    load_bytes,
    load_stored,
    load_words,
)
from fusecell.compiler.codegen.tile_cost import TileCost
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.storage import Storage

__all__ = ["ProductKind", "StaticStrides", "microkernel", "outer_product"]


@dataclass(frozen=True, slots=True)
class StaticStrides:
    """Strides that are equal in all of a kernel's uses of a microkernel, and so constants in it; None: they differ.

    Attributes:
        row: bytes between the operand's rows.
        depth: of the panels, in words.
    """

    row: int | None = None
    depth: int | None = None


class ProductKind(NamedTuple):
    """What a tile multiplies: how many products at once, and how their weights are stored."""

    products: int
    stored: Storage | None = None

    @property
    def suffix(self) -> str:
        """Both, as a part of a name."""
        return str(self.products) if self.stored is None else f"{self.products}.{self.stored.value}"


_ACC, _A, _DEPTH = ptr("acc"), ptr("a"), i64("depth")


def microkernel(module: Module, rows: int, kind: ProductKind, groups: int, strides: StaticStrides) -> str:
    """Return the name of the microkernel of a tile, emitted on first use.

    It takes the accumulators and the bytes between their rows; the operand and the bytes between its rows; the panel
    and the bytes between its column groups; the depth; and the address to prefetch, with the bytes from one k to the
    next.
    """
    products, stored = kind
    name = f"tile.{rows}x{products}x{groups}" + (f".{stored.value}" if stored is not None else "")
    if module.is_new(name):
        acc_row, a_row, panel, panel_group = i64("acc.row"), i64("a.row"), ptr("panel"), i64("panel.group")
        prefetch, prefetch_k = ptr("prefetch"), i64("prefetch.k")
        params = (_ACC, acc_row, _A, a_row, panel, panel_group, _DEPTH, prefetch, prefetch_k)
        f = Function(module, name, *params, noalias=(_ACC,))
        f.comment(f"{rows} rows x {products} products x {groups} groups of {LANES} columns")
        # A distance that is a constant is part of the load's address, and costs no addition.
        panel_vector = stored_vector_bytes(module, stored)
        panel_k = products * panel_vector
        row: Integer = a_row if strides.row is None else strides.row
        group: Integer = panel_group if strides.depth is None else strides.depth * panel_k
        operands = _Operands(row, module.itemsize, panel, group, panel_k, panel_vector, stored)

        def next_panel(k: Integer) -> Value:
            return f.at(prefetch, f.mul(k, prefetch_k), "prefetch.at")

        _Tile(f, operands, rows, products, groups, next_panel).write(acc_row)
    return name


def outer_product(module: Module, rows: int, groups: int, *, pairs: bool = False) -> str:
    """Return the name of the microkernel of a sum over rows, emitted on first use: acc += a^T b.

    Its tile is ``rows`` features of a by ``groups`` column groups of b. It takes the accumulators; where to load them
    from at the start; a and b; the bytes between rows of all four; the rows to add, in runs: the rows of a run, how
    many runs there are, and the bytes from a run to the next of a and of b.

    Arguments:
        pairs: whether each number is a word with those of two rows, and rows are counted by words.
    """
    name = f"outer.{'pairs.' if pairs else ''}{rows}x{groups}"
    if module.is_new(name):
        start, b, acc_row, start_row = ptr("start"), ptr("b"), i64("acc.row"), i64("start.row")
        a_k, b_k, runs, a_run, b_run = i64("a.k"), i64("b.k"), i64("runs"), i64("a.run"), i64("b.run")
        params = (_ACC, start, _A, b, acc_row, start_row, a_k, b_k, _DEPTH, runs, a_run, b_run)
        f = Function(module, name, *params)
        f.comment(f"{rows} features x {groups} groups of {LANES} features")
        stored = Storage.BF16_BF16 if pairs else None
        operands = _Operands(module.itemsize, a_k, b, module.vector_bytes, b_k, module.itemsize, stored)
        line_bytes = module.target.tuning.cache_line_bytes
        last_line = groups * module.vector_bytes // line_bytes - 1

        def next_accumulators(k: Integer) -> Value:
            # Accumulators of large gradients come from L2 or L3. A line of the tile below for every k: the first line
            # of each of its eight rows, then the second of each, up to its last, and no further to the right.
            row = f.and_(k, 7, "row")
            next_tile = f.at(_ACC, f.mul(acc_row, f.add(row, rows)), "next_tile")
            if not last_line:
                return next_tile
            line = f.minimum(f.lshr(k, 3, "line"), last_line, "line")
            return f.at(next_tile, f.mul(line, line_bytes), "prefetch.at")

        tile = _Tile(f, operands, rows, 1, groups, next_accumulators)
        tile.write(acc_row, start=(start, start_row), runs=(runs, a_run, b_run))
    return name


@dataclass(frozen=True, slots=True)
class _Operands:
    """Strides of a tile's operands in bytes: between rows and k of a; between column groups and words of the panel."""

    a_row: Integer
    a_k: Integer
    panel: Value
    panel_group: Integer
    panel_k: Integer
    panel_align: int
    stored: Storage | None = None


@dataclass
class _Tile:
    """Body of a microkernel: loads, multiply-adds over all k, stores.

    Attributes:
        prefetch: returns the address to prefetch at a k; used if the tile has loads to spare.
    """

    f: Function
    operands: _Operands
    rows: int
    products: int
    groups: int
    prefetch: Callable[[Integer], Value]

    def write(
        self,
        acc_row: Value,
        start: tuple[Value, Value] | None = None,
        runs: tuple[Value, Value, Value] | None = None,
    ) -> None:
        """Write the function to its end.

        Arguments:
            acc_row: the bytes between rows of the accumulators.
            start: from where they are loaded, if not from where they are stored, and the bytes between its rows.
            runs: how many runs of ``depth`` there are, and the bytes from one to the next of a and of the panel.
        """
        f, vector_bytes = self.f, self.f.module.vector_bytes
        self._keys = list(itertools.product(range(self.rows), range(self.products), range(self.groups)))
        targets, sources = self._vectors(_ACC, acc_row), self._vectors(*(start or (_ACC, acc_row)))
        sums = [f.load(at, f"first.{_label(key)}", vector_bytes) for key, at in zip(self._keys, sources, strict=True)]
        if runs is None:
            sums = self._multiply(sums, _A, self.operands.panel, 0)
        else:
            count, a_run, panel_run = runs
            names = [f"run.{_label(key)}" for key in self._keys]
            with f.for_range_carrying("run", 0, count, sums, nonempty=True, names=names) as (run, carried):
                a, panel = f.at(_A, f.mul(run, a_run)), f.at(self.operands.panel, f.mul(run, panel_run))
                carried[:] = self._multiply(carried[:], a, panel, f.mul(run, _DEPTH))
            sums = carried
        for at, value in zip(targets, sums, strict=True):
            f.store(value, at, vector_bytes)
        f.end()

    def _vectors(self, start: Value, row_bytes: Value) -> list[Value]:
        """Return the address of each accumulator in memory whose rows are ``row_bytes`` apart."""
        f = self.f
        rows = [f.at(start, f.mul(row_bytes, row), f"{start[1:]}.r{row}") for row in range(self.rows)]
        return [f.at(rows[r], (p * self.groups + g) * f.module.vector_bytes) for r, p, g in self._keys]

    def _multiply(self, sums: list[Value], a: Value, panel: Value, k_before: Integer) -> list[Value]:
        """Loop over k; ``k_before`` counts those of earlier runs."""
        f, operands = self.f, self.operands
        stored = operands.stored
        multiplies_pairs = stored is not None and stored.multiplies_pairs
        if stored is not None and stored.packs_pairs and not multiplies_pairs:
            return self._multiply_pairs(sums, a)
        if stored is not None and stored.packs_fours:
            return self._multiply_bytes(sums, a)
        names = [f"c.{_label(key)}" for key in self._keys]
        row_offsets = [f.mul(operands.a_row, row) for row in range(self.rows)]
        group_offsets = [f.mul(operands.panel_group, group) for group in range(self.groups)]
        with f.for_range_carrying("k", 0, _DEPTH, sums, nonempty=True, names=names) as (k, carried):
            # Constant distances go last: they become part of the instruction's address.
            a_at = f.at(a, f.mul(k, operands.a_k), "a.k")
            panel_at = f.at(panel, f.mul(k, operands.panel_k), "panel.k")
            # Smaller tiles are bound by loads, with which a prefetch would compete.
            if self.rows >= f.module.target.tuning.prefetch_min_rows:
                f.prefetch(self.prefetch(f.add(k, k_before)))

            def weight(product: int, group: int) -> Value:
                start = f.at(panel_at, group_offsets[group], f"panel.g{group}")
                pointer = f.at(start, product * operands.panel_align)
                if stored is not None and not multiplies_pairs:
                    return load_stored(f, pointer, stored, f"w{product}.{group}")
                return f.load(pointer, f"w{product}.{group}", operands.panel_align)

            def number(row: int) -> Value:
                return f.load_splat(f.at(a_at, row_offsets[row], f"a.r{row}"), f"a{row}")

            self._multiply_add(carried, number, weight)
        return carried

    def _multiply_bytes(self, sums: list[Value], a: Value) -> list[Value]:
        """Loop over the words of a panel that have the weights of four k each; the sums are integers until the end."""
        f, operands = self.f, self.operands
        names = [f"c.{_label(key)}" for key in self._keys]
        row_offsets = [f.mul(operands.a_row, row) for row in range(self.rows)]
        group_offsets = [f.mul(operands.panel_group, group) for group in range(self.groups)]

        def words_of(panel: Value, product: int, group: int) -> Value:
            start = f.at(panel, group_offsets[group], f"panel.g{group}")
            return load_words(f, f.at(start, product * operands.panel_align), f"w{product}.{group}")

        # Before the weights' words is one of what a sum begins with.
        first = [first_of_dots(f, words_of(operands.panel, product, group)) for _, product, group in self._keys]
        words = f.lshr(f.add(_DEPTH, 3), 2, "words")
        with f.for_range_carrying("word", 0, words, first, nonempty=True, names=names) as (word, carried):
            a_at = f.at(a, f.mul(word, 4 * f.module.itemsize), "a.k")
            panel_at = f.at(operands.panel, f.mul(f.add(word, 1), operands.panel_k), "panel.k")
            numbers = [load_bytes(f, f.at(a_at, row_offsets[row], f"a.r{row}"), f"a{row}") for row in range(self.rows)]
            for group, product in itertools.product(range(self.groups), range(self.products)):
                weights = words_of(panel_at, product, group)
                for row in range(self.rows):
                    key = (row, product, group)
                    place = self._keys.index(key)
                    carried[place] = dot_bytes(f, carried[place], numbers[row], weights, f"n.{_label(key)}")
        return [
            f.fadd(total, as_numbers(f, integers, "whole"), f"s.{_label(key)}")
            for key, total, integers in zip(self._keys, sums, carried, strict=True)
        ]

    def _multiply_pairs(self, sums: list[Value], a: Value) -> list[Value]:
        """Loop over the words of a panel that have the weights of two k each, the lower one first; then an odd k."""
        names = [f"c.{_label(key)}" for key in self._keys]
        pairs = self.f.lshr(_DEPTH, 1, "pairs")
        for start, stop, halves in ((0, pairs, (0, 1)), (pairs, self.f.sub(_DEPTH, pairs), (0,))):
            with self.f.for_range_carrying("word", start, stop, sums, names=names) as (word, carried):
                self._multiply_words(carried, a, word, halves)
            sums = carried
        return sums

    def _multiply_words(self, sums: list[Value], a: Value, word: Value, halves: Sequence[int]) -> None:
        """Add the products of a word's k, column by column: each word is in a register for its own products alone."""
        f, operands = self.f, self.operands
        a_at = f.at(a, f.mul(word, 2 * f.module.itemsize), "a.k")
        panel_at = f.at(operands.panel, f.mul(word, operands.panel_k), "panel.k")
        rows = [f.at(a_at, f.mul(operands.a_row, row), f"a.r{row}") for row in range(self.rows)]
        numbers = {
            (row, half): f.load_splat(f.at(rows[row], half * f.module.itemsize), f"a{row}.{half}")
            for row in range(self.rows)
            for half in halves
        }
        positions = {key: position for position, key in enumerate(self._keys)}
        for group, product in itertools.product(range(self.groups), range(self.products)):
            start = f.at(panel_at, f.mul(operands.panel_group, group), f"panel.g{group}")
            name = f"w{product}.{group}"
            words = load_words(f, f.at(start, product * operands.panel_align), name)
            for half in halves:
                weights = half_word(f, words, half, name)
                for row in range(self.rows):
                    key = (row, product, group)
                    position = positions[key]
                    sums[position] = f.fma(numbers[row, half], weights, sums[position], f"n.{_label(key)}")

    def _multiply_add(
        self, sums: list[Value], number: Callable[[int], Value], weight: Callable[[int, int], Value]
    ) -> None:
        """Add the products of one k: the operand of fewer registers stays in them, the other comes value by value."""
        stored = self.operands.stored
        by_pairs = stored is not None and stored.multiplies_pairs
        multiply = partial(dot_pairs, self.f) if by_pairs else self.f.fma
        rows = range(self.rows)
        columns = [(product, group) for group in range(self.groups) for product in range(self.products)]
        registers_each = TileCost(self.f.module.target, self.f.module.dtype).registers_each
        if self.rows + registers_each < len(columns) * registers_each + 1:
            numbers = [number(row) for row in rows]
            pairs = ((r, p, g, numbers[r], vector) for p, g in columns for vector in (weight(p, g),) for r in rows)
        else:
            vectors = {(p, g): weight(p, g) for p, g in columns}
            pairs = ((r, p, g, scalar, vectors[p, g]) for r in rows for scalar in (number(r),) for p, g in columns)
        positions = {key: position for position, key in enumerate(self._keys)}
        for r, p, g, scalar, vector in pairs:
            position = positions[r, p, g]
            sums[position] = multiply(scalar, vector, sums[position], f"n.{_label((r, p, g))}")


def _label(key: tuple[int, int, int]) -> str:
    return f"r{key[0]}p{key[1]}g{key[2]}"
