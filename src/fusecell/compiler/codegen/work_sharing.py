"""A thread team: the threads that run one call together, each its share of every stage.

``@work(args, thread, threads, barrier)`` is what each of them runs; ``@run`` is a team of one. Where one needs what
another computes, all wait at a barrier: a counter, which each raises when it comes, until all have.

The rows of a call are partitioned where there are enough: then nobody waits for anybody within the loop over time. Else
the columns of every stage are, and all wait after each. An element is computed by the same instructions in the same
order whoever does it, so its bits depend on none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fusecell.compiler.codegen.kernel_abi import TeamBlock
from fusecell.compiler.codegen.llvm_builder import Function, Module, Value

__all__ = ["ROWS_EACH", "WORK", "ThreadTeam", "emit_barrier", "emit_entries"]

WORK = ("ptr %given", "i64 %thread", "i64 %threads", "ptr %barrier")
ROWS_EACH = 4
"""Rows of a thread from which rows are partitioned: half a tile, but nobody waits for anybody."""
_ROWS_EACH_LARGE = 32
"""The same where the weights of the loop exceed a core's cache: columns partition them, rows don't."""
_LARGE = 1 << 20
_SPIN_BUDGET = 512
"""Turns at a barrier, some ten microseconds, before the others, who may be waiting for this core, get it."""
_CLOSED = 1 << 20
"""What ``ARRIVED`` is once the team is complete: who takes a number from here on is too late."""


class ThreadTeam:
    """What the main loop says in terms of a thread team: who acts, who waits, whose share is what.

    Arguments:
        rows: of the call.
        counts: the address of how many rows take part in each step, if that differs.
        loop_bytes: of the weights that every step reads.

    Attributes:
        regular: whether all rows take part in every step.
        rows_each: how many rows of a thread it takes for rows to be partitioned.
        apart: whether each has a place of its own in the chunk's buffers.
        thread_id, threads: which share of the columns this thread takes, of how many.
        first, last: the rows that are this thread's own.
    """

    def __init__(self, f: Function, rows: Value, counts: str, loop_bytes: int) -> None:
        self.f, self.rows = f, rows
        self._passed = f.let("passed", "alloca i64")
        f.store_int(0, self._passed)
        self.several = f.let("is.team", "icmp sgt i64 %threads, 1")
        self.regular = f.let("is.regular", f"icmp eq ptr {counts}, null")
        self.rows_each = ROWS_EACH if loop_bytes <= _LARGE else _ROWS_EACH_LARGE
        enough = f.let("is.enough", f"icmp sge i64 {rows}, {f.mul('%threads', self.rows_each)}")
        can = f.let("can.partition", f"and i1 {self.regular}, {enough}")
        self.rowwise = f.let("is.rowwise", f"and i1 {self.several}, {can}")
        self.apart = self.rowwise
        self.columns = f.let("is.columns", f"xor i1 {self.rowwise}, {self.several}")
        whole = f.let("is.whole", f"xor i1 {self.rowwise}, true")
        self.thread_id = f.let("column.thread", f"select i1 {whole}, i64 %thread, i64 0")
        self.threads = f.let("column.threads", f"select i1 {whole}, i64 %threads, i64 1")
        first, last = f.share(rows, "%thread", "%threads")
        self.first = f.let("own.first", f"select i1 {whole}, i64 0, i64 {first}")
        self.last = f.let("own.last", f"select i1 {whole}, i64 {rows}, i64 {last}")
        leads = f.let("is.first", "icmp eq i64 %thread, 0")
        self._acts = f.let("acts", f"or i1 {self.rowwise}, {leads}")
        self._leads = leads

    @contextmanager
    def leader(self) -> Iterator[None]:
        """What one of them does."""
        with self.f.when("leader", self._leads):
            yield

    @contextmanager
    def acting(self) -> Iterator[None]:
        """What each does for its own rows, or, where columns are partitioned, one for all rows."""
        with self.f.when("acts", self._acts):
            yield

    def own(self, start: Value, stop: Value) -> tuple[Value, Value]:
        """Of some rows those that are one's own."""
        return self.f.maximum(start, self.first), self.f.minimum(stop, self.last)

    def barrier(self, condition: str | None = None) -> None:
        """Wait for the others, if ``condition`` holds; where there are several, if it is left out."""
        with self.f.when("wait", condition or self.several):
            self.f.call("barrier", "ptr %barrier", "i64 %threads", f"ptr {self._passed}")


