"""The program that ``memcheck`` runs under valgrind: kernels on memory from malloc, without torch."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.runtime.guard_page_extents import extents
from fusecell.compiler.runtime.guard_pages import Bytes
from fusecell.compiler.runtime.kernel import Kernel, compile_graph

STEPS, ROWS = 5, 3
CALLS = [(False, False), (True, False), (True, True)]
"""With and without resets and lengths."""


def kernels(folder: Path) -> Iterator[Kernel]:
    """A kernel for each ``.graph`` file; ``backward`` stands in the names of gradients'."""
    for path in sorted(folder.glob("*.graph")):
        yield compile_graph(Graph.parse(path.read_text()), backward="backward" in path.name)


def run(kernel: Kernel, resets: bool, ragged: bool, short: int = 0) -> None:
    """Run a kernel on memory of exactly the declared sizes, and write its results so that valgrind checks them.

    Arguments:
        short: bytes by which the outputs are too short.
    """
    generator, arguments = np.random.default_rng(0), kernel.block()
    block = arguments.values
    dtype = np.float32 if kernel.itemsize == 4 else np.float64
    chunk = kernel.set_sizes(arguments, STEPS, ROWS, False, 0, 2)
    scratch = np.empty(kernel.emitted.scratch.bytes(ROWS, chunk) + 64, np.uint8)
    kernel.set_sizes(arguments, STEPS, ROWS, False, scratch.ctypes.data, chunk)
    counts = np.array([3, 2, 2, 1, 0] if ragged else [ROWS] * STEPS, np.int64)
    tables = {"order": np.arange(ROWS), "counts": counts, "offsets": np.cumsum(counts) - counts}
    if ragged:
        block[kernel.slots.ragged[1]] = counts.ctypes.data
    # What a kernel adds to, or fills but some of, its caller has zeroed.
    filled = set(kernel.slots.sums) - set(kernel.plan.covered())
    memories, outputs = [], []
    for extent in extents(kernel, block, STEPS, ROWS):
        if (extent.name in tables and not ragged) or (extent.name.startswith("reset") and not resets):
            continue
        size = extent.row
        for word, count in reversed(extent.strides):
            block[word], size = size, size * count
        # Behind it there is nothing: malloc's own bytes, which valgrind guards.
        saved = extent.name in kernel.slots.saved
        size -= short if extent.name == "output" else 0
        memory = _aligned(size + extent.slack) if saved else np.empty(size, np.uint8)
        if extent.name in tables:
            memory[:] = tables[extent.name].astype(np.int64).view(np.uint8)
        elif extent.name == "resets":
            memory[:] = generator.random(size) < 0.4
        elif not extent.written or ragged or extent.name in filled or extent.name.startswith("reset"):
            memory[:size] = generator.random(size // kernel.itemsize).astype(dtype).view(np.uint8)
        if extent.written and not saved:
            outputs.append(memory)
        block[extent.pointer] = memory.ctypes.data
        memories.append(memory)
    kernel.long(arguments.address)
    with open(os.devnull, "wb", buffering=0) as sink:
        for memory in outputs:
            sink.write(memory.data)


def _aligned(size: int) -> Bytes:
    """Memory as a call keeps it from forward to backward: at a multiple of 64."""
    address = ctypes.c_void_p()
    assert ctypes.CDLL(None).posix_memalign(ctypes.byref(address), 64, ctypes.c_size_t(size)) == 0
    assert address.value
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address.value), np.uint8)


if __name__ == "__main__":
    for kernel in kernels(Path(sys.argv[1])):
        for resets, ragged in CALLS:
            run(kernel, resets, ragged)
        if short := int(sys.argv[2]):
            run(kernel, False, False, short)
    assert "torch" not in sys.modules
