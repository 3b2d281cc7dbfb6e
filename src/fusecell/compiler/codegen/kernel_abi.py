"""Kernel ABI: the argument block that a kernel is called with, and its scratch memory.

The argument block is an array of 64-bit slots, looked up by name::

    steps, rows, chunk_steps, reverse, scratch, ...      numbers of the call, and optional arrays (0: absent)
    in.x.ptr, in.x.step, in.x.row                        each input: address, bytes between steps, between rows
    weight.W.ptr, weight.W.stride0, weight.W.stride1     each weight: address, bytes between rows, between columns
    first.h.ptr, first.h.row, last.h..., reset.h...      each state: at the start, at the end, after a reset
    out.y.ptr, out.y.step, out.y.row                     each output, or gradient of a weight
    saved.v.ptr                                          each value saved for the backward
    at.<buffer>                                          filled in by the kernel: where its buffers are

A call on several threads has a team block in addition (`TeamBlock`), through which they synchronise.

The caller fills the slots it knows; the kernel lays out its buffers in the scratch memory, as their sizes depend on the
rows of a step and of a chunk, which are known at the call only. One array, and not a parameter for each, because a call
through ctypes costs 0.3 us with four pointers and 0.08 with none, and a cell may have any number of tensors: the caller
fills the array once and changes only addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, unique

from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_module import Module
from fusecell.compiler.codegen.llvm_text import NULL, Integer, Value, i64, ptr
from fusecell.compiler.codegen.panel import Panel
from fusecell.compiler.codegen.weight_gradients.pack_operand import (
    PACKED,
    PACKED_COLUMNS,
    is_packed,
    packed_bytes,
    strip_bytes,
)
from fusecell.compiler.ir.graph import SAVED
from fusecell.compiler.ir.sizes import ALIGNMENT, SLOT_BYTES, Size
from fusecell.compiler.schedule.plan import SCOPES, Buffer, Plan
from fusecell.errors import CompilerError

__all__ = [
    "ARGS", "SLOT_BYTES", "STEP", "STEP_PARAMS", "THREADS", "THREAD_ID", "Layout", "RowAddress", "Size",
    "StepRows", "TeamBlock", "fixed_stride", "row_address", "slack",
]  # fmt: skip

HEADER = (
    "steps",
    "rows",  # of the longest step: the batch size
    "chunk_steps",
    "reverse",  # 1: from the last step to the first
    "scratch",  # address of the scratch memory; 0: the buffers' slots are filled already
    "counts",  # address of the number of rows that take part in each step; 0: all
    "caller.order",  # address of the caller's row for each of the kernel's rows; 0: the same
    "resets",  # address of a flag per step and row; 0: no resets
    "resets.step",
    "resets.row",
    "offsets",  # address of the rows before each step in saved values; 0: steps times rows
    "packed",  # whether panels are packed already, or will be used again: see main_loop
)

ARGS = ptr("args")
"""The argument block, the first parameter of every function that needs it."""
THREAD_ID, THREADS = i64("thread_id"), i64("threads")
"""The number of the thread in its team, and how many there are."""


@unique
class TeamBlock(IntEnum):
    """Slots of the block that the threads of one call share, by their positions.

    The runtime writes some before a call and reads others after it. The barrier is in another cache line than the slots
    by which threads arrive: threads that arrive late would take the line from those that wait at a barrier.
    """

    ARRIVED = 0
    """How many threads have arrived; each takes the number before its own arrival as its thread_id."""
    TEAM_SIZE = 1
    """How many threads work: 0 until the leader has decided."""
    BARRIER = 8
    """The barrier's counter: each thread adds one at each barrier."""
    YIELD = 9
    """The address of the function that yields the core to another thread."""
    RUNTIME_COUNT = 10
    """The address of the function that returns how many threads the runtime has started, or 0."""
    THREADS = 11
    """How many threads were requested."""
    ARGUMENTS = 12
    """The address of the call's argument block."""
    ARRIVAL_BUDGET = 13
    """How often the leader looks whether the others have arrived, at the most."""
    WORKED = 14
    """Result: how many threads worked."""
    YIELDS = 15
    """Result: how often a thread yielded its core."""

    @property
    def offset(self) -> int:
        """Bytes from the block's start."""
        return SLOT_BYTES * self

    @classmethod
    def slots(cls) -> int:
        """Return how many slots the block has."""
        return max(cls) + 1


