"""Kernels: compile a graph to machine code, and compute the sizes that its calls need.

Nothing here needs torch: a stream that was saved runs kernels on NumPy's memory.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusecell.compiler.backend import tuning
from fusecell.compiler.backend.jit import Loaded, load
from fusecell.compiler.backend.target import Target, host_target, l2_bytes
from fusecell.compiler.codegen import Emitted, emit
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.ir.graph_contract import check_graph
from fusecell.compiler.ir.sizes import ALIGNMENT, align_up, ceil_div
from fusecell.compiler.runtime.argument_block import ArgumentBlock, Slots
from fusecell.compiler.runtime.debug_output import debug_stages, print_stages
from fusecell.compiler.schedule.plan import Plan
from fusecell.compiler.schedule.scheduler import plan
from fusecell.compiler.transforms.passes import optimise
from fusecell.errors import CompilerError

__all__ = ["Kernel", "compile_graph"]


@dataclass(frozen=True)
class Kernel:
    """Machine code for one graph; any number of steps and rows.

    Arguments:
        source: the graph before any pass.
        seconds: the time it took from the graph to callable code.
        macs: multiply-adds per row and step.
        loop_macs: those of them that depend on the step before.
        output_sizes: features of each output that has a row for every step and row of the batch.
        short, long: run the kernel on one thread; the argument is the address of an :class:`ArgumentBlock`. Only
            ``long`` lets other Python threads run meanwhile: to take the GIL again can cost more than a short call.
        team: the address of ``@team``, which each thread of a team runs.
    """

    source: Graph
    plan: Plan
    emitted: Emitted
    loaded: Loaded
    seconds: float
    macs: int
    output_sizes: dict[str, int]
    slots: Slots
    itemsize: int
    short: Callable[[int], None]
    long: Callable[[int], None]
    team: int
    loop_macs: int

    def block(self) -> ArgumentBlock:
        """Return the argument block of a new call, with nothing bound yet."""
        return ArgumentBlock(self.slots)

    def chunk(self, steps: int, rows: int) -> int:
        """Return the steps of a chunk: as many as fit L2, but enough rows to be worth reading the weights for.

        A chunk's buffers are written by one stage and read by the next, so they should stay in L2. Weights that are
        larger than L2 come from L3 for every chunk anew, which only pays with many rows to multiply by them.
        """
        size, rows, sizes = self.emitted.scratch, max(rows, 1), tuning.TUNING
        step_bytes = max(size.per_chunk_row * rows, 1)
        if step_bytes * steps <= min(size.fixed, sizes.only_chunk_bytes):
            return max(1, steps)
        least = 1
        if size.fixed > sizes.large_panels_bytes:
            sum_rows = sizes.sum_rows if l2_bytes() >= sizes.large_l2_bytes else sizes.sum_rows_small_l2
            least = ceil_div(sum_rows if self.slots.sums else sizes.panel_rows, rows)
        return max(1, min(steps, max(least, sizes.chunk_bytes // step_bytes)))

    def scratch_bytes(self, steps: int, rows: int, threads: int = 1) -> int:
        """Return the bytes of scratch memory that a call needs, with room to align it."""
        return align_up(self.emitted.scratch.bytes(rows, self.chunk(steps, rows), threads)) + ALIGNMENT

    def set_sizes(
        self, block: ArgumentBlock, steps: int, rows: int, reverse: bool, scratch: int, chunk: int | None = None
    ) -> int:
        """Write the sizes of a call and the address of its scratch memory; return the steps of a chunk."""
        chunk, slots, values = chunk or self.chunk(steps, rows), self.slots, block.values
        values[slots.steps], values[slots.rows], values[slots.reverse] = steps, rows, reverse
        values[slots.chunk_steps], values[slots.scratch] = chunk, align_up(scratch)
        return chunk


def compile_graph(
    graph: Graph,
    *,
    backward: bool = False,
    about: str = "",
    code_bytes: int | None = None,
    target: Target | None = None,
) -> Kernel:
    """Check, optimise, schedule, emit and load a graph.

    Arguments:
        backward: whether it is the graph of a gradient.
        about: what is compiled, for the headlines of ``FUSECELL_DEBUG``.
        code_bytes: the limit of the size of its LLVM text.
        target: a CPU whose code this machine runs; by default its own.

    Raises:
        CompilerError: for a graph that breaks its contract (``ir.contract``), or whose text is longer.
        ValueError: if ``FUSECELL_DEBUG`` names an unknown stage.
    """
    shown = debug_stages()
    began = time.perf_counter()
    check_graph(graph, "gradient" if backward else "step")
    target = target or host_target()
    schedule = plan(optimise(graph)[-1][1], backward=backward)
    emitted = emit(schedule, target)
    if code_bytes is not None and len(emitted.text) > code_bytes:
        raise CompilerError(f"a step's code has {len(emitted.text):,} bytes, more than the {code_bytes:,} it may have")
    slots = Slots(schedule, emitted)
    loaded = load(emitted.text, ["run", "team"], target)
    address = loaded.address("run")
    kernel = Kernel(
        source=graph,
        plan=schedule,
        emitted=emitted,
        loaded=loaded,
        seconds=time.perf_counter() - began,
        macs=_macs(schedule),
        output_sizes={label: graph[graph.outputs[label]].size for label in slots.outputs},
        slots=slots,
        itemsize=graph.dtype.itemsize,
        # PYFUNCTYPE holds the GIL during the call, CFUNCTYPE releases it.
        short=ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(address),
        long=ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address),
        team=loaded.address("team"),
        loop_macs=sum(
            _macs_of(schedule.graph, index) for stage in schedule.stages_of("loop") for index in stage.computed()
        ),
    )
    print_stages(kernel, about, shown)
    return kernel


def _macs(schedule: Plan) -> int:
    """Count the multiply-adds per row and step."""
    graph = schedule.graph
    outer = sum(each.height * each.width for each in schedule.sums if each.a is not None and each.nest is None)
    return outer + sum(_macs_of(graph, index) for index, _ in graph)


def _macs_of(graph: Graph, index: int) -> int:
    """Count the multiply-adds of the products or the contraction of one node per row; other nodes have none."""
    node = graph[index]
    if node.op in ("contract", "contract_sum"):
        return math.prod((*node.attrs["shape"], *node.attrs["count"]))
    if node.op != "affine":
        return 0
    terms: Any = node.attrs["terms"]
    return sum((term["rows"][1] - term["rows"][0]) * node.size for term in terms)
