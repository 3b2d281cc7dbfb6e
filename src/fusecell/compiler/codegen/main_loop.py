"""``@work``, what every thread of a call runs: packing, then the loop over time, chunk by chunk::

    pack weights into panels; compute what needs weights alone ("once")
    for chunk of steps:                      as many as keep the chunk's buffers in L2
        copy inputs in
        stages of phase "hoisted"               all rows of the chunk at once: what needs inputs but no state
        for step in chunk:
            read and write states of rows that begin or end; reset
            stages of phase "loop"           from state to state
        stages of phase "post"               all rows of the chunk at once: what nothing in the loop waits for
        copy outputs out
        add the chunk to the gradients of weights

Rows are taken in the order of ``order``, the caller's own without lengths; with ``counts`` the first counts[t] of
them take part in step t, so they must come longest first. A row's state is read from the caller when the row begins and
written back when it ends, so that ended rows cost nothing.

The slot ``packed`` says of the panels: 1, the scratch memory holds those of an earlier call; 2, a later call will use
them; 0, neither: then panels that are used only once are packed portion by portion where they are used, and never are
in memory whole.
"""

from __future__ import annotations

from collections.abc import Callable

from fusecell.compiler.codegen.kernel_abi import (
    ARGS,
    SLOT_BYTES,
    THREAD_ID,
    THREADS,
    Layout,
    Panel,
    StepRows,
)
from fusecell.compiler.codegen.llvm_builder import Function, Module
from fusecell.compiler.codegen.llvm_text import FALSE, NULL, Integer, Value
from fusecell.compiler.codegen.pack_weights import pack_panel_name
from fusecell.compiler.codegen.row_io import CallerRows
from fusecell.compiler.codegen.stage_body import epilogue_roots, reads
from fusecell.compiler.codegen.weight_gradients.accumulator import GradientAccumulator
from fusecell.compiler.codegen.weight_gradients.kernels import emit_reductions
from fusecell.compiler.codegen.work_sharing import CALLER_ARGS, WORK_PARAMS, Team
from fusecell.compiler.ir.affine import affine_parts
from fusecell.compiler.schedule.plan import Phase, Plan, Stage

__all__ = ["emit_main_loop"]

Range = tuple[Integer, Integer]