@dataclass(frozen=True, slots=True)
class StepRows:
    """Position of one step's rows: in the caller's tensors, the chunk's buffers, the saved values, the states."""

    t: Integer
    """The step, in the caller's numbering."""
    base: Integer
    """Its first row in the buffers of the chunk."""
    saved_base: Integer
    """Its first row in the chunk's part of the saved values."""
    old_state: Integer
    """The copy of the states, 0 or 1, that holds the old ones."""

    def args(self) -> tuple[Integer, ...]:
        """Return the fields in the order of the parameters that pass them on."""
        return self.t, self.base, self.saved_base, self.old_state

    def with_state(self, state: Integer) -> StepRows:
        """Return the same rows, with another copy of the states."""
        return replace(self, old_state=state)


_T, _BASE, _SAVED_BASE, _OLD_STATE = i64("t"), i64("base"), i64("saved.base"), i64("old_state")
STEP = StepRows(_T, _BASE, _SAVED_BASE, _OLD_STATE)
"""The step's rows inside the functions of a stage."""
STEP_PARAMS = (ARGS, _T, _BASE, _SAVED_BASE, _OLD_STATE)
"""The first parameters of every function of a stage."""


UNROLLED_SAVED = 32
"""Saved values, at the most, whose addresses are set one by one; more are set in a loop."""
UNROLLED_BUFFERS = 64
"""The same of buffers in the scratch memory."""
SPLIT_SUM_BYTES = 2 << 20
"""Bytes of weight gradients up to which there is room for two partial sums; beyond, writing and adding the second takes
longer than it saves. It decides bits of gradients, so it is the same on every machine."""


def _scoped(module: Module, scope: str, row: int) -> Size:
    """Return the size of a buffer of rows of ``row`` bytes: one per call, step's row or chunk's row, or two states."""
    return {
        "call": Size(fixed=row),
        "step": Size(per_row=row),
        # Two copies, so that a step can write new states while other columns of it still read the old ones.
        "state": Size(per_row=2 * row),
        # With gaps between the parts of threads: a core's prefetcher would otherwise fetch rows that another writes.
        "chunk": Size(per_chunk_row=row, gaps=2 * module.target.tuning.thread_gap_bytes),
    }[scope]


def partial_sums(module: Module, plan: Plan) -> int:
    """Return how many partial sums of each weight gradient there are: one, or two, of half of the rows each."""
    bytes_ = sum(reduction.height * module.row_bytes(reduction.width) for reduction in plan.sums)
    return 2 if bytes_ <= SPLIT_SUM_BYTES else 1


def slack(module: Module) -> int:
    """Return the bytes behind every buffer that may be read: a slice reads whole vectors, up to one past its row."""
    return ALIGNMENT + module.vector_bytes


