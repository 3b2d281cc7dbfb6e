"""``python -m benchmarks.overhead``: what a call costs above its kernels, and an import above torch's."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor, nn

import fusecell as fc
from benchmarks.clock import take_turns
from fusecell.compiler.programs.launch import PreparedCall
from fusecell.compiler.runtime.kernel import Kernel

__all__ = ["above_kernels", "calls", "import_seconds", "inside_kernels", "kernels_of", "main"]

Call = Callable[[], object]

_IMPORT = """
import time, torch
began = time.process_time()
import fusecell as fc
fc.GRU(5, 10)
print(time.process_time() - began)
"""


class _Empty(torch.autograd.Function):
    """Computes nothing of as many tensors as a GRU has: what no function in Python can do without."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return x.new_empty(*x.shape[:-1], weights[1].shape[1])

    @staticmethod
    def backward(ctx: torch.autograd.function.NestedIOFunction, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[torch.empty_like(weight) for weight in ctx.saved_tensors[1:]]


def _trained(outputs: Callable[[], Tensor], parameters: list[nn.Parameter], grad: Tensor) -> Call:
    def call() -> None:
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(outputs(), grad)

    return call


def _without_gradient(call: Call) -> Call:
    def quiet() -> object:
        with torch.no_grad():
            return call()

    return quiet


def calls() -> dict[str, Call]:
    """What is timed: ours, torch.nn's and an empty function's, by name."""
    torch.manual_seed(0)
    x, sequence, h = torch.randn(3, 5), torch.randn(35, 3, 5), torch.randn(3, 10)
    grad, grads = torch.randn(3, 10), torch.randn(35, 3, 10)
    found: dict[str, Call] = {}
    for name, home in (("fusecell", fc), ("torch.nn", nn)):
        cell, layer = home.GRUCell(5, 10), home.GRU(5, 10)
        of_cell, of_layer = list(cell.parameters()), list(layer.parameters())
        found[f"a step, {name}"] = _without_gradient(lambda cell=cell: cell(x, h))
        found[f"a step that learns, {name}"] = _trained(lambda cell=cell: cell(x, h), of_cell, grad)
        found[f"a layer, {name}"] = _without_gradient(lambda layer=layer: layer(sequence))
        found[f"a layer that learns, {name}"] = _trained(lambda layer=layer: layer(sequence)[0], of_layer, grads)
    weights = list(fc.GRUCell(5, 10).parameters())
    found["an empty function"] = _trained(lambda: _Empty.apply(x, *weights), weights, grad)
    return found


def inside_kernels(call: Call, seconds: float = 0.0, least: int = 20) -> list[tuple[float, float]]:
    """Seconds of each of several calls, and how many of these were spent inside kernels."""
    inside, run, found = [0.0], PreparedCall.run, []
    for _ in range(3):  # the first compiles, the second goes the way of the first
        call()

    def timed(self: PreparedCall, block: array[int]) -> None:
        began = time.perf_counter()
        run(self, block)
        inside[0] += time.perf_counter() - began

    with patch.object(PreparedCall, "run", timed):
        first = time.perf_counter()
        while len(found) < least or time.perf_counter() - first < seconds:
            inside[0] = 0.0
            began = time.perf_counter()
            call()
            found.append((time.perf_counter() - began, inside[0]))
    return found


def kernels_of(call: Call) -> list[Kernel]:
    """The kernels that a call runs, once it has found them."""
    run, found = PreparedCall.run, []
    for _ in range(2):
        call()

    def noted(self: PreparedCall, block: array[int]) -> None:
        found.append(self.kernel)
        run(self, block)

    with patch.object(PreparedCall, "run", noted):
        call()
    return found


def above_kernels(call: Call, seconds: float) -> tuple[float, float]:
    """Seconds of a call, and of a call (not the same one: the clock has its cost) what is not inside kernels."""
    above = statistics.median(each - inside for each, inside in inside_kernels(call, seconds))
    return take_turns({"": call}, seconds)[""].median, above


def import_seconds(runs: int = 5) -> float:
    """Processor seconds of a process for the import and a first layer, torch being there."""
    found = [subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, check=True) for _ in range(runs)]
    return statistics.median(float(each.stdout) for each in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="per call that is timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| call | us | above its kernels |\n|---|---:|---:|")
    for name, call in calls().items():
        whole, above = above_kernels(call, options.seconds)
        own = f"{above * 1e6:.1f}" if "fusecell" in name else ""
        print(f"| {name} | {whole * 1e6:.1f} | {own} |")
    print(f"\nImport and a first layer, above torch's import: {import_seconds() * 1e3:.0f} ms.")


if __name__ == "__main__":
    main()
