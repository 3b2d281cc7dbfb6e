"""Rows between the caller's tensors and the kernel's buffers: states, resets, inputs and outputs outside the loop.

Per chunk of steps, as `main_loop` calls it::

    write_starts    first row of each step in the chunk, where the number of rows differs from step to step
    copy_in         for step, row: chunk buffer[row] = input[step, order[row]]
    per step:
        move_states "first"    rows that begin: read their state from the caller
        move_states "last"     rows that have ended: write their state to the caller
        reset                  rows whose flag is set: state = reset state; in the backward its gradient is cut off
    copy_out        for step, row: output[step, order[row]] = chunk buffer[row]

In general the rows of a chunk's buffers are those of its steps, one step after the other. Where the team is *padded*,
each thread has a separate part of them, whole pages apart: with rows of other threads between its own, a core would
prefetch those, out of the caches of the cores that write them (false sharing, by the hardware's prefetcher).
"""

from __future__ import annotations

from collections.abc import Callable

from fusecell.compiler.codegen.kernel_abi import ARGS, Layout
from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_module import Module
from fusecell.compiler.codegen.llvm_text import FALSE, NULL, Integer, Value
from fusecell.compiler.codegen.work_sharing import Team
from fusecell.compiler.ir.primitives import LANES, PRIMITIVES
from fusecell.compiler.ir.sizes import ALIGNMENT
from fusecell.compiler.schedule.plan import Location, Plan

__all__ = ["CallerRows"]

_INT_BYTES = 8
"""Bytes of an element of the arrays of row numbers."""


