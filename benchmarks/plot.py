"""Plot how many times faster than each peer fusecell is: ``python -m benchmarks.plot RUN.json CHART.png``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: there may be no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.shapes import Mode

__all__ = ["draw", "main"]

_OURS = "fusecell"


def draw(run: dict[str, Any], path: Path) -> None:
    """Plot the results of :mod:`benchmarks.run`: a panel for each mode, a row for each shape, a mark for each peer.

    Marks left of 1 are losses.

    Arguments:
        run: the content of its JSON file.
        path: the image to write.
    """
    shapes = {mode: [shape for shape in run["shapes"] if shape["mode"] == mode.value][::-1] for mode in Mode}
    shapes = {mode: of_mode for mode, of_mode in shapes.items() if of_mode}
    names = list(dict.fromkeys(name for shape in run["shapes"] for name in shape["us_per_step"] if name != _OURS))
    rows = [len(of_mode) for of_mode in shapes.values()]
    figure, panels = plt.subplots(
        len(shapes),
        figsize=(8, 0.4 + 0.8 * len(shapes) + 0.32 * sum(rows)),
        height_ratios=rows,
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    for (mode, of_mode), axes in zip(shapes.items(), panels[:, 0], strict=True):
        axes.set_title(mode.title, loc="left", fontsize="medium")
        _draw_mode(axes, of_mode, names)
    panels[-1, 0].set_xlabel(f"peer's time over fusecell's, {run['threads']} thread(s), {run['machine']['cpu']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_mode(axes: Axes, shapes: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    axes.axvline(1, color="black", linewidth=1)
    for number, name in enumerate(names):
        points = [
            (times[name] / times[_OURS], row)
            for row, times in enumerate(shape["us_per_step"] for shape in shapes)
            if name in times and _OURS in times
        ]
        if points:
            mark = "osD^vP"[number % 6]
            axes.plot(*zip(*points, strict=True), mark, label=name, color=f"C{number}", markersize=6)
    labels = [
        f"{shape['cell']} {shape['steps']}/{shape['batch']}/{shape['inputs']}/{shape['hidden']}" for shape in shapes
    ]
    axes.set_yticks(range(len(shapes)), labels)
    axes.set_ylim(-0.5, len(shapes) - 0.5)
    axes.set_xscale("log", base=2)  # twice as fast and twice as slow are equally far from 1
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}x")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the results and write the chart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="what `python -m benchmarks.run --json` wrote")
    parser.add_argument("chart", type=Path, help="the picture, .png or .svg")
    options = parser.parse_args(arguments)
    draw(json.loads(options.run.read_text(encoding="utf-8")), options.chart)


if __name__ == "__main__":
    main()
