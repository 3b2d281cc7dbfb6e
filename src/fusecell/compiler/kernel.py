"""A kernel: machine code for one graph, and the block of words that it is called with."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusecell.compiler.emit import Emitted, emit
from fusecell.compiler.graph import SAVED, Graph
from fusecell.compiler.machine import Loaded, load
from fusecell.compiler.passes import optimise
from fusecell.compiler.schedule import Plan, plan
from fusecell.compiler.target import host_target

__all__ = ["Block", "Kernel", "compile_graph"]

Block = Any
"""A ctypes array of 64-bit words; it belongs to one call, so that kernels can run in many threads at once."""

# What the buffers of a chunk of steps may take, so that lifted values are still in L2 when the loop reads them.
CHUNK_BYTES = 384 * 1024
# Below this many multiply-adds a kernel keeps the GIL: letting it go may cost more than the kernel.
SHORT_CALL = 1_000_000


@dataclass(frozen=True)
class Kernel:
    """Machine code for one graph; any number of steps and rows.

    A call fills a :meth:`block` by name, through :meth:`sequence`, :meth:`rows` and :meth:`matrix`, and runs it.
    """

    plan: Plan
    emitted: Emitted
    loaded: Loaded
    seconds: float
    """How long it took to compile."""
    macs: int
    """Multiply-adds of a row's step."""
    at: dict[str, int]
    """Where each word is in a block."""
    short: Callable[[int], None]
    long: Callable[[int], None]
    words: type[Block]
    inputs: tuple[str, ...]
    """The inputs it reads, but for those saved by the forward."""
    weights: tuple[str, ...]

    def block(self) -> Block:
        """A new block of words, all zero."""
        return self.words()

    def sequence(self, block: Block, name: str, value: Tensor) -> None:
        """Give a (T, N, size) tensor, its features side by side; one of a single step stands for all steps."""
        at, bytes_ = self.at[f"{name}.ptr"], value.element_size()
        step, row, _ = value.stride()
        block[at] = value.data_ptr()
        block[at + 1] = 0 if value.shape[0] == 1 else step * bytes_
        block[at + 2] = row * bytes_

    def rows(self, block: Block, name: str, value: Tensor) -> None:
        """Give a (N, size) tensor, its features side by side."""
        at = self.at[f"{name}.ptr"]
        block[at] = value.data_ptr()
        block[at + 1] = value.stride(0) * value.element_size()

    def matrix(self, block: Block, name: str, value: Tensor) -> None:
        """Give a weight, or the memory for its gradient, with any strides."""
        at, bytes_ = self.at[f"{name}.ptr"], value.element_size()
        block[at] = value.data_ptr()
        for dim, stride in enumerate(value.stride(), 1):
            block[at + dim] = stride * bytes_

    def run(self, block: Block, steps: int, rows: int, *, reverse: bool) -> None:
        """Run over a filled block."""
        chunk, at = self.chunk_steps(steps, rows), self.at
        scratch = torch.empty(self.emitted.scratch.bytes(rows, chunk) + 64, dtype=torch.uint8)
        block[at["steps"]], block[at["rows"]] = steps, rows
        block[at["chunk_steps"]], block[at["reverse"]] = chunk, reverse
        block[at["scratch"]] = -(-scratch.data_ptr() // 64) * 64
        function = self.short if self.macs * steps * rows < SHORT_CALL else self.long
        function(ctypes.addressof(block))

    def chunk_steps(self, steps: int, rows: int) -> int:
        """How many steps are lifted at a time."""
        each = self.emitted.scratch.per_chunk_row * rows
        return max(1, min(steps, CHUNK_BYTES // max(each, 1)))


def compile_graph(graph: Graph, *, backward: bool = False) -> Kernel:
    """Optimise, schedule, emit and load a graph; ``backward`` if it is a gradient's."""
    began = time.perf_counter()
    target = host_target()
    schedule = plan(optimise(graph)[-1][1], backward=backward)
    emitted = emit(schedule, target)
    loaded = load(emitted.text, ["run"], target)
    address = loaded.address("run")
    return Kernel(
        schedule,
        emitted,
        loaded,
        time.perf_counter() - began,
        _macs(schedule),
        {name: index for index, name in enumerate(emitted.words)},
        ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(address),
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address),
        ctypes.c_int64 * len(emitted.words),
        tuple(name for name in _names(schedule, "input") if not name.startswith(SAVED)),
        tuple(_names(schedule, "weight")),
    )


def _names(schedule: Plan, op: str) -> list[str]:
    return [schedule.graph[index].name for index in schedule.graph.leaves(op)]


def _macs(schedule: Plan) -> int:
    """Multiply-adds of a row's step."""
    graph = schedule.graph
    total = sum(found.height * found.width for found in schedule.sums if found.a is not None)
    for _, node in graph:
        if node.op == "affine":
            total += sum((term["rows"][1] - term["rows"][0]) * node.size for term in node.attrs["terms"])
    return total
