"""Run a GRU's kernel in the check mode, and something more right after it."""

import ctypes

import torch

import fusecell as fc
from fusecell.compiler.dispatch.runner import find_program
from fusecell.compiler.runtime import guard_pages as check
from fusecell.compiler.runtime.guard_page_extents import extents

__all__ = ["run_checked"]


def run_checked(run, missing_slot=None):
    """Run a GRU's kernel under the checks over 7 steps of 3 rows, then ``run`` with the argument block's slots by name.

    Arguments:
        missing_slot: a slot to leave 0.
    """
    cell, x = fc.GRUCell(5, 17), torch.randn(7, 3, 5)
    kernel = find_program(cell, (x,)).kernel
    block = kernel.block()
    tensors = [
        torch.empty(7, 3, 17),
        torch.empty(3, 17),
        torch.zeros(3, 17),
        *[getattr(cell, name).detach() for name in kernel.slots.weights],
    ]
    block.bind(inputs=[x], weights=tensors[3:], first=tensors[2:3], outputs=tensors[:1], last=tensors[1:2])
    kernel.set_sizes(block, 7, 3, False, 0, 7)
    if missing_slot:
        block.values[kernel.slots.indices[missing_slot]] = 0

    def run_and_more(address):
        kernel.long(address)
        slots = (ctypes.c_int64 * len(kernel.emitted.slots)).from_address(address)
        run(dict(zip(kernel.emitted.slots, slots, strict=True)))

    memory = extents(kernel, block.values, 7, 3)
    check.checked_run(
        run_and_more, block.values, kernel.emitted, memory, kernel.slots.indices, rows=3, chunk=7, threads=1
    )
