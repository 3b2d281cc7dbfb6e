"""Run a kernel whose weights stay the same: packed at the first call for so many rows, for all later ones."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fusecell.cell import Cell
from fusecell.compiler.ir.sizes import ALIGNMENT
from fusecell.compiler.programs.inference import run_all
from fusecell.compiler.programs.launch import RaggedRows, run, start
from fusecell.compiler.programs.team_size import team_size
from fusecell.compiler.runtime import guard_pages
from fusecell.compiler.runtime.argument_block import ArgumentBlock
from fusecell.compiler.runtime.kernel import Kernel
from fusecell.execution.options import Options, State
from fusecell.shapes import Shape

__all__ = ["KernelCell", "PrepackedKernel"]

_MOST_SIZES = 4
"""Numbers of rows for which packed weights are kept at a time."""
_MOST_STEPS = 1 << 20
"""More than any chunk has; the steps of a call are not limited by it."""


class KernelCell(Cell, ABC):
    """A cell that comes with a kernel of its own, which runs its calls without gradients."""

    @abstractmethod
    def run_kernel(self, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
        """Run over (T, N, ...) inputs; see :func:`fusecell.eager.run_eager`."""


@dataclass(frozen=True)
class _Memory:
    """Scratch memory for so many rows on so many threads, which keeps the packed weights, and the steps of a chunk."""

    scratch: np.ndarray
    chunk: int


class PrepackedKernel:
    """A kernel and the weights that it was given.

    Calls of several Python threads run one after the other, as they share memory.

    Arguments:
        weights: in the order of the graph's weight leaves; only read until the first call for a number of rows.
    """

    def __init__(self, kernel: Kernel, weights: State) -> None:
        self._kernel, self._weights = kernel, weights
        self._memory: OrderedDict[tuple[int, int], _Memory] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(
        self, inputs: State, state: State, reset: State, options: Options, shapes: Mapping[str, Shape]
    ) -> tuple[Tensor, State]:
        """Run over (T, N, ...) inputs; arguments and results as of :func:`run_forward`."""
        with self._lock:
            outputs, after = run_all(self._kernel, self._weights, inputs, state, reset, options, shapes, self._run)
        return outputs["output"], after

    def _run(
        self, kernel: Kernel, block: ArgumentBlock, steps: int, rows: int, reverse: bool, ragged: RaggedRows | None
    ) -> None:
        """Run the kernel with all its tensors bound, in memory that has the packed weights, or will have them."""
        if guard_pages.ENABLED:  # which gives every run scratch memory of its own
            run(kernel, block, steps, rows, reverse, ragged)
            return
        if ragged is not None:
            block.bind(ragged=(ragged.order, ragged.counts, ragged.offsets))
        threads = team_size(kernel, steps, rows)
        memory = self._memory.get((rows, threads))
        is_packed = memory is not None
        if memory is None:
            chunk = kernel.chunk(_MOST_STEPS, rows)
            memory = _Memory(np.empty(kernel.scratch.bytes(rows, chunk, threads) + ALIGNMENT, np.uint8), chunk)
        kernel.set_sizes(block, steps, rows, reverse, memory.scratch.ctypes.data, memory.chunk)
        block.values[kernel.slots.packed] = 1 if is_packed else 2
        start(kernel, steps, rows, threads, block.address)
        self._memory[rows, threads] = memory
        self._memory.move_to_end((rows, threads))
        if len(self._memory) > _MOST_SIZES:
            self._memory.popitem(last=False)
