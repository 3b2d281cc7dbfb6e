"""Drawings of steps: what is in them is what the step computes."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecell as fc
from fusecell.compiler.ir.step_boxes import Box
from fusecell.inspection.diagram import _columns, _svg

_SVG = "{http://www.w3.org/2000/svg}"


class Own(fc.Cell):
    """A cell whose formulas have names: two states, a gate, and functions made of others."""

    states = ("h", "trace")

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__(inputs, size)
        self.state_sizes = (size, size)
        self.maps = nn.Linear(inputs + size, 2 * size)
        self.norm = nn.LayerNorm(size)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        h, trace = state
        left, right = self.maps(torch.cat([x, h], 1)).chunk(2, 1)
        gate = torch.sigmoid(left)
        candidate = F.softplus(self.norm(right))
        h = gate * h + (1 - gate) * F.silu(candidate)
        trace = 0.9 * trace + F.relu(h) - F.softmax(h, 1)
        return h - trace, (h, trace)


def formulas(cell):
    return {name: box.formula for name, box in fc.diagram(cell).boxes.items()}


def test_formulas_of_a_cell_of_ones_own():
    found = formulas(Own(3, 5))
    assert list(found) == ["x", "h", "trace", "gate", "candidate", "h'", "trace'", "output"]
    assert found["gate"] == "σ(maps_weight [x, h] + maps_bias)"
    assert found["candidate"] == "softplus(layer_norm(maps_weight [x, h] + maps_bias)·norm_weight + norm_bias)"
    assert found["h'"] == "h·gate + (1 − gate)·silu(candidate)"
    assert found["trace'"] == "trace·0.9 + relu(h') − softmax(h')"
    assert found["output"] == "h' − trace'"


def test_a_gate_times_another_part_is_no_silu():
    """Two parts of one product: z n is not silu of either."""
    assert formulas(fc.cells.MinGRUCell(3, 5))["h'"] == "h·(1 − z) + z·n"


def test_parentheses():
    class Signs(fc.Cell):
        def step(self, x, state):
            (h,) = state
            both = (x - h) / (x + h) - (h - (x - 2)) / 3 / h
            h = -(both + x)
            return h, (h,)

    found = formulas(Signs(3, 3))
    assert found["both"] == "(x − h)/(x + h) − (h − (x − 2))/3/h"
    assert found["h'"] == "−(x + both)"


@pytest.mark.parametrize("entry", fc.CELLS, ids=lambda entry: entry.name)
def test_sources_come_before_what_is_computed_from_them(entry):
    boxes = list(fc.diagram(entry.make(3, 5).eval()).boxes.values())
    seen: set[str] = set()
    for box in boxes:
        assert set(box.sources) <= seen
        assert bool(box.formula) == (box.kind not in ("input", "state"))
        seen.add(box.name)
    cell = entry.make(3, 5)
    assert {box.name for box in boxes if box.kind == "new state"} == {f"{name}'" for name in cell.states}


def rectangles(svg: str):
    root = ElementTree.fromstring(svg)
    return {
        group.find(f"{_SVG}text").text: tuple(
            float(group.find(f"{_SVG}rect").get(name)) for name in ("x", "y", "width", "height")
        )
        for group in root.iter(f"{_SVG}g")
    }, root


@pytest.mark.parametrize("entry", [*fc.CELLS, *fc.cells.STRUCTURED_CELLS], ids=lambda entry: entry.name)
def test_boxes_lie_apart_and_inside_and_hold_their_text(entry):
    inputs = entry.inputs(2, 1, 32) if hasattr(entry, "inputs") else torch.zeros(2, 1, 32)
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    drawing = fc.diagram(entry.make(32, 64).eval(), input_sizes=[tuple(each.shape[2:]) for each in tensors])
    places, root = rectangles(drawing.svg)
    _, _, width, height = map(float, root.get("viewBox").split())
    for x, y, w, h in places.values():
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height  # noqa: PT018  # one box
    for (x, y, w, h), (x2, y2, w2, h2) in itertools.combinations(places.values(), 2):
        assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
    for group in root.iter(f"{_SVG}g"):
        box = group.find(f"{_SVG}rect")
        for text in group.iter(f"{_SVG}text"):
            # A monospaced digit of 12 pixels is 7.2 wide.
            assert float(text.get("x")) + 7.2 * len(text.text) <= float(box.get("x")) + float(box.get("width")) + 1


def test_a_line_past_other_columns_crosses_no_box():
    chain = [Box("x", "input", "", (), 1)]
    for number in range(5):
        chain.append(Box(f"v{number}", "value", "f(...)", (chain[-1].name, "x"), 1))
    columns = _columns(chain)
    assert [sum(place.box is None for place in column) for column in columns] == [0, 1, 1, 1, 1, 0]
    svg = _svg(chain, "a chain")
    assert svg.count("<rect") == 6
    # Through each of the four columns between x and the last value it goes straight on.
    assert max(path.count("H") for path in re.findall(r'd="(M[^"]*)"', svg)) == 4


def test_files_and_notebooks(tmp_path):
    drawing = fc.diagram(fc.GRU(3, 5, num_layers=2), tmp_path / "gru.svg")
    assert (tmp_path / "gru.svg").read_text(encoding="utf-8") == drawing.svg == drawing._repr_svg_()
    assert "prefers-color-scheme: dark" in drawing.svg
    assert fc.diagram(fc.Recurrent(fc.GRUCell(3, 5))).boxes.keys() == drawing.boxes.keys()


def test_what_is_refused():
    with pytest.raises(TypeError, match="diagram takes a cell or a layer of fusecell, got Linear"):
        fc.diagram(nn.Linear(3, 5))
    with pytest.raises(ValueError, match="of GRUCell, LSTMCell"):
        fc.diagram(fc.Sequential(fc.Recurrent(fc.GRUCell(3, 5)), fc.Recurrent(fc.LSTMCell(5, 5))))

    class Reads(fc.Cell):
        def step(self, x, state):
            (h,) = state
            h = h if float(x.sum()) > 0 else -h
            return h, (h,)

    with pytest.raises(fc.NotCompilable, match="reads the value of a tensor"):
        fc.diagram(Reads(3, 3))