class _MainLoop:
    """Writes ``@work``."""

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
        if self.plan.sums:
            self.team.is_padded = self.gradients.split_rows(f, self.team)
        layout.assign_buffers(f, self.rows, self.chunk_steps, self.team.is_padded)
        self.callers = CallerRows(self.module, layout, self.plan, f, self.team, self.rows)
        self.callers.fill_order()
        self._prepare()
        self.callers.copy_unstepped_states()
        self.gradients.begin(f)
        self.callers.find_inputs_in_place()
        rows_before = f.alloca("rows_before.at")
        f.store_int(0, rows_before)
        self.saved_start = f.alloca("saved_start.at")
        # Panels and copied weights are complete before another thread reads them.
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
        copy = f.alloca_bytes(size, "own_args")
        is_shared = f.gt(THREADS, 1, "is_shared")
        with f.if_(is_shared, "copy"):
            f.copy_bytes(copy, CALLER_ARGS, size)
        args = f.select(is_shared, copy, CALLER_ARGS, "args")
        assert args == ARGS, f"the argument block is {args}, expected {ARGS}"

    # Once per call.

    def _prepare(self) -> None:
        """Pack panels; copy other weights, padded to whole vectors; compute the values of weights alone.

        A panel that is used only once, in a single chunk or a single step, is packed where it is used: so each of its
        portions is in L1 when it is read, and never written to memory and back.
        """
        f = self.f
        packed = self.layout.integer(f, "packed")
        is_unused_later = f.eq(packed, 0, "is_unused_later")
        is_alone = f.eq(THREADS, 1, "is_alone")
        packs_on_use = f.and_(is_unused_later, is_alone, "packs_on_use")
        is_one_chunk = f.ge(self.chunk_steps, self.steps, "is_one_chunk")
        is_one_step = f.eq(self.steps, 1, "is_one_step")
        once_per_chunk = f.and_(packs_on_use, is_one_chunk, "chunk.pack_on_use")
        once_per_step = f.and_(packs_on_use, is_one_step, "step.pack_on_use")
        self.pack_on_use: dict[Phase, Value] = {
            "once": FALSE, "hoisted": once_per_chunk, "loop": once_per_step, "post": once_per_chunk
        }  # fmt: skip
        with f.if_(f.ne(packed, 1, "is_unpacked"), "pack"):
            for panel, phase in self.panels.items():
                with f.unless(self.pack_on_use[phase], "panel"):
                    self._pack(panel)
            with self.team.leader():
                self._copy_vectors()
                for stage in self.plan.stages_of("once"):
                    self._call(stage, StepRows(0, 0, 0, 0), (0, 1), (0, 1))

    def _pack(self, panel: Panel) -> None:
        """Pack this thread's share of a panel's column groups."""
        f, module = self.f, self.module
        first, last = f.partition(module.groups(panel.width), THREAD_ID, THREADS)
        to = f.at(self.layout.buffer(f, panel.name), f.mul(first, panel.group_bytes(module)))
        f.call(pack_panel_name(panel), ARGS, first, f.sub(last, first), to)

    def _copy_vectors(self) -> None:
        """Copy weights that aren't operands of products, such as biases, into rows of whole vectors."""
        f, module, graph = self.f, self.module, self.plan.graph
        for index in graph.leaves("weight"):
            node = graph[index]
            if index not in self.plan.vectors:
                continue
            target = self.layout.buffer(f, f"{node.name}.packed")
            source = self.layout.pointer(f, f"weight.{node.name}.ptr")
            stride = self.layout.integer(f, f"weight.{node.name}.stride0")
            with f.for_range("j", 0, node.size) as j:
                value = f.load_scalar(f.at(source, f.mul(j, stride)), "value")
                f.store_scalar(value, f.at(target, f.mul(j, module.itemsize)))

    # Chunks and steps.

    def _chunk(self, first: Integer, rows_before: Value) -> None:
        """Run a chunk of steps, from ``first`` in the order in which they run."""
        f, team, callers = self.f, self.team, self.callers
        steps = f.minimum(self.chunk_steps, f.sub(self.steps, first, "steps_left"), "chunk.steps")
        steps_behind = f.sub(f.sub(self.steps, first), steps, "steps_behind")
        # In reverse the first chunk has the highest steps; ``low`` is the lowest of a chunk in either direction.
        low = f.select(self.is_reverse, steps_behind, first, "low")
        total = callers.starts(low, steps)
        self._find_saved(low)
        callers.copy_in(low, steps)
        # By columns, a thread's products read rows that others have copied; by rows only its own.
        team.barrier(team.by_columns)
        self._outside("hoisted", low, steps, total)
        with f.for_range("i", 0, steps) as i:
            self._step(f.add(first, i, "steps_done"), low, rows_before)
        self._outside("post", low, steps, total)
        callers.copy_out(low, steps)
        self.gradients.add_chunk(f, team, steps, total, self.is_reverse)
        # The next chunk overwrites buffers that others may still read.
        team.barrier(team.by_columns)

    def _step(self, steps_done: Integer, low: Value, rows_before_at: Value) -> None:
        """Run one step: states of rows that begin or end, resets, the stages of the loop."""
        f, team, callers = self.f, self.team, self.callers
        mirrored = f.sub(f.sub(self.steps, 1), steps_done, "mirrored")
        t = f.select(self.is_reverse, mirrored, steps_done, "t")
        old_state = f.and_(steps_done, 1, "old_state")
        base, saved_base = callers.bases(f.sub(t, low))
        rows = callers.taking_part(t)
        # Where all rows take part in all steps, rows begin in the first step only, and end after the last.
        rows_before = f.load_int(rows_before_at, "rows_before")
        with f.if_(f.ne(rows, rows_before, "rows_change"), "rows_change"):
            callers.move_states("first", rows_before, rows, old_state)
            callers.move_states("last", rows, rows_before, old_state)
            f.store_int(rows, rows_before_at)
            team.barrier(team.by_columns)
        if not self.plan.backward:
            callers.reset(t, rows, old_state)
        where = StepRows(t, base, saved_base, old_state)
        first, last = team.own_rows(0, rows)
        for stage in self.plan.stages_of("loop"):
            if stage.reductions:
                # A row's reduction takes its columns in order, so one thread does it: rows are partitioned, always.
                share_first, share_last = f.partition(rows, team.column_thread, team.column_threads)
                begin, end = f.maximum(first, share_first), f.select(team.by_rows, last, share_last, "end")
                self._call(stage, where, (begin, end), (0, 1))
            else:
                self._call(stage, where, (first, last), (team.column_thread, team.column_threads))
            team.barrier(team.by_columns)
        if self.plan.backward:
            callers.reset(t, rows, f.sub(1, old_state, "new_state"))

    def _outside(self, phase: Phase, low: Value, steps: Integer, total: Integer) -> None:
        """Run the stages of a chunk outside the loop: by rows for this thread's own, else for its share of all."""
        f, team = self.f, self.team
        stages = self.plan.stages_of(phase)
        if not stages:
            return
        with f.if_(team.by_rows, "by_rows"):
            turns, last = steps, team.last_row
            if not any(self._uses_saved(stage) for stage in stages):
                # A padded thread's rows of all steps are neighbours in the chunk's buffers: one call for all.
                last_of_all = f.add(team.first_row, f.mul(f.sub(team.last_row, team.first_row), steps))
                turns = f.select(team.is_padded, 1, steps, "turns")
                last = f.select(team.is_padded, last_of_all, team.last_row, "last")
            with f.for_range("p", 0, turns) as p:
                base, saved_base = self.callers.bases(p)
                for stage in stages:
                    self._call(stage, StepRows(low, base, saved_base, 0), (team.first_row, last), (0, 1))
        with f.unless(team.by_rows, "together"):
            share = f.partition(total, THREAD_ID, THREADS)
            for stage in stages:
                self._call(stage, StepRows(low, 0, 0, 0), share, (0, 1))
                team.barrier()

    def _uses_saved(self, stage: Stage) -> bool:
        """Whether a stage outside the loop reads or writes what is saved for the backward."""
        plan = self.plan
        results = set(stage.results())
        places = [place for each in stage.stores.values() for place in each]
        places += reads(plan, stage, epilogue_roots(plan, stage), results)
        for index in stage.affines:
            start, terms = affine_parts(plan.graph[index])
            places += reads(plan, stage, [row for row, *_ in terms] + ([] if start is None else [start]), ())
        return any(place.buffer.scope == "saved" for place in places)

    def _panels(self, phase: Phase) -> list[Panel]:
        return [panel for panel, other in self.panels.items() if other == phase]

    def _call(self, stage: Stage, where: StepRows, rows: Range, columns: Range) -> None:
        """Run a stage over rows [from, to) and, as which thread of how many, its share of the columns."""
        self.f.call(stage.name, ARGS, *where.args(), *rows, *columns, self.pack_on_use[stage.phase])

    def _find_saved(self, low: Value) -> None:
        """Find where the chunk's rows begin among all rows of all steps, in what is saved for the backward."""
        f = self.f
        if not self.layout.saved:
            return
        offsets = self.layout.pointer(f, "offsets")
        is_regular = f.eq(offsets, NULL, "no_offsets")
        start_at = f.select(is_regular, self.saved_start, offsets, "start.at")
        # One load from a selected address, in place of a branch.
        offset = f.select(is_regular, 0, f.mul(low, 8), "start.offset")
        f.store_int(f.mul(low, self.rows), self.saved_start)
        self.layout.set_saved(f, self.module, f.load_int(f.at(start_at, offset), "saved_start"))


