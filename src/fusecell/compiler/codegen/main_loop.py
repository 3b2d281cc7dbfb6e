"""``@work``: packs the weights, then walks over chunks of steps: hoisted, the loop over time, post.

Rows are taken in the order of ``order`` (the caller's own without lengths); with ``counts`` the first counts[t] of
them take part in step t, which is why they must come longest first. A row's state is read from the caller when the
row begins and handed back when it ends, so that ended rows cost nothing.

The word ``packed`` says of the panels: 1, the scratch memory holds those of an earlier call; 2, a later call will want
them; 0, neither: then those that are used but once are packed piece by piece where they are, and never in memory whole.
"""

from __future__ import annotations

from collections.abc import Callable

from fusecell.compiler.codegen.kernel_abi import Layout, Panel
from fusecell.compiler.codegen.llvm_builder import Function, Module, Value
from fusecell.compiler.codegen.pack_weights import pack_panel_name
from fusecell.compiler.codegen.row_io import CallerRows
from fusecell.compiler.codegen.stage import CALL
from fusecell.compiler.codegen.stage_body import epilogue_roots, reads
from fusecell.compiler.codegen.weight_gradients.accumulator import SumEmitter
from fusecell.compiler.codegen.weight_gradients.kernels import emit_sums
from fusecell.compiler.codegen.work_sharing import WORK, Crew
from fusecell.compiler.ir.affine import affine_parts
from fusecell.compiler.schedule.plan import Phase, Plan, Stage

__all__ = ["emit_driver"]


