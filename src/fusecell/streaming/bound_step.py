"""One cell of a stream bound to its memory: kernel, packed weights, state and buffers. Nothing here needs torch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusecell.compiler.backend import tuning
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.ir.sizes import ALIGNMENT, SLOT_BYTES
from fusecell.compiler.runtime import guard_pages
from fusecell.compiler.runtime.argument_block import ArgumentBlock
from fusecell.compiler.runtime.kernel_calls import KernelCalls
from fusecell.streaming.row_layout import RowLayout, is_one_shape

if TYPE_CHECKING:
    from fusecell.compiler.schedule.plan import Plan

__all__ = ["MOST_STEPS", "Array", "BoundStep", "Part", "RowShapes", "View"]

Array = np.ndarray[Any, Any]

MOST_STEPS = 64
"""The most steps of one kernel call in ``push``; scratch memory is allocated for these."""


class RowShapes(NamedTuple):
    """The shapes of a row of a cell's input, of its output and of each of its states.

    Several inputs are a tuple of shapes, several outputs a tuple or a dict.
    """

    input: RowLayout
    output: RowLayout
    states: tuple[tuple[int, ...], ...]

    @property
    def is_flat(self) -> bool:
        """Whether each is one tensor of one dimension, its features."""
        are_one = is_one_shape(self.input) and is_one_shape(self.output)
        return are_one and all(len(shape) == 1 for shape in (self.input, self.output, *self.states))


@dataclass(frozen=True)
class Part:
    """A compiled cell with its weights and initial states, as streams build it or load it.

    Arguments:
        kind: the name of the cell's class.
        graph: the graph of one step.
        kernel: the kernel compiled from it, in this process or when the stream was saved.
        weights: in the order of the graph's weight leaves.
        start: the initial states, (rows, size) each.
        shapes: of a row of the input, the output and each state, as users see them; flat if left out. A kernel has
            several inputs, or outputs, side by side in a row.
    """

    kind: str
    graph: Graph
    kernel: KernelCalls
    weights: Sequence[Array]
    start: Sequence[Array]
    shapes: RowShapes | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32 if self.graph.dtype == "f32" else np.float64)

    @functools.cached_property
    def input_size(self) -> int:
        return sum(self.graph[leaf].size for leaf in self.graph.leaves("input"))

    @property
    def input_ranges(self) -> dict[str, tuple[int, int]]:
        """The first feature of each input, by its name in the graph, in a row of all, and the one behind its last."""
        leaves = [self.graph[leaf] for leaf in self.graph.leaves("input")]
        ends = accumulate([leaf.size for leaf in leaves], initial=0)
        return {leaf.name: span for leaf, span in zip(leaves, pairwise(ends), strict=True)}

    @functools.cached_property
    def output_size(self) -> int:
        return self.kernel.output_sizes["output"]

    @functools.cached_property
    def plan(self) -> Plan:
        """The schedule of the graph; made anew where the kernel came from a file."""
        # The compiler, and llvmlite with it, is imported on use: to run a step needs neither.
        from fusecell.compiler.runtime.kernel import Kernel, schedule

        return self.kernel.plan if isinstance(self.kernel, Kernel) else schedule(self.graph)

    @property
    def row_shapes(self) -> RowShapes:
        """The shapes of a row, as users see them."""
        if self.shapes is not None:
            return self.shapes
        inputs = tuple([(self.graph[leaf].size,) for leaf in self.graph.leaves("input")])
        states = tuple([value.shape[1:] for value in self.start])
        return RowShapes(inputs if len(inputs) > 1 else inputs[0], (self.output_size,), states)


@dataclass(frozen=True, slots=True)
class View:
    """A NumPy array with those methods of a tensor that a kernel calls."""

    value: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def stride(self) -> tuple[int, ...]:
        return tuple(stride // self.value.itemsize for stride in self.value.strides)

    def data_ptr(self) -> int:
        return self.value.ctypes.data

    def is_neg(self) -> bool:
        return False


class BoundStep:
    """A step bound to its buffers: ``run(address)`` reads ``input``, updates ``state`` and writes ``output``.

    Arguments:
        part: the compiled cell.
        source: (rows, input_size), the buffer of its inputs, side by side: the output of the cell below.
    """

    def __init__(self, part: Part, source: Array) -> None:
        kernel = part.kernel
        self.part, self._rows = part, source.shape[0]
        self.start = part.start
        self.state = [value.copy() for value in part.start]
        # The same memory in the users' shapes.
        rows = [(self._rows, *shape) for shape in part.row_shapes.states]
        self.shaped_state = [value.reshape(shape) for value, shape in zip(self.state, rows, strict=True)]
        self.input, self.output = source, np.zeros((self._rows, part.output_size), part.dtype)
        states = [View(value) for value in self.state]
        self._block = block = kernel.block()
        # The kernel has read a row's state before it writes it, so one buffer serves for both.
        block.bind(weights=map(View, part.weights), first=states, last=states)
        self._bind(block, self.input[None], self.output[None])
        chunk = kernel.chunk(MOST_STEPS, self._rows)
        self._scratch = np.empty(kernel.scratch.bytes(self._rows, chunk) + ALIGNMENT, np.uint8)
        kernel.set_sizes(block, 1, self._rows, False, self._scratch.ctypes.data, chunk)
        self.address = block.address
        self.run = kernel.short if kernel.macs * self._rows < tuning.TUNING.short_step_macs else kernel.long
        self._run_chunk = kernel.long
        if guard_pages.ENABLED:  # in scratch memory of its own each time, so that every run packs for itself
            self.run = self._run_chunk = self._run_checked
            return
        # The first run packs the weights for all others, and runs a step as well: its effect on the state is undone.
        packed = kernel.slots.packed
        block.values[packed] = 2
        kernel.short(self.address)
        block.values[packed] = 1
        for value, first in zip(self.state, self.start, strict=True):
            value[...] = first

    def _run_checked(self, address: int) -> None:
        """Run with the arguments at an address, on guarded copies of all that they point to."""
        from fusecell.compiler.runtime.guard_page_extents import run_guarded
        from fusecell.compiler.runtime.kernel import Kernel

        kernel = self.part.kernel
        assert isinstance(kernel, Kernel)  # in the check mode, a file's machine code isn't used
        block = kernel.block()
        ctypes.memmove(block.address, address, SLOT_BYTES * len(block.values))
        run_guarded(kernel, block.values, kernel.long)

    def _bind(self, block: ArgumentBlock, x: Array, y: Array) -> None:
        """Bind the arrays of inputs and outputs, (T, N, size)."""
        inputs = [View(x[:, :, first:last]) for first, last in self.part.input_ranges.values()]
        block.bind(inputs=inputs, outputs=[View(y)])

    def run_some(self, order: Array, count: Array) -> None:
        """Run one step of the first ``count`` rows in ``order``; both are int64 arrays, (rows,) and (1,)."""
        # In a copy of the block: the usual step finds its own unchanged.
        block, offsets = self._block.copy(), np.zeros(1, np.int64)
        block.bind(ragged=(View(order), View(count), View(offsets)))
        self.run(block.address)

    def run_chunk(self, x: Array) -> Array:
        """Run several steps, at most ``MOST_STEPS``: (T, rows, input_size) to (T, rows, output_size)."""
        y = np.empty((x.shape[0], *self.output.shape), x.dtype)
        block = self._block.copy()
        self._bind(block, x, y)
        block.values[block.slots.steps] = x.shape[0]
        self._run_chunk(block.address)
        return y
