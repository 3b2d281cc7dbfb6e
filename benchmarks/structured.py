"""Time the structured cells against the Python loop and JAX, in turns: ``python -m benchmarks.structured``."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

from benchmarks import machine

__all__ = ["main"]


def main() -> None:
    """Print a table of all structured cells, or of those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", help="names of cells; all by default")
    parser.add_argument("--rows", type=int, default=8, help="sequences at once")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=128, help="features of the state")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each contestant")
    options = parser.parse_args()
    machine.bind(1)  # before a framework counts cores
    print(f"{machine.describe()['cpu']}, {options.steps} steps, {options.rows} rows, 64 -> {options.size}, one core")
    print(f"{machine.versions(('fusecell', 'torch', 'jax'))}, {time.strftime('%d %B %Y')}\n")
    print("| cell | compile s | inference ms | loop / ours | JAX / ours | training ms | loop / ours | JAX / ours |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    import torch

    import fusecell as fc

    torch.set_num_threads(1)
    for entry in fc.cells.STRUCTURED_CELLS:
        if not options.cells or entry.name in options.cells:
            print(_row(entry, options), flush=True)


def _row(entry: Any, options: argparse.Namespace) -> str:
    import torch

    torch.manual_seed(0)
    cell = entry.make(64, options.size)
    inputs = entry.inputs(options.steps, options.rows, 64)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    began = time.thread_time()
    contestants = {training: _contestants(entry.name, cell, inputs, training) for training in (False, True)}
    compiling = time.thread_time() - began
    cells = [f"| {entry.name}"]
    for training in (False, True):
        cells += _times(contestants[training], options.seconds)
    return " | ".join([cells[0], f"{compiling:.2f}", *cells[1:]]) + " |"


def _times(contestants: dict[str, Callable[[], Any]], seconds: float) -> list[str]:
    from benchmarks.clock import take_turns

    for call in contestants.values():
        call()
    timings = take_turns(contestants, seconds)
    ours = timings["fusecell"].median
    peers = [f"{timings[name].median / ours:.2f}" if name in timings else "" for name in ("loop", "JAX")]
    return [f"{ours * 1e3:.2f}", *peers]


def _contestants(name: str, cell: Any, inputs: tuple[Any, ...], training: bool) -> dict[str, Callable[[], Any]]:
    """Return the calls to time; ours is compiled by a call of it, and compared with JAX's numbers."""
    import torch

    import fusecell as fc
    from benchmarks.structured_jax import jax_layer

    layer = fc.Recurrent(cell)
    leaves = tuple(value.clone().requires_grad_(training) for value in inputs)
    wanted = [*leaves, *cell.parameters()]

    def ours(runner: str) -> Any:
        with fc.runner(runner), torch.set_grad_enabled(training):
            output, _ = layer(leaves if len(leaves) > 1 else leaves[0])
            first = output["state"] if isinstance(output, dict) else output
            return torch.autograd.grad(first.sum(), wanted, allow_unused=True) if training else first

    warnings.simplefilter("error")
    result = ours("compiled")
    contestants: dict[str, Callable[[], Any]] = {"fusecell": lambda: ours("compiled"), "loop": lambda: ours("eager")}
    jax = jax_layer(name, cell, inputs, training=training)
    if jax is not None:
        contestants["JAX"] = jax
        if not training:
            torch.testing.assert_close(torch.tensor(jax()), result, rtol=1e-4, atol=1e-4)
    return contestants


if __name__ == "__main__":
    main()
