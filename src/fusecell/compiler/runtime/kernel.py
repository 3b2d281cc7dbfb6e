"""A kernel: machine code for one graph, and what a call writes into its argument block.

Nothing here needs torch: a stream that was saved runs kernels on NumPy's memory.
"""

from __future__ import annotations

import ctypes
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fusecell.compiler.backend import tuning
from fusecell.compiler.backend.jit import Loaded, load
from fusecell.compiler.backend.target import host_target, l2_bytes
from fusecell.compiler.codegen import Emitted, emit
from fusecell.compiler.ir.contract import check_graph
from fusecell.compiler.ir.graph import SAVED, Graph
from fusecell.compiler.ir.sizes import ALIGNMENT, align_up, ceil_div
from fusecell.compiler.runtime.stages import debug_stages, print_stages
from fusecell.compiler.schedule.plan import Plan
from fusecell.compiler.schedule.scheduler import plan
from fusecell.compiler.transforms.passes import optimise
from fusecell.errors import CompilerError

__all__ = ["Kernel", "Strided", "compile_graph"]

Strided = Any
"""A tensor, or anything else with its ``shape``, ``stride()`` in elements, ``data_ptr()`` and ``is_neg()``."""
_Places = tuple[int, ...]


class _Words:
    """The positions of an argument block's words, looked up by name once.

    Attributes:
        inputs, outputs, saved, weights: by name.
        first, last, reset: of each state, in order.
        positions: of every word.
    """

    def __init__(self, schedule: Plan, emitted: Emitted) -> None:
        graph = schedule.graph
        self.positions = {name: position for position, name in enumerate(emitted.slots)}
        sequence, matrix, rows = (".ptr", ".step", ".row"), (".ptr", ".stride0", ".stride1"), (".ptr", ".row")
        leaves = {op: [graph[index].name for index in graph.leaves(op)] for op in ("input", "weight")}
        self.sizes = self._all("", "steps", "rows", "reverse", "chunk_steps", "scratch")
        self.ragged = self._all("", "caller.order", "counts", "offsets")
        self.resets = self._all("resets", "", ".step", ".row")
        self.inputs = {name: self._all(f"in.{name}", *sequence) for name in leaves["input"] if not _is_saved(name)}
        self.weights = {name: self._all(f"weight.{name}", *matrix) for name in leaves["weight"]}
        self.first, self.last, self.reset = (
            [self._all(f"{kind}.{name}", *rows) for name in schedule.states] for kind in ("first", "last", "reset")
        )
        self.saved = {buffer.name: self.positions[f"{buffer.name}.ptr"] for buffer in schedule.saved()}
        self.outputs: dict[str, _Places] = {}
        self.sums: dict[str, _Places] = {}
        for label, index in graph.outputs.items():
            if graph[index].type.kind == "sum":
                self.sums[label] = self._all(f"out.{label}", *matrix)
            elif not label.startswith(("state.", SAVED)):
                self.outputs[label] = self._all(f"out.{label}", *sequence)
        self._check(emitted)

    def _all(self, name: str, *parts: str) -> _Places:
        return tuple([self.positions[name + part] for part in parts])

    def _check(self, emitted: Emitted) -> None:
        tables = (self.inputs, self.weights, self.outputs, self.sums)
        bound = {places[0] for table in tables for places in table.values()} | set(self.saved.values())
        bound |= {places[0] for places in (*self.first, *self.last)}
        missing = [name for name in emitted.pointers if self.positions[name] not in bound]
        if missing:
            raise CompilerError(f"a kernel would be called without {', '.join(missing)}")