def emit_main_loop(module: Module, layout: Layout, plan: Plan, panels: dict[Panel, Phase]) -> None:
    """Write ``@work``.

    Arguments:
        panels: all panels of packed weights, with the phase in which each is used.
    """
    _MainLoop(module, layout, plan, panels).emit()


def _flush_denormals(f: Function) -> Callable[[], None]:
    """Make denormals count as zero, where the CPU can; return what writes the code that restores the caller's mode.

    Arithmetic on them can take more than a hundred cycles (Fog, "The microarchitecture of Intel, AMD and VIA CPUs");
    states that decay to zero are full of them.
    """
    control = f.module.target.isa.denormals
    if control is None:
        return lambda: None
    f.declares |= control.declarations
    kind = f"i{control.bits}"
    flush = Value(str(control.flush), kind)
    if control.through_memory:
        caller_mode, own_mode = f.alloca("mode.caller", type=kind), f.alloca("mode.own", type=kind)
        f.call(Value(control.read, "ptr"), caller_mode)
        f.store_int(f.or_(f.load_int(caller_mode, "mode", kind), flush, "mode.flushing"), own_mode)
        f.call(Value(control.write, "ptr"), own_mode)
        return lambda: f.call(Value(control.write, "ptr"), caller_mode)
    mode = f.call_for(kind, control.read, name="mode")
    f.call(Value(control.write, "ptr"), f.or_(mode, flush, "mode.flushing"))
    return lambda: f.call(Value(control.write, "ptr"), mode)
