"""Time exported steps against ONNX Runtime's, both called from C: ``python -m benchmarks.from_c``.

One row, one core. The object file of each cell is linked with ``from_c.c``, which also opens an ONNX Runtime session of
the same weights by its C API, with tensors made once; both run the same steps, and the program compares their outputs.
It needs gcc.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import bind
from benchmarks.shapes import Mode, Shape

__all__ = ["main", "time_shape"]

SHAPES = tuple(
    Shape(*each)
    for each in (("gru", 1, 1, 4, 16), ("gru", 1, 1, 40, 128), ("lstm", 1, 1, 40, 128), ("gru", 1, 1, 256, 256))
)
FORMATS = ("float32", "bfloat16", "int8", "int8-dynamic")
_SOURCE = Path(__file__).with_name("from_c.c")
_FARTHEST = 1e-5
"""Between two outputs of float32."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.from_c", description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=101, help="of 400 steps of each contestant")
    options = parser.parse_args(arguments)
    bind(1)
    names = ("ONNX Runtime us", *(f"{name} us" for name in FORMATS), "float32, x", "int8-dynamic, x")
    print(f"| step of I/H, from C | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}")
    for shape in SHAPES:
        timings = {name: time_shape(shape, name, options.turns) for name in FORMATS}
        peer = statistics.median(peer for _, peer in timings.values())
        ratios = (peers / ours for ours, peers in (timings["float32"], timings["int8-dynamic"]))
        cells = [f"{peer:.2f}", *(f"{ours:.2f}" for ours, _ in timings.values()), *(f"{ratio:.1f}" for ratio in ratios)]
        print(f"| {shape.cell} {shape.inputs}/{shape.hidden} | {' | '.join(cells)} |", flush=True)


def time_shape(shape: Shape, weights: str, turns: int) -> tuple[float, float]:
    """Return the median microseconds of an exported step and of ONNX Runtime's.

    Raises:
        AssertionError: if their outputs differ, in float32.
    """
    import fusecell as fc
    from benchmarks.onnx_peers import make_model
    from benchmarks.problem import make_problem

    problem = make_problem(shape, Mode.STREAM)
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder, "cell")
        fc.export(fc.Stream(problem.layer, weights=weights), stem, target="host", format="object", prefix="cell")
        model = stem.with_suffix(".onnx")
        model.write_bytes(make_model(problem).SerializeToString())
        program = stem.with_suffix(".program")
        build = [
            "gcc",
            "-O2",
            "-std=gnu11",
            "-I",
            folder,
            _SOURCE,
            stem.with_suffix(".o"),
            "-o",
            program,
            "-ldl",
            "-lm",
        ]
        subprocess.run(build, check=True)
        states = ["h", "c"] if shape.cell == "lstm" else ["h"]
        run = [program, _library(), model, str(turns), *states]
        *lines, difference = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    assert weights != "float32" or float(difference) < _FARTHEST, f"outputs differ by {difference}"
    ours, peers = zip(*(map(float, line.split()) for line in lines), strict=True)
    return statistics.median(ours), statistics.median(peers)


def _library() -> Path:
    """Return ONNX Runtime's library, which its wheel has."""
    import onnxruntime

    libraries = sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*"))
    if not libraries:
        raise FileNotFoundError("This onnxruntime has no libonnxruntime.so; onnxruntime 1.20 and later have it.")
    return libraries[0]


if __name__ == "__main__":
    main()
