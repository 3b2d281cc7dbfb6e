"""``diagram``: a picture of a cell's step, made from its compiled graph.

Boxes are laid out from left to right, each to the right of all that it is computed from, and ordered within a column so
that few lines cross: the method of Sugiyama, Tagawa and Toda, "Methods for visual understanding of hierarchical system
structures", 1981. A line past other columns goes through a place of its own in each.
"""

from __future__ import annotations

import html
import os
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from fusecell.cell import Cell
from fusecell.cell_tree import HasCells
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.ir.step_boxes import Box, boxes_of
from fusecell.errors import NotCompilable
from fusecell.inspection.explain import explain
from fusecell.inspection.recurrent_parts import named_recurrent_parts
from fusecell.shapes import Size

__all__ = ["Diagram", "diagram"]

_LINE, _CHARACTER, _PADDING = 15, 6.4, 9
_COLUMN_GAP, _ROW_GAP, _MARGIN, _PASSAGE = 44, 16, 10, 8
_MOST_CHARACTERS, _MOST_LINES = 38, 6
_SWEEPS = 12
_STYLE = """
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1f2933 }
.name { font-weight: bold }
.formula { fill: #52606d }
rect { fill: #fff; stroke: #9aa5b1; rx: 6 }
path { fill: none; stroke: #9aa5b1; stroke-width: 1.3 }
marker path { fill: #9aa5b1; stroke: none }
.input rect { fill: #e3f0fb; stroke: #5b9bd5 }
.state rect { fill: #fdf0dc; stroke: #d9a441 }
.new-state rect { fill: #fdf0dc; stroke: #d9a441; stroke-width: 2 }
.output rect { fill: #e4f5e8; stroke: #57a773 }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e7eb }
  .formula { fill: #a5b1bd }
  rect { fill: #2a3038; stroke: #6b7785 }
  path { stroke: #6b7785 }
  marker path { fill: #6b7785 }
  .input rect { fill: #1d3348 }
  .state rect, .new-state rect { fill: #453416 }
  .output rect { fill: #1e3a28 }
}
"""