class _Driver:
    def __init__(self, module: Module, layout: Layout, plan: Plan, panels: dict[Panel, Phase]) -> None:
        self.module, self.layout, self.plan, self.panels = module, layout, plan, panels
        self.sums = SumEmitter(module, layout, plan)
        self.f = Function(module, "work", *WORK, moves_buffers=True)

    def emit(self) -> None:
        emit_sums(self.module, self.layout, self.plan)
        f, layout = self.f, self.layout
        self._own_block()
        self.steps, self.rows = layout.word(f, "steps"), layout.word(f, "rows")
        self.chunk = layout.word(f, "chunk_steps")
        backwards = layout.word(f, "reverse")
        self.reverse = f.let("backwards", f"icmp ne i64 {backwards}, 0")
        restore = _flush_denormals(f)
        sizes = (p.depth * len(p.weights) * self.module.padded(p.width) for p in self._panels("loop"))
        self.crew = Crew(f, self.rows, layout.pointer(f, "counts"), sum(sizes))
        if self.plan.sums:
            self.crew.apart = self.sums.part_halves(f, self.crew)
        layout.place_buffers(f, self.rows, self.chunk, self.crew.apart)
        self.callers = CallerRows(self.module, layout, self.plan, f, self.crew, self.rows)
        self.callers.fill_order()
        self._once()
        self.callers.skip_rows_without_steps()
        self.sums.begin(f)
        self.callers.find_in_place()
        before = f.let("alive.at", "alloca i64")
        f.store_int(0, before)
        self.start = f.let("start.first", "alloca i64")
        self.crew.meet()
        with f.loop("first", 0, self.steps, self.chunk) as first:
            self._chunk(first, before)
        self.sums.finish(f, self.crew)
        last = f.let("last.slot", f"and i64 {self.steps}, 1")
        self.callers.move_states("last", 0, f.load_int(before, "alive"), last)
        self.callers.leave_in_place()
        restore()
        f.end()

    def _own_block(self) -> None:
        """Each thread of a crew has a copy of the argument block, in which it finds its way through the chunks."""
        f, size = self.f, 8 * len(self.layout.words)
        copy = f.let("block", f"alloca [{size} x i8], align 64")
        shared = f.let("is.shared", "icmp sgt i64 %crew, 1")
        self.module.declares.add("declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)")
        with f.when("copy", shared):
            f.do(f"call void @llvm.memcpy.p0.p0.i64(ptr {copy}, ptr %given, i64 {size}, i1 false)")
        f.let("args", f"select i1 {shared}, ptr {copy}, ptr %given")

    # What is done once.

    def _once(self) -> None:
        """Panels of the weights of products; copies of the others, padded to whole vectors; values of weights alone.

        A panel that is used but once, in a single chunk or a single step, is packed where it is used.
        """
        f = self.f
        packed = self.layout.word(f, "packed")
        passing = f.let("is.passing", f"icmp eq i64 {packed}, 0")
        alone = f.let("is.alone", "icmp eq i64 %crew, 1")
        passing = f.let("is.passing", f"and i1 {passing}, {alone}")
        one_chunk = f.let("one.chunk", f"icmp sge i64 {self.chunk}, {self.steps}")
        one_step = f.let("one.step", f"icmp eq i64 {self.steps}, 1")
        whole = f.let("fresh.whole", f"and i1 {passing}, {one_chunk}")
        step = f.let("fresh.step", f"and i1 {passing}, {one_step}")
        self.fresh: dict[Phase, str] = {"once": "false", "hoisted": whole, "loop": step, "post": whole}
        with f.when("pack", f.let("is.unpacked", f"icmp ne i64 {packed}, 1")):
            for panel, phase in self.panels.items():
                with f.when("panel", f.let("is.kept", f"xor i1 {self.fresh[phase]}, true")):
                    self._pack(panel)
            with self.crew.leader():
                self._copy_vectors()
                for stage in self.plan.stages_of("once"):
                    self._call(stage, ("0", "0", "0", "0"), (0, 1), (0, 1))

    def _pack(self, panel: Panel) -> None:
        f, module = self.f, self.module
        first, last = f.share(module.blocks(panel.width), "%me", "%crew")
        bytes_ = panel.depth * len(panel.weights) * module.block
        to = f.at(self.layout.buffer(f, panel.name), f.mul(first, bytes_))
        f.call(pack_panel_name(panel), "ptr %args", f"i64 {first}", f"i64 {f.sub(last, first)}", f"ptr {to}")

    def _copy_vectors(self) -> None:
        f, module, graph = self.f, self.module, self.plan.graph
        for index in graph.leaves("weight"):
            node = graph[index]
            if index not in self.plan.vectors:
                continue
            to, source = self.layout.buffer(f, f"{node.name}.packed"), self.layout.pointer(f, f"weight.{node.name}.ptr")
            stride = self.layout.word(f, f"weight.{node.name}.stride0")
            with f.loop("j", 0, node.size) as j:
                value = f.let("value", f"load {module.scalar}, ptr {f.at(source, f.mul(j, stride))}")
                f.do(f"store {module.scalar} {value}, ptr {f.at(to, f.mul(j, module.bytes))}")

    # Chunks and steps.

    def _chunk(self, first: Value, alive_at: str) -> None:
        """A chunk of steps, from ``first`` in the order in which they run."""
        f, crew, callers = self.f, self.crew, self.callers
        steps = f.minimum(self.chunk, f.sub(self.steps, first, "left"), "chunk.steps")
        behind = f.sub(f.sub(self.steps, first), steps, "behind")
        low = f.let("low", f"select i1 {self.reverse}, i64 {behind}, i64 {first}")
        total = callers.starts(low, steps)
        self._find_saved(low)
        callers.gather(low, steps)
        crew.meet(crew.columns)
        self._outside("hoisted", low, steps, total)
        with f.loop("i", 0, steps) as i:
            self._step(f.add(first, i, "done"), low, alive_at)
        self._outside("post", low, steps, total)
        callers.scatter(low, steps)
        self.sums.add_chunk(f, crew, steps, total, self.reverse)
        crew.meet(crew.columns)

    def _step(self, done: Value, low: str, alive_at: str) -> None:
        f, crew, callers = self.f, self.crew, self.callers
        mirrored = f.sub(f.sub(self.steps, 1), done, "mirrored")
        t = f.let("t", f"select i1 {self.reverse}, i64 {mirrored}, i64 {done}")
        slot = f.let("slot", f"and i64 {done}, 1")
        base, kept = callers.bases(f.sub(t, low))
        rows = callers.alive(t)
        before = f.load_int(alive_at, "before")
        with f.when("moved", f.let("is.moved", f"icmp ne i64 {rows}, {before}")):
            callers.move_states("first", before, rows, slot)
            callers.move_states("last", rows, before, slot)
            f.store_int(rows, alive_at)
            crew.meet(crew.columns)
        if not self.plan.backward:
            callers.reset(t, rows, slot)
        first, last = crew.own(0, rows)
        for stage in self.plan.stages_of("loop"):
            if stage.reductions:
                # A row's reduction takes its columns in order: rows are parted, whatever is parted elsewhere.
                mine, theirs = f.share(rows, crew.me, crew.crew)
                begin, end = f.maximum(first, mine), f.let("end", f"select i1 {crew.rowwise}, i64 {last}, i64 {theirs}")
                self._call(stage, (f"{t}", base, kept, slot), (begin, end), (0, 1))
            else:
                self._call(stage, (f"{t}", base, kept, slot), (first, last), (crew.me, crew.crew))
            crew.meet(crew.columns)
        if self.plan.backward:
            callers.reset(t, rows, f.sub(1, slot, "slot.after"))

    def _outside(self, phase: Phase, low: str, steps: Value, total: Value) -> None:
        """The stages of a chunk outside the loop: all its rows, or, of a crew whose rows are parted, one's own."""
        f, crew = self.f, self.crew
        stages = self.plan.stages_of(phase)
        if not stages:
            return
        with f.when("parted", crew.rowwise):
            turns, last = steps, crew.last
            if not any(self._meets_saved(stage) for stage in stages):
                # Those of all steps are neighbours in the chunk's buffers.
                of_all = f.add(crew.first, f.mul(f.sub(crew.last, crew.first), steps))
                turns = f.let("turns", f"select i1 {crew.apart}, i64 1, i64 {steps}")
                last = f.let("last", f"select i1 {crew.apart}, i64 {of_all}, i64 {crew.last}")
            with f.loop("p", 0, turns) as p:
                base, kept = self.callers.bases(p)
                for stage in stages:
                    self._call(stage, (low, base, kept, "0"), (crew.first, last), (0, 1))
        with f.when("together", f.let("is.together", f"xor i1 {crew.rowwise}, true")):
            mine = f.share(total, "%me", "%crew")
            for stage in stages:
                self._call(stage, (low, "0", "0", "0"), mine, (0, 1))
                crew.meet()

    def _meets_saved(self, stage: Stage) -> bool:
        """Whether a stage outside the loop reads or writes what is saved."""
        plan = self.plan
        results = set(stage.results())
        places = [place for each in stage.stores.values() for place in each]
        places += reads(plan, stage, epilogue_roots(plan, stage), results)
        for index in stage.affines:
            init, terms = affine_parts(plan.graph[index])
            places += reads(plan, stage, [row for row, *_ in terms] + ([] if init is None else [init]), ())
        return any(place.buffer.scope == "saved" for place in places)

    def _panels(self, phase: Phase) -> list[Panel]:
        return [panel for panel, other in self.panels.items() if other == phase]

    def _call(
        self, stage: Stage, where: tuple[str, str, str, str], rows: tuple[Value, Value], columns: tuple[Value, Value]
    ) -> None:
        """Run a stage over rows from one to another, and a share of its columns."""
        given = [kind.split("%")[0] + value for kind, value in zip(CALL[1:], where, strict=True)]
        share = (*rows, *columns)
        self.f.call(stage.name, CALL[0], *given, *(f"i64 {v}" for v in share), f"i1 {self.fresh[stage.phase]}")

    def _find_saved(self, low: str) -> None:
        """Where the chunk's rows begin among all rows of all steps, for what is saved."""
        f = self.f
        if not self.layout.saved:
            return
        offsets = self.layout.pointer(f, "offsets")
        regular = f.let("no.offsets", f"icmp eq ptr {offsets}, null")
        start_at = f.let("start.at", f"select i1 {regular}, ptr {self.start}, ptr {offsets}")
        offset = f.let("start.offset", f"select i1 {regular}, i64 0, i64 {f.mul(low, 8)}")
        f.store_int(f.mul(low, self.rows), self.start)
        self.layout.place_saved(f, self.module, f.load_int(f.at(start_at, offset), "start"))


