"""A crew: the threads that run one call together, each its share of every stage.

``@work(args, me, crew, gate)`` is what each of them runs; ``@run`` is a crew of one. Where one needs what another has
made they meet at a gate: a counter, which each raises when it comes, and waits for the others to raise.

The rows of a call are parted where there are enough: then nobody waits for anybody within the loop over time. Else
the columns of every stage are, and all meet after each. An element is computed by the same instructions in the same
order whoever does it, so its bits depend on none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fusecell.compiler.codegen.llvm_builder import Function, Module, Value

__all__ = ["ROWS_EACH", "WORK", "Crew", "emit_entries", "emit_meet"]

WORK = ("ptr %given", "i64 %me", "i64 %crew", "ptr %gate")
ROWS_EACH = 4
"""Rows of a thread from which rows are parted: half a tile, but nobody waits for anybody."""
_ROWS_EACH_LARGE = 32
"""The same where the weights of the loop exceed a core's cache: columns part them, rows don't."""
_LARGE = 1 << 20
_SPINS = 512
"""Turns at the gate, some ten microseconds, before the others, who may be waiting for this core, get it."""
_CLOSED = 1 << 20
_DECISION, _GATE, _YIELD, _COUNT, _THREADS, _ARGS, _PATIENCE, _WORKED, _GIVEN = 1, 8, 9, 10, 11, 12, 13, 14, 15
"""The words of a crew's data behind the first, which hands out the threads' numbers. Patience is how many turns the
first waits for the others; the last two are answers: how many worked, and how often one gave its core away."""


class Crew:
    """What the driver says in terms of a crew: who acts, who waits, whose share is what.

    Arguments:
        rows: of the call.
        counts: the address of how many rows take part in each step, if that differs.
        loop_bytes: of the weights that every step reads.

    Attributes:
        regular: whether all rows take part in every step.
        rows_each: how many rows of a thread it takes for rows to be parted.
        apart: whether each has a place of its own in the chunk's buffers.
    """

    def __init__(self, f: Function, rows: Value, counts: str, loop_bytes: int) -> None:
        self.f, self.rows = f, rows
        self._met = f.let("met", "alloca i64")
        f.store_int(0, self._met)
        self.several = f.let("is.crew", "icmp sgt i64 %crew, 1")
        self.regular = f.let("is.regular", f"icmp eq ptr {counts}, null")
        self.rows_each = ROWS_EACH if loop_bytes <= _LARGE else _ROWS_EACH_LARGE
        enough = f.let("is.enough", f"icmp sge i64 {rows}, {f.mul('%crew', self.rows_each)}")
        can = f.let("can.part", f"and i1 {self.regular}, {enough}")
        self.rowwise = f.let("is.rowwise", f"and i1 {self.several}, {can}")
        self.apart = self.rowwise
        self.columns = f.let("is.columns", f"xor i1 {self.rowwise}, {self.several}")
        whole = f.let("is.whole", f"xor i1 {self.rowwise}, true")
        # The share of the columns that this thread takes, and its own rows.
        self.me = f.let("column.me", f"select i1 {whole}, i64 %me, i64 0")
        self.crew = f.let("column.crew", f"select i1 {whole}, i64 %crew, i64 1")
        first, last = f.share(rows, "%me", "%crew")
        self.first = f.let("own.first", f"select i1 {whole}, i64 0, i64 {first}")
        self.last = f.let("own.last", f"select i1 {whole}, i64 {rows}, i64 {last}")
        leads = f.let("is.first", "icmp eq i64 %me, 0")
        self._acts = f.let("acts", f"or i1 {self.rowwise}, {leads}")
        self._leads = leads

    @contextmanager
    def leader(self) -> Iterator[None]:
        """What one of them does."""
        with self.f.when("leader", self._leads):
            yield

    @contextmanager
    def acting(self) -> Iterator[None]:
        """What each does for its own rows, or, where columns are parted, one for all rows."""
        with self.f.when("acts", self._acts):
            yield

    def own(self, start: Value, stop: Value) -> tuple[Value, Value]:
        """Of some rows those that are one's own."""
        return self.f.maximum(start, self.first), self.f.minimum(stop, self.last)

    def meet(self, condition: str | None = None) -> None:
        """Wait for the others, if ``condition`` holds; where there are several, if it is left out."""
        with self.f.when("meet", condition or self.several):
            self.f.call("meet", "ptr %gate", "i64 %crew", f"ptr {self._met}")


def emit_meet(module: Module) -> None:
    """Write ``@meet``: raise the counter, wait until all have."""
    f = Function(module, "meet", "ptr %gate", "i64 %crew", "ptr %met")
    target = f.add(f.load_int("%met", "before"), "%crew", "target")
    f.store_int(target, "%met")
    f.do("%came = atomicrmw add ptr %gate, i64 1 seq_cst")
    _wait(f, "%gate", f"sge i64 %now, {target}", "%gate")
    f.end()


