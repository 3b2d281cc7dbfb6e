"""Rows to and from the caller: states, resets, and what is read and made outside the loop.

Where nothing says otherwise the rows of a chunk's buffers are those of its steps, one step after the other. ``apart``,
each of a crew has a place of its own in them: with rows of others between its own, a core would fetch those in advance,
out of the caches of the cores that write them.
"""

from __future__ import annotations

from collections.abc import Callable

from fusecell.compiler.codegen.kernel_abi import ALIGNED, Layout
from fusecell.compiler.codegen.llvm_builder import LANES, Function, Module, Value
from fusecell.compiler.codegen.work_sharing import Crew
from fusecell.compiler.schedule.plan import Location, Plan

__all__ = ["CallerRows"]


class CallerRows:
    """The parts of ``@work`` that move rows, or say which there are."""

    def __init__(self, module: Module, layout: Layout, plan: Plan, f: Function, crew: Crew, rows: Value) -> None:
        self.module, self.layout, self.plan, self.f, self.crew, self.rows = module, layout, plan, f, crew, rows
        self.order = layout.buffer(f, "order")
        self._total, self._base = f.let("total.at", "alloca i64"), f.let("own.base", "alloca i64")
        self._in_place: dict[int, tuple[str, str]] = {}

    def alive(self, t: Value) -> str:
        """How many rows take part in a step."""
        f = self.f
        counts = self.layout.pointer(f, "counts")
        address = f.let("no.counts", f"icmp eq ptr {counts}, null")
        offset = f.let("count.offset", f"select i1 {address}, i64 0, i64 {f.mul(t, 8)}")
        own = f.at("%args", 8 * self.layout.index("rows"), "own.rows")
        source = f.let("count.at", f"select i1 {address}, ptr {own}, ptr {counts}")
        return f.load_int(f.at(source, offset), "rows")

    def fill_order(self) -> None:
        """The caller's order, or one row after another; whoever of a crew writes it writes the same."""
        f = self.f
        given = self.layout.pointer(f, "caller.order")
        present = f.let("ordered", f"icmp ne ptr {given}, null")
        with f.when("order", present):
            self._copy(self.order, given, f.mul(self.rows, 8))
        with f.when("own.order", f.let("is.own", f"xor i1 {present}, true")), f.loop("n", 0, self.rows) as n:
            f.store_int(n, f.at(self.order, f.mul(n, 8)))

    def starts(self, low: str, steps: Value) -> str:
        """How many rows a chunk has; where their number differs, note at which of them each of its steps begins."""
        f = self.f
        starts = self.layout.buffer(f, "starts")
        f.store_int(f.mul(steps, self.rows), self._total)
        with f.when("ragged", f.let("is.ragged", f"xor i1 {self.crew.regular}, true")):
            f.store_int(0, self._total)
            f.store_int(0, starts)
            with f.loop("p", 0, steps) as p:
                count = self.alive(f.add(low, p))
                after = f.add(f.load_int(self._total, "start"), count)
                f.store_int(after, self._total)
                f.store_int(after, f.at(starts, f.mul(f.add(p, 1), 8)))
        return f.load_int(self._total, "total")

    def bases(self, p: Value) -> tuple[str, str]:
        """Where the rows of a chunk's step ``p``, counted from the call's first, begin.

        Returns:
            In the chunk's buffers, and in what is saved of the chunk, which lies as the caller's rows do.
        """
        f, crew = self.f, self.crew
        f.store_int(f.mul(p, self.rows), self._base)
        noted = f.at(self.layout.buffer(f, "starts"), f.mul(p, 8))
        kept = f.load_int(f.let("base.at", f"select i1 {crew.regular}, ptr {self._base}, ptr {noted}"), "kept")
        # A thread's place is where it would be in the longest chunk: others may still be in the one before.
        before = f.mul(crew.first, f.sub(self.layout.word(f, "chunk_steps"), 1))
        apart = f.add(before, f.mul(p, f.sub(crew.last, crew.first, "own")), "apart.base")
        return f.let("base", f"select i1 {crew.apart}, i64 {apart}, i64 {kept}"), kept

    def move_states(self, kind: str, start: Value, stop: Value, slot: Value) -> None:
        """``first``: read the states of rows that begin; ``last``: hand back those of rows that end."""
        f, module = self.f, self.module
        start, stop = self.crew.own(start, stop)
        with self.crew.acting(), f.loop("row", start, stop) as row:
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

    def skip_rows_without_steps(self) -> None:
        """The state of a row that takes part in no step is the one it came with."""
        f = self.f
        start, stop = self.crew.own(0, self.rows)
        with self.crew.acting(), f.loop("row", start, stop) as row:
            caller = f.load_int(f.at(self.order, f.mul(row, 8)), "caller.row")
            for name, (leaf, _) in self.plan.states.items():
                bytes_ = self.plan.graph[leaf].size * self.module.bytes
                self._copy(self._caller_state("last", name, caller), self._caller_state("first", name, caller), bytes_)

    def reset(self, t: Value, rows: Value, slot: Value) -> None:
        """Rows whose flag is set go back to the reset state before the step; a gradient is cut off after it."""
        f = self.f
        flags = self.layout.pointer(f, "resets")
        given = f.let("has.resets", f"icmp ne ptr {flags}, null")
        act: Callable[[str, str, str, int], None] = self._cut_row if self.plan.backward else self._reset_row
        with f.when("resets", given):
            here = f.at(flags, f.mul(t, self.layout.word(f, "resets.step")))
            start, stop = self.crew.own(0, rows)
            with self.crew.acting(), f.loop("row", start, stop) as row:
                caller = f.load_int(f.at(self.order, f.mul(row, 8)), "caller.row")
                flag = f.let("flag", f"load i8, ptr {f.at(here, f.mul(caller, self.layout.word(f, 'resets.row')))}")
                is_set = f.let("is.set", f"icmp ne i8 {flag}, 0")
                with f.when("reset", is_set):
                    for name, (leaf, _) in self.plan.states.items():
                        size = self.plan.graph[leaf].size
                        mine = self._state_row(f"state.{name}", size, slot, row)
                        act(mine, self._caller_state("reset", name, caller), f"state.{name}", size)
            self.crew.meet(self.crew.columns)

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

    def find_in_place(self) -> None:
        """Which of the inputs outside the loop lie in memory as they would in the chunk's buffers."""
        f, layout = self.f, self.layout
        together = f.let("is.together", f"xor i1 {self.crew.rowwise}, true")
        regular = f.let("is.regular.whole", f"and i1 {together}, {self.crew.regular}")
        for index, buffer in self.plan.gathered.items():
            if not self._has_whole_vectors(index):
                continue
            words, size = f"in.{self.plan.graph[index].name}", buffer.size * self.module.bytes
            low_bits = f.let("low.bits", f"and i64 {layout.word(f, f'{words}.ptr')}, {ALIGNED - 1}")
            fits = f.let("fits", f"and i1 {regular}, {f.let('is.aligned', f'icmp eq i64 {low_bits}, 0')}")
            strides = (
                (f"{words}.row", size, self.rows),
                (f"{words}.step", f.mul(self.rows, size), layout.word(f, "steps")),
            )
            for word, wanted, count in strides:
                same = f.let("is.so", f"icmp eq i64 {layout.word(f, word)}, {wanted}")
                so = f.let("fits", f"or i1 {same}, {f.let('is.one', f'icmp sle i64 {count}, 1')}")
                fits = f.let("fits", f"and i1 {fits}, {so}")
            self._in_place[index] = fits, layout.buffer(f, buffer.name)

    def _has_whole_vectors(self, index: int) -> bool:
        """Whether no read of an input's rows goes beyond them, as that of a part of a vector does."""
        graph = self.plan.graph
        if graph[index].size % LANES:
            return False
        parts = {index}
        for other, node in graph:
            if node.op == "slice" and node.args[0] in parts:
                parts.add(other)
                if node.attrs["start"] % LANES:
                    return False
        return True

    def gather(self, low: str, steps: Value) -> None:
        """Inputs of products outside the loop, brought into rows of the chunk, or read where they are."""
        f, layout = self.f, self.layout
        for index, buffer in self.plan.gathered.items():
            words = f"in.{self.plan.graph[index].name}"
            in_place, _ = self._in_place.get(index, ("false", ""))
            with f.when("in.place", in_place):
                here = f.mul(low, layout.word(f, f"{words}.step"))
                layout.place(f, buffer.name, f.at(layout.pointer(f, f"{words}.ptr"), here))
            with f.when("gather", f.let("is.elsewhere", f"xor i1 {in_place}, true")):
                self._exchange(words, Location(buffer), buffer.size, low, steps, gather=True)

    def leave_in_place(self) -> None:
        """The buffers are where they were: a caller may have given their places for many calls."""
        for index, (_, own) in self._in_place.items():
            self.layout.place(self.f, self.plan.gathered[index].name, own)

    def scatter(self, low: str, steps: Value) -> None:
        """Outputs computed outside the loop, brought to the caller's rows."""
        graph = self.plan.graph
        for label, place in self.plan.scattered.items():
            self._exchange(f"out.{label}", place, graph[graph.outputs[label]].size, low, steps, gather=False)

    def _exchange(self, words: str, place: Location, size: int, low: str, steps: Value, *, gather: bool) -> None:
        f, module = self.f, self.module
        theirs, mine = self.layout.pointer(f, f"{words}.ptr"), self.layout.buffer(f, place.buffer.name)
        mine = f.at(mine, place.offset * module.bytes)
        step, apart = self.layout.word(f, f"{words}.step"), self.layout.word(f, f"{words}.row")
        # Where rows are parted each takes its own of every step, else all of some steps.
        first, last = f.share(steps, self.crew.me, self.crew.crew)
        with f.loop("p", first, last) as p:
            t = f.add(low, p)
            base, _ = self.bases(p)
            start, stop = self.crew.own(0, self.alive(t))
            with f.loop("row", start, stop) as row:
                caller = f.load_int(f.at(self.order, f.mul(row, 8)), "caller.row")
                user = f.at(f.at(theirs, f.mul(t, step)), f.mul(caller, apart))
                own = f.at(mine, f.mul(f.add(base, row), module.padded(place.buffer.size)))
                target, source = (own, user) if gather else (user, own)
                self._copy(target, source, size * module.bytes)

    def _copy(self, target: str, source: str, count: Value) -> None:
        self.module.declares.add("declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)")
        self.f.do(f"call void @llvm.memcpy.p0.p0.i64(ptr {target}, ptr {source}, i64 {count}, i1 false)")
