"""Run a GRU's kernel in the check mode, and something more right after it."""

import ctypes

import torch

import fusecell as fc
from fusecell.compiler.dispatch.runner import find_program
from fusecell.compiler.runtime import guard_pages as check
from fusecell.compiler.runtime.guarded_extents import extents

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
        *[getattr(cell, name).detach() for name in kernel.words.weights],
    ]
    kernel.give_sequences(block, kernel.words.inputs.values(), [x])
    kernel.give_matrices(block, kernel.words.weights.values(), tensors[3:])
    kernel.give_states(block, kernel.words.first, tensors[2:3])
    kernel.give_sequences(block, kernel.words.outputs.values(), tensors[:1])
    kernel.give_states(block, kernel.words.last, tensors[1:2])
    kernel.fill(block, 7, 3, False, 0, 7)
    if missing_slot:
        block[kernel.words.positions[missing_slot]] = 0

    def run_and_more(address):
        kernel.long(address)
        slots = (ctypes.c_int64 * len(kernel.emitted.slots)).from_address(address)
        run(dict(zip(kernel.emitted.slots, slots, strict=True)))

    memory = extents(kernel, block, 7, 3)
    check.checked_run(run_and_more, block, kernel.emitted, memory, kernel.words.positions, rows=3, chunk=7)
