"""The check mode's view of a call: every piece of the caller's memory that a kernel may read or write."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterator

from fusecell.compiler.ir.sizes import padded
from fusecell.compiler.runtime.guard_pages import Extent, checked_run
from fusecell.compiler.runtime.kernel import Kernel

__all__ = ["extents", "run_guarded"]


def run_guarded(kernel: Kernel, values: array[int], run: Callable[[int], None], threads: int = 1) -> None:
    """Run a kernel on guarded copies of all that its arguments point to.

    Arguments:
        values: the slots of a filled argument block.
        run: runs the kernel over the argument block at an address.
        threads: that it runs on, at the most.
    """
    slots = kernel.slots
    rows, chunk = values[slots.rows], values[slots.chunk_steps]
    pieces = extents(kernel, values, values[slots.steps], rows)
    checked_run(run, values, kernel.emitted, pieces, slots.indices, rows=rows, chunk=chunk, threads=threads)


def extents(kernel: Kernel, values: array[int], steps: int, rows: int) -> list[Extent]:
    """List every piece of the caller's memory that a kernel has a slot for, bound in this call or not.

    Arguments:
        values: the slots of a filled argument block.
    """
    return [*_tensors(kernel, steps, rows), *_tables(kernel, values, steps), *_saved(kernel, values, steps)]


def _tensors(kernel: Kernel, steps: int, rows: int) -> Iterator[Extent]:
    """Yield inputs, outputs, weights, sums, states, resets."""
    slots, graph, item = kernel.slots, kernel.plan.graph, kernel.itemsize
    nodes = {graph[index].name: graph[index] for op in ("input", "weight") for index in graph.leaves(op)}
    results = {label: graph[index] for label, index in graph.outputs.items()}
    for table, source, written in ((slots.inputs, nodes, False), (slots.outputs, results, True)):
        for name, (address, step, row) in table.items():
            yield Extent(name, address, ((step, steps), (row, rows)), source[name].size * item, written)
    for table, source, written in ((slots.weights, nodes, False), (slots.sums, results, True)):
        for name, (address, *strides) in table.items():
            yield Extent(name, address, tuple(zip(strides, source[name].type.shape, strict=False)), item, written)
    kinds = (("first", slots.first, False), ("last", slots.last, True), ("reset", slots.reset, kernel.plan.backward))
    for kind, states, written in kinds:
        for (name, (leaf, _)), (address, row) in zip(kernel.plan.states.items(), states, strict=True):
            yield Extent(f"{kind}.{name}", address, ((row, rows),), graph[leaf].size * item, written)
    address, step, row = slots.resets
    yield Extent("resets", address, ((step, steps), (row, rows)), 1, written=False)


def _tables(kernel: Kernel, values: array[int], steps: int) -> Iterator[Extent]:
    """Yield the tables of rows that differ in length: their order, and their number in each step."""
    # The kernel writes none of them, but an index beyond their end would read another table's numbers unseen.
    sizes = (("order", values[kernel.slots.rows]), ("counts", steps), ("offsets", steps))
    for (name, size), address in zip(sizes, kernel.slots.ragged, strict=True):
        yield Extent(name, address, (), 8 * size, written=False)


def _saved(kernel: Kernel, values: array[int], steps: int) -> Iterator[Extent]:
    """Yield the values saved for the backward, each with a row for every row of every step."""
    _, counts, _ = kernel.slots.ragged
    all_rows = steps * values[kernel.slots.rows]
    if values[counts]:  # with lengths only the rows that take part in a step have memory
        all_rows = sum((ctypes.c_int64 * steps).from_address(values[counts]))
    for buffer in kernel.plan.saved():
        row = padded(buffer.size) * kernel.itemsize
        address = kernel.slots.saved[buffer.name]
        yield Extent(buffer.name, address, (), all_rows * row, not kernel.plan.backward, kernel.emitted.slack)
