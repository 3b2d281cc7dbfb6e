"""``python -m benchmarks.plot RUN.json CHART.png``: how many times faster than each peer, losses included."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["draw", "main"]

_OURS = "fusecell"


def draw(run: dict[str, Any], path: Path) -> None:
    """Draw a run of :mod:`benchmarks.run`: a row for each shape, a mark for each peer; left of 1 is a loss."""
    shapes = run["shapes"][::-1]
    names = list(dict.fromkeys(name for shape in shapes[::-1] for name in shape["us_per_step"] if name != _OURS))
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.32 * len(shapes)), layout="constrained")
    axes.axvline(1, color="black", linewidth=1)
    for number, name in enumerate(names):
        points = [
            (times[name] / times[_OURS], row)
            for row, times in enumerate(shape["us_per_step"] for shape in shapes)
            if name in times and _OURS in times
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "osD^vP"[number % 6], label=name, markersize=6)
    labels = [
        f"{shape['cell']} {shape['steps']}/{shape['batch']}/{shape['inputs']}/{shape['hidden']}" for shape in shapes
    ]
    axes.set_yticks(range(len(shapes)), labels)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}x")
    axes.set_xlabel(f"peer's time over fusecell's, inference, {run['threads']} thread(s), {run['machine']['cpu']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the run, draw the chart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="what `python -m benchmarks.run --json` wrote")
    parser.add_argument("chart", type=Path, help="the picture, .png or .svg")
    options = parser.parse_args(arguments)
    draw(json.loads(options.run.read_text(encoding="utf-8")), options.chart)


if __name__ == "__main__":
    main()
