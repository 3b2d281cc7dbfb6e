"""Plot learning curves: held-out bits per character over seconds of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusecell.demo.train import Point

__all__ = ["plot_curves"]

_COLOURS = ("#0b6e99", "#d9730d", "#4d6461")
_INK, _FAINT = "#37352f", "#8a8a86"
_DPI = 160
_LABEL_HEIGHT = 30.0
"""Height of a label of two lines with a gap, in points."""


def plot_curves(curves: Mapping[str, Sequence[Point]], baselines: Mapping[str, float], path: Path) -> None:
    """Draw learning curves into a PNG.

    Arguments:
        curves: the points of each model, at least one, by the model's name.
        baselines: bits per character of each baseline by its name, drawn as horizontal lines.
        path: the file to write.
    """
    figure = Figure(figsize=(8, 4.5), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    last = max(points[-1].seconds for points in curves.values())
    for points, colour in zip(curves.values(), _COLOURS, strict=False):
        seconds, bits = [point.seconds for point in points], [point.held_out for point in points]
        axes.plot(seconds, bits, color=colour, linewidth=2.2, marker="o", markersize=3.5)
    for name, level in baselines.items():
        axes.plot((0, last), (level, level), color=_FAINT, linewidth=1, linestyle=(0, (5, 4)), zorder=1)
        label = f"{name}  {level:.2f}"
        axes.annotate(label, (0, level), (6, 4), textcoords="offset points", color=_FAINT, fontsize=9, va="bottom")
    _style(axes, last)
    figure.draw_without_rendering()  # lays out the axes, whose positions _label_ends reads
    _label_ends(axes, curves)
    figure.savefig(path, facecolor="white")


def _style(axes: Axes, last: float) -> None:
    """Set scales, titles, spines and grid; leave room for labels on the right."""
    axes.margins(y=0.1)
    axes.set_xlim(0, last * 1.35)  # the labels at the ends of the curves need a third of the width
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last * 1.01])
    axes.set_xlabel("seconds of training", color=_INK)
    axes.set_ylabel("bits per character of held-out text", color=_INK)
    axes.set_title("Learning Python from the standard library", color=_INK, loc="left", fontsize=12, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK)
    axes.grid(axis="y", color="#eeeeec", linewidth=0.8)
    axes.set_axisbelow(True)


def _label_ends(axes: Axes, curves: Mapping[str, Sequence[Point]]) -> None:
    """Label the end of each curve with its name, its last bits per character and the characters read."""
    ends = [(points[-1], name, colour) for (name, points), colour in zip(curves.items(), _COLOURS, strict=False)]
    # From the bottom up, each label at least a label's height above the one below: two curves may end together.
    below = -math.inf
    for point, name, colour in sorted(ends, key=lambda end: end[0].held_out):
        y = axes.transData.transform((point.seconds, point.held_out))[1] * 72 / _DPI
        height = max(y, below + _LABEL_HEIGHT)
        below = height
        axes.annotate(
            f"{name}  {point.held_out:.2f}\n{point.characters / 1e6:.2g} million characters",
            (point.seconds, point.held_out),
            (9, height - y),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            fontweight="bold",
            va="center",
        )
