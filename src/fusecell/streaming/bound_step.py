"""One cell of a stream bound to its memory: kernel, packed weights, state and buffers. Nothing here needs torch."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusecell.compiler.backend import tuning
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.runtime import guard_pages
from fusecell.compiler.runtime.guarded_extents import extents
from fusecell.compiler.runtime.kernel import Kernel

__all__ = ["MOST_STEPS", "Array", "BoundStep", "Part"]

Array = np.ndarray[Any, Any]

MOST_STEPS = 64
"""The most steps of one kernel call in ``push``; scratch memory is allocated for these."""


@dataclass(frozen=True)
class Part:
    """A compiled cell with its weights and initial states, as streams build it or load it.

    Arguments:
        kind: the name of the cell's class.
        graph: the graph of one step.
        kernel: the kernel compiled from it.
        weights: in the order of the graph's weight leaves.
        start: the initial states, (rows, size) each.
    """

    kind: str
    graph: Graph
    kernel: Kernel
    weights: Sequence[Array]
    start: Sequence[Array]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32 if self.graph.dtype == "f32" else np.float64)

    @functools.cached_property
    def input_size(self) -> int:
        (leaf,) = self.graph.leaves("input")
        return self.graph[leaf].size

    @functools.cached_property
    def output_size(self) -> int:
        return self.kernel.output_sizes["output"]


@dataclass(frozen=True, slots=True)
class _View:
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
        source: (rows, input_size), the buffer of its input: the output of the cell below.
    """

    def __init__(self, part: Part, source: Array) -> None:
        kernel = part.kernel
        self.part, self._kernel, self._rows = part, kernel, source.shape[0]
        self.start = part.start
        self.state = [value.copy() for value in part.start]
        self.input, self.output = source, np.zeros((self._rows, part.output_size), part.dtype)
        block, words = kernel.block(), kernel.words
        kernel.give_matrices(block, words.weights.values(), map(_View, part.weights))
        states = [_View(value) for value in self.state]
        kernel.give_states(block, words.first, states)
        kernel.give_states(block, words.last, states)
        self._give(block, self.input[None], self.output[None])
        chunk = kernel.chunk(MOST_STEPS, self._rows)
        self._scratch = np.empty(kernel.emitted.scratch.bytes(self._rows, chunk) + 64, np.uint8)
        kernel.fill(block, 1, self._rows, False, self._scratch.ctypes.data, chunk)
        self._block: array[int] = block
        self.address = block.buffer_info()[0]
        self.run = kernel.short if kernel.macs * self._rows < tuning.TUNING.short_step_macs else kernel.long
        self._run_chunk = kernel.long
        if guard_pages.ENABLED:  # in scratch memory of its own each time, so that every run packs for itself
            self.run = self._run_chunk = self._run_checked
            return
        # The first run packs the weights for all others, and runs a step as well: its effect on the state is undone.
        block[words.positions["packed"]] = 2
        kernel.short(self.address)
        block[words.positions["packed"]] = 1
        for value, first in zip(self.state, self.start, strict=True):
            value[...] = first

    def _run_checked(self, address: int) -> None:
        """Run over the block at an address on guarded copies of all that it points to."""
        kernel, block = self._kernel, self._kernel.block()
        ctypes.memmove(block.buffer_info()[0], address, 8 * len(block))
        steps, _, _, chunk, _ = [block[place] for place in kernel.words.sizes]
        guard_pages.checked_run(
            kernel.long, block, kernel.emitted, extents(kernel, block, steps, self._rows), kernel.words.positions,
            rows=self._rows, chunk=chunk,
        )  # fmt: skip

    def _give(self, block: array[int], x: Array, y: Array) -> None:
        """Bind the arrays of inputs and outputs, (T, N, size), in an argument block."""
        words = self._kernel.words
        self._kernel.give_sequences(block, words.inputs.values(), [_View(x)] * len(words.inputs))
        self._kernel.give_sequences(block, words.outputs.values(), [_View(y)])

    def run_some(self, order: Array, count: Array) -> None:
        """Run one step of the first ``count`` rows in ``order``; both are int64 arrays, (rows,) and (1,)."""
        # In a copy of the block: the usual step finds its own unchanged.
        block, offsets = self._block[:], np.zeros(1, np.int64)
        self._kernel.give_ragged(block, _View(order), _View(count), _View(offsets))
        self.run(block.buffer_info()[0])

    def run_chunk(self, x: Array) -> Array:
        """Run several steps, at most ``MOST_STEPS``: (T, rows, input_size) to (T, rows, output_size)."""
        y = np.empty((x.shape[0], *self.output.shape), x.dtype)
        block = self._block[:]
        self._give(block, x, y)
        block[self._kernel.words.sizes[0]] = x.shape[0]
        self._run_chunk(block.buffer_info()[0])
        return y
