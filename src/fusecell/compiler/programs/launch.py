"""Run a kernel for torch: scratch memory, rows of different lengths, one thread or a team."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusecell.compiler.backend import tuning
from fusecell.compiler.ir.sizes import ALIGNMENT, align_up
from fusecell.compiler.programs.team_size import is_worth_team, step_us, team_size
from fusecell.compiler.runtime import guard_pages
from fusecell.compiler.runtime.argument_block import ArgumentBlock
from fusecell.compiler.runtime.guard_page_extents import run_guarded
from fusecell.compiler.runtime.kernel import Kernel
from fusecell.compiler.runtime.thread_team import backs_off, run_team
from fusecell.compiler.runtime.thread_team import run_each as run_on_team
from fusecell.execution.options import State

__all__ = ["PreparedCall", "RaggedRows", "run", "run_each", "start"]


@dataclass(frozen=True)
class RaggedRows:
    """Rows of different lengths, longest first, so that the rows of each step are a prefix of this order.

    Arguments:
        order: (N,), the row at each place.
        counts: (T,), the rows that take part in each step.
        offsets: (T,), the rows of all steps before each one.
    """

    order: Tensor
    counts: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, lengths: Tensor, steps: int) -> RaggedRows:
        """Sort the rows of a call by their lengths."""
        longest, order = torch.sort(lengths, descending=True, stable=True)
        counts = (longest > torch.arange(steps, device=longest.device)[:, None]).sum(1)
        return cls(order, counts, torch.cumsum(counts, 0) - counts)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.order.shape[0]

    @property
    def all_rows(self) -> int:
        """Number of rows of all steps together."""
        return int(self.counts.sum())


def run(
    kernel: Kernel, block: ArgumentBlock, steps: int, rows: int, reverse: bool, ragged: RaggedRows | None = None
) -> None:
    """Run a kernel with all its tensors bound, on as many of torch's threads as the call is worth.

    Arguments:
        ragged: the rows in order of length, where lengths differ.
    """
    if ragged is not None:
        block.bind(ragged=(ragged.order, ragged.counts, ragged.offsets))
    threads = team_size(kernel, steps, rows)
    scratch = _scratch(kernel.scratch_bytes(steps, rows, threads))
    kernel.set_sizes(block, steps, rows, reverse, scratch.data_ptr())
    if guard_pages.ENABLED:
        run_guarded(kernel, block.values, partial(start, kernel, steps, rows, threads), threads)
    else:
        start(kernel, steps, rows, threads, block.address)


def run_each(
    kernel: Kernel,
    blocks: tuple[ArgumentBlock, ArgumentBlock],
    count: int,
    steps: int,
    rows: int,
    reverse: bool,
    ragged: RaggedRows | None,
) -> None:
    """Run a kernel for each of several members, side by side on as many threads as torch takes.

    Where there are fewer members than threads, one runs after the other, on all of them.

    Arguments:
        blocks: of the first two members. Tensors of all members lie at equal distances, or are one tensor, so that
            these two say where those of the others are.
        count: the number of members, two or more.
    """
    for block in blocks:
        if ragged is not None:
            block.bind(ragged=(ragged.order, ragged.counts, ragged.offsets))
    threads = 1 if backs_off() else torch.get_num_threads()
    each_on_all = guard_pages.ENABLED or 1 < threads > count
    # For each thread, not for each member: the next member finds it in the cache.
    size = align_up(kernel.scratch_bytes(steps, rows))
    scratch = _scratch(size * (1 if each_on_all else threads))
    for block in blocks:
        kernel.set_sizes(block, steps, rows, reverse, align_up(scratch.data_ptr()))
    first, second = (np.frombuffer(block.values, np.int64) for block in blocks)
    members = first + np.arange(count)[:, None] * (second - first)
    if each_on_all:
        for member in members:
            run(kernel, ArgumentBlock(kernel.slots, array("q", member.tobytes())), steps, rows, reverse)
        return
    run_on_team(kernel.loaded.address("run"), members, threads, kernel.slots.scratch, size)


def start(kernel: Kernel, steps: int, rows: int, threads: int, address: int) -> None:
    """Run a kernel over the argument block at an address."""
    if threads > 1:
        run_team(kernel.team, address, threads, step_us(kernel, rows) * steps)
    elif kernel.macs * steps * rows < tuning.TUNING.short_call_macs:
        kernel.short(address)
    else:
        kernel.long(address)


class PreparedCall:
    """A kernel for calls of one size, whose arguments are all set but for addresses.

    Arguments:
        block: bound to tensors of the same sizes and strides as the calls' own.
        reads: slot and index of each of a call's tensors whose address a kernel reads.
        unread: slots of results that nobody reads, with their bytes: they share a call's scratch memory.

    Raises:
        NotPreparable: if a tensor had to be copied to be bound.
    """

    def __init__(
        self,
        kernel: Kernel,
        block: ArgumentBlock,
        steps: int,
        rows: int,
        reverse: bool,
        reads: Sequence[tuple[int, int]],
        unread: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.kernel, self._steps, self._rows, self.reads = kernel, steps, rows, tuple(reads)
        kernel.set_sizes(block, steps, rows, reverse, 0)
        self._values, self._scratch_slot = block.freeze(), kernel.slots.scratch
        self._run_alone = kernel.short if kernel.macs * steps * rows < tuning.TUNING.short_call_macs else kernel.long
        self._worth_team = is_worth_team(kernel, steps, rows)
        self._unread, offset = [], 0
        for slot, size in unread:
            self._unread.append((slot, offset))
            offset += align_up(size)
        self._unread_size, self._size = offset, offset + kernel.scratch_bytes(steps, rows)
        # Gaps between what two threads write of a buffer, `Tuning.thread_gap_bytes`.
        self._per_helper = kernel.emitted.scratch.per_helper

    @property
    def slots(self) -> int:
        """The number of arguments."""
        return len(self._values)

    def bind(self, tensors: State) -> array[int]:
        """Return the arguments of one call, with the addresses of what it reads of its tensors."""
        values = self._values[:]
        for slot, index in self.reads:
            values[slot] = tensors[index].data_ptr()
        return values

    def run(self, values: array[int]) -> None:
        """Run the kernel with arguments that have the addresses of all of the caller's tensors."""
        kernel, steps, rows = self.kernel, self._steps, self._rows
        threads = team_size(kernel, steps, rows) if self._worth_team else 1
        size = self._size + (threads - 1) * self._per_helper
        # The usual case without a call: the thread's scratch memory is large enough from the first calls on.
        address, memory = _thread.address, None
        if size > _thread.size:
            memory = _scratch(size)
            address = align_up(memory.data_ptr())
        for slot, offset in self._unread:
            values[slot] = address + offset
        values[self._scratch_slot] = address + self._unread_size
        if guard_pages.ENABLED:
            run_guarded(kernel, values, partial(start, kernel, steps, rows, threads), threads)
        elif threads == 1:
            self._run_alone(values.buffer_info()[0])
        else:
            start(kernel, steps, rows, threads, values.buffer_info()[0])
        del memory

    def run_each(self, members: npt.NDArray[np.int64]) -> None:
        """Run the kernel for several members side by side, each on one thread.

        Arguments:
            members: the arguments of one member in each row, with the addresses of all of its caller's tensors.
        """
        kernel = self.kernel
        threads = 1 if backs_off() else torch.get_num_threads()
        if guard_pages.ENABLED or 1 < threads > len(members):
            for member in members:
                self.run(array("q", member.tobytes()))
            return
        size = align_up(kernel.scratch_bytes(self._steps, self._rows))
        memory = _scratch(self._unread_size + size * threads)
        address = align_up(memory.data_ptr())
        for slot, offset in self._unread:
            members[:, slot] = address + offset
        members[:, self._scratch_slot] = address + self._unread_size
        run_on_team(kernel.loaded.address("run"), members, threads, self._scratch_slot, size)


def _scratch(size: int) -> Tensor:
    """Return at least ``size`` bytes from its first aligned address on: the thread's own memory, grown if need be.

    Scratch over ``large_scratch_bytes`` is freed after its call; a thread keeps the rest for the calls to come.
    """
    if _thread.scratch is not None and _thread.size >= size:
        return _thread.scratch
    sizes = tuning.TUNING
    size = max(size, sizes.small_scratch_bytes)
    if size < sizes.huge_scratch_bytes:
        scratch = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
    else:
        # NumPy asks Linux for huge pages from 4 MB on, torch does not.
        scratch = torch.from_numpy(np.empty(size + ALIGNMENT, np.uint8))
    if size <= sizes.large_scratch_bytes:
        _thread.scratch, _thread.address, _thread.size = scratch, align_up(scratch.data_ptr()), size
    return scratch


class _ThreadScratch(threading.local):
    """A thread's scratch memory, its first aligned address, and its bytes from there."""

    scratch: Tensor | None = None
    address = size = 0


_thread = _ThreadScratch()