class Layout:
    """Layout of the argument block and of the scratch memory, by names of slots and buffers.

    Attributes:
        slots: the names of all slots, in order.
        sizes: the buffers, in order.
        saved: the values that are saved for the backward, or read by it.
        partial_sums: how many partial sums of each weight gradient there are.
    """

    def __init__(self, module: Module, plan: Plan, panels: list[Panel]) -> None:
        self.saved = plan.saved()
        self._caller_slots = (*_caller_slots(plan), *(f"{buffer.name}.ptr" for buffer in self.saved))
        self.partial_sums = partial_sums(module, plan)
        self.sizes = self._sizes(module, plan, panels)
        buffers = (*self.sizes, *(buffer.name for buffer in self.saved))
        self.slots = (*self._caller_slots, *(f"at.{name}" for name in buffers))
        self._index = {name: index for index, name in enumerate(self.slots)}
        if len(self._index) != len(self.slots):
            raise CompilerError("two slots of a kernel's argument block would have one name")

    def _sizes(self, module: Module, plan: Plan, panels: list[Panel]) -> dict[str, Size]:
        # "order": the caller's row for each row of the kernel. "starts": the first row of each step of a chunk.
        sizes = [("order", Size(fixed=64, per_row=8)), ("starts", Size(fixed=64, per_chunk_step=8))]
        for stage in plan.stages:
            if stage.reductions:
                bytes_ = len(stage.reductions) * module.vector_bytes
                sizes.append((f"partials.{stage.name}", _scoped(module, SCOPES[stage.phase], bytes_)))
        for panel in panels:
            sizes.append((panel.name, Size(fixed=module.groups(panel.width) * panel.group_bytes(module))))
        for buffer in plan.buffers:
            sizes.append((buffer.name, _scoped(module, buffer.scope, buffer_row_bytes(module, buffer))))
        for reduction in plan.distinct_sums:
            size = Size(fixed=self.partial_sums * reduction.height * module.row_bytes(reduction.width))
            sizes += [(reduction.part, size), (reduction.total, size)]
        # One gradient after the other uses the same micro-panels and strips, so that they stay in L1 and L2.
        packed = [reduction for reduction in plan.sums if is_packed(module, plan, reduction)]
        if packed:
            panels_a = self.partial_sums * max(packed_bytes(module, reduction) for reduction in packed)
            strips_b = self.partial_sums * max(strip_bytes(module, reduction) for reduction in packed)
            # Each thread has strips of its own.
            sizes += [(PACKED, Size(fixed=panels_a)), (PACKED_COLUMNS, Size(fixed=strips_b, per_thread=strips_b))]
        # Slack behind each: a slice that begins in the middle of a vector is read by whole vectors.
        buffers = {name: size + Size(fixed=slack(module)) for name, size in sizes}
        if len(buffers) != len(sizes):
            raise CompilerError("two buffers of a kernel would have one name, and one location in memory")
        return buffers

    @property
    def pointers(self) -> tuple[str, ...]:
        """The slots that every call must fill; reset states only one with resets."""
        return tuple(name for name in self._caller_slots if name.endswith(".ptr") and not name.startswith("reset."))

    @property
    def scratch(self) -> Size:
        """All scratch memory of a call."""
        total = Size(fixed=ALIGNMENT)
        for size in self.sizes.values():
            total += size
        return total

    def offset(self, name: str) -> int:
        """Return the bytes from the argument block's start to a slot."""
        return SLOT_BYTES * self._index[name]

    def integer(self, f: Function, name: str) -> Value:
        """Load a slot as a number."""
        return f.load_int(self._slot(f, name), name, once=True)

    def pointer(self, f: Function, name: str) -> Value:
        """Load a slot as an address."""
        return f.load_pointer(self._slot(f, name), name, once=True)

    def buffer(self, f: Function, name: str) -> Value:
        """Load the address of a buffer."""
        # Not loaded once where they move: inputs used in place, and saved values, have another address in every chunk.
        return f.load_pointer(self._slot(f, f"at.{name}"), f"at.{name}", once=not f.moves_buffers)

    def _slot(self, f: Function, name: str) -> Value:
        return f.at(ARGS, self.offset(name), "slot")

    def set_buffer(self, f: Function, name: str, address: Value) -> None:
        """Set the address of a buffer."""
        f.store_pointer(address, self._slot(f, f"at.{name}"))

    def set_saved(self, f: Function, module: Module, first_row: Integer) -> None:
        """Set the addresses of saved values to the chunk's rows, from ``first_row`` on."""
        if len(self.saved) > UNROLLED_SAVED:
            self._set_many_saved(f, module, first_row)
            return
        for buffer in self.saved:
            tensor = self.pointer(f, f"{buffer.name}.ptr")
            rows = f.at(tensor, f.mul(first_row, module.row_bytes(buffer.size)), buffer.name)
            self.set_buffer(f, buffer.name, rows)

    def _set_many_saved(self, f: Function, module: Module, first_row: Integer) -> None:
        """Set them in a loop over their slots: LLVM's time for loads and stores in a row grows with their square."""
        row_bytes = module.integers("saved.row_bytes", [module.row_bytes(buffer.size) for buffer in self.saved])
        pointers = self._slot(f, f"{self.saved[0].name}.ptr")
        addresses = self._slot(f, f"at.{self.saved[0].name}")
        with f.for_range("saved", 0, len(self.saved), nonempty=True) as each:
            offset = f.mul(each, SLOT_BYTES)
            tensor = f.load_pointer(f.at(pointers, offset), "tensor")
            row = f.load_int(f.at(row_bytes, offset), "row_bytes")
            f.store_pointer(f.at(tensor, f.mul(first_row, row)), f.at(addresses, offset))

    def assign_buffers(self, f: Function, rows: Integer, chunk_steps: Integer, is_padded: Value) -> None:
        """Write the addresses of all buffers in the scratch memory; without scratch memory the caller has set them.

        Arguments:
            is_padded: whether each thread has a part of its own in the buffers of a chunk (no false sharing).
        """
        scratch, chunk_rows = self.pointer(f, "scratch"), f.mul(rows, chunk_steps, "chunk_rows")
        helpers = f.sub(THREADS, 1, "other_threads")
        threads_before = f.select(is_padded, THREAD_ID, 0, "threads_before")
        # A gap between the parts of any two threads, and another behind the last, before the next buffer.
        gap = f.module.target.tuning.thread_gap_bytes
        counts = (rows, chunk_rows, chunk_steps, helpers)
        if len(self.sizes) > UNROLLED_BUFFERS:
            self._assign_many(f, scratch, counts, f.mul(threads_before, gap))
            return
        with f.if_(f.ne(scratch, NULL, "has_scratch"), "assign"):
            start = scratch
            for name, size in self.sizes.items():
                self.set_buffer(f, name, f.at(start, f.mul(threads_before, gap if size.gaps else 0)))
                total: Integer = size.fixed
                for count, bytes_ in zip(counts, _bytes_per(size), strict=True):
                    total = f.add(total, f.mul(count, bytes_))
                start = f.at(start, f.align_up(total, ALIGNMENT), name)

    def _assign_many(self, f: Function, scratch: Value, counts: Sequence[Integer], gaps_before: Integer) -> None:
        """Write the addresses of all buffers in a loop, over a table of their sizes."""
        rows = [[int(size.gaps > 0), size.fixed, *_bytes_per(size)] for size in self.sizes.values()]
        table = f.module.integers("buffer.sizes", [number for row in rows for number in row])
        addresses = self._slot(f, f"at.{next(iter(self.sizes))}")
        start_at = f.alloca("buffer.start.at", type="ptr")
        f.store_pointer(scratch, start_at)
        count = f.select(f.ne(scratch, NULL, "has_scratch"), len(rows), 0, "buffers")
        with f.for_range("buffer", 0, count) as each:
            row = f.at(table, f.mul(each, SLOT_BYTES * len(rows[0])))
            has_gaps, fixed, *bytes_per = (
                f.load_int(f.at(row, SLOT_BYTES * place), "buffer.size") for place in range(len(rows[0]))
            )
            start = f.load_pointer(start_at, "buffer.start")
            f.store_pointer(f.at(start, f.mul(has_gaps, gaps_before)), f.at(addresses, f.mul(each, SLOT_BYTES)))
            total: Integer = fixed
            for rows_or_steps, bytes_ in zip(counts, bytes_per, strict=True):
                total = f.add(total, f.mul(rows_or_steps, bytes_))
            f.store_pointer(f.at(start, f.align_up(total, ALIGNMENT)), start_at)


