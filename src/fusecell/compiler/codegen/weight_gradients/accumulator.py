"""Accumulation of weight gradients over the chunks of a call: row panels, splits of the rows, the caller's gradient::

    for chunk (main_loop):
        for split of the rows:                         one, or two halves, each with accumulators of its own
            while rows of the chunk are left:
                rows = up to the end of the row panel  512 rows
                for gradient: acc += a^T b over rows   `kernels`
                if the row panel is full: total += acc
    for gradient: caller's gradient = total of the splits

Row panels: rows are added in the order in which the steps run; each 512 of them are added up from zero, then to the
total. So a sum has the same bits however the steps are divided into chunks, and long ones stay accurate, as their error
grows with the number of panels (blocked summation; Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed.,
chapter 4).

Splits (split-K): where a team of two would partition the rows of a call, and there are enough, each half of them is
summed by itself, whichever thread does it, in row panels of as many whole steps as have 512 rows of a half; the halves
are added at the end. Then each of two threads sums the rows that it has just written, which are in its own cache.
Threads of other teams share the accumulators of each split among them. Whether rows are split depends on the call
alone, not on its threads, so the bits don't either.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusecell.compiler.codegen.kernel_abi import ARGS, THREAD_ID, THREADS, Layout
from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_module import Module
from fusecell.compiler.codegen.llvm_text import FALSE, Integer, Value, i1, i64, ptr
from fusecell.compiler.codegen.weight_gradients.kernels import RowRange, add_partial, add_to_caller
from fusecell.compiler.codegen.work_sharing import Team
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.sizes import ALIGNMENT
from fusecell.compiler.schedule.plan import Plan, Sum

__all__ = ["ROW_PANEL", "GradientAccumulator"]

ROW_PANEL = 512
"""Rows that are added up before they are added to the total. Part of the numerical promise: it decides bits."""
_MIN_SPLIT_ROWS = 16
"""Rows of a step from which split sums cost little on one thread. Decides bits, too."""


_IS_SPLIT, _SPLIT = i1("is_split"), i64("split")


@dataclass(frozen=True, slots=True)
class _Units:
    """Units in which a chunk is counted: rows; with split rows whole steps, so that both splits fill panels together.

    Attributes:
        count: in the chunk.
        per_panel: in a row panel.
        rows: of a unit, in the saved values.
        direction: from a unit to the next: 1, or -1 where steps run backwards.
        row_step: from a row of a unit to the next.
    """

    count: Integer
    per_panel: Integer
    rows: Integer
    direction: Integer
    row_step: Integer


class GradientAccumulator:
    """Writer of the parts of ``@work`` for the gradients of weights: at the start, per chunk, at the end."""

    def __init__(self, module: Module, layout: Layout, plan: Plan) -> None:
        self.module, self.layout, self.plan = module, layout, plan

    def begin(self, f: Function) -> None:
        """Start without any rows, and decide which totals are the caller's gradients themselves."""
        if not self.plan.sums:
            return
        # Counters are in memory, as loops of the builder carry vectors only.
        # By split: units in the current panel, and full panels so far.
        self._filled, self._full_panels = (f.alloca(name, 2) for name in ("filled.at", "full_panels.at"))
        self._done = f.alloca("units_done.at")
        for counters in (self._filled, self._full_panels):
            f.store_int(0, counters)
            f.store_int(0, f.at(counters, 8))
        for reduction in self._whole_gradients():
            f.call(self._use_in_place(reduction), ARGS, self._is_split)

    def split_rows(self, f: Function, team: Team) -> Value:
        """Decide whether rows are split, and which splits are this thread's alone, or shared with the others.

        Returns:
            Whether each thread reads only rows that it has written, so that its buffers can be separate.
        """
        rows_of_call = f.mul(self.layout.integer(f, "steps"), team.rows)
        is_long = f.ge(rows_of_call, ROW_PANEL, "is_long")
        can_split = f.and_(team.is_regular, is_long if self.layout.partial_sums == 2 else FALSE, "can_split")
        min_rows = max(2 * team.min_rows, _MIN_SPLIT_ROWS)
        # None of it asks for the threads of the call: a sum has the same bits on any number.
        self._is_split = f.and_(can_split, f.ge(team.rows, min_rows, "is_enough"), "is_split")
        is_pair = f.and_(f.eq(THREADS, 2, "is_pair"), team.by_rows, "is_pair_by_rows")
        self._is_private = f.and_(is_pair, self._is_split, "is_private")
        self._is_shared = f.xor(self._is_private, team.is_team, "is_shared_sum")
        splits = f.select(self._is_split, 2, 1, "splits")
        self._first_split = f.select(self._is_private, THREAD_ID, 0, "split.from")
        self._last_split = f.select(self._is_private, f.add(THREAD_ID, 1), splits, "split.to")
        self._thread_id = f.select(self._is_private, 0, THREAD_ID, "sum.thread_id")
        self._threads = f.select(self._is_private, 1, THREADS, "sum.threads")
        return self._is_private

    def add_chunk(self, f: Function, team: Team, steps: Integer, total: Value, is_reverse: Value) -> None:
        """Add the rows of a chunk to every gradient.

        Arguments:
            steps: of the chunk.
            total: its rows.
        """
        if not self.plan.sums:
            return
        chunk_steps = self.layout.integer(f, "chunk_steps")
        # By rows each thread has written its own rows; shared sums read those of all.
        reads_all_rows = f.and_(team.by_rows, self._is_shared, "reads_all_rows")
        team.barrier(reads_all_rows)
        units = self._units(f, team, steps, total, is_reverse)
        panels = f.udiv(units.count, units.per_panel, "panels")
        middle, odd = f.lshr(team.rows, 1, "middle"), f.and_(team.rows, 1, "odd")
        with f.for_range("split", self._first_split, self._last_split) as split:
            filled_at, full_panels_at = (f.at(at, f.mul(split, 8)) for at in (self._filled, self._full_panels))
            split_start = f.mul(split, middle)
            split_rows = f.add(middle, f.mul(split, odd), "split.rows")
            f.store_int(0, self._done)
            # A chunk ends at most one panel begun before it, and begins at most one that it doesn't end.
            with f.for_range("turn", 0, f.add(panels, 2)):
                done, filled = f.load_int(self._done, "units_done"), f.load_int(filled_at, "filled")
                count = f.minimum(f.sub(units.per_panel, filled), f.sub(units.count, done), "count")
                reverse_unit = f.sub(f.sub(units.count, 1), done, "reverse_unit")
                unit = f.select(is_reverse, reverse_unit, done, "unit")
                rows = self._row_range(f, team, units, unit, count, (split, split_start, split_rows, chunk_steps))
                self._add_range(f, rows, filled, full_panels_at)
                f.store_int(f.add(done, count), self._done)
                self._advance_panel(f, team, units, split, f.add(filled, count, "filled"), filled_at)
        team.barrier(reads_all_rows)

    def _units(self, f: Function, team: Team, steps: Integer, total: Value, is_reverse: Value) -> _Units:
        is_split = self._is_split
        count = f.select(is_split, steps, total, "units")
        # A half of a step has half of its rows: 2 * 512 rows of both are 512 of each.
        whole_steps = f.udiv(2 * ROW_PANEL, f.maximum(team.rows, 1), "whole_steps")
        per_panel = f.select(is_split, f.maximum(whole_steps, 1), ROW_PANEL, "panel.units")
        rows = f.select(is_split, team.rows, 1, "unit.rows")
        direction = f.select(is_reverse, -1, 1, "direction")
        # A step's rows are in order in either direction; without a split a step is no unit, and rows run backwards.
        row_step = f.select(is_split, 1, direction, "row.step")
        return _Units(count, per_panel, rows, direction, row_step)

    def _row_range(
        self,
        f: Function,
        team: Team,
        units: _Units,
        unit: Value,
        count: Value,
        split: tuple[Integer, Integer, Integer, Integer],
    ) -> RowRange:
        """Return the rows of ``count`` units from ``unit`` on: with splits a run per step, else one run.

        Arguments:
            split: its number, its first row in a step, its rows in a step, and the steps of the longest chunk.
        """
        index, split_start, split_rows, chunk_steps = split
        saved_first = f.add(f.mul(unit, units.rows), split_start, "first.saved")
        # Padded, a thread's rows of all steps are neighbours.
        padded_first = f.add(f.mul(unit, split_rows), f.mul(split_start, chunk_steps), "first.padded")
        first = f.select(team.is_padded, padded_first, saved_first, "first")
        unit_rows = f.select(team.is_padded, split_rows, units.rows, "run.rows")
        runs = f.select(self._is_split, count, 1, "runs")
        rows = f.select(self._is_split, split_rows, count, "rows")
        run_step, saved_run_step = f.mul(unit_rows, units.direction), f.mul(units.rows, units.direction)
        return RowRange(first, saved_first, runs, run_step, saved_run_step, rows, units.row_step, index)

    def _add_range(self, f: Function, rows: RowRange, filled: Value, full_panels_at: Value) -> None:
        """Add a range of rows to the current row panel of every gradient."""
        opens = f.eq(filled, 0, "opens")
        is_first_panel = f.eq(f.load_int(full_panels_at, "full_panels"), 0, "is_first_panel")
        for reduction in self.plan.distinct_sums:
            acc = self._panel(f, reduction, rows.split, is_first_panel)
            f.call(reduction.name, ARGS, acc, opens, *rows.args(), self._thread_id, self._threads)

    def _advance_panel(
        self, f: Function, team: Team, units: _Units, split: Value, filled: Integer, filled_at: Value
    ) -> None:
        """Store how full the row panel is; if it is full, close it."""
        is_full = f.eq(filled, units.per_panel, "is_full")
        f.store_int(f.select(is_full, 0, filled, "filled"), filled_at)
        with f.if_(is_full, "full_panel"):
            self._close_panel(f, team, split)

    def finish(self, f: Function, team: Team) -> None:
        """Close the last row panel and add the totals to the caller's gradients."""
        if not self.plan.sums:
            return
        is_open, has_full = (
            f.ne(f.load_int(f.at(counters, f.mul(self._first_split, 8)), "count"), 0, "is_positive")
            for counters in (self._filled, self._full_panels)
        )
        with f.if_(is_open, "open_panel"), f.for_range("split", self._first_split, self._last_split) as split:
            self._close_panel(f, team, split)
        # Without any row no accumulator has been written.
        with f.unless(f.or_(is_open, has_full, "has_rows"), "no_rows"):
            self._clear(f)
            team.barrier(self._is_shared)
        # Below, threads read splits that others have summed; of shared ones a barrier has come before.
        team.barrier(self._is_private)
        for reduction in self.plan.sums:
            f.call(self._add_to_caller(reduction), ARGS, self._is_split, THREAD_ID, THREADS)

    def _whole_gradients(self) -> list[Sum]:
        """List the sums that are a whole gradient, with rows of whole vectors."""
        covered = self.plan.covered()
        return [
            reduction
            for reduction in self.plan.distinct_sums
            if reduction.label in covered and not reduction.flipped and not reduction.width % LANES
        ]

    def _use_in_place(self, reduction: Sum) -> str:
        """Write a function that sums in the caller's gradient, if its layout matches and there is no second split.

        Like the next ones a function for each gradient: those of gradients of one shape are compiled once.
        """
        f = Function(self.module, f"{reduction.name}.use_in_place", ARGS, _IS_SPLIT)
        layout, itemsize, label = self.layout, self.module.itemsize, reduction.label
        strides = [(0, self.module.row_bytes(reduction.width)), (1, itemsize)]
        if len(self.plan.graph[self.plan.graph.outputs[label]].type.shape) == 1:
            strides = [(0, itemsize)]
        low_bits = f.and_(layout.integer(f, f"out.{label}.ptr"), ALIGNMENT - 1, "low_bits")
        fits = f.and_(f.not_(_IS_SPLIT, "not_split"), f.eq(low_bits, 0, "is_aligned"), "fits")
        for dim, stride in strides:
            is_packed = f.eq(layout.integer(f, f"out.{label}.stride{dim}"), stride, "is_packed")
            fits = f.and_(fits, is_packed, "fits")
        with f.if_(fits, "in_place"):
            layout.set_buffer(f, reduction.total, layout.pointer(f, f"out.{label}.ptr"))
        return f.end()

    def _bytes(self, reduction: Sum) -> int:
        """Return the bytes of a gradient's accumulators."""
        return reduction.height * self.module.row_bytes(reduction.width)

    def _panel(self, f: Function, reduction: Sum, split: Integer, is_first: Value) -> Value:
        """Return the accumulators of the current row panel: the total itself for the first panel, else the part."""
        total, part = (self.layout.buffer(f, name) for name in (reduction.total, reduction.part))
        panel = f.select(is_first, total, part, "panel")
        return f.at(panel, f.mul(split, self._bytes(reduction)), "acc")

    def _close_panel(self, f: Function, team: Team, split: Integer) -> None:
        """Count a row panel as full; from the second on add it to the total."""
        full_panels_at = f.at(self._full_panels, f.mul(split, 8))
        full_panels = f.load_int(full_panels_at, "full_panels")
        f.store_int(f.add(full_panels, 1), full_panels_at)
        # The first row panel was added up in the total itself.
        with f.if_(f.ne(full_panels, 0, "is_not_first"), "add_part"):
            team.barrier(self._is_shared)
            for reduction in self.plan.distinct_sums:
                f.call(self._add_part(reduction), ARGS, split, self._thread_id, self._threads)
            team.barrier(self._is_shared)

    def _add_part(self, reduction: Sum) -> str:
        """Write a function that adds this thread's share of a row panel to the total."""
        name = f"{reduction.name}.add_part"
        if not self.module.is_new(name):
            return name
        f = Function(self.module, name, ARGS, _SPLIT, THREAD_ID, THREADS)
        vectors = self._bytes(reduction) // self.module.vector_bytes
        begin, end = (f.mul(vector, self.module.vector_bytes) for vector in f.partition(vectors, THREAD_ID, THREADS))
        offset = f.mul(_SPLIT, self._bytes(reduction))
        total, part = (f.at(self.layout.buffer(f, each), offset) for each in (reduction.total, reduction.part))
        f.call(add_partial(self.module), total, part, begin, end)
        return f.end()

    def _clear(self, f: Function) -> None:
        """Set all totals to zero, for a call without rows."""
        is_first = f.eq(self._thread_id, 0, "is_first_of_split")
        with f.if_(is_first, "clear"), f.for_range("split", self._first_split, self._last_split) as split:
            for reduction in self.plan.distinct_sums:
                start = f.at(self.layout.buffer(f, reduction.total), f.mul(split, self._bytes(reduction)))
                f.call(_zero(self.module), start, self._bytes(reduction))

    def _add_to_caller(self, reduction: Sum) -> str:
        """Write a function that adds a total to the caller's gradient, at its corner, whatever the strides.

        A team partitions the rows of a gradient that is a single sum; several sums are added in order by one thread.
        """
        module, layout, label = self.module, self.layout, reduction.label
        f = Function(module, f"{reduction.name}.add_to_caller", ARGS, _IS_SPLIT, THREAD_ID, THREADS)
        is_matrix = len(self.plan.graph[self.plan.graph.outputs[label]].type.shape) == 2
        dims = ("1", "0") if reduction.flipped else ("0", "1")
        strides = [layout.integer(f, f"out.{label}.stride{dim}") for dim in (dims if is_matrix else "00")]
        gradient, source = layout.pointer(f, f"out.{label}.ptr"), layout.buffer(f, reduction.total)
        start = f.at(gradient, f.mul(strides[0], reduction.corner[0])) if is_matrix else gradient
        start = f.at(start, f.mul(strides[1], reduction.corner[1]))
        is_fresh = label in self.plan.covered()
        first, last = f.partition(reduction.height, THREAD_ID, THREADS) if is_fresh else (0, reduction.height)
        row_bytes = module.row_bytes(reduction.width)
        is_elsewhere = f.ne(gradient, source, "is_elsewhere")
        with f.if_(is_elsewhere if is_fresh else f.eq(THREAD_ID, 0, "is_leader"), "add"):
            rows = f.mul(first, row_bytes)
            to = (f.at(start, f.mul(strides[0], first)), *strides)
            size = (row_bytes, f.sub(last, first), reduction.width)
            f.call(add_to_caller(module, is_fresh=is_fresh), *to, f.at(source, rows), *size)
            with f.if_(_IS_SPLIT, "split"):
                second = f.at(f.at(source, self._bytes(reduction)), rows)
                f.call(add_to_caller(module, is_fresh=False), *to, second, *size)
        return f.end()


def _zero(module: Module) -> str:
    """Write ``@gradient.zero(start, bytes)``, unless it is written: store zeros, vector by vector."""
    name, start, bytes_ = "gradient.zero", ptr("start"), i64("bytes")
    if module.is_new(name):
        f = Function(module, name, start, bytes_)
        with f.for_range("byte", 0, bytes_, module.vector_bytes) as byte:
            f.store(f.zero, f.at(start, byte), module.vector_bytes)
        f.end()
    return name
