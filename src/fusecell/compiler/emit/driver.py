"""``@run``: packs the weights, then walks over chunks of steps: lift, the loop over time, post.

Rows are taken in the order of ``order`` (the caller's own without lengths); with ``counts`` the first counts[t] of
them take part in step t, which is why they must come longest first. A row's state is read from the caller when the
row begins and handed back when it ends, so that ended rows cost nothing. With ``packed`` the scratch memory holds
the packed weights of an earlier call already.
"""

from __future__ import annotations

from collections.abc import Callable

from fusecell.compiler.emit.layout import Layout, Panel
from fusecell.compiler.emit.stages import CALL
from fusecell.compiler.emit.sums import SumEmitter
from fusecell.compiler.emit.text import LANES, Function, Module, Value
from fusecell.compiler.emit.tiles import pack_name
from fusecell.compiler.plan import Phase, Place, Plan

__all__ = ["emit_driver"]


class _Driver:
    def __init__(self, module: Module, layout: Layout, plan: Plan, panels: list[Panel]) -> None:
        self.module, self.layout, self.plan, self.panels = module, layout, plan, panels
        self.sums = SumEmitter(module, layout, plan)
        self.f = Function(module, "run", "ptr %args", exported=True)

    def emit(self) -> None:
        self.sums.functions()
        f, layout = self.f, self.layout
        self.steps, self.rows = layout.word(f, "steps"), layout.word(f, "rows")
        self.chunk = layout.word(f, "chunk_steps")
        backwards = layout.word(f, "reverse")
        self.reverse = f.let("backwards", f"icmp ne i64 {backwards}, 0")
        restore = _flush_denormals(f)
        layout.place_buffers(f, self.rows, f.mul(self.rows, self.chunk, "chunk.rows"), self.chunk)
        self.order = layout.buffer(f, "order")
        self._fill_order()
        with f.when("pack", f.let("is.unpacked", f"icmp eq i64 {layout.word(f, 'packed')}, 0")):
            self._pack()
            self._stages("once", "0", "0", "0", 1)
        self._skip_rows_without_steps()
        self.sums.clear(f)
        before = f.let("alive.at", "alloca i64")
        f.store_int(0, before)
        self.start = f.let("start.first", "alloca i64")
        with f.loop("first", 0, self.steps, self.chunk) as first:
            self._chunk(first, before)
        self.sums.finish(f)
        last = f.let("last.slot", f"and i64 {self.steps}, 1")
        self._move_states("last", 0, f.load_int(before, "alive"), last)
        restore()
        f.end()

    def _chunk(self, first: Value, alive_at: str) -> None:
        """A chunk of steps, from ``first`` in the order in which they run."""
        f = self.f
        steps = f.minimum(self.chunk, f.sub(self.steps, first, "left"), "chunk.steps")
        behind = f.sub(f.sub(self.steps, first), steps, "behind")
        low = f.let("low", f"select i1 {self.reverse}, i64 {behind}, i64 {first}")
        total = self._starts(low, steps)
        self._find_saved(low)
        self._gather(low, steps)
        self._stages("lift", low, "0", "0", total)
        with f.loop("i", 0, steps) as i:
            self._step(f.add(first, i, "done"), low, alive_at)
        self._stages("post", low, "0", "0", total)
        self._scatter(low, steps)
        self.sums.add_chunk(f, total, self.reverse)

    def _step(self, done: Value, low: str, alive_at: str) -> None:
        f = self.f
        mirrored = f.sub(f.sub(self.steps, 1), done, "mirrored")
        t = f.let("t", f"select i1 {self.reverse}, i64 {mirrored}, i64 {done}")
        slot = f.let("slot", f"and i64 {done}, 1")
        base = f.load_int(f.at(self.layout.buffer(f, "starts"), f.mul(f.sub(t, low), 8)), "base")
        rows = self._alive(t)
        before = f.load_int(alive_at, "before")
        self._move_states("first", before, rows, slot)
        self._move_states("last", rows, before, slot)
        f.store_int(rows, alive_at)
        if not self.plan.backward:
            self._reset(t, rows, slot, self._reset_row)
        self._stages("loop", t, base, slot, rows)
        if self.plan.backward:
            self._reset(t, rows, f.sub(1, slot, "slot.after"), self._cut_row)

    def _alive(self, t: Value) -> str:
        """How many rows take part in a step."""
        f = self.f
        counts = self.layout.pointer(f, "counts")
        address = f.let("no.counts", f"icmp eq ptr {counts}, null")
        offset = f.let("count.offset", f"select i1 {address}, i64 0, i64 {f.mul(t, 8)}")
        own = f.at("%args", 8 * self.layout.index("rows"), "own.rows")
        source = f.let("count.at", f"select i1 {address}, ptr {own}, ptr {counts}")
        return f.load_int(f.at(source, offset), "rows")

    def _starts(self, low: str, steps: Value) -> str:
        """The first row of each of the chunk's steps in the chunk's buffers; returns their number in all."""
        f = self.f
        starts = self.layout.buffer(f, "starts")
        f.store_int(0, starts)
        with f.loop("p", 0, steps) as p:
            here = f.at(starts, f.mul(p, 8))
            count = self._alive(f.add(low, p))
            f.store_int(f.add(f.load_int(here, "start"), count), f.at(here, 8))
        return f.load_int(f.at(starts, f.mul(steps, 8)), "total")

    def _fill_order(self) -> None:
        f = self.f
        given = self.layout.pointer(f, "caller.order")
        present = f.let("ordered", f"icmp ne ptr {given}, null")
        with f.loop("n", 0, self.rows) as n:
            f.store_int(n, f.at(self.order, f.mul(n, 8)))
        with f.when("order", present):
            self._copy(self.order, given, f.mul(self.rows, 8))

    def _pack(self) -> None:
        """Panels of the weights of products; copies of the others, padded to whole vectors."""
        f, module, graph = self.f, self.module, self.plan.graph
        for panel in self.panels:
            f.comment(f"{panel.name}: {', '.join(name for name, *_ in panel.weights)}")
            to = self.layout.buffer(f, panel.name)
            step = len(panel.weights) * module.block
            for position, (name, transposed, (k0, _), (f0, _)) in enumerate(panel.weights):
                strides = [self.layout.word(f, f"weight.{name}.stride{d}") for d in (0, 1)]
                column, k = strides if transposed else strides[::-1]
                source = f.at(self.layout.pointer(f, f"weight.{name}.ptr"), f.mul(k, k0))
                source = f.at(source, f.mul(column, f0))
                with f.loop("block", 0, module.blocks(panel.width)) as block:
                    done = f.mul(block, LANES)
                    columns = f.minimum(f.sub(panel.width, done), LANES, "columns")
                    f.call(
                        pack_name(module),
                        f"ptr {f.at(f.at(to, f.mul(block, panel.depth * step)), position * module.block)}",
                        f"i64 {step}",
                        f"ptr {f.at(source, f.mul(column, done))}",
                        f"i64 {k}",
                        f"i64 {column}",
                        f"i64 {columns}",
                        f"i64 {panel.depth}",
                    )
        for index in graph.leaves("weight"):
            node = graph[index]
            if index not in self.plan.homes:
                continue
            to, source = self.layout.buffer(f, f"{node.name}.packed"), self.layout.pointer(f, f"weight.{node.name}.ptr")
            stride = self.layout.word(f, f"weight.{node.name}.stride0")
            with f.loop("j", 0, node.size) as j:
                value = f.let("value", f"load {module.scalar}, ptr {f.at(source, f.mul(j, stride))}")
                f.do(f"store {module.scalar} {value}, ptr {f.at(to, f.mul(j, module.bytes))}")

    def _stages(self, phase: Phase, t: str, base: str, slot: str, rows: Value) -> None:
        values = (t, base, slot)
        for stage in self.plan.stages:
            if stage.phase == phase:
                given = [kind.split("%")[0] + value for kind, value in zip(CALL[1:], values, strict=True)]
                self.f.call(stage.name, CALL[0], *given, f"i64 {rows}")

    # Rows to and from the caller.

    def _move_states(self, kind: str, start: Value, stop: Value, slot: Value) -> None:
        """``first``: read the states of rows that begin; ``last``: hand back those of rows that end."""
        f, module = self.f, self.module
        with f.loop("row", start, stop) as row:
            caller = f.load_int(f.at(self.order, f.mul(row, 8)), "caller.row")
            for name, (leaf, _) in self.plan.states.items():
                size = self.plan.graph[leaf].size
                mine = self._state_row(f"state.{name}", size, slot, row)
                theirs = self._caller_state(kind, name, caller)
                source, target = (theirs, mine) if kind == "first" else (mine, theirs)
                self._copy(target, source, size * module.bytes)

    def _state_row(self, buffer: str, size: int, slot: Value, row: Value) -> str:
        f = self.f
        here = f.add(f.mul(slot, self.rows), row)
        return f.at(self.layout.buffer(f, buffer), f.mul(here, self.module.padded(size)))

    def _caller_state(self, kind: str, name: str, row: Value) -> str:
        f = self.f
        start = self.layout.pointer(f, f"{kind}.{name}.ptr")
        return f.at(start, f.mul(row, self.layout.word(f, f"{kind}.{name}.row")))

    def _skip_rows_without_steps(self) -> None:
        """The state of a row that takes part in no step is the one it came with."""
        f = self.f
        with f.loop("row", 0, self.rows) as row:
            caller = f.load_int(f.at(self.order, f.mul(row, 8)), "caller.row")
            for name, (leaf, _) in self.plan.states.items():
                bytes_ = self.plan.graph[leaf].size * self.module.bytes
                self._copy(self._caller_state("last", name, caller), self._caller_state("first", name, caller), bytes_)

    def _reset(self, t: Value, rows: Value, slot: Value, act: Callable[[str, str, str, int], None]) -> None:
        """Do something with each state of the rows whose flag is set."""
        f = self.f
        flags = self.layout.pointer(f, "resets")
        given = f.let("has.resets", f"icmp ne ptr {flags}, null")
        with f.when("resets", given):
            here = f.at(flags, f.mul(t, self.layout.word(f, "resets.step")))
            with f.loop("row", 0, rows) as row:
                caller = f.load_int(f.at(self.order, f.mul(row, 8)), "caller.row")
                flag = f.let("flag", f"load i8, ptr {f.at(here, f.mul(caller, self.layout.word(f, 'resets.row')))}")
                is_set = f.let("is.set", f"icmp ne i8 {flag}, 0")
                with f.when("reset", is_set):
                    for name, (leaf, _) in self.plan.states.items():
                        size = self.plan.graph[leaf].size
                        mine = self._state_row(f"state.{name}", size, slot, row)
                        act(mine, self._caller_state("reset", name, caller), f"state.{name}", size)

    def _reset_row(self, mine: str, theirs: str, name: str, size: int) -> None:
        """Go back to the reset state before the step."""
        self._copy(mine, theirs, size * self.module.bytes)

    def _cut_row(self, mine: str, theirs: str, name: str, size: int) -> None:
        """After the step's backward: its gradient belongs to the reset state, and nothing goes further back."""
        f, module = self.f, self.module
        with f.loop("j", 0, size) as j:
            own, other = f.at(mine, f.mul(j, module.bytes)), f.at(theirs, f.mul(j, module.bytes))
            values = [f.let("value", f"load {module.scalar}, ptr {at}, align {module.bytes}") for at in (own, other)]
            total = f.let("sum", f"fadd {module.scalar} {values[0]}, {values[1]}")
            f.do(f"store {module.scalar} {total}, ptr {other}, align {module.bytes}")
            f.do(f"store {module.scalar} 0.0, ptr {own}, align {module.bytes}")

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

    def _gather(self, low: str, steps: Value) -> None:
        """Inputs of products outside the loop, brought into rows of the chunk."""
        for index, buffer in self.plan.gathered.items():
            self._exchange(f"in.{self.plan.graph[index].name}", Place(buffer), buffer.size, low, steps, gather=True)

    def _scatter(self, low: str, steps: Value) -> None:
        """Outputs computed outside the loop, brought to the caller's rows."""
        for label, index in self.plan.scattered.items():
            place = self.plan.place(index, "post")
            assert place is not None
            self._exchange(f"out.{label}", place, self.plan.graph[index].size, low, steps, gather=False)

    def _exchange(self, words: str, place: Place, size: int, low: str, steps: Value, *, gather: bool) -> None:
        f, module = self.f, self.module
        theirs, mine = self.layout.pointer(f, f"{words}.ptr"), self.layout.buffer(f, place.buffer.name)
        mine = f.at(mine, place.offset * module.bytes)
        step, apart = self.layout.word(f, f"{words}.step"), self.layout.word(f, f"{words}.row")
        starts = self.layout.buffer(f, "starts")
        with f.loop("p", 0, steps) as p:
            t = f.add(low, p)
            base = f.load_int(f.at(starts, f.mul(p, 8)), "base")
            with f.loop("row", 0, self._alive(t)) as row:
                caller = f.load_int(f.at(self.order, f.mul(row, 8)), "caller.row")
                user = f.at(f.at(theirs, f.mul(t, step)), f.mul(caller, apart))
                own = f.at(mine, f.mul(f.add(base, row), module.padded(place.buffer.size)))
                target, source = (own, user) if gather else (user, own)
                self._copy(target, source, size * module.bytes)

    def _copy(self, target: str, source: str, count: Value) -> None:
        self.module.declares.add("declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)")
        self.f.do(f"call void @llvm.memcpy.p0.p0.i64(ptr {target}, ptr {source}, i64 {count}, i1 false)")


def emit_driver(module: Module, layout: Layout, plan: Plan, panels: list[Panel]) -> None:
    """Write ``@run``."""
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