def _wait(f: Function, word: str, condition: str, gate: str) -> None:
    """Look at a word until ``condition`` holds of what is there; after a while others get the core."""
    f.raw(
        [
            "  br label %look",
            "look:",
            "  %spins = phi i64 [ 0, %entry ], [ %spins.next, %wait ], [ 0, %give ]",
            f"  %now = load atomic i64, ptr {word} acquire, align 8",
            f"  %open = icmp {condition}",
            "  br i1 %open, label %through, label %stay",
            "stay:",
            *_spin_hint(f.module),
            "  %spins.next = add i64 %spins, 1",
            f"  %long = icmp sge i64 %spins.next, {_SPINS}",
            "  br i1 %long, label %give, label %wait",
            "wait:",
            "  br label %look",
            "give:",
            f"  %given.at = getelementptr i8, ptr {gate}, i64 {8 * (_GIVEN - _GATE)}",
            "  %given = atomicrmw add ptr %given.at, i64 1 monotonic",
            f"  %yield.at = getelementptr i8, ptr {gate}, i64 {8 * (_YIELD - _GATE)}",
            "  %yield = load ptr, ptr %yield.at",
            "  %done = call i32 %yield()",
            "  br label %look",
            "through:",
        ]
    )


def _spin_hint(module: Module) -> list[str]:
    """Tell the core that it only waits, where it can be told."""
    hint = module.target.isa.spin_hint
    if hint is None:
        return []
    declaration, call = hint
    module.declares.add(declaration)
    return [f"  {call}"]


def emit_entries(module: Module) -> None:
    """Write ``@run``, a crew of one, and ``@crew``, which each thread of a crew runs with the same data.

    The first to come waits a little for the others, then closes the crew: who comes later finds it so and leaves.
    """
    f = Function(module, "run", "ptr %args", exported=True)
    f.call("work", "ptr %args", "i64 0", "i64 1", "ptr null")
    f.end()
    _gather_crew(module)
    f = Function(module, "join", "ptr %decision", "ptr %gate")
    _wait(f, "%decision", "sgt i64 %now, 0", "%gate")
    f.end()
    f = Function(module, "crew", "ptr %data", exported=True)
    me = f.let("me", "atomicrmw add ptr %data, i64 1 seq_cst")
    gate, decision = f.at("%data", 8 * _GATE, "gate"), f.at("%data", 8 * _DECISION, "decision")
    with f.when("leader", f.let("is.leader", f"icmp eq i64 {me}, 0")):
        f.call("gather", "ptr %data")
    with f.when("in.time", f.let("is.in.time", f"icmp slt i64 {me}, {_CLOSED}")):
        f.call("join", f"ptr {decision}", f"ptr {gate}")
        args = f.let("args", f"load ptr, ptr {f.at('%data', 8 * _ARGS)}")
        f.call("work", f"ptr {args}", f"i64 {me}", f"i64 {f.load_int(decision, 'crew')}", f"ptr {gate}")
    f.end()


def _gather_crew(module: Module) -> None:
    """Write ``@gather``: wait until all threads are there, or for some time, and decide."""
    f = Function(module, "gather", "ptr %data")
    # A runtime may give fewer threads than it was asked for: then it knows how many.
    wanted = f.let("wanted.at", "alloca i64")
    f.store_int(f.load_int(f.at("%data", 8 * _THREADS), "threads"), wanted)
    count = f.let("count", f"load ptr, ptr {f.at('%data', 8 * _COUNT)}")
    with f.when("counted", f.let("is.counted", f"icmp ne ptr {count}, null")):
        short = f.let("short", f"call i32 {count}()")
        f.store_int(f.let("long", f"sext i32 {short} to i64"), wanted)
    threads = f.load_int(wanted, "wanted")
    patience = f.load_int(f.at("%data", 8 * _PATIENCE), "patience")
    f.raw(
        [
            "  br label %look",
            "look:",
            "  %spins = phi i64 [ 0, %counted.end ], [ %spins.next, %stay ]",
            "  %here = load atomic i64, ptr %data acquire, align 8",
            f"  %all = icmp sge i64 %here, {threads}",
            f"  %late = icmp sge i64 %spins, {patience}",
            "  %enough = or i1 %all, %late",
            "  br i1 %enough, label %close, label %stay",
            "stay:",
            *_spin_hint(module),
            "  %spins.next = add i64 %spins, 1",
            "  br label %look",
            "close:",
        ]
    )
    crew = f.let("crew", f"atomicrmw xchg ptr %data, i64 {_CLOSED} seq_cst")
    f.store_int(crew, f.at("%data", 8 * _WORKED))
    f.do(f"store atomic i64 {crew}, ptr {f.at('%data', 8 * _DECISION)} release, align 8")
    f.end()
