"""One cell of a stream: its kernel, its weights packed in place, its state. Nothing here needs torch."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusecell.compiler.backend import tuning
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.runtime.kernel import Kernel

__all__ = ["MOST_STEPS", "Array", "Link", "Part"]

Array = np.ndarray[Any, Any]

MOST_STEPS = 64
"""Steps of a chunk that is pushed; more go chunk by chunk."""


@dataclass(frozen=True)
class Part:
    """What a link is made of.

    Arguments:
        kind: the name of the cell's class.
        graph: of one step.
        kernel: compiled from it.
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
    """NumPy's memory as a kernel takes it."""

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


class Link:
    """A part that runs: ``input`` is read and ``output`` written by each :meth:`run`.

    Arguments:
        part: what it is made of.
        source: (rows, input_size), where its input will stand: the output of the link below.
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
        # The first run packs for all others; the state that it moves on is put back.
        block[words.positions["packed"]] = 2
        kernel.short(self.address)
        block[words.positions["packed"]] = 1
        for value, first in zip(self.state, self.start, strict=True):
            value[...] = first
        self.run = kernel.short if kernel.macs * self._rows < tuning.TUNING.short_step_macs else kernel.long

    def _give(self, block: array[int], x: Array, y: Array) -> None:
        """Inputs and outputs, (T, N, size)."""
        words = self._kernel.words
        self._kernel.give_sequences(block, words.inputs.values(), [_View(x)] * len(words.inputs))
        self._kernel.give_sequences(block, words.outputs.values(), [_View(y)])

    def run_some(self, order: Array, count: Array) -> None:
        """A step of the first ``count`` rows of an order."""
        block, offsets = self._block[:], np.zeros(1, np.int64)
        self._kernel.give_ragged(block, _View(order), _View(count), _View(offsets))
        self.run(block.buffer_info()[0])

    def run_chunk(self, x: Array) -> Array:
        """Several steps."""
        y = np.empty((x.shape[0], *self.output.shape), x.dtype)
        block = self._block[:]
        self._give(block, x, y)
        block[self._kernel.words.sizes[0]] = x.shape[0]
        self._kernel.long(block.buffer_info()[0])
        return y