def _bytes_per(size: Size) -> tuple[int, ...]:
    """Return a buffer's bytes for each row, row of a chunk, step of a chunk, and thread but the first."""
    return size.per_row, size.per_chunk_row, size.per_chunk_step, size.per_helper


def _caller_slots(plan: Plan) -> list[str]:
    """List the slots that a caller fills, except those of saved values."""
    graph = plan.graph
    slots = list(HEADER)
    for index in graph.leaves("input"):
        if not graph[index].name.startswith(SAVED):
            slots += [f"in.{graph[index].name}.{part}" for part in ("ptr", "step", "row")]
    for index in graph.leaves("weight"):
        slots += [f"weight.{graph[index].name}.{part}" for part in ("ptr", "stride0", "stride1")]
    for name in plan.states:
        slots += [f"{kind}.{name}.{part}" for kind in ("first", "last", "reset") for part in ("ptr", "row")]
    for label, index in graph.outputs.items():
        if graph[index].type.kind in ("row", "mask") and not label.startswith(("state.", SAVED)):
            slots += [f"out.{label}.{part}" for part in ("ptr", "step", "row")]
        elif graph[index].type.kind == "sum":
            slots += [f"out.{label}.{part}" for part in ("ptr", "stride0", "stride1")]
    return slots


@dataclass(frozen=True, slots=True)
class RowAddress:
    """Address of a buffer's rows of a step, the bytes between them, and whether they are in the caller's order."""

    start: Value
    stride: Integer
    in_caller_order: bool


def row_address(f: Function, layout: Layout, module: Module, buffer: Buffer, at: StepRows) -> RowAddress:
    """Return the address of a buffer's rows of one step."""
    if buffer.scope == "user":
        tensor = layout.pointer(f, f"{buffer.name}.ptr")
        start = f.at(tensor, f.mul(at.t, layout.integer(f, f"{buffer.name}.step")))
        return RowAddress(start, layout.integer(f, f"{buffer.name}.row"), True)
    row = buffer_row_bytes(module, buffer)
    start = layout.buffer(f, buffer.name)
    # The rows of a chunk's steps follow each other; a step's buffer has one step's rows, and a call's one row.
    if buffer.scope in ("chunk", "saved"):
        start = f.at(start, f.mul(at.base if buffer.scope == "chunk" else at.saved_base, row))
    elif buffer.scope == "state":
        start = f.at(start, f.mul(f.mul(at.old_state, layout.integer(f, "rows")), row))
    stride = fixed_stride(module, buffer)
    assert stride is not None, f"{buffer.name} is the caller's, whose stride is known at the call only"
    return RowAddress(start, stride, False)


def fixed_stride(module: Module, buffer: Buffer) -> int | None:
    """Return the bytes between a buffer's rows; None in a caller's tensor, where they are known at the call only."""
    if buffer.stride == "caller":
        return None
    return 0 if buffer.stride == "none" else buffer_row_bytes(module, buffer)


def buffer_row_bytes(module: Module, buffer: Buffer) -> int:
    """Return the bytes of a buffer's row, padded to whole vectors; of pairs, to halves of vectors."""
    return module.row_bytes(buffer.size) // (2 if buffer.in_pairs else 1)
