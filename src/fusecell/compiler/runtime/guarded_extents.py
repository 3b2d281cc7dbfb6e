"""The caller's memory that a call of a kernel reads and writes, for the check mode."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator

from fusecell.compiler.ir.sizes import padded
from fusecell.compiler.runtime.guard_pages import Extent
from fusecell.compiler.runtime.kernel import Kernel

__all__ = ["extents"]


def extents(kernel: Kernel, block: array[int], steps: int, rows: int) -> list[Extent]:
    """Every piece of it, also those that this call leaves out.

    Arguments:
        block: of the call, filled.
        rows: of the caller's tensors.
    """
    return [*_tensors(kernel, steps, rows), *_tables(kernel, block, steps), *_saved(kernel, block, steps)]


def _tensors(kernel: Kernel, steps: int, rows: int) -> Iterator[Extent]:
    """Inputs, outputs, weights, sums, states, resets."""
    words, graph, item = kernel.words, kernel.plan.graph, kernel.itemsize
    nodes = {graph[index].name: graph[index] for op in ("input", "weight") for index in graph.leaves(op)}
    results = {label: graph[index] for label, index in graph.outputs.items()}
    for table, source, written in ((words.inputs, nodes, False), (words.outputs, results, True)):
        for name, (ptr, step, row) in table.items():
            yield Extent(name, ptr, ((step, steps), (row, rows)), source[name].size * item, written)
    for table, source, written in ((words.weights, nodes, False), (words.sums, results, True)):
        for name, (ptr, *strides) in table.items():
            yield Extent(name, ptr, tuple(zip(strides, source[name].type.shape, strict=False)), item, written)
    kinds = (("first", words.first, False), ("last", words.last, True), ("reset", words.reset, kernel.plan.backward))
    for kind, states, written in kinds:
        for (name, (leaf, _)), (ptr, row) in zip(kernel.plan.states.items(), states, strict=True):
            yield Extent(f"{kind}.{name}", ptr, ((row, rows),), graph[leaf].size * item, written)
    ptr, step, row = words.resets
    yield Extent("resets", ptr, ((step, steps), (row, rows)), 1, written=False)


def _tables(kernel: Kernel, block: array[int], steps: int) -> Iterator[Extent]:
    """Which rows there are in each step, if they differ in length."""
    taking_part = block[kernel.words.positions["rows"]]
    sizes = (("order", taking_part), ("counts", steps), ("offsets", steps))
    for (name, size), ptr in zip(sizes, kernel.words.ragged, strict=True):
        yield Extent(name, ptr, (), 8 * size, written=False)


def _saved(kernel: Kernel, block: array[int], steps: int) -> Iterator[Extent]:
    """What the forward keeps for the backward, a row for every row of every step."""
    _, counts, _ = kernel.words.ragged
    all_rows = steps * block[kernel.words.positions["rows"]]
    if block[counts]:
        all_rows = sum((ctypes.c_int64 * steps).from_address(block[counts]))
    for buffer in kernel.plan.saved():
        row = padded(buffer.size) * kernel.itemsize
        ptr = kernel.words.saved[buffer.name]
        yield Extent(buffer.name, ptr, (), all_rows * row, not kernel.plan.backward, kernel.emitted.slack)
