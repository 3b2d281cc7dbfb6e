"""Work sharing: how the threads of a team run one call together, and where they wait for each other.

``@work(args, thread_id, threads, barrier)`` is what each of them runs; ``@run`` is a team of one::

    @run(args):    @work(args, 0, 1, null)
    @team(block):  thread_id = block.next_thread++         in every thread that the runtime starts
                   thread 0: wait a little for the others, then close the team: ``threads`` is who has come
                   others:   wait until it is closed; who comes later leaves
                   @work(block.args, thread_id, threads, block.barrier)

The rows of a call are partitioned where there are enough: then no thread waits for another within the loop over time.
Else the columns of every stage are, with a barrier after each. An element is computed by the same instructions in the
same order whichever thread does it, so its bits depend on none of this.

The barrier is a counter that only grows: each thread adds one, and waits until it is ``threads`` times the number of
barriers so far (a centralised barrier without reset; Mellor-Crummey and Scott, ACM TOCS 1991). Threads spin, as a wait
takes microseconds; after some ten they give their core to others, who may be waiting for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fusecell.compiler.codegen.kernel_abi import THREAD_ID, THREADS
from fusecell.compiler.codegen.llvm_builder import Function, Module
from fusecell.compiler.codegen.llvm_text import NULL, Integer, Value, ptr

__all__ = ["CALLER_ARGS", "MIN_ROWS_PER_THREAD", "WORK_PARAMS", "Team", "emit_barrier", "emit_entries"]

CALLER_ARGS, BARRIER = ptr("caller.args"), ptr("barrier")
WORK_PARAMS = (CALLER_ARGS, THREAD_ID, THREADS, BARRIER)
"""What ``@work`` takes: the caller's argument block, which thread of how many, the barrier's counter."""
MIN_ROWS_PER_THREAD = 4
"""Least rows per thread for partitioning by rows: half a tile, but no barrier in the loop."""
MIN_ROWS_LARGE_LOOP = 32
"""The same where the weights of the loop exceed `LARGE_LOOP_BYTES`: by columns each core reads a part of them only."""
LARGE_LOOP_BYTES = 1 << 20
"""Bytes of the loop's weights that a core's L2 holds."""
_SPINS = 512
"""Turns at the gate, some ten microseconds, before the others, who may be waiting for this core, get it."""
_CLOSED = 1 << 20
_DECISION, _GATE, _YIELD, _COUNT, _THREADS, _ARGS, _PATIENCE, _WORKED, _GIVEN = 1, 8, 9, 10, 11, 12, 13, 14, 15
"""The words of a crew's data behind the first, which hands out the threads' numbers. Patience is how many turns the
first waits for the others; the last two are answers: how many worked, and how often one gave its core away."""


class Team:
    """How the threads of a team share a call, inside ``@work``: by rows where there are enough, else by columns.

    Arguments:
        rows: of the call.
        counts: the address of how many rows take part in each step, if that differs; else null.
        loop_bytes: of the weights that every step reads.

    Attributes:
        is_team: whether there are several threads.
        is_regular: whether all rows take part in every step.
        by_rows: whether rows are partitioned: each thread runs all stages on its own.
        by_columns: whether columns are: each thread runs its columns of every stage, with a barrier after each.
        min_rows: rows per thread from which rows are partitioned.
        is_padded: whether each thread has a part of its own in the chunk's buffers.
        column_thread, column_threads: which of how many threads takes its share of the columns; by rows 0 of 1.
        first_row, last_row: this thread's own rows; by columns all.
    """

    def __init__(self, f: Function, rows: Integer, counts: Value, loop_bytes: int) -> None:
        self.f, self.rows = f, rows
        self._barriers = f.alloca("barrier_count.at")
        f.store_int(0, self._barriers)
        self.is_team = f.gt(THREADS, 1, "is_team")
        self.is_regular = f.eq(counts, NULL, "is_regular")
        self.min_rows = MIN_ROWS_PER_THREAD if loop_bytes <= LARGE_LOOP_BYTES else MIN_ROWS_LARGE_LOOP
        is_enough = f.ge(rows, f.mul(THREADS, self.min_rows), "is_enough")
        can_partition = f.and_(self.is_regular, is_enough, "can_partition")
        self.by_rows = f.and_(self.is_team, can_partition, "by_rows")
        self.is_padded = self.by_rows
        self.by_columns = f.xor(self.by_rows, self.is_team, "by_columns")
        is_whole = f.not_(self.by_rows, "is_whole")
        self.column_thread = f.select(is_whole, THREAD_ID, 0, "column.thread_id")
        self.column_threads = f.select(is_whole, THREADS, 1, "column.threads")
        first, last = f.partition(rows, THREAD_ID, THREADS)
        self.first_row = f.select(is_whole, 0, first, "own.first")
        self.last_row = f.select(is_whole, rows, last, "own.last")
        self._is_leader = f.eq(THREAD_ID, 0, "is_leader")
        self._does_rows = f.or_(self.by_rows, self._is_leader, "does_rows")

    @contextmanager
    def leader(self) -> Iterator[None]:
        """Code that one thread runs."""
        with self.f.if_(self._is_leader, "leader"):
            yield

    @contextmanager
    def per_row(self) -> Iterator[None]:
        """Code for single rows: every thread runs it for its own; by columns the leader for all."""
        with self.f.if_(self._does_rows, "per_row"):
            yield

    def own_rows(self, start: Integer, stop: Integer) -> tuple[Value, Value]:
        """Return this thread's own rows of a range."""
        return self.f.maximum(start, self.first_row), self.f.minimum(stop, self.last_row)

    def barrier(self, condition: Value | None = None) -> None:
        """Wait for all threads of the team, if there are several and, where one is passed, ``condition`` holds."""
        with self.f.if_(condition or self.is_team, "barrier"):
            self.f.call("barrier", BARRIER, THREADS, self._barriers)