def emit_driver(module: Module, layout: Layout, plan: Plan, panels: dict[Panel, Phase]) -> None:
    """Write ``@work``."""
    _Driver(module, layout, plan, panels).emit()


def _flush_denormals(f: Function) -> Callable[[], None]:
    """Denormals count as zero from here; returns what puts the CPU's own mode back."""
    triple = f.module.target.triple
    if triple.startswith("x86_64"):
        f.module.declares |= {"declare void @llvm.x86.sse.stmxcsr(ptr)", "declare void @llvm.x86.sse.ldmxcsr(ptr)"}
        saved, ours = f.let("mode.saved", "alloca i32"), f.let("mode.ours", "alloca i32")
        f.do(f"call void @llvm.x86.sse.stmxcsr(ptr {saved})")
        mode = f.let("mode", f"load i32, ptr {saved}")
        flushing = f.let("mode.flushing", f"or i32 {mode}, {0x8040}")
        f.do(f"store i32 {flushing}, ptr {ours}")
        f.do(f"call void @llvm.x86.sse.ldmxcsr(ptr {ours})")
        return lambda: f.do(f"call void @llvm.x86.sse.ldmxcsr(ptr {saved})")
    if triple.startswith("aarch64"):
        f.module.declares |= {"declare i64 @llvm.aarch64.get.fpcr()", "declare void @llvm.aarch64.set.fpcr(i64)"}
        mode = f.let("mode", "call i64 @llvm.aarch64.get.fpcr()")
        flushing = f.let("mode.flushing", f"or i64 {mode}, {1 << 24}")
        f.do(f"call void @llvm.aarch64.set.fpcr(i64 {flushing})")
        return lambda: f.do(f"call void @llvm.aarch64.set.fpcr(i64 {mode})")
    return lambda: None
