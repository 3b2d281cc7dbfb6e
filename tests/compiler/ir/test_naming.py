"""Values have the names of the user's variables through all passes; names are unique."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.compiler.frontend import Traced, trace
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.ir.naming import restore_names
from fusecell.compiler.transforms.partition import partition
from fusecell.compiler.transforms.passes import optimise


def joint(cell: fc.Cell) -> Graph:
    traced = trace(cell, [(cell.input_size,)], torch.float32, gradients=True)
    assert isinstance(traced, Traced)
    return traced.graph


def both(cell: fc.Cell) -> list[Graph]:
    """The optimised forward and backward for all gradients."""
    graph = joint(cell)
    graphs = partition(graph, [label for label in graph.outputs if label.startswith(("grad.input", "grad.weight"))])
    return [optimise(half)[-1][1] for half in (graphs.forward, graphs.backward)]


def names(graph: Graph) -> dict[str, str]:
    """Each value's arguments by its name."""
    return {node.name: ", ".join(graph[arg].name for arg in node.args) for node in graph.nodes}


def test_the_parts_of_a_gru_have_its_variables_names() -> None:
    forward, backward = map(names, both(fc.GRUCell(3, 5)))
    assert forward["r.input"] == "r.bias, x, weight_ih"
    assert forward["z.pre"] == "z.input, h, weight_hh"
    assert forward["z"] == "z.pre"
    assert forward["n.hidden"] == "bias_hh.n, h, weight_hh"
    assert forward["n.input"] == "bias_ih.n, x, weight_ih"
    assert forward["z.bias"] == "bias_hh.z, bias_ih.z"
    assert {"h.new", "n.pre", "n"} <= set(forward)
    assert {"saved.n.hidden", "grad.x", "grad.h.new", "grad.weight_hh"} <= set(backward)


def test_a_function_of_a_variable_has_its_name() -> None:
    assert names(both(fc.LSTMCell(3, 5))[0])["c.new.tanh"] == "c.new"


def test_names_are_unique_and_stable(zoo_cell) -> None:
    cell = zoo_cell.make(3, 5)
    for graph, again in zip((joint(cell), *both(cell)), (joint(cell), *both(cell)), strict=True):
        assert len({node.name for node in graph.nodes}) == len(graph.nodes)
        assert graph.text == again.text
        assert Graph.parse(graph.text) == graph


def test_names_are_all_that_changes(zoo_cell) -> None:
    stages = dict(optimise(joint(zoo_cell.make(3, 5))))
    before, after = stages["split_affines"], stages["restore_names"]
    assert before.outputs == after.outputs
    assert [replace(node, name="") for node in before.nodes] == [replace(node, name="") for node in after.nodes]
    assert restore_names(after, stages["traced"]).text == after.text


class Shadowing(fc.Cell):
    """A step whose variables have the names of primitives, of the input, and of parts of other values."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.of_x, self.of_h = nn.Linear(input_size, hidden_size), nn.Linear(hidden_size, hidden_size)

    def step(self, x, state):
        (h,) = state
        x = self.of_x(x)
        sum = self.of_h(h) + x
        mul = torch.tanh(sum)
        self.note("mul.pre", sum * 2)
        return mul, (mul,)


def test_a_variable_keeps_its_name_whatever_it_is() -> None:
    graph = joint(Shadowing(3, 5))
    parts = names(graph)
    assert parts["mul"] == "sum"
    assert "x.1" in parts
    assert parts["mul.pre"].startswith(("sum", "c2"))
    forward = names(both(Shadowing(3, 5))[0])
    assert forward["mul"] == "sum"
    assert forward["sum"] == "sum.input, h, of_h_weight"


@pytest.mark.parametrize("name", ["c2", "x", "grad.x", "h.new"])
def test_noted_names_stay_unique(name: str) -> None:
    class Noting(fc.Cell):
        def step(self, x, state):
            (h,) = state
            return h + x, (self.note(name, torch.tanh(h) * 2.0 + x),)

    for graph in (joint(Noting(4, 4)), *both(Noting(4, 4))):
        assert len({node.name for node in graph.nodes}) == len(graph.nodes)
        assert Graph.parse(graph.text) == graph


def test_long_names_leave_room_for_what_is_added() -> None:
    """A graph's names have 256 characters at most, with all that passes and saving add to them."""

    class Long(fc.Cell):
        def __init__(self, size: int) -> None:
            super().__init__(size, size)
            self.of_x, self.of_h = nn.Linear(size, 2 * size), nn.Linear(size, 2 * size)
            setattr(self, "w" * 180, nn.Parameter(torch.randn(2 * size)))

        def step(self, x, state):
            (h,) = state
            gates = self.of_x(x) + self.of_h(h) + getattr(self, "w" * 180)
            first, second = gates.chunk(2, -1)
            first = self.note("n" * 300, torch.sigmoid(first))
            return first, (torch.tanh(torch.tanh(second) * first),)

    x = torch.randn(3, 2, 4, requires_grad=True)
    with fc.runner("compiled"):
        y, _ = fc.scan(Long(4), x)
        y.sum().backward()
    for graph in both(Long(4)):
        assert max(len(node.name) for node in graph.nodes) <= 256
        assert any(node.name == "n" * 120 for node in graph.nodes) or "saved." + "n" * 120 in names(graph)
