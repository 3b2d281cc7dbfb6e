"""Compare each shape's kernel with the machine's limits on one core: ``python -m benchmarks.limits``.

With several rows, the bound is the time of the multiply-adds at the rate of a tile in L1, plus the time of the same
kernel without its products, for activations, loads and stores. With one row, it is the time of reading the loop's
weights from L2, plus the multiply-adds outside the loop.

A second table is of training: the time of a forward and a backward, and the share that its multiply-adds would take at
that rate. A third compares cells of one size: the time of an operation in each, over that in the built-in GRU.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.machine import bind
from benchmarks.shapes import SHAPES, Shape

__all__ = ["Bound", "Trained", "bound", "machine_limits", "main", "trained", "without_products"]

OWN = "own"
"""The name, in shapes, of a cell that the compiler was not written with in mind: :mod:`benchmarks.own_cell`."""
CELLS_AT_ONE_SIZE = tuple(Shape(cell, 100, 32, 128, 256) for cell in ("gru", "leaky", "ligru", "gru_layer_norm", OWN))


@dataclass(frozen=True)
class Bound:
    """Microseconds per step of a kernel alone, and of each of its bounds.

    Attributes:
        shape: the sizes.
        kernel: the whole kernel.
        multiply_adds: those of its products, at the rate of a tile in L1.
        epilogue: the kernel without its products.
        weights: reading the loop's weights from L2.
        macs: multiply-adds of a step of one row, a number.
    """

    shape: Shape
    kernel: float
    multiply_adds: float
    epilogue: float
    weights: float
    macs: int

    @property
    def rate(self) -> float:
        """Billions of operations a second, of which a multiply-add is two."""
        return 2e-3 * self.macs * self.shape.batch / self.kernel

    @property
    def share(self) -> float:
        """The bound over the kernel's time."""
        if self.shape.batch == 1:
            return (self.weights + self.multiply_adds) / self.kernel
        return (self.multiply_adds + self.epilogue) / self.kernel


@dataclass(frozen=True)
class Trained:
    """Microseconds per step of a training call, of its kernels, and of their multiply-adds at the rate of a tile."""

    shape: Shape
    call: float
    kernels: float
    multiply_adds: float

    @property
    def share(self) -> float:
        """The multiply-adds' time over the call's."""
        return self.multiply_adds / self.call


def bound(shape: Shape, flops: float, l2: float, seconds: float) -> Bound:
    """Time a shape's kernel with packed weights, and the same kernel without its products.

    Arguments:
        shape: the sizes.
        flops: operations per second of a tile in L1.
        l2: bytes per second from L2.
        seconds: how long to time each of the two kernels.
    """
    import torch

    from fusecell.compiler.dispatch.runner import find_program
    from fusecell.compiler.refusal import Refusal

    cell = _make(shape)
    x = torch.randn(shape.steps, shape.batch, shape.inputs)
    program = find_program(cell, (x,))
    assert not isinstance(program, Refusal)
    kernel, loop = program.kernel, program.kernel.loop_macs
    weights = [value.detach() for value in program.traced.weights.values(cell)]
    # Compiled from the text both times, so that the two kernels differ in their products alone.
    whole = _time(kernel, kernel.emitted.text, x, weights, cell, seconds)
    epilogue = _time(kernel, without_products(kernel.emitted.text), x, weights, cell, seconds)
    macs = kernel.macs - loop if shape.batch == 1 else kernel.macs
    scale = 1e6 / shape.steps
    return Bound(shape, whole * scale, 2e6 * macs * shape.batch / flops, epilogue * scale, 4e6 * loop / l2, kernel.macs)


def trained(shape: Shape, flops: float, seconds: float) -> Trained:
    """Time a layer's forward and backward to its parameters; the arguments are those of :func:`bound`."""
    import torch

    import fusecell as fc
    from benchmarks.overhead import inside_kernels, kernels_of

    layer = fc.Recurrent(_make(shape))
    parameters = list(layer.parameters())
    x = torch.randn(shape.steps, shape.batch, shape.inputs)
    grad = torch.randn(shape.steps, shape.batch, shape.hidden)

    def call() -> object:
        return torch.autograd.grad(layer(x)[0], parameters, grad)

    times = inside_kernels(call, seconds)
    whole, inside = (1e6 * statistics.median(column) / shape.steps for column in zip(*times, strict=True))
    macs = sum(kernel.macs for kernel in kernels_of(call))
    return Trained(shape, whole, inside, 2e6 * macs * shape.batch / flops)


