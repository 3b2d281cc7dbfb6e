"""What a kernel is called with: a block of 64-bit words, and scratch memory cut into buffers.

The caller fills the words it knows, pointers, strides in bytes, sizes; the kernel fills in the addresses of its
buffers. Sizes of buffers depend on the rows of a step and of a chunk, which are known at the call only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, unique

from fusecell.compiler.codegen.llvm_builder import Function, Module, Value
from fusecell.compiler.codegen.weight_gradients.pack_operand import STRIPS, has_strips, strips_bytes
from fusecell.compiler.ir.graph import SAVED
from fusecell.compiler.schedule.plan import Buffer, Plan

__all__ = ["ALIGNED", "Layout", "Panel", "Size", "TeamBlock", "fixed_stride", "row_address", "slack"]

WORD = 8
"""Bytes of a slot."""
HEADER = (
    "steps",
    "rows",
    "chunk_steps",
    "reverse",
    "scratch",
    "counts",
    "caller.order",
    "resets",
    "resets.step",
    "resets.row",
    "offsets",
    "packed",
)


@unique
class TeamBlock(IntEnum):
    """What the threads of one call share: the slots of a block of 64-bit words, by their positions.

    What the runtime writes before a call and reads after it, and what machine code reads, counts and answers in it. The
    barrier's line of the cache is not the one at which threads arrive.
    """

    ARRIVED = 0
    """How many threads have come; each takes the number it finds as its own."""
    TEAM_SIZE = 1
    """How many threads work: 0 until the first to come has decided."""
    BARRIER = 8
    """Raised by each thread that comes to a barrier."""
    YIELD = 9
    """The address of the function that gives the core to another thread."""
    RUNTIME_COUNT = 10
    """The address of the function that tells how many threads the runtime gave, or 0."""
    THREADS = 11
    """How many threads were asked for."""
    ARGUMENTS = 12
    """The address of the call's argument block."""
    ARRIVAL_BUDGET = 13
    """How many turns the first to come waits for the others."""
    WORKED = 14
    """Answer: how many threads worked."""
    YIELDS = 15
    """Answer: how often one gave its core away."""

    @property
    def offset(self) -> int:
        """Bytes from the block's start."""
        return WORD * self

    @classmethod
    def slots(cls) -> int:
        """How many words the block has."""
        return max(cls) + 1


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes: fixed, and per row of a step, row of a chunk, step of a chunk, and thread of a team beyond the first."""

    fixed: int = 0
    per_row: int = 0
    per_chunk_row: int = 0
    per_chunk_step: int = 0
    per_helper: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(
            self.fixed + other.fixed,
            self.per_row + other.per_row,
            self.per_chunk_row + other.per_chunk_row,
            self.per_chunk_step + other.per_chunk_step,
            self.per_helper + other.per_helper,
        )

    def bytes(self, rows: int, chunk_steps: int, threads: int = 1) -> int:
        of_chunk = rows * chunk_steps * self.per_chunk_row + chunk_steps * self.per_chunk_step
        return self.fixed + self.per_row * rows + of_chunk + (threads - 1) * self.per_helper


@dataclass(frozen=True, slots=True)
class Panel:
    """Weights as a product reads them: [block of columns][k][product][lane]."""

    name: str
    depth: int
    width: int
    weights: tuple[tuple[str, bool, tuple[int, int], tuple[int, int]], ...]
    """Per product: the weight, whether it is transposed, its rows and its columns."""


ALIGNED = 64
"""What the addresses of buffers are multiples of."""
_BETWEEN = 4096
"""Bytes between what two threads write of a buffer, if each has a place of its own: caches fetch within a page. As many
stand behind the last, before the next buffer."""
_UNROLLED = 32
"""Saved values that are placed one by one; more in a loop. Their words stand one behind the other."""
_HALVED = 2 << 20
"""Bytes of sums, beyond which a second copy costs more than it brings."""
_ROWS = {"once": "call", "lift": "chunk", "loop": "step", "post": "chunk"}


def _scoped(scope: str, row: int) -> Size:
    """A buffer of rows of ``row`` bytes: one, one per row of a step or of a chunk, or the old and the new state."""
    return {
        "call": Size(fixed=row),
        "step": Size(per_row=row),
        "state": Size(per_row=2 * row),
        "chunk": Size(per_chunk_row=row, per_helper=2 * _BETWEEN),
    }[scope]


def sum_halves(module: Module, plan: Plan) -> int:
    """How many copies of the sums there is room for: two, so that halves of the rows can be summed apart, or one."""
    bytes_ = sum(found.height * module.padded(found.width) for found in plan.sums)
    return 2 if bytes_ <= _HALVED else 1


def slack(module: Module) -> int:
    """Room behind every buffer: a slice reads whole vectors, up to one past its row."""
    return 64 + module.block


class Layout:
    """The words of the argument block, by name, and the offsets of the buffers in scratch memory."""

    def __init__(self, module: Module, plan: Plan, panels: list[Panel]) -> None:
        graph = plan.graph
        words = list(HEADER)
        for index in graph.leaves("input"):
            if not graph[index].name.startswith(SAVED):
                words += [f"in.{graph[index].name}.{part}" for part in ("ptr", "step", "row")]
        for index in graph.leaves("weight"):
            words += [f"weight.{graph[index].name}.{part}" for part in ("ptr", "stride0", "stride1")]
        for name in plan.states:
            words += [f"{kind}.{name}.{part}" for kind in ("first", "last", "reset") for part in ("ptr", "row")]
        for label, index in graph.outputs.items():
            if graph[index].type.kind in ("row", "mask") and not label.startswith(("state.", SAVED)):
                words += [f"out.{label}.{part}" for part in ("ptr", "step", "row")]
            elif graph[index].type.kind == "sum":
                words += [f"out.{label}.{part}" for part in ("ptr", "stride0", "stride1")]
        self.saved = plan.saved()
        words += [f"{buffer.name}.ptr" for buffer in self.saved]
        self.given = tuple(words)
        self.halves = sum_halves(module, plan)
        self.sizes = self._sizes(module, plan, panels)
        self.words = (*words, *(f"at.{name}" for name in (*self.sizes, *(buffer.name for buffer in self.saved))))
        self._index = {name: index for index, name in enumerate(self.words)}

    def _sizes(self, module: Module, plan: Plan, panels: list[Panel]) -> dict[str, Size]:
        sizes = {
            "order": Size(fixed=64, per_row=8),
            "starts": Size(fixed=64, per_chunk_step=8),
        }
        for stage in plan.stages:
            if stage.reductions:
                bytes_ = len(stage.reductions) * module.block
                sizes[f"partials.{stage.name}"] = _scoped(_ROWS[stage.phase], bytes_)
        for panel in panels:
            sizes[panel.name] = Size(fixed=module.blocks(panel.width) * panel.depth * len(panel.weights) * module.block)
        for buffer in plan.buffers():
            sizes[buffer.name] = _scoped(buffer.scope, module.padded(buffer.size))
        for found in plan.sums:
            for name in (found.part, found.total):
                sizes[name] = Size(fixed=self.halves * found.height * module.padded(found.width))
        strips = [strips_bytes(module, found) for found in plan.sums if has_strips(module, plan, found)]
        if strips:
            sizes[STRIPS] = Size(fixed=self.halves * max(strips))
        return {name: size + Size(fixed=slack(module)) for name, size in sizes.items()}

    @property
    def pointers(self) -> tuple[str, ...]:
        """The words without which a kernel must not be called; the state of resets goes with the resets."""
        return tuple(name for name in self.given if name.endswith(".ptr") and not name.startswith("reset."))

    @property
    def scratch(self) -> Size:
        """All scratch memory of a call."""
        total = Size(fixed=64)
        for size in self.sizes.values():
            total += size
        return total

    def index(self, name: str) -> int:
        """The position of a word."""
        return self._index[name]

    def word(self, f: Function, name: str) -> str:
        """A word of the argument block as a number."""
        return f.same(name, f"load i64, ptr {self._at(f, name)}")

    def pointer(self, f: Function, name: str) -> str:
        """A word of the argument block as an address."""
        return f.same(name, f"load ptr, ptr {self._at(f, name)}")

    def buffer(self, f: Function, name: str) -> str:
        """The address of a buffer."""
        load = f.let if f.moves_buffers else f.same
        return load(f"at.{name}", f"load ptr, ptr {self._at(f, f'at.{name}')}")

    def _at(self, f: Function, name: str) -> str:
        return f.at("%args", 8 * self._index[name], "word")

    def place(self, f: Function, name: str, address: str) -> None:
        """Have a buffer be somewhere else."""
        f.do(f"store ptr {address}, ptr {self._at(f, f'at.{name}')}")

    def place_saved(self, f: Function, module: Module, start: Value) -> None:
        """Have a chunk find its rows, from ``start`` on, of what is saved."""
        if len(self.saved) > _UNROLLED:
            self._place_many_saved(f, module, start)
            return
        for buffer in self.saved:
            whole = self.pointer(f, f"{buffer.name}.ptr")
            here = f.at(whole, f.mul(start, module.padded(buffer.size)), buffer.name)
            self.place(f, buffer.name, here)

    def _place_many_saved(self, f: Function, module: Module, start: Value) -> None:
        """The same in a loop over what is saved: LLVM takes ever longer for so many loads and stores in a row."""
        rows = module.numbers("saved.row.bytes", [module.padded(buffer.size) for buffer in self.saved])
        first = self._at(f, f"{self.saved[0].name}.ptr")
        places = self._at(f, f"at.{self.saved[0].name}")
        with f.loop("saved", 0, len(self.saved), some=True) as each:
            offset = f.mul(each, WORD)
            whole = f.let("whole", f"load ptr, ptr {f.at(first, offset)}")
            row = f.load_int(f.at(rows, offset), "row.bytes")
            here = f.at(whole, f.mul(start, row))
            f.do(f"store ptr {here}, ptr {f.at(places, offset)}")

    def place_buffers(self, f: Function, rows: Value, chunk_steps: Value, apart: str) -> None:
        """Work out every buffer's address, unless the caller left it in the argument block and gave no scratch.

        Arguments:
            apart: whether each thread has a place of its own in what belongs to a chunk.
        """
        scratch, chunk_rows = self.pointer(f, "scratch"), f.mul(rows, chunk_steps, "chunk.rows")
        helpers = f.sub("%threads", 1, "helpers")
        before = f.let("threads.before", f"select i1 {apart}, i64 %thread, i64 0")
        with f.when("place", f.let("is.given", f"icmp ne ptr {scratch}, null")):
            here = scratch
            for name, size in self.sizes.items():
                self.place(f, name, f.at(here, f.mul(before, _BETWEEN if size.per_helper else 0)))
                total: Value = size.fixed
                for count, each in (
                    (rows, size.per_row),
                    (chunk_rows, size.per_chunk_row),
                    (chunk_steps, size.per_chunk_step),
                    (helpers, size.per_helper),
                ):
                    total = f.add(total, f.mul(count, each))
                up = f.add(total, 63)
                aligned = -64 & up if isinstance(up, int) else f.let("aligned", f"and i64 {up}, -64")
                here = f.at(here, aligned, name)


def row_address(
    f: Function, layout: Layout, module: Module, buffer: Buffer, *, t: str, base: str, kept: str, slot: Value
) -> tuple[str, Value, bool]:
    """Where a buffer's rows of this step begin, how far apart they are, and whether they are in the caller's order."""
    if buffer.scope == "user":
        start = f.at(layout.pointer(f, f"{buffer.name}.ptr"), f.mul(t, layout.word(f, f"{buffer.name}.step")))
        return start, layout.word(f, f"{buffer.name}.row"), True
    stride = module.padded(buffer.size)
    start = layout.buffer(f, buffer.name)
    if buffer.scope in ("chunk", "saved"):
        start = f.at(start, f.mul(base if buffer.scope == "chunk" else kept, stride))
    elif buffer.scope == "state":
        start = f.at(start, f.mul(f.mul(slot, layout.word(f, "rows")), stride))
    apart = fixed_stride(module, buffer)
    assert apart is not None, f"{buffer.name} is the caller's, whose rows are anywhere"
    return start, apart, False


def fixed_stride(module: Module, buffer: Buffer) -> int | None:
    """The bytes between a buffer's rows, of a caller's buffer None: they are known at the call only."""
    if buffer.scope == "user":
        return None
    return 0 if buffer.scope == "call" else module.padded(buffer.size)
