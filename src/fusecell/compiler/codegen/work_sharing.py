"""Work sharing: how the threads of a team run one call together, and where they wait for each other.

Each runs ``@work(args, thread_id, threads, barrier)``; ``@run`` is a team of one::

    @run(args):    @work(args, 0, 1, null)
    @team(block):  thread_id = block.arrived++             in every thread that the runtime starts
                   thread 0: @gather(block)                wait a little for the others, then close the team
                   others:   @join(...)                    wait until it is closed; later ones return
                   @work(block.arguments, thread_id, block.team_size, block.barrier)

The rows of a call are partitioned where there are enough: then no thread waits for another within the loop over time.
Else the columns of every stage are, with a barrier after each. An element is computed by the same instructions in the
same order whichever thread does it, so its bits depend on none of this.

The barrier is a counter that only grows: each thread adds one, and waits until it is ``threads`` times the number of
barriers so far (a centralised barrier without reset; Mellor-Crummey and Scott, ACM TOCS 1991). Threads spin, as a wait
takes microseconds: between two cores of a Zen 4 a handshake took 0.43 us by spinning and 1.6 us through a futex. After
some ten microseconds they yield their core, as the thread that they wait for may need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fusecell.compiler.codegen.kernel_abi import ARGS, THREAD_ID, THREADS, TeamBlock
from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_module import Module
from fusecell.compiler.codegen.llvm_text import NULL, Integer, Value, ptr

__all__ = ["CALLER_ARGS", "MIN_ROWS_PER_THREAD", "WORK_PARAMS", "Team", "emit_barrier", "emit_entries"]

CALLER_ARGS, BARRIER = ptr("caller.args"), ptr("barrier")
WORK_PARAMS = (CALLER_ARGS, THREAD_ID, THREADS, BARRIER)
"""Parameters of ``@work``: the caller's argument block, the number of the thread and of threads, the barrier."""
MIN_ROWS_PER_THREAD = 4
"""Least rows per thread for partitioning by rows: half a tile, but no barrier in the loop. This and the next two decide
which sums are split, and so bits of gradients (`weight_gradients.accumulator`): they are the same on every machine."""
MIN_ROWS_LARGE_LOOP = 32
"""The same where the weights of the loop exceed `LARGE_LOOP_BYTES`: by columns each core reads only a part of them."""
LARGE_LOOP_BYTES = 1 << 20
"""Bytes of the loop's weights, about, that stay in a core's L2."""
_CLOSED = 1 << 20
"""Value of the slot ARRIVED of a closed team: more than any number of threads."""


class Team:
    """How the threads of a team share a call, inside ``@work``: by rows where there are enough, else by columns.

    Arguments:
        rows: of the call.
        counts: the address of the number of rows that take part in each step, if steps differ in it; else null.
        loop_bytes: bytes of the weights that every step reads.

    Attributes:
        is_team: whether there are several threads.
        is_regular: whether all rows take part in every step.
        by_rows: whether rows are partitioned: each thread runs all stages on its own.
        by_columns: whether columns are: each thread runs its columns of every stage, with a barrier after each.
        min_rows: rows per thread from which rows are partitioned.
        is_padded: whether each thread has a separate part of the chunk's buffers.
        column_thread, column_threads: the number of the thread, and of threads, that share columns; by rows 0 and 1.
        first_row, last_row: the range of this thread's rows; by columns all.
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
        # Kernels of gradients set it themselves: there threads may read rows of others, in the common layout.
        self.is_padded = self.by_rows
        self.by_columns = f.xor(self.by_rows, self.is_team, "by_columns")
        not_by_rows = f.not_(self.by_rows, "not_by_rows")
        # By rows a thread computes all columns of its rows, as if it were alone; by columns all rows of its columns.
        self.column_thread = f.select(not_by_rows, THREAD_ID, 0, "column.thread_id")
        self.column_threads = f.select(not_by_rows, THREADS, 1, "column.threads")
        first, last = f.partition(rows, THREAD_ID, THREADS)
        self.first_row = f.select(not_by_rows, 0, first, "first_row")
        self.last_row = f.select(not_by_rows, rows, last, "last_row")
        self._is_leader = f.eq(THREAD_ID, 0, "is_leader")
        self._runs_per_row = f.or_(self.by_rows, self._is_leader, "runs_per_row")

    @contextmanager
    def leader(self) -> Iterator[None]:
        """Enter code that only thread 0 runs."""
        with self.f.if_(self._is_leader, "leader"):
            yield

    @contextmanager
    def per_row(self) -> Iterator[None]:
        """Enter code for single rows: every thread runs it for its own rows; by columns the leader for all."""
        with self.f.if_(self._runs_per_row, "per_row"):
            yield

    def thread_rows(self, start: Integer, stop: Integer) -> tuple[Value, Value]:
        """Return this thread's part of a range of rows."""
        return self.f.maximum(start, self.first_row), self.f.minimum(stop, self.last_row)

    def barrier(self, condition: Value | None = None) -> None:
        """Wait for all threads of the team, if there are several and, where one is passed, ``condition`` holds."""
        with self.f.if_(condition or self.is_team, "barrier"):
            self.f.call("barrier", BARRIER, THREADS, self._barriers)


