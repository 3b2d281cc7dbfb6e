"""``python -m benchmarks.limits``: what bounds each shape, and how near its kernel comes on one core.

The bound of a shape of several rows is the time of its multiply-adds at the rate of a tile in L1, and that of the same
kernel without its products: what its activations, loads and stores take alone. Of one row it is the time in which the
weights of the loop come from L2, with the multiply-adds of what is outside the loop.

A second table has training: a call, forward and backward with the gradient of its outputs given, and how much of it
its multiply-adds would take at that rate. A third has cells at one size, the built-in GRU first: what an operation of
each takes, in GRU's time for one.
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
"""The name of a cell that no part of the compiler was made for."""
CELLS_AT_ONE_SIZE = tuple(Shape(cell, 100, 32, 128, 256) for cell in ("gru", "leaky", "ligru", "gru_layer_norm", OWN))


@dataclass(frozen=True)
class Bound:
    """Microseconds per step: of the kernel alone, and of what bounds it."""

    shape: Shape
    kernel: float
    multiply_adds: float
    epilogue: float
    weights: float
    macs: int
    """Multiply-adds of a row's step."""

    @property
    def rate(self) -> float:
        """Billions of operations a second, of which a multiply-add is two."""
        return 2e-3 * self.macs * self.shape.batch / self.kernel

    @property
    def share(self) -> float:
        """How much of the kernel's time the bound is."""
        if self.shape.batch == 1:
            return (self.weights + self.multiply_adds) / self.kernel
        return (self.multiply_adds + self.epilogue) / self.kernel


@dataclass(frozen=True)
class Trained:
    """Microseconds per step of a call that learns, of its kernels, and of their multiply-adds at the rate of a tile."""

    shape: Shape
    call: float
    kernels: float
    multiply_adds: float

    @property
    def share(self) -> float:
        """How much of the call the multiply-adds are."""
        return self.multiply_adds / self.call


def bound(shape: Shape, flops: float, l2: float, seconds: float) -> Bound:
    """Time a shape's kernel, weights packed already, and the same without its products.

    Arguments:
        flops: operations a second of a tile in L1.
        l2: bytes a second that come from L2.
        seconds: for each of the two.
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
    whole = _time(kernel, kernel.emitted.text, x, weights, cell, seconds)
    bare = _time(kernel, without_products(kernel.emitted.text), x, weights, cell, seconds)
    macs = kernel.macs - loop if shape.batch == 1 else kernel.macs
    scale = 1e6 / shape.steps
    return Bound(shape, whole * scale, 2e6 * macs * shape.batch / flops, bare * scale, 4e6 * loop / l2, kernel.macs)


def trained(shape: Shape, flops: float, seconds: float) -> Trained:
    """Time a layer's forward and backward to its parameters, arguments as of :func:`bound`."""
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
    from benchmarks.own_cell import FastSlowCell
    from fusecell.cells import CELLS

    makers = {OWN: FastSlowCell} | {each.name: each.make for each in CELLS}
    return makers[shape.cell](shape.inputs, shape.hidden)


def without_products(text: str) -> str:
    """A kernel's text whose tiles are not called."""
    bare, count = re.subn(r"  call void %tile[^\n]*\n", "", text)
    assert count, "no tile is called in the kernel's text"
    return bare


def _time(kernel: object, text: str, x: object, weights: Sequence[object], cell: object, seconds: float) -> float:
    """The median time of a kernel's text over an input."""
    import torch

    from fusecell.compiler.backend.jit import load
    from fusecell.compiler.backend.target import host_target

    made: Any = kernel
    given: Any = x
    loaded = load(text, ["run"], host_target())
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(loaded.address("run"))
    block, words = made.block(), made.words
    steps, rows = given.shape[:2]
    state = cell.initial_state(rows, dtype=given.dtype, device="cpu")  # type: ignore[attr-defined]
    after = [value.clone() for value in state]
    outputs = [torch.empty(steps, rows, size) for size in made.output_sizes.values()]
    made.give_sequences(block, words.inputs.values(), [given])
    made.give_matrices(block, words.weights.values(), weights)
    made.give_states(block, words.first, state)
    made.give_states(block, words.last, after)
    made.give_sequences(block, words.outputs.values(), outputs)
    scratch = torch.zeros(made.scratch_bytes(steps, rows), dtype=torch.uint8)
    made.fill(block, steps, rows, False, scratch.data_ptr())
    address, packed = block.buffer_info()[0], words.positions["packed"]
    block[packed] = 2
    run(address)
    block[packed] = 1
    return _median(lambda: run(address), seconds)


