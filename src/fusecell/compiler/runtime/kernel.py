"""Kernels: compile a graph to machine code.

Nothing here needs torch: a stream that was saved runs kernels on NumPy's memory.
"""

from __future__ import annotations

import ctypes
import math
import time
from dataclasses import dataclass
from typing import Any

from fusecell.compiler.backend.jit import Loaded, load
from fusecell.compiler.backend.target import Target, host_target
from fusecell.compiler.codegen import Emitted, emit
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.ir.graph_contract import check_graph
from fusecell.compiler.runtime.argument_block import Slots
from fusecell.compiler.runtime.debug_output import debug_stages, print_stages
from fusecell.compiler.runtime.kernel_calls import KernelCalls
from fusecell.compiler.schedule.plan import Plan
from fusecell.compiler.schedule.scheduler import plan
from fusecell.compiler.transforms.passes import optimise
from fusecell.errors import CompilerError

__all__ = ["Kernel", "compile_graph", "multiply_adds", "schedule"]


@dataclass(frozen=True, kw_only=True)
class Kernel(KernelCalls):
    """Machine code for one graph; any number of steps and rows.

    Arguments:
        source: the graph before any pass.
        seconds: the time it took from the graph to callable code.
        loop_macs: the multiply-adds per row and step that depend on the step before.
        team: the address of ``@team``, which each thread of a team runs.
    """

    source: Graph
    plan: Plan
    emitted: Emitted
    loaded: Loaded
    seconds: float
    itemsize: int
    team: int
    loop_macs: int


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
    planned = schedule(graph, backward=backward, pairs=target.pair_dot is not None)
    emitted = emit(planned, target, share=True)
    if code_bytes is not None and len(emitted.text) > code_bytes:
        raise CompilerError(f"a step's code has {len(emitted.text):,} bytes, more than the {code_bytes:,} it may have")
    slots = Slots.of_kernel(planned, emitted)
    loaded = load(emitted.text, ["run", "team"], target)
    address = loaded.address("run")
    kernel = Kernel(
        source=graph,
        plan=planned,
        emitted=emitted,
        scratch=emitted.scratch,
        loaded=loaded,
        seconds=time.perf_counter() - began,
        macs=multiply_adds(planned),
        output_sizes={label: graph[graph.outputs[label]].size for label in slots.outputs},
        slots=slots,
        itemsize=graph.dtype.itemsize,
        # PYFUNCTYPE holds the GIL during the call, CFUNCTYPE releases it.
        short=ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(address),
        long=ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address),
        team=loaded.address("team"),
        loop_macs=sum(
            _macs_of(planned.graph, index) for stage in planned.stages_of("loop") for index in stage.computed()
        ),
    )
    print_stages(kernel, about, shown)
    return kernel


def schedule(graph: Graph, *, backward: bool = False, pairs: bool = False) -> Plan:
    """Optimise a graph and order its computation.

    Arguments:
        backward: whether it is the graph of a gradient.
        pairs: whether it is for a CPU that multiplies pairs of bfloat16 numbers.
    """
    return plan(optimise(graph, pairs=pairs)[-1][1], backward=backward)


def multiply_adds(planned: Plan) -> int:
    """Count the multiply-adds per row and step."""
    graph = planned.graph
    outer = sum(each.height * each.width for each in planned.distinct_sums if each.a is not None and each.nest is None)
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
