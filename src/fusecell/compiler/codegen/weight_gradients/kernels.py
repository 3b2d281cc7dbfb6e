"""Functions of the gradients of weights: one per gradient, which adds rows to its accumulators, and shared helpers.

``@<gradient>`` for a^T b, over a range of rows (Goto and van de Geijn's loops, with k running over rows)::

    for row group of the range:                    128 rows: a tile's part of a stays in L1
        pack a                                     only if its rows are long
        for portion of b's column groups:          as wide as a tile
            pack b's columns                       only if a is packed
            for tile of a's features:              this thread's share
                acc += a^T b                       microkernel `outer_product`, over the rows of the group

For b alone, a bias, up to eight column groups of accumulators stay in registers over all rows of the range.

No operand needs packing where rows are short: both are read row by row, as they are. Measured on one core of a Zen 4,
tiles of 12 x 2 reached 89 to 102 GFLOP/s that way, where MKL reached 74 to 88.

Pairs of bfloat16 rows are always packed, two rows to a word of each feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fusecell.compiler.codegen.kernel_abi import ARGS, THREAD_ID, THREADS, Layout, StepRows, row_address
from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_module import Module
from fusecell.compiler.codegen.llvm_text import Integer, Value, i1, i64, ptr
from fusecell.compiler.codegen.microkernel import outer_product
from fusecell.compiler.codegen.nests import SummedRows, emit_contract_sum, emit_scatter_sum, is_callers
from fusecell.compiler.codegen.tile_cost import split_evenly
from fusecell.compiler.codegen.weight_gradients.pack_operand import (
    PACKED,
    PACKED_COLUMNS,
    TILE_FEATURES,
    emit_pack_column_pairs,
    emit_pack_columns,
    emit_pack_operand,
    emit_pack_pairs,
    is_packed,
    micro_panel_bytes,
    outer_tiling,
    packed_bytes,
    strip_bytes,
)
from fusecell.compiler.ir.graph import Node
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.schedule.plan import Plan, Sum

__all__ = ["RowRange", "add_partial", "add_to_caller", "emit_reductions"]


@dataclass(frozen=True, slots=True)
class RowRange:
    """Range of rows of a chunk that a gradient adds up: runs of rows, each in order, one after the other.

    Without a split of the rows that is one run of neighbours; with it a run per step, of the split's rows of that step.

    Attributes:
        first: the first row, in the buffers of the chunk.
        saved_first: the first row, in the chunk's saved values.
        runs: the number of runs.
        run_step: rows from the start of a run to that of the next, in the buffers of the chunk.
        saved_run_step: the same in the saved values.
        rows: of a run.
        row_step: from a row to the next: 1, or -1 where steps run backwards.
        split: the part of a step's rows, 0 or 1; each has accumulators of its own.
    """

    first: Integer
    saved_first: Integer
    runs: Integer
    run_step: Integer
    saved_run_step: Integer
    rows: Integer
    row_step: Integer
    split: Integer

    def args(self) -> tuple[Integer, ...]:
        """Return the fields in the order of the parameters that pass them on."""
        head = (self.first, self.saved_first, self.runs, self.run_step, self.saved_run_step)
        return *head, self.rows, self.row_step, self.split


_FEW_BLOCKS = 4
"""Blocks of eight column groups that are written out, at the most; of wider sums a loop goes through them."""
_ACC, _OPENS = ptr("acc"), i1("opens")
_RANGE_PARAMS = (
    i64("first"), i64("saved.first"), i64("runs"), i64("run.step"), i64("saved.run.step"), i64("rows"),
    i64("row.step"), i64("split"),
)  # fmt: skip
_RANGE = RowRange(*_RANGE_PARAMS)
_PARAMS = (ARGS, _ACC, _OPENS, *_RANGE_PARAMS, THREAD_ID, THREADS)
"""Parameters of a gradient's function: the accumulators, and whether they open a row panel and so count as zero; the
rows to add; and the number of the thread, and of threads, that share the accumulators."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of an operand: their address, the bytes from each to the next, and from a run of them to the next."""

    start: Value
    k: Integer
    run: Integer

    def advanced(self, f: Function, count: Integer, bytes_: Integer) -> _Rows:
        """Return the same rows from an address on that is ``count * bytes_`` higher."""
        return replace(self, start=f.at(self.start, f.mul(count, bytes_)))


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles of one height: their number, the number of the first among all, and its first feature."""

    count: int
    height: int
    first: int
    feature: int


def emit_reductions(module: Module, layout: Layout, plan: Plan) -> None:
    """Write the function of every weight gradient, under its name; of several that are the same that of the first."""
    for reduction in plan.distinct_sums:
        emitter = _Reduction(module, layout, plan, reduction)
        if reduction.a is None:
            emitter.row_sum()
        elif reduction.nest is not None:
            emitter.nest_sum(plan.graph[reduction.nest], reduction.a)
        else:
            emitter.outer_sum(reduction.a)


class _Reduction:
    """Writer of the function of one weight gradient."""

    def __init__(self, module: Module, layout: Layout, plan: Plan, reduction: Sum) -> None:
        self.module, self.layout, self.plan, self.reduction = module, layout, plan, reduction
        self.tiling = outer_tiling(module, reduction)
        self.f = Function(module, reduction.name, *_PARAMS)

    def row_sum(self) -> None:
        """Write the sum of b's rows, eight column groups at a time, in turns among the threads."""
        f, module = self.f, self.module
        b = self._operand(self.reduction.b, "b")
        # A row panel opens by loading zeros in place of the accumulators: nothing has to clear them before.
        zeros = module.zeros(8 * module.vector_bytes)
        blocks, begin = module.groups(self.reduction.width) // 8, 0
        if blocks > _FEW_BLOCKS:
            begin = 8 * blocks
            with f.for_range("block", THREAD_ID, blocks, THREADS) as block:
                self._add_block(b, f.mul(block, 8), 8, zeros)
        for first in range(begin, module.groups(self.reduction.width), 8):
            turn = f.urem(first // 8, THREADS, "turn")
            # Whole groups per thread: a group's sum has one order of additions, whichever thread does it.
            with f.if_(f.eq(turn, THREAD_ID, "is_this_thread"), "this_thread"):
                self._add_block(b, first, min(8, module.groups(self.reduction.width) - first), zeros)
        f.end()

    def _add_block(self, b: _Rows, first: Integer, groups: int, zeros: Value) -> None:
        """Add all rows of some column groups, from one on, to their accumulators."""
        f, vector_bytes = self.f, self.module.vector_bytes
        acc = f.at(_ACC, f.mul(first, vector_bytes))
        start = f.select(_OPENS, zeros, acc, "start")
        self._add_rows(start, acc, b.advanced(f, first, vector_bytes), groups)

    def _add_rows(self, start: Value, acc: Value, b: _Rows, groups: int) -> None:
        """Add all rows of some column groups, in registers, to what is at ``start``; store the sums at ``acc``."""
        f, vector_bytes = self.f, self.module.vector_bytes
        sources, targets = ([f.at(at, group * vector_bytes) for group in range(groups)] for at in (start, acc))
        first = [f.load(at, "first", vector_bytes) for at in sources]
        with f.for_range_carrying("run", 0, _RANGE.runs, first) as (run, sums):
            run_start = f.at(b.start, f.mul(run, b.run))
            with f.for_range_carrying("row", 0, _RANGE.rows, sums) as (row, carried):
                row_at = f.at(run_start, f.mul(row, b.k))
                for group, so_far in enumerate(carried):
                    value = f.load(f.at(row_at, group * vector_bytes), "value", self.module.itemsize)
                    carried[group] = f.fadd(so_far, value, "sum")
            sums[:] = carried
        for at, value in zip(targets, sums, strict=True):
            f.store(value, at, vector_bytes)

    def nest_sum(self, nest: Node, a_index: int) -> None:
        """Write the sum of a nest of each row."""
        a, b = self._operand(a_index, "a"), self._operand(self.reduction.b, "b")
        runs, strides = (_RANGE.runs, _RANGE.rows), ((a.run, b.run), (a.k, b.k))
        exact = tuple(is_callers(self.reduction.operands[index]) for index in (a_index, self.reduction.b))
        rows = SummedRows(a.start, b.start, *runs, *strides, (THREAD_ID, THREADS), (exact[0], exact[1]))
        emit = emit_contract_sum if nest.op == "contract_sum" else emit_scatter_sum
        emit(self.f, nest.attrs, rows, _ACC, _OPENS)
        self.f.end()

    def outer_sum(self, a_index: int) -> None:
        """Write the sum of a^T b, row group by row group: of long runs a part of one, of short ones several."""
        f = self.f
        a, b = self._operand(a_index, "a"), self._operand(self.reduction.b, "b")
        group = self.module.target.tuning.pack_row_group
        runs_per_group = f.maximum(f.udiv(group, f.maximum(_RANGE.rows, 1), "whole_runs"), 1, "runs_per_group")
        # A split's rows of a step are a run; several short ones make a row group together.
        with f.for_range("run", 0, _RANGE.runs, runs_per_group) as run:
            runs = f.minimum(f.sub(_RANGE.runs, run), runs_per_group, "runs")
            a_run, b_run = a.advanced(f, run, a.run), b.advanced(f, run, b.run)
            with f.for_range("row", 0, _RANGE.rows, group) as row:
                depth = f.minimum(f.sub(_RANGE.rows, row), group, "depth")
                is_first = f.eq(f.add(run, row), 0, "is_first")
                opens = f.and_(_OPENS, is_first, "opens")
                self._tiles(opens, a_run.advanced(f, row, a.k), b_run.advanced(f, row, b.k), (depth, runs))
        f.end()

    def _tiles(self, opens: Value, a: _Rows, b: _Rows, size: tuple[Integer, Integer]) -> None:
        """Write the tiles of a row group: for each portion of b's columns all of a's features.

        Arguments:
            opens: whether the accumulators count as zero.
            size: the rows of a run, and how many runs there are.
        """
        f, module, reduction = self.f, self.module, self.reduction
        acc_row, width = module.row_bytes(reduction.width), self.tiling.width(self._max_height)
        start_row = f.select(opens, 0, acc_row, "start.row")
        packed = self._pack(a, size) if is_packed(module, self.plan, reduction) else None
        words = (self._words(size[0]), size[1])
        # Where accumulators open, they are loaded from zeros, at a stride of 0: no pass has to clear them.
        zeros = module.zeros(width * module.vector_bytes)
        group = 0
        for portions, groups in split_evenly(module.groups(reduction.width), width):
            with f.for_range("group", group, group + portions * groups, groups) as first:
                column = f.mul(first, module.vector_bytes)
                tile_b = b.advanced(f, first, module.vector_bytes)
                if packed is not None:
                    tile_b = self._pack_columns(tile_b, groups, size)
                for tiles in self._heights():
                    begin, end = f.partition(tiles.count, THREAD_ID, THREADS)
                    with f.for_range("tile", begin, end) as tile:
                        feature = f.add(f.mul(tile, tiles.height), tiles.feature)
                        acc = f.at(f.at(_ACC, f.mul(feature, acc_row)), column)
                        start = f.select(opens, zeros, acc, "start")
                        if packed is None:
                            tile_a = a.advanced(f, feature, module.itemsize)
                        else:
                            tile_a = packed.advanced(f, f.add(tile, tiles.first), micro_panel_bytes(module))
                        strides = (acc_row, start_row, tile_a.k, tile_b.k, *words, tile_a.run, tile_b.run)
                        name = outer_product(module, tiles.height, groups, pairs=reduction.pairs)
                        f.call(name, acc, start, tile_a.start, tile_b.start, *strides)
            group += portions * groups

    def _pack(self, a: _Rows, size: tuple[Integer, Integer]) -> _Rows:
        """Pack the rows of a into micro-panels, each thread those of its own tiles; return the packed rows."""
        f, module, (depth, runs) = self.f, self.module, size
        row_bytes = TILE_FEATURES * module.itemsize
        start = f.at(self.layout.buffer(f, PACKED), f.mul(_RANGE.split, packed_bytes(module, self.reduction)))
        packed = _Rows(start, row_bytes, f.mul(self._words(depth), row_bytes))
        with f.for_range("run", 0, runs) as run:
            source, target = a.advanced(f, run, a.run), packed.advanced(f, run, packed.run)
            for tiles in self._heights():
                begin, end = f.partition(tiles.count, THREAD_ID, THREADS)
                to = target.advanced(f, f.add(begin, tiles.first), micro_panel_bytes(module))
                features = source.advanced(f, f.add(f.mul(begin, tiles.height), tiles.feature), module.itemsize)
                part = (a.k, depth, f.sub(end, begin))
                if self.reduction.pairs:
                    f.call(emit_pack_pairs(module, tiles.height), to.start, features.start, *part)
                else:
                    tile_bytes = tiles.height * module.itemsize
                    f.call(emit_pack_operand(module), to.start, features.start, *part, tile_bytes)
        return packed

    def _pack_columns(self, b: _Rows, groups: int, size: tuple[Integer, Integer]) -> _Rows:
        """Pack a portion of b's columns, each thread into a strip of its own; return the packed rows."""
        f, module, (depth, runs) = self.f, self.module, size
        row_bytes = groups * module.vector_bytes
        strip = f.add(f.mul(THREAD_ID, self.layout.partial_sums), _RANGE.split, "strip")
        start = f.at(self.layout.buffer(f, PACKED_COLUMNS), f.mul(strip, strip_bytes(module, self.reduction)))
        packed = _Rows(start, row_bytes, f.mul(self._words(depth), row_bytes))
        emit = emit_pack_column_pairs if self.reduction.pairs else emit_pack_columns
        with f.for_range("run", 0, runs) as run:
            source, target = b.advanced(f, run, b.run), packed.advanced(f, run, packed.run)
            f.call(emit(module, groups), target.start, source.start, b.k, depth)
        return packed

    def _words(self, rows: Integer) -> Integer:
        """Return how many words of each feature rows of a run are packed to: one for each, or for each pair."""
        return self.f.lshr(self.f.add(rows, 1), 1, "words") if self.reduction.pairs else rows

    @property
    def _max_height(self) -> int:
        """Features of the tallest tile."""
        return min(self.tiling.max_rows, self.reduction.height)

    def _heights(self) -> Iterator[_Tiles]:
        """Split a's features evenly into tiles: those of one height after the other."""
        first, feature = 0, 0
        for count, height in split_evenly(self.reduction.height, self._max_height):
            yield _Tiles(count, height, first, feature)
            first, feature = first + count, feature + count * height

    def _operand(self, index: int, name: str) -> _Rows:
        """Return the rows of the range in an operand."""
        f, location = self.f, self.reduction.operands[index]
        at = StepRows(t=0, base=_RANGE.first, saved_base=_RANGE.saved_first, old_state=0)
        rows = row_address(f, self.layout, self.module, location.buffer, at)
        start = f.at(rows.start, location.offset * self.module.itemsize, name)
        run = _RANGE.saved_run_step if location.buffer.scope == "saved" else _RANGE.run_step
        return _Rows(start, f.mul(_RANGE.row_step, rows.stride, f"{name}.k"), f.mul(run, rows.stride, f"{name}.run"))


def add_partial(module: Module) -> str:
    """Return the name of the function that adds a thread's share of a row panel to the total, emitted on first use."""
    name = "gradient.add_partial"
    if not module.is_new(name):
        return name
    total, partial, first, last = ptr("total"), ptr("partial"), i64("from"), i64("to")
    f = Function(module, name, total, partial, first, last, noalias=(total, partial))
    with f.for_range("byte", first, last, module.vector_bytes) as byte:
        total_at, partial_at = f.at(total, byte), f.at(partial, byte)
        so_far = f.load(total_at, "so_far", module.vector_bytes)
        value = f.load(partial_at, "value", module.vector_bytes)
        f.store(f.fadd(so_far, value, "sum"), total_at, module.vector_bytes)
    f.end()
    return name


def add_to_caller(module: Module, *, is_fresh: bool) -> str:
    """Return the name of the function that adds a total to the caller's gradient, emitted on first use.

    By vectors where the gradient's columns are contiguous, else number by number.

    Arguments:
        is_fresh: whether nothing is there yet, so that the total is stored.
    """
    name = "gradient.store" if is_fresh else "gradient.add"
    if not module.is_new(name):
        return name
    to, to_row, to_column = ptr("to"), i64("to.row"), i64("to.column")
    source, source_row, height, width = ptr("from"), i64("from.row"), i64("height"), i64("width")
    params = (to, to_row, to_column, source, source_row, height, width)
    f = Function(module, name, *params, noalias=(to, source))
    is_contiguous = f.eq(to_column, module.itemsize, "is_contiguous")
    with f.for_range("row", 0, height) as row:
        target_row, total_row = f.at(to, f.mul(row, to_row)), f.at(source, f.mul(row, source_row))
        with f.if_(is_contiguous, "contiguous"), f.for_range("column", 0, width, LANES) as column:
            mask = f.first_lanes(f.sub(width, column))
            offset = f.mul(column, module.itemsize)
            target = f.at(target_row, offset)
            value = f.load(f.at(total_row, offset), "value", module.vector_bytes)
            if not is_fresh:
                value = f.fadd(f.load_masked(target, mask, "so_far"), value, "sum")
            f.store_masked(value, target, mask)
        with f.unless(is_contiguous, "strided"), f.for_range("column", 0, width) as column:
            target = f.at(target_row, f.mul(column, to_column))
            value = f.load_scalar(f.at(total_row, f.mul(column, module.itemsize)), "value")
            if not is_fresh:
                value = f.fadd(f.load_scalar(target, "so_far"), value, "sum")
            f.store_scalar(value, target)
    f.end()
    return name
