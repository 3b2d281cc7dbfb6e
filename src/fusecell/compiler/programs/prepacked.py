"""Run a kernel whose weights stay the same: packed at the first call for so many rows, for all later ones."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fusecell.cell import Cell
from fusecell.compiler.ir.sizes import ALIGNMENT, align_up
from fusecell.compiler.programs.inference import run_all
from fusecell.compiler.programs.launch import PreparedCall, RaggedRows, run, start
from fusecell.compiler.programs.team_size import team_size
from fusecell.compiler.runtime import guard_pages
from fusecell.compiler.runtime.argument_block import ArgumentBlock
from fusecell.compiler.runtime.kernel import Kernel
from fusecell.execution.options import Options, State
from fusecell.forks import new_lock
from fusecell.shapes import Shape

__all__ = ["KernelCell", "PrepackedCall", "PrepackedKernel"]

_MOST_SIZES = 4
"""Numbers of rows for which packed weights are kept at a time."""
_MOST_STEPS = 1 << 20
"""More than any chunk has; the steps of a call are not limited by it."""


class KernelCell(Cell):  # no ABC: every call asks isinstance, which takes four times as long of one
    """A cell that comes with a kernel of its own, which runs its calls without gradients."""

    def prepacked(self) -> PrepackedKernel:
        """Return its kernel, which another one takes the place of when the cell's weights have changed."""
        raise NotImplementedError

    def starts_from_zeros(self) -> bool:
        """Whether all of its first states are zeros."""
        raise NotImplementedError

    def run_kernel(self, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
        """Run over (T, N, ...) inputs; see :func:`fusecell.eager.run_eager`."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Memory:
    """Scratch memory for so many rows on so many threads, which keeps the packed weights, and the steps of a chunk."""

    scratch: np.ndarray
    address: int
    chunk: int

    @classmethod
    def of(cls, kernel: Kernel, rows: int, threads: int) -> _Memory:
        """Allocate it; for calls of any number of steps."""
        chunk = kernel.chunk(_MOST_STEPS, rows)
        scratch = np.empty(kernel.scratch.bytes(rows, chunk, threads) + ALIGNMENT, np.uint8)
        return cls(scratch, align_up(scratch.ctypes.data), chunk)


class PrepackedKernel:
    """A kernel, and the weights that it packs.

    Calls of several Python threads run one after the other, as they share memory.

    Arguments:
        weights: returns them, in the order of the graph's weight leaves; asked at the first call for a number of rows,
            so that nothing has to keep those that are only packed.
        only_packed: of each, whether the kernel reads it but to pack it.

    Attributes:
        packed_weights: for calls that find their weights packed: in the place of those that are only packed tensors of
            the same shapes.
    """

    def __init__(self, kernel: Kernel, weights: Callable[[], State], only_packed: Sequence[bool]) -> None:
        self.kernel, self._weights = kernel, weights
        self.packed_weights = tuple(
            [_unread(value) if is_packed else value for value, is_packed in zip(weights(), only_packed, strict=True)]
        )
        self._memory: OrderedDict[tuple[int, int], _Memory] = OrderedDict()
        self._lock = new_lock()

    def __call__(
        self, inputs: State, state: State, reset: State, options: Options, shapes: Mapping[str, Shape]
    ) -> tuple[Tensor, State]:
        """Run over (T, N, ...) inputs; arguments and results as of :func:`run_forward`."""
        with self._lock:
            outputs, after = run_all(self.kernel, self.packed_weights, inputs, state, reset, options, shapes, self._run)
        return outputs["output"], after

    def _run(
        self, kernel: Kernel, block: ArgumentBlock, steps: int, rows: int, reverse: bool, ragged: RaggedRows | None
    ) -> None:
        """Run the kernel with all its tensors bound, in memory that has the packed weights, or will have them."""
        if guard_pages.ENABLED:  # which gives every run scratch memory of its own
            weights = self._weights()  # which nothing else keeps until the kernel has read them
            block.bind(weights=weights)
            run(kernel, block, steps, rows, reverse, ragged)
            del weights
            return
        if ragged is not None:
            block.bind(ragged=(ragged.order, ragged.counts, ragged.offsets))
        kernel.set_sizes(block, steps, rows, reverse, 0)
        self._launch(block.values, steps, rows)

    def launch(self, values: array[int], steps: int, rows: int) -> None:
        """Run the kernel with an argument block that has all but the addresses of what is packed."""
        with self._lock:
            self._launch(values, steps, rows)

    def _launch(self, values: array[int], steps: int, rows: int) -> None:
        kernel = self.kernel
        threads = team_size(kernel, steps, rows)
        memory = self._memory.get((rows, threads))
        slots, is_packed = kernel.slots, memory is not None
        weights: State = ()
        if memory is None:
            memory = _Memory.of(kernel, rows, threads)
            weights = self._weights()  # which nothing else keeps until the kernel has packed them
            block = ArgumentBlock(slots, values)
            block.bind(weights=weights)
        values[slots.scratch], values[slots.chunk_steps] = memory.address, memory.chunk
        values[slots.packed] = 1 if is_packed else 2
        start(kernel, steps, rows, threads, values.buffer_info()[0])
        del weights
        if not is_packed:
            self._memory[rows, threads] = memory
            if len(self._memory) > _MOST_SIZES:
                self._memory.popitem(last=False)


def _unread(value: Tensor) -> Tensor:
    """Return a tensor of the shape of another, one row of memory long."""
    return value.new_empty(value.shape[-1:]).expand(value.shape)


class PrepackedCall(PreparedCall):
    """A prepared call of a kernel whose weights are packed."""

    def __init__(self, owner: PrepackedKernel, *args: Any) -> None:
        super().__init__(*args)
        self._owner = owner
        # Results that nobody reads.
        self._waste = np.empty(self._unread_size + ALIGNMENT, np.uint8)

    def run(self, values: array[int]) -> None:
        """Run the kernel with arguments that have the addresses of all of the caller's tensors."""
        address = align_up(self._waste.ctypes.data)
        for slot, offset in self._unread:
            values[slot] = address + offset
        self._owner.launch(values, self._steps, self._rows)