def _median(call: Callable[[], object], seconds: float) -> float:
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def machine_limits(seconds: float = 0.5) -> tuple[float, float]:
    """Operations a second of a tile whose operands are in L1, and bytes a second of one row's tile from L2."""
    return _rate(8, 3, 1, 64, 1, seconds), 2 * _rate(1, 1, 8, 128, 8, seconds)


def _rate(rows: int, products: int, groups: int, depth: int, panels: int, seconds: float) -> float:
    import numpy as np

    from fusecell.compiler.backend.jit import load
    from fusecell.compiler.backend.target import host_target
    from fusecell.compiler.codegen.llvm_builder import Function, Module
    from fusecell.compiler.codegen.llvm_text import i64, ptr
    from fusecell.compiler.codegen.microkernel import StaticStrides, microkernel
    from fusecell.compiler.ir.sizes import DType

    module = Module("limits", DType.F32, host_target())
    name = microkernel(module, rows, products, groups, StaticStrides())
    accumulators, operand, all_panels, repeats = ptr("acc"), ptr("a"), ptr("panels"), i64("times")
    f = Function(module, "run", accumulators, operand, all_panels, repeats, exported=True)
    size = depth * products * module.vector_bytes
    with f.for_range("time", 0, repeats), f.for_range("panel", 0, panels) as panel:
        here = f.at(all_panels, f.mul(panel, size * groups))
        row = products * groups * module.vector_bytes
        f.call(name, accumulators, row, operand, 4 * depth, here, size, depth, accumulators, 0)
    f.end()
    loaded = load(module.text(), ["run"], host_target())
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_int64)(loaded.address("run"))
    # Ones, not zeros: pages of zeros that nobody has written are all the same memory.
    sizes = (rows * products * groups * 64, rows * depth * 4 + 64, panels * size * groups)
    memory = np.ones(sum(sizes) // 4 + 32, np.float32)
    acc = -(-memory.ctypes.data // 64) * 64
    a = acc + sizes[0]
    weights = -(-(a + sizes[1]) // 64) * 64
    flops = 2 * rows * products * groups * 16 * depth * panels
    times = max(1, int(1e8 / flops))
    return flops * times / _median(lambda: run(acc, a, weights, times), seconds)


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table in Markdown, each of its rows as soon as it is known."""
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def _bounds(shapes: Iterable[Shape], flops: float, l2: float, seconds: float) -> Iterator[Sequence[str]]:
    for shape in shapes:
        found = bound(shape, flops, l2, seconds)
        weights = f"{found.weights:.3g}" if shape.batch == 1 else ""
        times = (f"{value:.3g}" for value in (found.kernel, found.multiply_adds, found.epilogue))
        yield shape.name, *times, weights, f"{found.share:.0%}"


def _trained(shapes: Iterable[Shape], flops: float, seconds: float) -> Iterator[Sequence[str]]:
    for shape in shapes:
        found = trained(shape, flops, seconds)
        times = (f"{value:.3g}" for value in (found.call, found.kernels, found.multiply_adds))
        yield shape.name, *times, f"{found.share:.0%}"


def _at_one_size(flops: float, l2: float, seconds: float) -> Iterator[Sequence[str]]:
    found = [bound(shape, flops, l2, seconds) for shape in CELLS_AT_ONE_SIZE]
    for each in found:
        numbers = (f"{each.kernel:.3g}", f"{each.epilogue:.3g}", f"{each.rate:.0f}")
        yield each.shape.name, *numbers, f"{found[0].rate / each.rate:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="SUBSTRING", help="shapes with this in their name")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each of a shape's two kernels")
    options = parser.parse_args(arguments)
    bind(1)
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
    """The shapes of a sequence."""
    return [shape for shape in SHAPES if only is None or only in shape.name]


if __name__ == "__main__":
    main()
