"""Calls of a kernel from torch: scratch memory, rows of different lengths, threads."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusecell.compiler.backend import tuning
from fusecell.compiler.codegen import MIN_ROWS_PER_THREAD
from fusecell.compiler.ir.sizes import ALIGNMENT, align_up
from fusecell.compiler.runtime import guard_pages as guard_pages
from fusecell.compiler.runtime.guarded_extents import extents
from fusecell.compiler.runtime.kernel import Kernel
from fusecell.compiler.runtime.thread_team import backs_off, run_team

__all__ = ["RaggedRows", "PreparedCall", "run"]


@dataclass(frozen=True)
class RaggedRows:
    """Rows of different lengths, longest first: their order, how many take part in each step, and in all before it."""

    order: Tensor
    counts: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, lengths: Tensor, steps: int) -> RaggedRows:
        """The rows of a call, from their lengths."""
        longest, order = torch.sort(lengths, descending=True, stable=True)
        counts = (longest > torch.arange(steps, device=longest.device)[:, None]).sum(1)
        return cls(order, counts, torch.cumsum(counts, 0) - counts)

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.order.shape[0]

    @property
    def all_rows(self) -> int:
        """The rows of all steps together."""
        return int(self.counts.sum())


def run(
    kernel: Kernel, block: array[int], steps: int, rows: int, reverse: bool, ragged: RaggedRows | None = None
) -> None:
    """Run a kernel over a filled block, on as many threads as torch would take and the call is worth.

    Arguments:
        ragged: the rows' lengths, where they differ.
    """
    if ragged is not None:
        kernel.give_ragged(block, ragged.order, ragged.counts, ragged.offsets)
    threads = crew_size(kernel, steps, rows)
    scratch = _scratch(kernel.scratch_bytes(steps, rows, threads))
    chunk = kernel.fill(block, steps, rows, reverse, scratch.data_ptr())
    if guard_pages.ENABLED:
        theirs, position = extents(kernel, block, steps, rows), kernel.words.positions
        guard_pages.checked_run(
            lambda address: start(kernel, address, steps, rows, threads),
            block, kernel.emitted, theirs, position, rows=rows, chunk=chunk,
        )  # fmt: skip
    else:
        start(kernel, block.buffer_info()[0], steps, rows, threads)


def start(kernel: Kernel, address: int, steps: int, rows: int, threads: int) -> None:
    """Run a kernel over the block at an address."""
    if threads > 1:
        run_team(kernel.team, address, threads, _microseconds(kernel, rows) * steps)
    elif kernel.macs * steps * rows < tuning.TUNING.short_call_macs:
        kernel.short(address)
    else:
        kernel.long(address)


def wants_crew(kernel: Kernel, steps: int, rows: int) -> bool:
    """Whether a call is worth more than one thread, if there are any."""
    return _microseconds(kernel, rows) * steps >= tuning.TUNING.team_call_us


def crew_size(kernel: Kernel, steps: int, rows: int) -> int:
    """How many threads a call is worth, of those that torch would take."""
    threads = torch.get_num_threads() if wants_crew(kernel, steps, rows) else 1
    if threads == 1 or backs_off():
        return 1
    if rows < MIN_ROWS_PER_THREAD * threads and _microseconds(kernel, rows) < tuning.TUNING.team_step_us:
        return 1
    return threads


def _microseconds(kernel: Kernel, rows: int) -> float:
    """What a step takes on one thread, about: its weights are read, or its rows multiplied, whichever takes longer."""
    item, rates = kernel.itemsize, tuning.TUNING
    macs_per_us = 4 * rates.macs_per_us  # times the bytes of a number: of float64 half as many
    loop = max(kernel.loop_macs * item / rates.bytes_per_us, rows * kernel.loop_macs * item / macs_per_us)
    return loop + rows * (kernel.macs - kernel.loop_macs) * item / macs_per_us


class PreparedCall:
    """A kernel for calls of one size, its block filled but for addresses.

    Arguments:
        block: filled with the strides of what calls will give.
        unread: words of results that nobody wants, with their bytes.
    """

    def __init__(
        self,
        kernel: Kernel,
        block: array[int],
        steps: int,
        rows: int,
        reverse: bool,
        unread: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.kernel, self._call = kernel, (steps, rows, reverse)
        kernel.fill(block, steps, rows, reverse, 0)
        self._block, self._place = block, kernel.words.sizes[4]
        self._alone = kernel.short if kernel.macs * steps * rows < tuning.TUNING.short_call_macs else kernel.long
        self._wants_crew = wants_crew(kernel, steps, rows)
        self._unread, here = [], 0
        for place, size in unread:
            self._unread.append((place, here))
            here += align_up(size)
        self._before, self._size = here, here + kernel.scratch_bytes(steps, rows)
        self._per_helper = kernel.emitted.scratch.per_helper

    def block(self) -> array[int]:
        """A block for one call."""
        return self._block[:]

    def run(self, block: array[int]) -> None:
        """Run the kernel over a block that has all addresses of the caller's tensors."""
        steps, rows, _ = self._call
        threads = crew_size(self.kernel, steps, rows) if self._wants_crew else 1
        size = self._size + (threads - 1) * self._per_helper
        scratch, kept = _memory.address, None
        if size > _memory.size:
            kept = _scratch(size)
            scratch = _aligned(kept)
        for place, offset in self._unread:
            block[place] = scratch + offset
        if guard_pages.ENABLED:
            run(self.kernel, block, *self._call)
            return
        block[self._place] = scratch + self._before
        if threads == 1:
            self._alone(block.buffer_info()[0])
        else:
            start(self.kernel, block.buffer_info()[0], steps, rows, threads)
        del kept


def _scratch(size: int) -> Tensor:
    """Memory for one call, so many bytes from a multiple of 64 on: a thread's own, kept for the next unless large."""
    kept = _memory.scratch
    if kept is None or _memory.size < size:
        sizes = tuning.TUNING
        size = max(size, sizes.small_scratch_bytes)
        if size < sizes.huge_scratch_bytes:
            kept = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
        else:
            kept = torch.from_numpy(np.empty(size + ALIGNMENT, np.uint8))
        if size <= sizes.large_scratch_bytes:
            _memory.scratch, _memory.address, _memory.size = kept, _aligned(kept), size
    return kept


def _aligned(memory: Tensor) -> int:
    """The first address in it that a kernel may be given."""
    return align_up(memory.data_ptr())


class _Memory(threading.local):
    """A thread's scratch memory, with the first address in it that a kernel may be given, and its size."""

    scratch: Tensor | None = None
    address = size = 0


_memory = _Memory()
