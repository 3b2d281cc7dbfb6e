"""Plot one picture of all machines and shapes: ``python -m benchmarks.overview RUN.json ... CHART.png``.

A row for each group of users, a mark for each run: how many times as fast as the fastest peer of each shape, the
geometric mean over the group's shapes, with a line from the worst of these to the best. What is slower is red.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: there may be no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.shapes import USERS, Mode, Shape

__all__ = ["draw", "main", "ratios"]

_LOSS = "#c0392b"
_APART = 0.24
"""Between the marks of two runs in a row, as a share of it."""


def ratios(run: Mapping[str, Any], mode: Mode) -> dict[str, list[float]]:
    """List, for each group of users, the fastest peer's time over fusecell's for each of its shapes in a run."""
    measured = {
        Shape(*(each[name] for name in ("cell", "steps", "batch", "inputs", "hidden"))): each["ratio_to_best_peer"]
        for each in run["shapes"]
        if each["mode"] == mode.value
    }
    return {user: [measured[shape] for shape in shapes if shape in measured] for user, shapes in USERS.items()}


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot runs of :mod:`benchmarks.run`.

    Arguments:
        runs: the contents of their JSON files.
        path: the image to write.
    """
    modes = (Mode.INFERENCE, Mode.TRAINING)
    figure, panels = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.85 * len(USERS)), layout="constrained", sharex=True, sharey=True
    )
    for mode, axes in zip(modes, panels, strict=True):
        _draw_mode(axes, runs, mode)
    panels[0].set_yticks(range(len(USERS)), USERS)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1, frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_mode(axes: Axes, runs: Sequence[Mapping[str, Any]], mode: Mode) -> None:
    axes.set_title(mode.title, loc="left", fontsize="medium")
    axes.axvline(1, color="black", linewidth=1)
    for number, run in enumerate(runs):
        shift = _APART * (number - (len(runs) - 1) / 2)
        label: str | None = _name(run)
        for row, values in enumerate(ratios(run, mode).values()):
            if not values:
                continue
            mean, at = geometric_mean(values), row + shift
            axes.plot([min(values), max(values)], [at, at], color=f"C{number}", linewidth=2, alpha=0.45)
            if min(values) < 1:
                axes.plot([min(values), min(1, max(values))], [at, at], color=_LOSS, linewidth=3)
            axes.plot([mean], [at], "o", color=f"C{number}" if mean >= 1 else _LOSS, markersize=7, label=label)
            axes.annotate(
                f"{mean:.{2 if mean < 1.2 else 1}f}x",
                (mean, at),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
            label = None  # once in the legend
    axes.set_xscale("log", base=2)  # twice as fast and twice as slow are equally far from 1
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}x")
    axes.set_xlabel("times as fast as the fastest other library")
    axes.grid(alpha=0.3)


def _name(run: Mapping[str, Any]) -> str:
    cores = "one core" if run["threads"] == 1 else f"{run['threads']} cores"
    level = {"x86-64-v3": ", all held to AVX2"}.get(run.get("level") or "", "")
    unheld = run.get("not_held_to_level") or ()
    return f"{run['machine']['cpu']}, {cores}{level}{' but ' + ', '.join(unheld) if unheld else ''}, {run['date'][:10]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the results and write the chart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overview", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="what `python -m benchmarks.run --json` wrote")
    parser.add_argument("chart", type=Path, help="the picture, .png or .svg")
    options = parser.parse_args(arguments)
    draw([json.loads(run.read_text(encoding="utf-8")) for run in options.runs], options.chart)


if __name__ == "__main__":
    main()
