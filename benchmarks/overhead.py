"""Measure a call's overhead above its kernels, and the import's above torch's: ``python -m benchmarks.overhead``."""

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

# Processor time: on a busy machine the wall time of an import is mostly other processes'.
_IMPORT = """
import time, torch
began = time.process_time()
import fusecell as fc
fc.GRU(5, 10)
print(time.process_time() - began)
"""


class _Empty(torch.autograd.Function):
    """An autograd function with as many tensors as a GRU that computes nothing: the lower bound of any's cost."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return x.new_empty(*x.shape[:-1], weights[1].shape[1])

    @staticmethod
    def backward(ctx: torch.autograd.function.NestedIOFunction, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[torch.empty_like(weight) for weight in ctx.saved_tensors[1:]]


def _with_backward(outputs: Callable[[], Tensor], parameters: list[nn.Parameter], grad: Tensor) -> Call:
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
    """Return the calls to time by name: ours, torch.nn's and an empty function's."""
    torch.manual_seed(0)
    x, sequence, h = torch.randn(3, 5), torch.randn(35, 3, 5), torch.randn(3, 10)
    grad, grads = torch.randn(3, 10), torch.randn(35, 3, 10)
    result: dict[str, Call] = {}
    for name, home in (("fusecell", fc), ("torch.nn", nn)):
        cell, layer = home.GRUCell(5, 10), home.GRU(5, 10)
        of_cell, of_layer = list(cell.parameters()), list(layer.parameters())
        result[f"a step, {name}"] = _without_gradient(lambda cell=cell: cell(x, h))
        result[f"a step that learns, {name}"] = _with_backward(lambda cell=cell: cell(x, h), of_cell, grad)
        result[f"a layer, {name}"] = _without_gradient(lambda layer=layer: layer(sequence))
        result[f"a layer that learns, {name}"] = _with_backward(lambda layer=layer: layer(sequence)[0], of_layer, grads)
    weights = list(fc.GRUCell(5, 10).parameters())
    result["an empty function"] = _with_backward(lambda: _Empty.apply(x, *weights), weights, grad)
    return result


def inside_kernels(call: Call, seconds: float = 0.0, least: int = 20) -> list[tuple[float, float]]:
    """Time several calls; return the seconds of each and those of them spent inside kernels.

    Arguments:
        call: the function.
        seconds: how long to go on.
        least: the least number of calls.
    """
    inside, run, times = [0.0], PreparedCall.run, []
    for _ in range(3):  # the first compiles, the second fills the call cache
        call()

    def timed(self: PreparedCall, block: array[int]) -> None:
        began = time.perf_counter()
        run(self, block)
        inside[0] += time.perf_counter() - began

    # Patched on the class: every kernel of a call goes through PreparedCall.run, forward and backward.
    with patch.object(PreparedCall, "run", timed):
        first = time.perf_counter()
        while len(times) < least or time.perf_counter() - first < seconds:
            inside[0] = 0.0
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began, inside[0]))
    return times


def kernels_of(call: Call) -> list[Kernel]:
    """Return the kernels that a call runs once all are compiled."""
    run, kernels = PreparedCall.run, []
    for _ in range(2):
        call()

    def recorded(self: PreparedCall, block: array[int]) -> None:
        kernels.append(self.kernel)
        run(self, block)

    with patch.object(PreparedCall, "run", recorded):
        call()
    return kernels


def above_kernels(call: Call, seconds: float) -> tuple[float, float]:
    """Return the seconds of a call, and those of a call outside of kernels.

    These are of different calls: reading the clock around every kernel takes time too.
    """
    above = statistics.median(each - inside for each, inside in inside_kernels(call, seconds))
    return take_turns({"": call}, seconds)[""].median, above


def import_seconds(runs: int = 5) -> float:
    """Return the processor seconds of importing fusecell and building a first layer, after the import of torch."""
    processes = [subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, check=True) for _ in range(runs)]
    return statistics.median(float(each.stdout) for each in processes)


def main() -> None:
    """Print the table and the time of the import."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="per call that is timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| call | us | above its kernels |\n|---|---:|---:|")
    for name, call in calls().items():
        whole, above = above_kernels(call, options.seconds)
        overhead = f"{above * 1e6:.1f}" if "fusecell" in name else ""
        print(f"| {name} | {whole * 1e6:.1f} | {overhead} |")
    print(f"\nImport and a first layer, above torch's import: {import_seconds() * 1e3:.0f} ms.")


if __name__ == "__main__":
    main()
