"""Time streamed steps whose weights are stored in 16 or 8 bits: ``python -m benchmarks.small_weights``.

One core; the float32 stream and ONNX Runtime's float32 session, a step of one row with the state passed on, take turns
with each format. The last columns are the root mean square of the output's error, over that of the output, for normally
distributed inputs and torch.nn's initial weights.

``--sequences``: layers over 100 steps, as ``fusecell.quantize`` makes them, beside torch.nn's and what
``torch.ao.quantization.quantize_dynamic`` makes of it.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

from benchmarks.clock import take_turns
from benchmarks.machine import bind
from benchmarks.shapes import Mode, Shape

__all__ = ["main"]

SHAPES = tuple(Shape(*each) for each in (("gru", 1, 1, 40, 128), ("gru", 1, 1, 256, 256), ("lstm", 1, 1, 256, 256)))
SEQUENCES = tuple(
    Shape(*each)
    for each in (
        ("gru", 100, 1, 40, 128),
        ("gru", 100, 1, 256, 256),
        ("gru", 100, 8, 256, 256),
        ("gru", 100, 32, 256, 256),
        ("lstm", 100, 1, 512, 512),
        ("lstm", 100, 16, 512, 512),
    )
)
FORMATS = ("bfloat16", "float16", "int8", "int8-dynamic")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_weights", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="timing of a shape, for each contestant")
    parser.add_argument("--sequences", action="store_true", help="layers over sequences, rather than steps")
    options = parser.parse_args(arguments)
    bind(1)
    import torch

    torch.set_num_threads(1)
    if options.sequences:
        _print_sequences(options.seconds)
        return
    names = ("float32 us", *(f"{name}, x" for name in FORMATS), "ONNX Runtime, x", *(f"{n} error" for n in FORMATS))
    print(f"| step of I/H | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}")
    for shape in SHAPES:
        print(_row(shape, options.seconds), flush=True)


def _print_sequences(seconds: float) -> None:
    """Print a table of whole sequences."""
    names = ("float32 ms", "torch.nn, x", "torch's dynamic int8, x", *(f"{name}, x" for name in FORMATS))
    print(f"| T/N/I/H | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}")
    for shape in SEQUENCES:
        contestants = _layers(shape)
        for call in contestants.values():
            call()
        times = {name: timing.median for name, timing in take_turns(contestants, seconds).items()}
        ratios = [f"{times['float32'] / times[name]:.2f}" for name in list(times)[1:]]
        sizes = f"{shape.steps}/{shape.batch}/{shape.inputs}/{shape.hidden}"
        print(f"| {shape.cell} {sizes} | {1e3 * times['float32']:.2f} | {' | '.join(ratios)} |", flush=True)


def _layers(shape: Shape) -> dict[str, Callable[[], object]]:
    """Return a call of each layer, without gradients."""
    import torch
    from torch import nn

    import fusecell as fc

    ours, torchs = {"gru": (fc.GRU, nn.GRU), "lstm": (fc.LSTM, nn.LSTM)}[shape.cell]
    layer = ours(shape.inputs, shape.hidden).eval()
    theirs = torchs(shape.inputs, shape.hidden).eval()
    dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(theirs), {torchs}, dtype=torch.qint8)
    layers = {"float32": layer, "torch.nn": theirs, "torch's dynamic int8": dynamic}
    layers |= {name: fc.quantize(layer, name) for name in FORMATS}
    x = torch.randn(shape.steps, shape.batch, shape.inputs)

    def run(layer: nn.Module) -> object:
        with torch.inference_mode():
            return layer(x)

    return {name: functools.partial(run, layer) for name, layer in layers.items()}


def _row(shape: Shape, seconds: float) -> str:
    """Return a line of the table."""
    import torch

    import fusecell as fc
    from benchmarks.onnx_peers import onnx_runtime
    from benchmarks.problem import make_problem

    problem = make_problem(shape, Mode.STREAM)
    x = problem.inputs[0][0].numpy()
    contestants: dict[str, Callable[[], object]] = {}
    for name in ("float32", *FORMATS):
        contestants[name] = functools.partial(fc.Stream(problem.layer, weights=name).step, x)
    peer = onnx_runtime(problem, 1)
    assert peer is not None, "ONNX has GRU and LSTM"
    contestants["ONNX Runtime"] = peer
    for call in contestants.values():
        call()
    times = {name: timing.median for name, timing in take_turns(contestants, seconds).items()}
    reports = [fc.weight_error(problem.layer, torch.randn(200, shape.inputs), name).values[0] for name in FORMATS]
    ratios = [f"{times['float32'] / times[name]:.2f}" for name in (*FORMATS, "ONNX Runtime")]
    errors = [f"{report.rms / report.size:.1e}" for report in reports]
    numbers = (f"{1e6 * times['float32']:.2f}", *ratios, *errors)
    return f"| {shape.cell} {shape.inputs}/{shape.hidden} | {' | '.join(numbers)} |"


if __name__ == "__main__":
    main()
