"""Time layers in 16 bits beside torch.nn's and beside float32: ``python -m benchmarks.sixteen_bits``.

torch.nn's layer, fusecell's in float32 and fusecell's in the 16-bit dtype take turns on one core, with the same
weights. A last column has the same with the best turns in the place of the median ones: on a busy machine the medians
are those of its neighbours. ``FUSECELL_TARGET=x86-64-v4`` and ``ONEDNN_MAX_CPU_ISA=AVX512_CORE`` hold the two to CPUs
that multiply no pairs of bfloat16 numbers.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.clock import take_turns
from benchmarks.machine import bind
from benchmarks.shapes import Shape

__all__ = ["main"]

SIZES = ((64, 16, 64, 128), (100, 1, 64, 128), (32, 64, 32, 128), (100, 2, 256, 256), (64, 16, 512, 512))
SHAPES = tuple(Shape(kind, *size) for kind in ("gru", "lstm", "rnn") for size in SIZES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sixteen_bits", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="timing of a shape, for each contestant")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    options = parser.parse_args(arguments)
    bind(1)
    import torch

    torch.set_num_threads(1)
    names = ("us", "torch.nn, x", "float32, x", "torch.nn by best turns, x")
    print(f"| layer T/N/I/H | | {' | '.join(names)} |\n| --- | --- |{' ---: |' * len(names)}")
    for shape in SHAPES:
        for mode in ("inference", "training"):
            print(_row(shape, mode, getattr(torch, options.dtype), options.seconds), flush=True)


def _row(shape: Shape, mode: str, dtype: Any, seconds: float) -> str:
    """Return a line of the table."""
    contestants = _contestants(shape, mode, dtype)
    for call in contestants.values():
        call()
        call()
    times = take_turns(contestants, seconds)
    ours, theirs, wide = times["ours"], times["torch.nn"], times["float32"]
    ratios = theirs.median / ours.median, wide.median / ours.median, theirs.best / ours.best
    sizes = f"{shape.steps}/{shape.batch}/{shape.inputs}/{shape.hidden}"
    numbers = " | ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"| {shape.cell.upper()} {sizes} | {mode} | {1e6 * ours.median:.0f} | {numbers} |"


def _contestants(shape: Shape, mode: str, dtype: Any) -> dict[str, Callable[[], object]]:
    """Return a call of each layer."""
    import torch
    from torch import nn

    import fusecell as fc

    torch.manual_seed(0)
    kind = shape.cell.upper()
    theirs = getattr(nn, kind)(shape.inputs, shape.hidden)
    ours, wide = (getattr(fc, kind)(shape.inputs, shape.hidden) for _ in range(2))
    for layer in (ours, wide):
        layer.load_state_dict(theirs.state_dict())
    x = torch.randn(shape.steps, shape.batch, shape.inputs)

    def infer(layer: nn.Module, x: torch.Tensor) -> object:
        with torch.inference_mode():
            return layer(x)

    def train(layer: nn.Module, x: torch.Tensor) -> None:
        layer.zero_grad()
        outputs, _ = layer(x.detach().requires_grad_())
        outputs.backward(torch.ones_like(outputs))

    call = infer if mode == "inference" else train
    layers = {"torch.nn": theirs.to(dtype), "ours": ours.to(dtype), "float32": wide}
    return {
        name: functools.partial(call, layer, x.to(next(layer.parameters()).dtype)) for name, layer in layers.items()
    }


if __name__ == "__main__":
    main()
