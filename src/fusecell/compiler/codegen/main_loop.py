"""``@work``, the main function of a call, which each of its threads runs: packing, then the loop over time::

    pack weights into panels; stages of phase "once", which need weights alone
    for chunk of steps:                      as many as keep the chunk's buffers in L2
        copy inputs in
        stages of phase "hoisted"               all rows of the chunk at once: what needs inputs but no state
        for step in chunk:
            read and write states of rows that begin or end
            reset                               before the step; in the backward, which runs in reverse, after it
            stages of phase "loop"              the chain from state to state
        stages of phase "post"                  all rows of the chunk at once: what nothing in the loop waits for
        copy outputs out
        add the chunk to the gradients of weights
    add the gradients to the caller's; write the states of rows that took part in the last step

Products leave the loop because as one product of a chunk's rows they run at the rate of the multiply-adds, not at that
at which weights come from L2. A chunk is as long as its buffers, hoisted values among them, stay in L2 until the loop
reads them.

Rows are taken in the order of the slot ``order``, the caller's own without lengths; with ``counts`` the first counts[t]
of them take part in step t, so they must come longest first. A row's state is read from the caller when the row begins
and written back when it ends, so that ended rows cost nothing.

The slot ``packed`` tells whether panels are reused: 1, the scratch memory has those of an earlier call; 2, a later call
will use them; 0, neither: then panels that are used only once are packed portion by portion where they are used, and
are never whole in memory.
"""

from __future__ import annotations

from collections.abc import Callable

from fusecell.compiler.codegen.kernel_abi import (
    ARGS,
    SLOT_BYTES,
    THREAD_ID,
    THREADS,
    Layout,
    StepRows,
)
from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_module import Module
from fusecell.compiler.codegen.llvm_text import FALSE, NULL, Integer, Value
from fusecell.compiler.codegen.pack_weights import pack_panel_name
from fusecell.compiler.codegen.panel import Panel
from fusecell.compiler.codegen.row_io import CallerRows
from fusecell.compiler.codegen.stage_body import epilogue_roots, reads
from fusecell.compiler.codegen.weight_gradients.accumulator import GradientAccumulator
from fusecell.compiler.codegen.weight_gradients.kernels import emit_reductions
from fusecell.compiler.codegen.work_sharing import CALLER_ARGS, WORK_PARAMS, Team
from fusecell.compiler.ir.affine import affine_parts
from fusecell.compiler.ir.graph import Node
from fusecell.compiler.schedule.plan import Phase, Plan, Stage

__all__ = ["emit_main_loop"]

Range = tuple[Integer, Integer]