@dataclass(frozen=True)
class Kernel:
    """Machine code for one graph; any number of steps and rows.

    Methods called ``give_...`` write into a block, which belongs to one call, so that a kernel can run in many
    threads at once. They return the tensors they had to make: those, like all that are given, must live until the
    kernel returns.
    """

    source: Graph
    """The graph before any pass."""
    plan: Plan
    emitted: Emitted
    loaded: Loaded
    seconds: float
    """How long it took from the graph to callable code."""
    macs: int
    """Multiply-adds of a row's step."""
    output_sizes: dict[str, int]
    """Features of each output that has a row for every step and row of the batch."""
    words: _Words
    itemsize: int
    short: Callable[[int], None]
    long: Callable[[int], None]
    team: int
    """The address of ``@team``, which each thread of a team runs."""
    loop_macs: int
    """Multiply-adds of a row's step that wait for the step before."""
    _zeros: array[int]

    def block(self) -> array[int]:
        """A new argument block."""
        return self._zeros[:]

    def give_sequences(self, block: array[int], table: Iterable[_Places], values: Iterable[Strided]) -> list[Strided]:
        """A (T, N, ...) tensor for each entry of the table; one of a single step stands for all steps."""
        kept = []
        for (ptr, step, row), value in zip(table, values, strict=True):
            strides = value.stride()
            if len(strides) != 3 or (strides[2] != 1 and value.shape[2] > 1):
                value = value.reshape(value.shape[0], value.shape[1], -1).contiguous()
                strides = value.stride()
                kept.append(value)
            block[ptr], block[row] = value.data_ptr(), strides[1] * self.itemsize
            block[step] = strides[0] * self.itemsize if value.shape[0] > 1 else 0
        return kept

    def give_states(self, block: array[int], table: Iterable[_Places], state: Iterable[Strided]) -> list[Strided]:
        """A (N, size) tensor for each state."""
        kept = []
        for (ptr, row), value in zip(table, state, strict=True):
            strides = value.stride()
            if strides[1] != 1 and value.shape[1] > 1:
                value = value.contiguous()
                strides = value.stride()
                kept.append(value)
            block[ptr], block[row] = value.data_ptr(), strides[0] * self.itemsize
        return kept

    def give_matrices(self, block: array[int], table: Iterable[_Places], values: Iterable[Strided]) -> list[Strided]:
        """A weight for each entry of the table, or the memory for its gradient, with any strides."""
        kept = []
        for (ptr, stride0, stride1), value in zip(table, values, strict=True):
            if value.is_neg():
                value = value.resolve_neg()
                kept.append(value)
            strides = value.stride()
            block[ptr], block[stride0] = value.data_ptr(), strides[0] * self.itemsize
            if len(strides) > 1:
                block[stride1] = strides[1] * self.itemsize
        return kept

    def give_ragged(self, block: array[int], order: Strided, counts: Strided, offsets: Strided) -> None:
        """Rows of different lengths: their order, how many take part in each step, and in all steps before it."""
        for place, value in zip(self.words.ragged, (order, counts, offsets), strict=True):
            block[place] = value.data_ptr()

    def give_resets(self, block: array[int], resets: Strided) -> None:
        """Which rows go back to the reset state, (T, N)."""
        ptr, step, row = self.words.resets
        block[ptr], (block[step], block[row]) = resets.data_ptr(), resets.stride()

    def chunk(self, steps: int, rows: int) -> int:
        """Return the steps of a chunk: as many as fit L2, but enough rows to be worth reading the weights for."""
        size, rows, sizes = self.emitted.scratch, max(rows, 1), tuning.TUNING
        step_bytes = max(size.per_chunk_row * rows, 1)
        if step_bytes * steps <= min(size.fixed, sizes.only_chunk_bytes):
            return max(1, steps)
        least = 1
        if size.fixed > sizes.large_panels_bytes:
            sum_rows = sizes.sum_rows if l2_bytes() >= sizes.large_l2_bytes else sizes.sum_rows_small_l2
            least = ceil_div(sum_rows if self.words.sums else sizes.panel_rows, rows)
        return max(1, min(steps, max(least, sizes.chunk_bytes // step_bytes)))

    def scratch_bytes(self, steps: int, rows: int, threads: int = 1) -> int:
        """What a call needs, and room to align it."""
        return align_up(self.emitted.scratch.bytes(rows, self.chunk(steps, rows), threads)) + ALIGNMENT

    def fill(
        self, block: array[int], steps: int, rows: int, reverse: bool, scratch: int, chunk: int | None = None
    ) -> int:
        """Write the sizes of a call and its scratch memory into a block; returns the steps of a chunk."""
        chunk, places = chunk or self.chunk(steps, rows), self.words.sizes
        block[places[0]], block[places[1]], block[places[2]] = steps, rows, reverse
        block[places[3]], block[places[4]] = chunk, align_up(scratch)
        return chunk


def compile_graph(graph: Graph, *, backward: bool = False, about: str = "", code_bytes: int | None = None) -> Kernel:
    """Check, optimise, schedule, emit and load a graph.

    Arguments:
        backward: whether it is a gradient's.
        about: what it is of, for the headlines of ``FUSECELL_DEBUG``.
        code_bytes: the most that its LLVM text may have.

    Raises:
        CompilerError: for a graph that breaks its contract (``ir.contract``), or whose text is longer.
        ValueError: if ``FUSECELL_DEBUG`` names a stage that there is none of.
    """
    shown = debug_stages()
    began = time.perf_counter()
    check_graph(graph, "gradient" if backward else "step")
    target = host_target()
    schedule = plan(optimise(graph)[-1][1], backward=backward)
    emitted = emit(schedule, target)
    if code_bytes is not None and len(emitted.text) > code_bytes:
        raise CompilerError(f"a step's code has {len(emitted.text):,} bytes, more than the {code_bytes:,} it may have")
    words = _Words(schedule, emitted)
    loaded = load(emitted.text, ["run", "team"], target)
    address = loaded.address("run")
    kernel = Kernel(
        source=graph,
        plan=schedule,
        emitted=emitted,
        loaded=loaded,
        seconds=time.perf_counter() - began,
        macs=_macs(schedule),
        output_sizes={label: graph[graph.outputs[label]].size for label in words.outputs},
        words=words,
        itemsize=graph.dtype.itemsize,
        short=ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(address),
        long=ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address),
        team=loaded.address("team"),
        loop_macs=sum(
            _macs_of(schedule.graph, index) for stage in schedule.stages_of("loop") for index in stage.affines
        ),
        _zeros=array("q", bytes(8 * len(emitted.slots))),
    )
    print_stages(kernel, about, shown)
    return kernel


def _is_saved(name: str) -> bool:
    return name.startswith(SAVED)


def _macs(schedule: Plan) -> int:
    """Multiply-adds of a row's step."""
    graph = schedule.graph
    total = sum(found.height * found.width for found in schedule.sums if found.a is not None)
    return total + sum(_macs_of(graph, index) for index, node in graph if node.op == "affine")


def _macs_of(graph: Graph, index: int) -> int:
    """Multiply-adds of a row's products."""
    node = graph[index]
    terms: Any = node.attrs["terms"]
    return sum((term["rows"][1] - term["rows"][0]) * node.size for term in terms)
