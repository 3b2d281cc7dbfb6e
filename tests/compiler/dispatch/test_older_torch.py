"""torch.compile where torch can't have a layer in its graph, before 2.12: layers are called between graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.compiler.dispatch.torch_compile import _run_outside
from fusecell.torch_internals import TAKES_MODULES_AS_CONSTANTS

LAYERS = {"GRU": lambda: fc.GRU(3, 5), "MGU": lambda: fc.Recurrent(fc.cells.MGUCell(3, 5))}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield LAYERS[request.param]()


def between_graphs(monkeypatch):
    """Have this torch call layers as an older one does."""
    if TAKES_MODULES_AS_CONSTANTS:
        outside = torch._dynamo.disable(_run_outside, reason="takes torch 2.12 or newer")
        monkeypatch.setitem(fc.execution.runners._RUNNERS, "traced", outside)


def test_a_model_is_compiled_around_a_layer(layer, monkeypatch):
    between_graphs(monkeypatch)
    model = fc.Sequential(layer, nn.Linear(5, 2))
    x = torch.randn(7, 2, 3)
    expected = model(x)[0]
    expected.sum().backward()
    gradients = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    y = torch.compile(model, backend="eager")(x)[0]
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    for each, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(each.grad, gradient)


def test_one_graph_is_refused_with_the_version(layer, monkeypatch):
    between_graphs(monkeypatch)
    with pytest.raises(Exception, match=r"torch 2\.12 or newer"):  # torch's own kind of error
        torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(7, 2, 3))