class _MainLoop:
    """Writer of ``@work``."""

    def __init__(self, module: Module, layout: Layout, plan: Plan, panels: dict[Panel, Phase]) -> None:
        self.module, self.layout, self.plan, self.panels = module, layout, plan, panels
        self.gradients = GradientAccumulator(module, layout, plan)
        self.f = Function(module, "work", *WORK_PARAMS, moves_buffers=True)

    def emit(self) -> None:
        emit_reductions(self.module, self.layout, self.plan)
        f, layout = self.f, self.layout
        self._copy_argument_block()
        self.steps, self.rows = layout.integer(f, "steps"), layout.integer(f, "rows")
        self.chunk_steps = layout.integer(f, "chunk_steps")
        self.is_reverse = f.ne(layout.integer(f, "reverse"), 0, "is_reverse")
        restore_denormals = _flush_denormals(f)
        loop_bytes = sum(
            panel.depth * len(panel.weights) * self.module.row_bytes(panel.width) for panel in self._panels("loop")
        )
        self.team = Team(f, self.rows, layout.pointer(f, "counts"), loop_bytes)
        # Padded, threads have separate parts of the chunk's buffers; a gradient whose sums are shared reads all parts.
        if self.plan.sums:
            self.team.is_padded = self.gradients.split_rows(f, self.team)
        layout.assign_buffers(f, self.rows, self.chunk_steps, self.team.is_padded)
        self.callers = CallerRows(self.module, layout, self.plan, f, self.team, self.rows)
        self.callers.fill_order()
        self._prepare()
        # Before the loop, in which the last states of rows that do take part are written.
        self.callers.copy_unstepped_states()
        self.gradients.begin(f)
        self.callers.find_inputs_in_place()
        # Counters that change in loops are in memory, as the builder's loops carry vectors only; LLVM's pass that would
        # put them into registers is not run, and once per step it doesn't matter.
        rows_before = f.alloca("rows_before.at")
        f.store_int(0, rows_before)
        self.saved_start = f.alloca("saved_start.at")
        # Panels and copied weights must be complete before another thread reads them.
        self.team.barrier()
        with f.for_range("chunk", 0, self.steps, self.chunk_steps) as first:
            self._chunk(first, rows_before)
        self.gradients.finish(f, self.team)
        # Steps alternate between the two copies of the states; the last step has written this one.
        last_state = f.and_(self.steps, 1, "last_state")
        self.callers.move_states("last", 0, f.load_int(rows_before, "rows_before"), last_state)
        self.callers.restore_buffers()
        restore_denormals()
        f.end()

    def _copy_argument_block(self) -> None:
        """Give each thread of a team a copy of the argument block, in which it sets its buffers chunk by chunk."""
        f, size = self.f, SLOT_BYTES * len(self.layout.slots)
        copy = f.alloca_bytes(size, "args.copy")
        is_shared = f.gt(THREADS, 1, "is_shared")
        with f.if_(is_shared, "copy"):
            f.copy_bytes(copy, CALLER_ARGS, size)
        # The value is called %args, as the parameter is in every other function: what addresses slots works in all.
        args = f.select(is_shared, copy, CALLER_ARGS, "args")
        assert args == ARGS, f"the argument block is {args}, expected {ARGS}"

    # Once per call.

    def _prepare(self) -> None:
        """Pack panels; copy other weights, padded to whole vectors; compute the values of weights alone.

        A panel that is used only once, in a single chunk or a single step, is packed where it is used: each of its
        portions is in L1 when it is read then, and does not go to memory and back.
        """
        f = self.f
        packed = self.layout.integer(f, "packed")
        is_unused_later = f.eq(packed, 0, "is_unused_later")
        # In a team every thread reads panels that others have packed.
        is_single_thread = f.eq(THREADS, 1, "is_single_thread")
        packs_on_use = f.and_(is_unused_later, is_single_thread, "packs_on_use")
        is_one_chunk = f.ge(self.chunk_steps, self.steps, "is_one_chunk")
        is_one_step = f.eq(self.steps, 1, "is_one_step")
        once_per_chunk = f.and_(packs_on_use, is_one_chunk, "chunk.pack_on_use")
        once_per_step = f.and_(packs_on_use, is_one_step, "step.pack_on_use")
        self.pack_on_use: dict[Phase, Value] = {
            "once": FALSE, "hoisted": once_per_chunk, "loop": once_per_step, "post": once_per_chunk
        }  # fmt: skip
        with f.if_(f.ne(packed, 1, "is_unpacked"), "pack"):
            groups = dict.fromkeys(self.module.groups(panel.width) for panel in self.panels)
            shares = {count: f.partition(count, THREAD_ID, THREADS) for count in groups}
            for panel, phase in self.panels.items():
                with f.unless(self.pack_on_use[phase], "panel"):
                    self._pack(panel, *shares[self.module.groups(panel.width)])
            # Vectors and their functions are small: partitioned, they would need a barrier after each stage.
            with self.team.leader():
                self._copy_vectors()
                for stage in self.plan.stages_of("once"):
                    self._call(stage, StepRows(0, 0, 0, 0), (0, 1), (0, 1))

    def _pack(self, panel: Panel, first: Integer, last: Integer) -> None:
        """Pack this thread's share of a panel's column groups, from ``first`` up to ``last``."""
        f, module = self.f, self.module
        to = f.at(self.layout.buffer(f, panel.name), f.mul(first, panel.group_bytes(module)))
        f.call(pack_panel_name(panel), ARGS, first, f.sub(last, first), to)

    def _copy_vectors(self) -> None:
        """Copy weights that aren't operands of products, such as biases, into rows of whole vectors."""
        # Stages then read them as they read any row: contiguous, and padded to whole vectors.
        f, module, graph = self.f, self.module, self.plan.graph
        for index in graph.leaves("weight"):
            node = graph[index]
            if index not in self.plan.vectors:
                continue
            target = self.layout.buffer(f, f"{node.name}.packed")
            source = self.layout.pointer(f, f"weight.{node.name}.ptr")
            stride = self.layout.integer(f, f"weight.{node.name}.stride0")
            if len(node.type.shape) == 2:
                self._copy_matrix(node, source, stride, target)
                continue
            with f.for_range("feature", 0, node.size) as feature:
                value = f.load_scalar(f.at(source, f.mul(feature, stride)), "value")
                f.store_scalar(value, f.at(target, f.mul(feature, module.itemsize)))

    def _copy_matrix(self, node: Node, source: Value, stride: Value, target: Value) -> None:
        """Copy a matrix that nests read, row after row without gaps."""
        f, item, (rows, columns) = self.f, self.module.itemsize, node.type.shape
        column_stride = self.layout.integer(f, f"weight.{node.name}.stride1")
        with f.for_range("row", 0, rows) as row:
            source_row, target_row = f.at(source, f.mul(row, stride)), f.at(target, f.mul(row, columns * item))
            with f.for_range("column", 0, columns) as column:
                value = f.load_scalar(f.at(source_row, f.mul(column, column_stride)), "value")
                f.store_scalar(value, f.at(target_row, f.mul(column, item)))

    # Chunks and steps.

    def _chunk(self, first: Integer, rows_before: Value) -> None:
        """Run a chunk of steps, from ``first`` in the order in which they run."""
        f, team, callers = self.f, self.team, self.callers
        steps = f.minimum(self.chunk_steps, f.sub(self.steps, first, "steps_left"), "chunk.steps")
        steps_after = f.sub(f.sub(self.steps, first), steps, "steps_after")
        # In reverse the first chunk has the highest steps: of a chunk the lowest is the first in memory.
        lowest_step = f.select(self.is_reverse, steps_after, first, "lowest_step")
        total = callers.write_starts(lowest_step, steps)
        self._find_saved(lowest_step)
        callers.copy_in(lowest_step, steps)
        # By columns, a thread's products read rows that others have copied; by rows only its own.
        team.barrier(team.by_columns)
        self._outside("hoisted", lowest_step, steps, total)
        with f.for_range("chunk_step", 0, steps) as chunk_step:
            self._step(f.add(first, chunk_step, "steps_done"), lowest_step, rows_before)
        self._outside("post", lowest_step, steps, total)
        callers.copy_out(lowest_step, steps)
        self.gradients.add_chunk(f, team, steps, total, self.is_reverse)
        # The next chunk overwrites buffers that others may still read.
        team.barrier(team.by_columns)

    def _step(self, steps_done: Integer, lowest_step: Value, rows_before_at: Value) -> None:
        """Run one step: states of rows that begin or end, resets, the stages of the loop."""
        f, team, callers = self.f, self.team, self.callers
        reverse_step = f.sub(f.sub(self.steps, 1), steps_done, "reverse_step")
        t = f.select(self.is_reverse, reverse_step, steps_done, "t")
        old_state = f.and_(steps_done, 1, "old_state")
        base, saved_base = callers.first_rows(f.sub(t, lowest_step))
        rows = callers.rows_of_step(t)
        # Where all rows take part in all steps, rows begin in the first step only, and end after the last.
        rows_before = f.load_int(rows_before_at, "rows_before")
        with f.if_(f.ne(rows, rows_before, "rows_change"), "rows_change"):
            callers.move_states("first", rows_before, rows, old_state)
            callers.move_states("last", rows, rows_before, old_state)
            f.store_int(rows, rows_before_at)
            team.barrier(team.by_columns)
        # The forward resets a state before the step that reads it, so the backward cuts the gradient off after it.
        if not self.plan.backward:
            callers.reset(t, rows, old_state)
        where = StepRows(t, base, saved_base, old_state)
        first, last = team.thread_rows(0, rows)
        for stage in self.plan.stages_of("loop"):
            if stage.reductions or stage.nest is not None:
                # A row's reduction or nest has one order, so one thread does it: rows are partitioned, always.
                share_first, share_last = f.partition(rows, team.column_thread, team.column_threads)
                begin, end = f.maximum(first, share_first), f.select(team.by_rows, last, share_last, "end")
                self._call(stage, where, (begin, end), (0, 1))
            else:
                self._call(stage, where, (first, last), (team.column_thread, team.column_threads))
            team.barrier(team.by_columns)
        if self.plan.backward:
            callers.reset(t, rows, f.sub(1, old_state, "new_state"))

    def _outside(self, phase: Phase, lowest_step: Value, steps: Integer, total: Integer) -> None:
        """Run the stages of a chunk outside the loop: by rows on this thread's own, else on its share of all."""
        f, team = self.f, self.team
        stages = self.plan.stages_of(phase)
        if not stages:
            return
        with f.if_(team.by_rows, "by_rows"):
            calls, last = steps, team.last_row
            if not any(self._uses_saved(stage) for stage in stages):
                # A padded thread's rows of all steps are neighbours in the chunk's buffers, so one call does them all,
                # in full tiles. Saved values are the caller's, in which rows of other threads lie between them.
                last_of_all = f.add(team.first_row, f.mul(f.sub(team.last_row, team.first_row), steps))
                calls = f.select(team.is_padded, 1, steps, "calls")
                last = f.select(team.is_padded, last_of_all, team.last_row, "last")
            with f.for_range("chunk_step", 0, calls) as chunk_step:
                base, saved_base = self.callers.first_rows(chunk_step)
                for stage in stages:
                    self._call(stage, StepRows(lowest_step, base, saved_base, 0), (team.first_row, last), (0, 1))
        with f.unless(team.by_rows, "shared_rows"):
            share = f.partition(total, THREAD_ID, THREADS)
            for stage in stages:
                self._call(stage, StepRows(lowest_step, 0, 0, 0), share, (0, 1))
                team.barrier()

    def _uses_saved(self, stage: Stage) -> bool:
        """Whether a stage outside the loop reads or writes saved values."""
        plan = self.plan
        results = set(stage.results())
        locations = [location for each in stage.stores.values() for location in each]
        locations += reads(plan, stage, epilogue_roots(plan, stage), results)
        if stage.nest is not None:
            locations += [stage.operands[arg] for arg in plan.graph[stage.nest].args]
        for index in stage.affines:
            start, terms = affine_parts(plan.graph[index])
            locations += reads(plan, stage, [row for row, *_ in terms] + ([] if start is None else [start]), ())
        return any(location.buffer.scope == "saved" for location in locations)

    def _panels(self, phase: Phase) -> list[Panel]:
        return [panel for panel, other in self.panels.items() if other == phase]

    def _call(self, stage: Stage, where: StepRows, rows: Range, columns: Range) -> None:
        """Run a stage over a range of rows; ``columns``: the thread's number, and how many threads share columns."""
        self.f.call(stage.name, ARGS, *where.args(), *rows, *columns, self.pack_on_use[stage.phase])

    def _find_saved(self, lowest_step: Value) -> None:
        """Set the addresses of saved values to the chunk's first row among the rows of all steps."""
        f = self.f
        if not self.layout.saved:
            return
        offsets = self.layout.pointer(f, "offsets")
        is_regular = f.eq(offsets, NULL, "no_offsets")
        start_at = f.select(is_regular, self.saved_start, offsets, "start.at")
        # One load from a selected address, in place of a branch.
        offset = f.select(is_regular, 0, f.mul(lowest_step, 8), "start.offset")
        f.store_int(f.mul(lowest_step, self.rows), self.saved_start)
        self.layout.set_saved(f, self.module, f.load_int(f.at(start_at, offset), "saved_start"))