def _make(shape: Shape) -> Any:
    """Build the cell of a shape."""
    from benchmarks.own_cell import FastSlowCell
    from fusecell.cells import CELLS

    makers = {OWN: FastSlowCell} | {each.name: each.make for each in CELLS}
    return makers[shape.cell](shape.inputs, shape.hidden)


def without_products(text: str) -> str:
    """Remove all calls of microkernels from a kernel's LLVM text."""
    epilogue, count = re.subn(r"  call void %microkernel[^\n]*\n", "", text)
    assert count, "no microkernel is called in the kernel's text"
    return epilogue


def _time(kernel: Any, text: str, x: Any, weights: Sequence[object], cell: Any, seconds: float) -> float:
    """Compile a kernel's LLVM text and return the median time of running it on x (T, N, I)."""
    import torch

    from fusecell.compiler.backend.jit import load
    from fusecell.compiler.backend.target import host_target

    loaded = load(text, ["run"], host_target())
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(loaded.address("run"))
    block = kernel.block()
    steps, rows = x.shape[:2]
    state = cell.initial_state(rows, dtype=x.dtype, device="cpu")
    after = [value.clone() for value in state]
    outputs = [torch.empty(steps, rows, size) for size in kernel.output_sizes.values()]
    block.bind(inputs=[x], weights=weights, first=state, last=after, outputs=outputs)
    scratch = torch.zeros(kernel.scratch_bytes(steps, rows), dtype=torch.uint8)
    kernel.set_sizes(block, steps, rows, False, scratch.data_ptr())
    address, packed = block.address, kernel.slots.packed
    # 2: pack the weights in this run; 1: they are packed.
    block.values[packed] = 2
    run(address)
    block.values[packed] = 1
    return _median(lambda: run(address), seconds)


def _median(call: Callable[[], object], seconds: float) -> float:
    """Return the median time of a function over some seconds, of five calls at least."""
    return statistics.median(_times(call, seconds))