class CallerRows:
    """Writer of the parts of ``@work`` that copy rows, or count them."""

    def __init__(self, module: Module, layout: Layout, plan: Plan, f: Function, team: Team, rows: Integer) -> None:
        self.module, self.layout, self.plan, self.f, self.team, self.rows = module, layout, plan, f, team, rows
        self.order = layout.buffer(f, "order")
        self._total, self._regular_base = f.alloca("total.at"), f.alloca("regular_base.at")
        self._in_place: dict[int, tuple[Value, Value]] = {}

    def rows_of_step(self, t: Integer) -> Value:
        """Return how many rows take part in a step."""
        f = self.f
        counts = self.layout.pointer(f, "counts")
        is_regular = f.eq(counts, NULL, "no_counts")
        # Without counts every step reads the slot of the batch size: one load from a selected address, no branch.
        offset = f.select(is_regular, 0, f.mul(t, _INT_BYTES), "count.offset")
        rows_slot = f.at(ARGS, self.layout.offset("rows"), "rows.slot")
        source = f.select(is_regular, rows_slot, counts, "count.at")
        return f.load_int(f.at(source, offset), "rows")

    def fill_order(self) -> None:
        """Write the order of rows: the caller's, or as they are. Every thread of a team writes the same."""
        f = self.f
        caller_order = self.layout.pointer(f, "caller.order")
        has_order = f.ne(caller_order, NULL, "has_order")
        with f.if_(has_order, "order"):
            f.copy_bytes(self.order, caller_order, f.mul(self.rows, _INT_BYTES))
        with f.unless(has_order, "unordered"), f.for_range("row", 0, self.rows) as row:
            f.store_int(row, f.at(self.order, f.mul(row, _INT_BYTES)))

    def write_starts(self, lowest_step: Value, steps: Integer) -> Value:
        """Return how many rows a chunk has; where steps differ in their number of rows, write the first row of each."""
        f = self.f
        starts = self.layout.buffer(f, "starts")
        f.store_int(f.mul(steps, self.rows), self._total)
        with f.unless(self.team.is_regular, "ragged"):
            f.store_int(0, self._total)
            f.store_int(0, starts)
            with f.for_range("chunk_step", 0, steps) as chunk_step:
                count = self.rows_of_step(f.add(lowest_step, chunk_step))
                after = f.add(f.load_int(self._total, "start"), count)
                f.store_int(after, self._total)
                f.store_int(after, f.at(starts, f.mul(f.add(chunk_step, 1), _INT_BYTES)))
        return f.load_int(self._total, "chunk.total")

    def first_rows(self, chunk_step: Integer) -> tuple[Value, Value]:
        """Return the first row of a step of the chunk, counted from the lowest step.

        Returns:
            Its number in the chunk's buffers, and in the chunk's saved values, which have the caller's layout.
        """
        f, team = self.f, self.team
        # The computed base goes through memory, so that one load serves both cases without a branch.
        f.store_int(f.mul(chunk_step, self.rows), self._regular_base)
        start = f.at(self.layout.buffer(f, "starts"), f.mul(chunk_step, _INT_BYTES))
        saved_base = f.load_int(f.select(team.is_regular, self._regular_base, start, "base.at"), "saved.base")
        # A thread's part begins where it would in the longest chunk: others may still be in the one before.
        before = f.mul(team.first_row, f.sub(self.layout.integer(f, "chunk_steps"), 1))
        thread_rows = f.sub(team.last_row, team.first_row, "thread_rows")
        padded_base = f.add(before, f.mul(chunk_step, thread_rows), "padded_base")
        return f.select(team.is_padded, padded_base, saved_base, "base"), saved_base

    def move_states(self, kind: str, start: Integer, stop: Integer, copy: Integer) -> None:
        """Read the states of rows that begin (``first``), or write those of rows that have ended (``last``).

        Arguments:
            copy: the copy of the states, 0 or 1.
        """
        f, module = self.f, self.module
        start, stop = self.team.thread_rows(start, stop)
        # By columns the leader copies all rows, which the columns of every thread will read, and a barrier follows.
        with self.team.per_row(), f.for_range("row", start, stop) as row:
            caller_row = self._caller_row(row)
            for name, (leaf, _) in self.plan.states.items():
                size = self.plan.graph[leaf].size
                state = self._state_row(f"state.{name}", size, copy, row)
                callers = self._caller_state(kind, name, caller_row)
                source, target = (callers, state) if kind == "first" else (state, callers)
                f.copy_bytes(target, source, size * module.itemsize)

    def _caller_row(self, row: Integer) -> Value:
        return self.f.load_int(self.f.at(self.order, self.f.mul(row, _INT_BYTES)), "caller_row")

    def _state_row(self, buffer: str, size: int, copy: Integer, row: Integer) -> Value:
        f = self.f
        index = f.add(f.mul(copy, self.rows), row)
        return f.at(self.layout.buffer(f, buffer), f.mul(index, self.module.row_bytes(size)))

    def _caller_state(self, kind: str, name: str, row: Integer) -> Value:
        f = self.f
        start = self.layout.pointer(f, f"{kind}.{name}.ptr")
        return f.at(start, f.mul(row, self.layout.integer(f, f"{kind}.{name}.row")))

    def copy_unstepped_states(self) -> None:
        """Copy every first state to the last one: it is the result of a row that takes part in no step."""
        f = self.f
        start, stop = self.team.thread_rows(0, self.rows)
        with self.team.per_row(), f.for_range("row", start, stop) as row:
            caller_row = self._caller_row(row)
            for name, (leaf, _) in self.plan.states.items():
                bytes_ = self.plan.graph[leaf].size * self.module.itemsize
                last = self._caller_state("last", name, caller_row)
                f.copy_bytes(last, self._caller_state("first", name, caller_row), bytes_)

    def reset(self, t: Integer, rows: Integer, copy: Integer) -> None:
        """Reset the rows whose flag is set: their state before the step, or in the backward its gradient after it."""
        f = self.f
        flags = self.layout.pointer(f, "resets")
        has_resets = f.ne(flags, NULL, "has_resets")
        reset_row: Callable[[Value, Value, int], None] = (
            self._cut_gradient_row if self.plan.backward else self._reset_row
        )
        with f.if_(has_resets, "resets"):
            flags_of_step = f.at(flags, f.mul(t, self.layout.integer(f, "resets.step")))
            start, stop = self.team.thread_rows(0, rows)
            with self.team.per_row(), f.for_range("row", start, stop) as row:
                caller_row = self._caller_row(row)
                offset = f.mul(caller_row, self.layout.integer(f, "resets.row"))
                flag = f.load_int(f.at(flags_of_step, offset), "flag", "i8")
                with f.if_(f.ne(flag, 0, "is_set"), "reset"):
                    for name, (leaf, _) in self.plan.states.items():
                        size = self.plan.graph[leaf].size
                        state = self._state_row(f"state.{name}", size, copy, row)
                        reset_row(state, self._caller_state("reset", name, caller_row), size)
            # By columns the leader resets all rows, of which the others read their operands.
            self.team.barrier(self.team.by_columns)

    def _reset_row(self, state: Value, callers: Value, size: int) -> None:
        """Set a state to the reset state."""
        self.f.copy_bytes(state, callers, size * self.module.itemsize)

    def _cut_gradient_row(self, state: Value, callers: Value, size: int) -> None:
        """Add a state's gradient to that of the reset state, whose copy it was, and set it to zero."""
        f, module = self.f, self.module
        with f.for_range("feature", 0, size) as feature:
            offset = f.mul(feature, module.itemsize)
            state_at, callers_at = f.at(state, offset), f.at(callers, offset)
            gradient, total = f.load_scalar(state_at, "gradient"), f.load_scalar(callers_at, "total")
            f.store_scalar(f.fadd(gradient, total, "total"), callers_at)
            f.store_scalar(Value("0.0", module.scalar), state_at)

    def find_inputs_in_place(self) -> None:
        """Decide which inputs outside the loop are used in place, without a copy: those with the layout of a buffer."""
        f, layout = self.f, self.layout
        not_by_rows = f.not_(self.team.by_rows, "not_by_rows")
        # By rows, each thread's products take its own rows of all steps, which are neighbours in a buffer only; and
        # with counts, rows that have ended lie between those of a step and the next.
        is_regular = f.and_(not_by_rows, self.team.is_regular, "is_regular_not_by_rows")
        for index, buffer in self.plan.gathered.items():
            if not self._has_whole_vectors(index):
                continue
            name, row_bytes = f"in.{self.plan.graph[index].name}", buffer.size * self.module.itemsize
            low_bits = f.and_(layout.integer(f, f"{name}.ptr"), ALIGNMENT - 1, "low_bits")
            fits = f.and_(is_regular, f.eq(low_bits, 0, "is_aligned"), "fits")
            strides = (
                (f"{name}.row", row_bytes, self.rows),
                (f"{name}.step", f.mul(self.rows, row_bytes), layout.integer(f, "steps")),
            )
            for slot, stride, count in strides:
                is_packed = f.eq(layout.integer(f, slot), stride, "is_packed")
                # The stride of a single row, or step, is never used.
                stride_fits = f.or_(is_packed, f.le(count, 1, "is_single"), "fits")
                fits = f.and_(fits, stride_fits, "fits")
            self._in_place[index] = fits, layout.buffer(f, buffer.name)

    def _has_whole_vectors(self, index: int) -> bool:
        """Whether whole vectors read nothing beyond an input's rows, which are the caller's and not padded."""
        graph = self.plan.graph
        if graph[index].size % LANES:
            return False
        parts = {index}
        for other, node in graph:
            # Nests read vectors from any feature on.
            reads_anywhere = PRIMITIVES[node.op].nest or node.op in ("contract_sum", "scatter_sum")
            if reads_anywhere and parts.intersection(node.args):
                return False
            if node.op == "slice" and node.args[0] in parts:
                parts.add(other)
                # A slice from the middle of a vector is read by whole vectors, the last one across the row's end.
                if node.attrs["start"] % LANES:
                    return False
        return True

    def copy_in(self, lowest_step: Value, steps: Integer) -> None:
        """Copy the inputs of products outside the loop into the chunk's buffers, unless they are used in place."""
        f, layout = self.f, self.layout
        for index, buffer in self.plan.gathered.items():
            name = f"in.{self.plan.graph[index].name}"
            in_place, _ = self._in_place.get(index, (FALSE, None))
            with f.if_(in_place, "in_place"):
                offset = f.mul(lowest_step, layout.integer(f, f"{name}.step"))
                layout.set_buffer(f, buffer.name, f.at(layout.pointer(f, f"{name}.ptr"), offset))
            with f.unless(in_place, "copied_in"):
                self._copy_rows(name, Location(buffer), buffer.size, lowest_step, steps, into_buffer=True)

    def restore_buffers(self) -> None:
        """Set the buffers of inputs used in place back to scratch memory: an argument block may be used again."""
        for index, (_, scratch) in self._in_place.items():
            self.layout.set_buffer(self.f, self.plan.gathered[index].name, scratch)

    def copy_out(self, lowest_step: Value, steps: Integer) -> None:
        """Copy the outputs computed outside the loop to the caller's rows."""
        graph = self.plan.graph
        for label, location in self.plan.scattered.items():
            size = graph[graph.outputs[label]].size
            self._copy_rows(f"out.{label}", location, size, lowest_step, steps, into_buffer=False)

    def _copy_rows(
        self, name: str, location: Location, size: int, lowest_step: Value, steps: Integer, *, into_buffer: bool
    ) -> None:
        """Copy the rows of a chunk between a tensor of the caller, by the name of its slots, and a buffer."""
        f, module = self.f, self.module
        callers, buffer = self.layout.pointer(f, f"{name}.ptr"), self.layout.buffer(f, location.buffer.name)
        buffer = f.at(buffer, location.offset * module.itemsize)
        step_bytes, row_bytes = self.layout.integer(f, f"{name}.step"), self.layout.integer(f, f"{name}.row")
        # By rows, each thread copies its own rows of every step; else all rows of its share of the steps.
        first, last = f.partition(steps, self.team.column_thread, self.team.column_threads)
        with f.for_range("chunk_step", first, last) as chunk_step:
            t = f.add(lowest_step, chunk_step)
            base, _ = self.first_rows(chunk_step)
            start, stop = self.team.thread_rows(0, self.rows_of_step(t))
            with f.for_range("row", start, stop) as row:
                caller_row = self._caller_row(row)
                callers_at = f.at(f.at(callers, f.mul(t, step_bytes)), f.mul(caller_row, row_bytes))
                buffer_at = f.at(buffer, f.mul(f.add(base, row), module.row_bytes(location.buffer.size)))
                target, source = (buffer_at, callers_at) if into_buffer else (callers_at, buffer_at)
                f.copy_bytes(target, source, size * module.itemsize)