def emit_main_loop(module: Module, layout: Layout, plan: Plan, panels: dict[Panel, Phase]) -> None:
    """Write ``@work``.

    Arguments:
        panels: all panels of packed weights, with the phase in which each is used.
    """
    _MainLoop(module, layout, plan, panels).emit()


def _flush_denormals(f: Function) -> Callable[[], None]:
    """Make denormals count as zero, where the CPU can; return a writer of the code that restores the caller's mode.

    Arithmetic on them can take more than a hundred cycles (Fog, "The microarchitecture of Intel, AMD and VIA CPUs");
    states that decay to zero are full of them. The mode is a register of each thread, so each thread sets it.
    """
    target = f.module.target
    control = target.isa.denormals
    if control is None or not target.sets_denormal_mode:
        return lambda: None
    f.declares |= control.declarations
    kind = f"i{control.bits}"
    flush = Value(str(control.flush), kind)
    if control.through_memory:
        caller_mode, kernel_mode = f.alloca("mode.caller", type=kind), f.alloca("mode.kernel", type=kind)
        f.call(Value(control.read, "ptr"), caller_mode)
        f.store_int(f.or_(f.load_int(caller_mode, "mode", kind), flush, "mode.flushing"), kernel_mode)
        f.call(Value(control.write, "ptr"), kernel_mode)
        return lambda: f.call(Value(control.write, "ptr"), caller_mode)
    mode = f.call_for(kind, control.read, name="mode")
    f.call(Value(control.write, "ptr"), f.or_(mode, flush, "mode.flushing"))
    return lambda: f.call(Value(control.write, "ptr"), mode)
