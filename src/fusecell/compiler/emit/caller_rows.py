"""Rows to and from the caller: states, resets, and what is read and made outside the loop."""

from __future__ import annotations

from collections.abc import Callable

from fusecell.compiler.emit.crew import Crew
from fusecell.compiler.emit.layout import Layout
from fusecell.compiler.emit.text import Function, Module, Value
from fusecell.compiler.plan import Place, Plan

__all__ = ["CallerRows"]


class CallerRows:
    """The parts of ``@work`` that move rows, or say which there are."""

    def __init__(self, module: Module, layout: Layout, plan: Plan, f: Function, crew: Crew, rows: Value) -> None:
        self.module, self.layout, self.plan, self.f, self.crew, self.rows = module, layout, plan, f, crew, rows
        self.order = layout.buffer(f, "order")
        self._total = f.let("total.at", "alloca i64")

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
        """The first row of each of the chunk's steps in the chunk's buffers; returns their number in all."""
        f = self.f
        starts = self.layout.buffer(f, "starts")
        total = self._total
        f.store_int(0, total)
        f.store_int(0, starts)
        with f.loop("p", 0, steps) as p:
            count = self.alive(f.add(low, p))
            after = f.add(f.load_int(total, "start"), count)
            f.store_int(after, total)
            f.store_int(after, f.at(starts, f.mul(f.add(p, 1), 8)))
        return f.load_int(total, "total")

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

    def gather(self, low: str, steps: Value) -> None:
        """Inputs of products outside the loop, brought into rows of the chunk."""
        for index, buffer in self.plan.gathered.items():
            self._exchange(f"in.{self.plan.graph[index].name}", Place(buffer), buffer.size, low, steps, gather=True)

    def scatter(self, low: str, steps: Value) -> None:
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
        # Where rows are parted each takes its own of every step, else all of some steps.
        first, last = f.share(steps, self.crew.me, self.crew.crew)
        with f.loop("p", first, last) as p:
            t = f.add(low, p)
            base = f.load_int(f.at(starts, f.mul(p, 8)), "base")
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
