"""A GRU's kernel, run by the check mode with something done after it."""

import ctypes

import torch

import fusecell as fc
from fusecell.compiler.dispatch.runner import find_program
from fusecell.compiler.runtime import guard_pages as check
from fusecell.compiler.runtime.guarded_extents import extents

__all__ = ["called"]


def called(run, given=None):
    """A GRU's kernel, or what ``run`` makes of it, run by the check over 7 steps of 3 rows."""
    cell, x = fc.GRUCell(5, 17), torch.randn(7, 3, 5)
    found = find_program(cell, (x,)).kernel
    block = found.block()
    kept = [
        torch.empty(7, 3, 17),
        torch.empty(3, 17),
        torch.zeros(3, 17),
        *[getattr(cell, name).detach() for name in found.slots.weights],
    ]
    block.bind(inputs=[x], weights=kept[3:], first=kept[2:3], outputs=kept[:1], last=kept[1:2])
    found.set_sizes(block, 7, 3, False, 0, 7)
    if given:
        block.values[found.slots.indices[given]] = 0

    def run_and_more(address):
        found.long(address)
        slots = (ctypes.c_int64 * len(found.emitted.slots)).from_address(address)
        run(dict(zip(found.emitted.slots, slots, strict=True)))

    theirs = extents(found, block.values, 7, 3)
    check.checked_run(run_and_more, block.values, found.emitted, theirs, found.slots.indices, rows=3, chunk=7)
