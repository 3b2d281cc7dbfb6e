"""What a caller of machine code needs of a kernel, whether it was compiled in this process or came with a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fusecell.compiler.backend import tuning
from fusecell.compiler.backend.cache_sizes import cache_sizes
from fusecell.compiler.ir.sizes import ALIGNMENT, Size, align_up, ceil_div
from fusecell.compiler.runtime.argument_block import ArgumentBlock, Slots

__all__ = ["KernelCalls"]


@dataclass(frozen=True, kw_only=True)
class KernelCalls:
    """Callable code of a graph, and the sizes of its calls.

    Arguments:
        macs: multiply-adds per row and step.
        output_sizes: features of each output that has a row for every step and row of the batch.
        scratch: the size of the scratch memory.
        short, long: run the kernel on one thread; the argument is the address of an :class:`ArgumentBlock`. Only
            ``long`` lets other Python threads run meanwhile: to take the GIL again can cost more than a short call.
    """

    macs: int
    output_sizes: dict[str, int]
    slots: Slots
    scratch: Size
    short: Callable[[int], None]
    long: Callable[[int], None]

    def block(self) -> ArgumentBlock:
        """Return the argument block of a new call, with nothing bound yet."""
        return ArgumentBlock(self.slots)

    def chunk(self, steps: int, rows: int) -> int:
        """Return the steps of a chunk: as many as fit L2, but enough rows to be worth reading the weights for.

        A chunk's buffers are written by one stage and read by the next, so they should stay in L2. Weights that are
        larger than L2 come from L3 for every chunk anew, which only pays with many rows to multiply by them.
        """
        size, rows, sizes = self.scratch, max(rows, 1), tuning.TUNING
        step_bytes = max(size.per_chunk_row * rows, 1)
        if step_bytes * steps <= min(size.fixed, sizes.only_chunk_bytes):
            return max(1, steps)
        least = 1
        if size.fixed > sizes.large_panels_bytes:
            sum_rows = sizes.sum_rows if cache_sizes().l2 >= sizes.large_l2_bytes else sizes.sum_rows_small_l2
            least = ceil_div(sum_rows if self.slots.sums else sizes.panel_rows, rows)
        # Three quarters: what a stage reads besides, rows of states and a panel's columns, takes the rest.
        chunk_bytes = min(sizes.chunk_bytes, cache_sizes().l2 * 3 // 4)
        return max(1, min(steps, max(least, chunk_bytes // step_bytes)))

    def scratch_bytes(self, steps: int, rows: int, threads: int = 1) -> int:
        """Return the bytes of scratch memory that a call needs, with room to align it."""
        return align_up(self.scratch.bytes(rows, self.chunk(steps, rows), threads)) + ALIGNMENT

    def set_sizes(
        self, block: ArgumentBlock, steps: int, rows: int, reverse: bool, scratch: int, chunk: int | None = None
    ) -> int:
        """Write the sizes of a call and the address of its scratch memory; return the steps of a chunk."""
        chunk, slots, values = chunk or self.chunk(steps, rows), self.slots, block.values
        values[slots.steps], values[slots.rows], values[slots.reverse] = steps, rows, reverse
        values[slots.chunk_steps], values[slots.scratch] = chunk, align_up(scratch)
        return chunk