def emit_barrier(module: Module) -> None:
    """Write ``@barrier``: add one to the counter, wait until all threads have."""
    count_at = ptr("count.at")
    f = Function(module, "barrier", BARRIER, THREADS, count_at)
    # Each thread has a count of its own, so the shared counter is never reset: with a reset the last thread would have
    # to know that all others have left the barrier.
    target = f.add(f.load_int(count_at, "count"), THREADS, "target")
    f.store_int(target, count_at)
    f.fetch_add(BARRIER, 1, "arrived")
    _spin_until(f, BARRIER, lambda count: f.ge(count, target, "is_open"), BARRIER)
    f.end()


def _spin_until(f: Function, slot: Value, is_open: Callable[[Value], Value], barrier: Value) -> None:
    """Write a loop that reads a slot until ``is_open`` holds of it; once its spin budget is spent, it yields the core.

    Arguments:
        barrier: the address of the team block's barrier, by which its other slots are found.
    """
    entry = f.current()
    f.branch("poll")
    f.begin("poll")
    next_spin = f.forward("spin.next")
    spin = f.phi([(0, entry), (next_spin, "again"), (0, "yield")], "spin")
    current = f.load_acquire(slot, "current")
    f.branch_if(is_open(current), "open", "closed")
    f.begin("closed")
    _spin_hint(f)
    f.define_sum(next_spin, spin, 1)
    f.branch_if(f.ge(next_spin, f.module.target.tuning.spin_budget, "is_spent"), "yield", "again")
    f.begin("again")
    f.branch("poll")
    f.begin("yield")
    f.fetch_add(f.at(barrier, TeamBlock.YIELDS.offset - TeamBlock.BARRIER.offset), 1, "yields", "monotonic")
    yield_at = f.at(barrier, TeamBlock.YIELD.offset - TeamBlock.BARRIER.offset)
    f.call_for("i32", f.load_pointer(yield_at, "yield.function"), name="status")
    f.branch("poll")
    f.begin("open")


def _spin_hint(f: Function) -> None:
    """Hint that this is a spin loop, where the CPU has such a hint: the core leaves units to its other hyperthread."""
    hint = f.module.target.isa.spin_hint
    if hint is not None:
        declaration, call = hint
        f.declares.add(declaration)
        f.do(call)


_BLOCK = ptr("block")


def emit_entries(module: Module) -> None:
    """Write ``@run``, a team of one, and ``@team``, which every thread of a team runs with the same `TeamBlock`."""
    f = Function(module, "run", ARGS, exported=True)
    f.call("work", ARGS, 0, 1, NULL)
    f.end()
    _emit_gather(module)
    size_at = ptr("team_size.at")
    f = Function(module, "join", size_at, BARRIER)
    _spin_until(f, size_at, lambda size: f.gt(size, 0, "is_open"), BARRIER)
    f.end()
    f = Function(module, "team", _BLOCK, exported=True)
    thread_id = f.fetch_add(_slot(f, TeamBlock.ARRIVED), 1, "thread_id")
    barrier, size_at = _slot(f, TeamBlock.BARRIER), _slot(f, TeamBlock.TEAM_SIZE)
    with f.if_(f.eq(thread_id, 0, "is_leader"), "leader"):
        f.call("gather", _BLOCK)
    with f.if_(f.lt(thread_id, _CLOSED, "is_in_time"), "in_time"):
        f.call("join", size_at, barrier)
        args = f.load_pointer(_slot(f, TeamBlock.ARGUMENTS), "args")
        f.call("work", args, thread_id, f.load_int(size_at, "threads"), barrier)
    f.end()


def _slot(f: Function, slot: TeamBlock) -> Value:
    """Return the address of a slot of the team block."""
    return f.at(_BLOCK, slot.offset, f"{slot.name.lower()}.at")


def _emit_gather(module: Module) -> None:
    """Write ``@gather``: wait until all threads have arrived, or for some time, and close the team.

    Waiting is bounded: where other programs occupy the cores, a call runs on the threads that have arrived.
    """
    f = Function(module, "gather", _BLOCK)
    expected_at = f.alloca("expected.at")
    f.store_int(f.load_int(_slot(f, TeamBlock.THREADS), "threads"), expected_at)
    # An OpenMP runtime may start fewer threads than requested: then it knows how many.
    count = f.load_pointer(_slot(f, TeamBlock.RUNTIME_COUNT), "count")
    with f.if_(f.ne(count, NULL, "has_count"), "counted"):
        f.store_int(f.sext(f.call_for("i32", count, name="runtime_threads"), "threads"), expected_at)
    expected = f.load_int(expected_at, "expected")
    budget = f.load_int(_slot(f, TeamBlock.ARRIVAL_BUDGET), "budget")
    arrived_at = _slot(f, TeamBlock.ARRIVED)
    entry = f.current()
    f.branch("poll")
    f.begin("poll")
    next_spin = f.forward("spin.next")
    spin = f.phi([(0, entry), (next_spin, "again")], "spin")
    all_arrived = f.ge(f.load_acquire(arrived_at, "arrived"), expected, "all_arrived")
    is_spent = f.ge(spin, budget, "is_spent")
    f.branch_if(f.or_(all_arrived, is_spent, "is_done"), "close", "again")
    f.begin("again")
    _spin_hint(f)
    f.define_sum(next_spin, spin, 1)
    f.branch("poll")
    f.begin("close")
    # Threads that take their number from now on get one beyond _CLOSED, and return.
    size = f.exchange(arrived_at, _CLOSED, "team_size")
    f.store_int(size, _slot(f, TeamBlock.WORKED))
    f.store_release(size, _slot(f, TeamBlock.TEAM_SIZE))
    f.end()
