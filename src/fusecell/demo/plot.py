"""The picture: held-out bits per character over seconds of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusecell.demo.train import Point

__all__ = ["plot_curves"]

_COLOURS = ("#0b6e99", "#d9730d", "#4d6461")
_INK, _FAINT = "#37352f", "#8a8a86"


def plot_curves(curves: Mapping[str, Sequence[Point]], baselines: Mapping[str, float], path: Path) -> None:
    """Draw learning curves into a PNG.

    Arguments:
        curves: for each model, its name and its points.
        baselines: bits per character of what doesn't learn over time, drawn as level lines.
        path: the file.
    """
    figure = Figure(figsize=(8, 4.5), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    last = max((points[-1].seconds for points in curves.values() if points), default=1.0)
    for (name, points), colour in zip(curves.items(), _COLOURS, strict=False):
        _draw_curve(axes, name, points, colour)
    for name, bits in baselines.items():
        axes.plot((0, last), (bits, bits), color=_FAINT, linewidth=1, linestyle=(0, (5, 4)), zorder=1)
        axes.annotate(
            f"{name}  {bits:.2f}", (0, bits), (6, 4), textcoords="offset points", color=_FAINT, fontsize=9, va="bottom"
        )
    axes.margins(y=0.1)
    axes.set_xlim(0, last * 1.25)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last * 1.01])
    axes.set_xlabel("seconds of training", color=_INK)
    axes.set_ylabel("bits per character", color=_INK)
    axes.set_title("Learning Python from the standard library", color=_INK, loc="left", fontsize=12, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK)
    axes.grid(axis="y", color="#eeeeec", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.savefig(path, facecolor="white")


def _draw_curve(axes: Axes, name: str, points: Sequence[Point], colour: str) -> None:
    """Held-out bits strongly, training bits faintly, the name at the end of the line."""
    if not points:
        return
    seconds = [point.seconds for point in points]
    held_out = [point.held_out for point in points]
    axes.plot(seconds, [point.training for point in points], color=colour, alpha=0.35, linewidth=1.2)
    axes.plot(seconds, held_out, color=colour, linewidth=2.2, marker="o", markersize=3.5)
    last = points[-1]
    axes.annotate(
        f"{name}  {last.held_out:.2f}\nheld-out text",
        (last.seconds, last.held_out),
        (9, 0),
        textcoords="offset points",
        color=colour,
        fontsize=10,
        fontweight="bold",
        va="center",
    )
    middle = points[2 * len(points) // 3]
    axes.annotate(
        "training",
        (middle.seconds, middle.training),
        (0, -6),
        textcoords="offset points",
        color=colour,
        alpha=0.6,
        va="top",
        ha="center",
    )
