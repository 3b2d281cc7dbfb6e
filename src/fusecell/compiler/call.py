"""Calls of a kernel from torch: scratch memory, rows in parts, threads."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fusecell.compiler import check
from fusecell.compiler.extents import extents
from fusecell.compiler.kernel import Kernel
from fusecell.compiler.threads import run_team

__all__ = ["Part", "Ready", "run", "run_parts"]

# Below this many multiply-adds a kernel keeps the GIL: letting it go may cost more than the kernel.
SHORT_CALL = 1_000_000
# Scratch memory of a thread is never less than the first, and beyond the second it isn't kept between calls.
SMALL_SCRATCH, LARGE_SCRATCH = 1 << 16, 1 << 23


@dataclass(frozen=True)
class RaggedRows:
    """Rows of different lengths, longest first: their order, how many take part in each step, and in all before it."""

    order: Tensor
    counts: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, lengths: Tensor, steps: int) -> RaggedRows:
        longest, order = torch.sort(lengths, descending=True, stable=True)
        return cls._of_sorted(longest, order, steps)

    def every(self, count: int, place: int, lengths: Tensor) -> RaggedRows:
        """One row of every ``count``, from the one at ``place``."""
        order = self.order[place::count].contiguous()
        return self._of_sorted(lengths[order], order, self.counts.shape[0])

    @classmethod
    def _of_sorted(cls, longest: Tensor, order: Tensor, steps: int) -> RaggedRows:
        counts = (longest > torch.arange(steps, device=longest.device)[:, None]).sum(1)
        return cls(order, counts, torch.cumsum(counts, 0) - counts)


@dataclass(frozen=True)
class Part:
    """Some rows of a call: one after another from ``first``, or those that ``ragged`` lists."""

    first: int
    rows: int
    all_rows: int
    """The rows of all steps together."""
    ragged: RaggedRows | None

    @classmethod
    def all_of(cls, rows: int, steps: int, lengths: Tensor | None, count: int) -> list[Part]:
        """The rows of a call in about equal parts; of rows with lengths every part has long ones and short ones."""
        if lengths is not None:
            ragged = RaggedRows.of(lengths, steps)
            made = [ragged] if count == 1 else [ragged.every(count, place, lengths) for place in range(count)]
            return [cls(0, each.order.shape[0], int(each.counts.sum()), each) for each in made]
        bounds = [rows * place // count for place in range(count + 1)]
        return [cls(a, b - a, steps * (b - a), None) for a, b in pairwise(bounds)]

    def block(self, kernel: Kernel, block: array[int]) -> array[int]:
        """A copy of a kernel's argument block for these rows."""
        block, words = block[:], kernel.words
        if self.ragged is not None:
            kernel.give_ragged(block, self.ragged.order, self.ragged.counts, self.ragged.offsets)
        elif self.first:
            sequences = (*words.inputs.values(), *words.outputs.values(), words.resets)
            for ptr, row in (*((ptr, row) for ptr, _, row in sequences), *words.first, *words.last, *words.reset):
                block[ptr] += self.first * block[row] if block[ptr] else 0
        return block


def run(kernel: Kernel, block: array[int], steps: int, rows: int, reverse: bool, reach: int | None = None) -> None:
    """Run a kernel over a filled block.

    Arguments:
        rows: how many take part.
        reach: how many the caller's tensors have, if that is more.
    """
    scratch = _scratch(kernel.scratch_bytes(steps, rows))
    chunk = kernel.fill(block, steps, rows, reverse, scratch.data_ptr())
    function = kernel.short if kernel.macs * steps * rows < SHORT_CALL else kernel.long
    if check.ENABLED:
        theirs, position = extents(kernel, block, steps, reach or rows), kernel.words.positions
        check.checked_run(function, block, kernel.emitted, theirs, position, rows=rows, chunk=chunk)
    else:
        function(block.buffer_info()[0])


class Ready:
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
        self._function = kernel.short if kernel.macs * steps * rows < SHORT_CALL else kernel.long
        self._size = kernel.scratch_bytes(steps, rows)
        self._unread = []
        for place, size in unread:
            self._unread.append((place, self._size))
            self._size += -(-size // 64) * 64

    def block(self) -> array[int]:
        """A block for one call."""
        return self._block[:]

    def run(self, block: array[int]) -> None:
        """Run the kernel over a block that has all addresses of the caller's tensors."""
        scratch, kept = _memory.address, None
        if self._size > _memory.size:
            kept = _scratch(self._size)
            scratch = -(-kept.data_ptr() // 64) * 64
        for place, offset in self._unread:
            block[place] = scratch + offset
        if check.ENABLED:
            run(self.kernel, block, *self._call)
            return
        block[self._place] = scratch
        self._function(block.buffer_info()[0])
        del kept


def run_parts(kernel: Kernel, blocks: Sequence[tuple[array[int], Part]], steps: int, rows: int, reverse: bool) -> None:
    """Run a kernel over the blocks of the parts of a call, on as many threads as torch would take."""
    if check.ENABLED:
        # Side by side the copies that a check makes of the caller's memory would undo one another.
        for block, part in blocks:
            run(kernel, block, steps, part.rows, reverse, None if part.ragged is None else rows)
        return
    sizes = [kernel.scratch_bytes(steps, part.rows) for _, part in blocks]
    scratch = _scratch(sum(sizes))
    here = scratch.data_ptr()
    for (block, part), size in zip(blocks, sizes, strict=True):
        kernel.fill(block, steps, part.rows, reverse, here)
        here += size
    data = array("q", [0, len(blocks), *[block.buffer_info()[0] for block, _ in blocks]])
    run_team(kernel.team, data.buffer_info()[0], min(torch.get_num_threads(), len(blocks)))


def _scratch(size: int) -> Tensor:
    """Memory for one call: a thread's own, kept for its next call unless it is large."""
    kept = _memory.scratch
    if kept is None or kept.shape[0] < size:
        kept = torch.empty(max(size, SMALL_SCRATCH), dtype=torch.uint8, device="cpu")
        if size <= LARGE_SCRATCH:
            _memory.scratch = kept
            _memory.address = -(-kept.data_ptr() // 64) * 64
            _memory.size = kept.shape[0]
    return kept


class _Memory(threading.local):
    """A thread's scratch memory, with the first address in it that a kernel may be given, and its size."""

    scratch: Tensor | None = None
    address = size = 0


_memory = _Memory()