def _times(call: Callable[[], object], seconds: float) -> list[float]:
    """Time a function over some seconds, five calls at least."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def machine_limits(seconds: float = 0.5) -> tuple[float, float]:
    """Measure the operations per second of a tile in L1, and the bytes per second of a one-row tile from L2.

    The tiles are those that the target's registers hold: one that spills would make the machine look slower.
    """
    from fusecell.compiler.backend.target import host_target
    from fusecell.compiler.codegen.tile_cost import MAX_GROUPS, Product, cheapest_tiling
    from fusecell.compiler.ir.sizes import DType

    _, tiling = cheapest_tiling(host_target(), DType.F32, (Product(fused=1, depth=64),), MAX_GROUPS)
    rows = tiling.max_rows
    # A one-row tile does two operations, a multiply-add, with each float32 of 4 bytes: bytes are twice the operations.
    return (
        _rate(rows, 1, tiling.width(rows), 64, 1, seconds),
        2 * _rate(1, 1, tiling.width(1), 128, 8 * MAX_GROUPS // tiling.width(1), seconds),
    )


def _rate(rows: int, products: int, groups: int, depth: int, panels: int, seconds: float) -> float:
    """Measure the operations per second of a tile over ``panels`` of packed weights, one after another.

    Arguments:
        rows, products, groups: the tile's size: rows, matrices, and groups of 16 columns.
        depth: the length of the products' sums.
        panels: how many panels there are in memory; few stay in L1, many come from L2.
        seconds: how long to measure.
    """
    import numpy as np

    from fusecell.compiler.backend.jit import load
    from fusecell.compiler.backend.target import host_target
    from fusecell.compiler.codegen.llvm_builder import Function
    from fusecell.compiler.codegen.llvm_module import Module
    from fusecell.compiler.codegen.llvm_text import i64, ptr
    from fusecell.compiler.codegen.microkernel import ProductKind, StaticStrides, microkernel
    from fusecell.compiler.ir.sizes import DType

    module = Module("limits", DType.F32, host_target())
    name = microkernel(module, rows, ProductKind(products), groups, StaticStrides())
    accumulators, operand, all_panels, repeats = ptr("acc"), ptr("a"), ptr("panels"), i64("times")
    f = Function(module, "run", accumulators, operand, all_panels, repeats, exported=True)
    size = depth * products * module.vector_bytes
    with f.for_range("time", 0, repeats), f.for_range("panel", 0, panels) as panel:
        first_panel = f.at(all_panels, f.mul(panel, size * groups))
        row = products * groups * module.vector_bytes
        f.call(name, accumulators, row, operand, 4 * depth, first_panel, size, depth, accumulators, 0)
    f.end()
    loaded = load(module.text(), ["run"], host_target())
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_int64)(loaded.address("run"))
    # Ones, not zeros: Linux maps untouched pages of zeros to one and the same page of memory.
    sizes = (rows * products * groups * 64, rows * depth * 4 + 64, panels * size * groups)
    memory = np.ones(sum(sizes) // 4 + 32, np.float32)
    acc = -(-memory.ctypes.data // 64) * 64
    a = acc + sizes[0]
    weights = -(-(a + sizes[1]) // 64) * 64
    flops = 2 * rows * products * groups * 16 * depth * panels
    # About a millisecond in machine code, so that the call from Python doesn't count.
    times = max(1, int(1e8 / flops))
    # The best of many: what a machine can do is not what another process left of it.
    return flops * times / min(_times(lambda: run(acc, a, weights, times), seconds))


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown, each row as soon as it is there."""
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def _bounds(shapes: Iterable[Shape], flops: float, l2: float, seconds: float) -> Iterator[Sequence[str]]:
    for shape in shapes:
        result = bound(shape, flops, l2, seconds)
        weights = f"{result.weights:.3g}" if shape.batch == 1 else ""
        times = (f"{value:.3g}" for value in (result.kernel, result.multiply_adds, result.epilogue))
        yield shape.name, *times, weights, f"{result.share:.0%}"


def _trained(shapes: Iterable[Shape], flops: float, seconds: float) -> Iterator[Sequence[str]]:
    for shape in shapes:
        result = trained(shape, flops, seconds)
        times = (f"{value:.3g}" for value in (result.call, result.kernels, result.multiply_adds))
        yield shape.name, *times, f"{result.share:.0%}"


def _at_one_size(flops: float, l2: float, seconds: float) -> Iterator[Sequence[str]]:
    results = [bound(shape, flops, l2, seconds) for shape in CELLS_AT_ONE_SIZE]
    for each in results:
        numbers = (f"{each.kernel:.3g}", f"{each.epilogue:.3g}", f"{each.rate:.0f}")
        yield each.shape.name, *numbers, f"{results[0].rate / each.rate:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="SUBSTRING", help="shapes with this in their name")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each of a shape's two kernels")
    options = parser.parse_args(arguments)
    bind(1)  # a process that changes cores finds its weights in no cache
    flops, l2 = machine_limits()
    print(f"A tile in L1: {flops / 1e9:.0f} GFLOP/s; one row's tile from L2: {l2 / 1e9:.0f} GB/s\n")
    shapes, seconds = pick_inference(options.only), options.seconds
    columns = ("cell T/N/I/H", "kernel", "multiply-adds", "activations, moves", "weights from L2", "share")
    _print_table(columns, _bounds(shapes, flops, l2, seconds))
    columns = ("training, T/N/I/H", "call", "kernels", "multiply-adds", "share")
    _print_table(columns, _trained(shapes, flops, 2 * seconds))
    if options.only is None:
        columns = ("cell T/N/I/H", "kernel", "of which activations, moves", "GFLOP/s", "an operation, in GRU's")
        _print_table(columns, _at_one_size(flops, l2, seconds))


def pick_inference(only: str | None) -> Sequence[Shape]:
    """Return the shapes of sequences, those with ``only`` in their names if it is not None."""
    return [shape for shape in SHAPES if only is None or only in shape.name]


if __name__ == "__main__":
    main()