@dataclass(frozen=True)
class Diagram:
    """A picture of a step; a notebook shows it.

    Example:
        >>> import fusecell as fc
        >>> picture = fc.diagram(fc.cells.MGUCell(5, 10))
        >>> picture.boxes["n"].sources
        ('h', 'f', 'x')

    Attributes:
        boxes: the values in it, by name: the inputs, the states and the step's variables, with their formulas.
        svg: the picture, a whole SVG file with colours for a light and for a dark page.
    """

    boxes: Mapping[str, Box]
    svg: str = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture to a file, which should end in .svg."""
        Path(path).write_text(self.svg, encoding="utf-8")

    def _repr_svg_(self) -> str:
        return self.svg


def diagram(
    module: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    input_sizes: Sequence[Size] | None = None,
    input_dtypes: Sequence[torch.dtype] | None = None,
) -> Diagram:
    """Draw the step of a cell: its inputs and states, the variables of its step with their formulas, and new states.

    The picture is made of the graph that the compiler has traced, so that it shows what is computed, for any cell.

    Example:
        >>> import fusecell as fc
        >>> picture = fc.diagram(fc.GRU(5, 10))
        >>> list(picture.boxes)
        ['x', 'h', 'r', 'z', 'n', "h'", 'output']
        >>> picture.boxes["z"].formula
        'σ(weight_hh h + bias_hh + weight_ih x + bias_ih)'

    Arguments:
        module: a cell, or a layer of one kind of cell.
        path: where to write the picture, a file that ends in .svg; None only returns it.
        input_sizes: the features or shape of each input, for a cell with several inputs.
        input_dtypes: the dtype of each input, for a cell that takes integers: ``(torch.int64,)`` for token ids.

    Returns:
        The :class:`fusecell.inspection.diagram.Diagram`.

    Raises:
        TypeError: if there is no cell in the module.
        ValueError: if there are several kinds of cells, or input sizes are missing.
        NotCompilable: if the step can't be traced.
    """
    parts = [part for _, part in named_recurrent_parts(module) if isinstance(part, Cell | HasCells)]
    cells = {type(part): part for part in parts if isinstance(part, Cell)}
    if not parts:
        raise TypeError(f"diagram takes a cell or a layer of fusecell, got {type(module).__name__}, which has none.")
    if len(cells) > 1:
        kinds = ", ".join(kind.__name__ for kind in cells)
        raise ValueError(f"diagram takes one cell, or a layer of one kind, got a {type(module).__name__} of {kinds}.")
    target = next(iter(cells.values()), module)
    explained = explain(target, input_sizes=input_sizes, input_dtypes=input_dtypes)
    if explained.runner != "compiled" and explained.reasons:
        raise NotCompilable(type(target).__name__, explained.reasons)
    boxes = boxes_of(Graph.parse(explained.cells[0].graph))
    result = Diagram({box.name: box for box in boxes}, _svg(boxes, f"One step of {type(target).__name__}"))
    if path is not None:
        result.save(path)
    return result


@dataclass
class _Place:
    """A box in the picture, or the passage of a line through a column.

    Attributes:
        column: from the left.
        box: None for a passage.
        x, y: of its upper left corner.
        across: the width of a passage, that of its column.
        left, right: the places that lines come from, and go to.
    """

    column: int
    box: Box | None = None
    x: float = 0.0
    y: float = 0.0
    across: float = 0.0
    left: list[_Place] = field(default_factory=list)
    right: list[_Place] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """The formula in lines of a few words."""
        if self.box is None or not self.box.formula:
            return []
        lines = textwrap.wrap(self.box.formula, _MOST_CHARACTERS, break_long_words=True)
        return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], "…"]

    @property
    def width(self) -> float:
        if self.box is None:
            return self.across
        characters = max(map(len, (self.box.name, *self.lines)))
        return max(34.0, characters * _CHARACTER * 1.13 + 2 * _PADDING)

    @property
    def height(self) -> float:
        return _PASSAGE if self.box is None else _LINE * (1 + len(self.lines)) + 2 * _PADDING - 3

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


def _svg(boxes: Sequence[Box], title: str) -> str:
    """Draw boxes and the lines between them."""
    columns = _columns(boxes)
    _order(columns)
    width, height = _arrange(columns)
    places = [place for column in columns for place in column]
    lines = [_line(start, stop) for start in places for stop in start.right if start.box is not None]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" role="img">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            '<marker id="arrow" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0L8 4L0 8z"/></marker>',
            *lines,
            *(_rectangle(place) for place in places if place.box is not None),
            "</svg>",
            "",
        ]
    )


def _columns(boxes: Sequence[Box]) -> list[list[_Place]]:
    """Put each box to the right of its sources, ends to the very right, and a passage into each column on the way."""
    depth: dict[str, int] = {}
    for box in boxes:
        depth[box.name] = 1 + max((depth[source] for source in box.sources), default=-1)
    last = max(depth.values())
    depth |= {box.name: last for box in boxes if box.kind in ("new state", "output") and not _is_read(box, boxes)}
    columns: list[list[_Place]] = [[] for _ in range(last + 1)]
    places: dict[str, _Place] = {}
    for box in boxes:
        here = places[box.name] = _Place(depth[box.name], box)
        columns[here.column].append(here)
        for source in box.sources:
            start = places[source]
            for column in range(start.column + 1, here.column):
                passage = next((each for each in start.right if each.box is None), None) or _Place(column)
                if passage not in columns[column]:
                    columns[column].append(passage)
                    _join(start, passage)
                start = passage
            _join(start, here)
    return columns


def _is_read(box: Box, boxes: Sequence[Box]) -> bool:
    return any(box.name in other.sources for other in boxes)


def _join(start: _Place, stop: _Place) -> None:
    start.right.append(stop)
    stop.left.append(start)


def _order(columns: list[list[_Place]]) -> None:
    """Order each column by the middle of its neighbours, to the right and back, a few times over."""
    for sweep in range(_SWEEPS):
        forward = sweep % 2 == 0
        for column in columns if forward else columns[::-1]:
            rank = {id(place): at for other in columns for at, place in enumerate(other)}
            weight: dict[int, float] = defaultdict(float)
            for at, place in enumerate(column):
                beside = place.left if forward else place.right
                weight[id(place)] = sum(rank[id(each)] for each in beside) / len(beside) if beside else at
            column.sort(key=lambda place: weight[id(place)])


def _arrange(columns: list[list[_Place]]) -> tuple[float, float]:
    """Give each place its corner, columns in the middle of the height; return the picture's width and height."""
    heights = [sum(place.height + _ROW_GAP for place in column) - _ROW_GAP for column in columns]
    height, x = max(heights), float(_MARGIN)
    for column, own in zip(columns, heights, strict=True):
        y, width = _MARGIN + (height - own) / 2, max([place.width for place in column if place.box is not None])
        for place in column:
            place.across = width
            place.x, place.y = x + (width - place.width) / 2, y
            y += place.height + _ROW_GAP
        x += width + _COLUMN_GAP
    return x - _COLUMN_GAP + _MARGIN, height + 2 * _MARGIN


def _line(start: _Place, stop: _Place) -> str:
    """Draw the line from a box through passages to the next boxes, as one path for each."""
    paths = []
    pending = [[start, stop]]
    while pending:
        way = pending.pop()
        if way[-1].box is None:
            pending += [[*way, after] for after in way[-1].right]
        else:
            paths.append(way)
    return "\n".join(f'<path marker-end="url(#arrow)" d="{_curve(way)}"/>' for way in paths)


def _curve(way: Sequence[_Place]) -> str:
    parts = [f"M{way[0].x + way[0].width:.1f} {way[0].middle:.1f}"]
    for start, stop in pairwise(way):
        x, y, to_x, to_y = start.x + start.width, start.middle, stop.x, stop.middle
        bend = (x + to_x) / 2
        parts.append(f"C{bend:.1f} {y:.1f} {bend:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}")
        if stop.box is None:
            parts.append(f"H{stop.x + stop.width:.1f}")
    return "".join(parts)


def _rectangle(place: _Place) -> str:
    box = place.box
    assert box is not None
    texts = [f'<text class="name" x="{place.x + _PADDING:.1f}" y="{place.y + 20:.1f}">{html.escape(box.name)}</text>']
    texts += [
        f'<text class="formula" x="{place.x + _PADDING:.1f}" y="{place.y + 20 + _LINE * row:.1f}">'
        f"{html.escape(line)}</text>"
        for row, line in enumerate(place.lines, 1)
    ]
    formula = f"{box.name} = {box.formula}" if box.formula else f"{box.name}, {box.kind}"
    return (
        f'<g class="{box.kind.replace(" ", "-")}"><title>{html.escape(formula)} ({box.size} features)</title>'
        f'<rect x="{place.x:.1f}" y="{place.y:.1f}" width="{place.width:.1f}" height="{place.height:.1f}"/>'
        f"{''.join(texts)}</g>"
    )
