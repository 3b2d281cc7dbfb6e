"""torch.fx.symbolic_trace: layers and cells are nodes of its graphs, as torch.nn's are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusecell as fc


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.out = layer, nn.Linear(8, 2)

    def forward(self, x):
        y, state = self.layer(x)
        return self.out(torch.relu(y)), state


class Loop(nn.Module):
    def __init__(self, library):
        super().__init__()
        self.first, self.second = library.GRUCell(5, 8), library.LSTMCell(8, 8)

    def forward(self, x, h):
        h = self.first(x, h)
        return self.second(h, self.second(h, hx=None))


@pytest.mark.parametrize(
    "make",
    [
        lambda library: Model(library.GRU(5, 8)),
        lambda library: Model(library.LSTM(5, 8, 2, batch_first=True)),
        Loop,
    ],
)
def test_the_graph_is_that_of_torchs_model(make):
    graphs, models = [], []
    for library in (fc, nn):
        torch.manual_seed(0)
        models.append(make(library))
        graphs.append(torch.fx.symbolic_trace(models[-1]))
    assert [(node.op, node.target) for node in graphs[0].graph.nodes] == [
        (node.op, node.target) for node in graphs[1].graph.nodes
    ]
    x = (torch.randn(4, 5), torch.randn(4, 8)) if isinstance(models[0], Loop) else (torch.randn(7, 4, 5),)
    torch.testing.assert_close(graphs[0](*x)[0], models[0](*x)[0])
    torch.testing.assert_close(graphs[0](*x)[0], graphs[1](*x)[0], rtol=1e-4, atol=1e-5)


class Leaky(fc.Cell):
    def step(self, x, state):
        (h,) = state
        return 0.5 * (x + h), (0.5 * (x + h),)


@pytest.mark.parametrize(
    "layer",
    [
        fc.Recurrent(fc.LSTMCell(5, 8), reverse=True),
        fc.Recurrent(fc.Stack(Leaky(5, 5), fc.GRUCell(5, 8))),
        fc.Bidirectional(fc.Recurrent(fc.GRUCell(5, 4)), fc.Recurrent(fc.GRUCell(5, 4))),
        fc.Sequential(fc.Recurrent(fc.GRUCell(5, 6)), nn.Linear(6, 8)),
    ],
)
def test_any_layer_is_a_node(layer):
    model, x = Model(layer), torch.randn(7, 4, 5)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layer", "out"]
    assert torch.equal(traced(x)[0], model(x)[0])


def test_lengths_and_states_are_arguments_of_the_node():
    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fc.LSTM(5, 8)

        def forward(self, x, h, c, lengths):
            return self.layer(x, (h, c), lengths=lengths)[0]

    model = Ragged()
    arguments = torch.randn(7, 3, 5), torch.randn(1, 3, 8), torch.randn(1, 3, 8), torch.tensor([7, 0, 3])
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(*arguments), model(*arguments))
    assert traced.graph.find_nodes(op="call_module", target="layer")[0].kwargs.keys() == {"lengths"}


def test_what_is_no_node_is_a_sentence():
    for root in (fc.GRU(5, 8), fc.Recurrent(Leaky(5, 5))):
        with pytest.raises(RuntimeError, match=r"can't trace \w+ itself.*torch.export"):
            torch.fx.symbolic_trace(root)
    stranger, cell = fc.GRU(5, 8), Leaky(5, 5)

    class Calls(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    # torch refuses a stranger itself, unless it is asked for its forward.
    with pytest.raises(RuntimeError, match=r"GRU: Calls, which is traced, has no such submodule"):
        torch.fx.symbolic_trace(Calls(stranger.forward))
    for name, function in (("scan", lambda x: fc.scan(cell, x)), ("step", lambda x: fc.step(cell, x))):
        with pytest.raises(TypeError, match=rf"can't record fusecell.{name}.*torch.export"):
            torch.fx.symbolic_trace(Calls(function))