def emit_barrier(module: Module) -> None:
    """Write ``@barrier``: raise the counter, wait until all have."""
    count = ptr("count")
    f = Function(module, "barrier", BARRIER, THREADS, count)
    target = f.add(f.load_int(count, "before"), THREADS, "target")
    f.store_int(target, count)
    f.do(f"%came = atomicrmw add ptr {BARRIER}, i64 1 seq_cst")
    _wait(f, BARRIER, f"sge i64 %now, {target}", BARRIER)
    f.end()


def _wait(f: Function, word: str, condition: str, gate: str) -> None:
    """Look at a word until ``condition`` holds of what is there; after a while others get the core."""
    f.lines.extend(
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
    args = ptr("args")
    f = Function(module, "run", args, exported=True)
    f.call("work", args, 0, 1, NULL)
    f.end()
    _gather_crew(module)
    decision, block = ptr("decision"), ptr("block")
    f = Function(module, "join", decision, BARRIER)
    _wait(f, decision, "sgt i64 %now, 0", BARRIER)
    f.end()
    f = Function(module, "crew", block, exported=True)
    thread_id = f.let("thread_id", f"atomicrmw add ptr {block}, i64 1 seq_cst")
    barrier, decision = f.at(block, 8 * _GATE, "barrier"), f.at(block, 8 * _DECISION, "decision")
    with f.if_(f.eq(thread_id, 0, "is_leader"), "leader"):
        f.call("gather", block)
    with f.if_(f.lt(thread_id, _CLOSED, "is_in_time"), "in_time"):
        f.call("join", decision, barrier)
        args = f.load_pointer(f.at(block, 8 * _ARGS), "args")
        f.call("work", args, thread_id, f.load_int(decision, "threads"), barrier)
    f.end()


def _gather_crew(module: Module) -> None:
    """Write ``@gather``: wait until all threads are there, or for some time, and decide."""
    block = ptr("block")
    f = Function(module, "gather", block)
    # A runtime may give fewer threads than it was asked for: then it knows how many.
    threads_at = f.alloca("threads.at")
    f.store_int(f.load_int(f.at(block, 8 * _THREADS), "threads"), threads_at)
    count = f.load_pointer(f.at(block, 8 * _COUNT), "count")
    with f.if_(f.ne(count, NULL, "is_counted"), "counted"):
        short = f.let("short", f"call i32 {count}()", "i32")
        f.store_int(f.sext(short, "long"), threads_at)
    threads = f.load_int(threads_at, "threads")
    patience = f.load_int(f.at(block, 8 * _PATIENCE), "patience")
    f.lines.extend(
        [
            "  br label %look",
            "look:",
            "  %spins = phi i64 [ 0, %counted.end ], [ %spins.next, %stay ]",
            "  %here = load atomic i64, ptr %block acquire, align 8",
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
    crew = f.let("crew", f"atomicrmw xchg ptr %block, i64 {_CLOSED} seq_cst")
    f.store_int(crew, f.at(block, 8 * _WORKED))
    f.do(f"store atomic i64 {crew}, ptr {f.at(block, 8 * _DECISION)} release, align 8")
    f.end()