def emit_barrier(module: Module) -> None:
    """Write ``@barrier``: raise the counter, wait until all have."""
    f = Function(module, "barrier", "ptr %barrier", "i64 %threads", "ptr %passed")
    target = f.add(f.load_int("%passed", "before"), "%threads", "target")
    f.store_int(target, "%passed")
    f.do("%came = atomicrmw add ptr %barrier, i64 1 seq_cst")
    _wait(f, "%barrier", f"sge i64 %now, {target}", "%barrier")
    f.end()


def _wait(f: Function, word: str, condition: str, barrier: str) -> None:
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
            f"  %long = icmp sge i64 %spins.next, {_SPIN_BUDGET}",
            "  br i1 %long, label %give, label %wait",
            "wait:",
            "  br label %look",
            "give:",
            f"  %yields.at = getelementptr i8, ptr {barrier}, i64 {TeamBlock.YIELDS.offset - TeamBlock.BARRIER.offset}",
            "  %yields = atomicrmw add ptr %yields.at, i64 1 monotonic",
            f"  %yield.at = getelementptr i8, ptr {barrier}, i64 {TeamBlock.YIELD.offset - TeamBlock.BARRIER.offset}",
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
    """Write ``@run``, a team of one, and ``@team``, which each thread of a team runs with the same :class:`TeamBlock`.

    The first to come waits a little for the others, then completes the team: who comes later finds it so and leaves.
    """
    f = Function(module, "run", "ptr %args", exported=True)
    f.call("work", "ptr %args", "i64 0", "i64 1", "ptr null")
    f.end()
    _emit_gather(module)
    f = Function(module, "join", "ptr %size", "ptr %barrier")
    _wait(f, "%size", "sgt i64 %now, 0", "%barrier")
    f.end()
    f = Function(module, "team", "ptr %block", exported=True)
    thread_id = f.let("thread", f"atomicrmw add ptr {_slot(f, TeamBlock.ARRIVED)}, i64 1 seq_cst")
    barrier, size = _slot(f, TeamBlock.BARRIER), _slot(f, TeamBlock.TEAM_SIZE)
    with f.when("leader", f.let("is.leader", f"icmp eq i64 {thread_id}, 0")):
        f.call("gather", "ptr %block")
    with f.when("in.time", f.let("is.in.time", f"icmp slt i64 {thread_id}, {_CLOSED}")):
        f.call("join", f"ptr {size}", f"ptr {barrier}")
        args = f.let("args", f"load ptr, ptr {_slot(f, TeamBlock.ARGUMENTS)}")
        f.call("work", f"ptr {args}", f"i64 {thread_id}", f"i64 {f.load_int(size, 'threads')}", f"ptr {barrier}")
    f.end()


def _slot(f: Function, slot: TeamBlock) -> str:
    """The address of a slot of the team's block."""
    return f.at("%block", slot.offset, f"{slot.name.lower().replace('_', '.')}.at")


def _emit_gather(module: Module) -> None:
    """Write ``@gather``: wait until all threads are there, or for some time, and decide how many the team has."""
    f = Function(module, "gather", "ptr %block")
    # A runtime may give fewer threads than it was asked for: then it knows how many.
    expected = f.let("expected.at", "alloca i64")
    f.store_int(f.load_int(_slot(f, TeamBlock.THREADS), "threads"), expected)
    count = f.let("count", f"load ptr, ptr {_slot(f, TeamBlock.RUNTIME_COUNT)}")
    with f.when("counted", f.let("is.counted", f"icmp ne ptr {count}, null")):
        short = f.let("short", f"call i32 {count}()")
        f.store_int(f.let("long", f"sext i32 {short} to i64"), expected)
    threads = f.load_int(expected, "expected")
    budget = f.load_int(_slot(f, TeamBlock.ARRIVAL_BUDGET), "budget")
    arrived = _slot(f, TeamBlock.ARRIVED)
    f.raw(
        [
            "  br label %look",
            "look:",
            "  %spins = phi i64 [ 0, %counted.end ], [ %spins.next, %stay ]",
            f"  %here = load atomic i64, ptr {arrived} acquire, align 8",
            f"  %all = icmp sge i64 %here, {threads}",
            f"  %late = icmp sge i64 %spins, {budget}",
            "  %enough = or i1 %all, %late",
            "  br i1 %enough, label %close, label %stay",
            "stay:",
            *_spin_hint(module),
            "  %spins.next = add i64 %spins, 1",
            "  br label %look",
            "close:",
        ]
    )
    size = f.let("team", f"atomicrmw xchg ptr {arrived}, i64 {_CLOSED} seq_cst")
    f.store_int(size, _slot(f, TeamBlock.WORKED))
    f.do(f"store atomic i64 {size}, ptr {_slot(f, TeamBlock.TEAM_SIZE)} release, align 8")
    f.end()
