"""Calls of a kernel from torch: scratch memory, rows of different lengths, threads."""

from __future__ import annotations

import threading
from array import array
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusecell.compiler import check
from fusecell.compiler.emit import ROWS_EACH
from fusecell.compiler.extents import extents
from fusecell.compiler.kernel import Kernel
from fusecell.compiler.threads import crew_waits, run_crew

__all__ = ["RaggedRows", "run"]

# Below this many multiply-adds a kernel keeps the GIL: letting it go may cost more than the kernel.
SHORT_CALL = 1_000_000
# Multiply-adds that are worth waking a crew for, and those of a step's loop, with the bytes of its weights, that are
# worth that it meets in every step: some two microseconds.
CREW_CALL = 3_000_000
CREW_STEP, CREW_STEP_BYTES = 160_000, 280_000
# Scratch memory of a thread is never less than the first, and beyond the second it isn't kept between calls. From the
# third NumPy asks for huge pages, whose first touch costs a fraction.
SMALL_SCRATCH, LARGE_SCRATCH, HUGE_SCRATCH = 1 << 16, 1 << 26, 1 << 22


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
    scratch = _scratch(kernel.scratch_bytes(steps, rows))
    chunk = kernel.fill(block, steps, rows, reverse, scratch.data_ptr())
    threads = crew_size(kernel, steps, rows)
    if check.ENABLED:
        theirs, position = extents(kernel, block, steps, rows), kernel.words.positions
        check.checked_run(
            lambda address: start(kernel, address, steps, rows, threads),
            block, kernel.emitted, theirs, position, rows=rows, chunk=chunk,
        )  # fmt: skip
    else:
        start(kernel, block.buffer_info()[0], steps, rows, threads)


def start(kernel: Kernel, address: int, steps: int, rows: int, threads: int) -> None:
    """Run a kernel over the block at an address."""
    if threads > 1:
        run_crew(kernel.crew, address, threads)
    elif kernel.macs * steps * rows < SHORT_CALL:
        kernel.short(address)
    else:
        kernel.long(address)


def crew_size(kernel: Kernel, steps: int, rows: int) -> int:
    """How many threads a call is worth."""
    if kernel.macs * steps * rows < CREW_CALL:
        return 1
    threads = torch.get_num_threads()
    if threads == 1:
        return 1
    if rows < ROWS_EACH * threads:
        bytes_ = kernel.loop_macs * kernel.itemsize
        if rows * kernel.loop_macs < CREW_STEP and bytes_ < CREW_STEP_BYTES:
            return 1
    return 1 if crew_waits() else threads


def _scratch(size: int) -> Tensor:
    """Memory for one call: a thread's own, kept for its next call unless it is large."""
    kept: Tensor | None = getattr(_memory, "scratch", None)
    if kept is None or kept.shape[0] < size:
        if size < HUGE_SCRATCH:
            kept = torch.empty(max(size, SMALL_SCRATCH), dtype=torch.uint8, device="cpu")
        else:
            kept = torch.from_numpy(np.empty(size, np.uint8))
        if size <= LARGE_SCRATCH:
            _memory.scratch = kept
    return kept


_memory = threading.local()
