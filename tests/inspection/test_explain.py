"""``explain`` agrees with what a call does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusecell as fc


class Branches(fc.Cell):
    def step(self, x, state):
        (h,) = state
        if h.sum() > 0:
            h = h + x
        return h, (h,)


def test_every_zoo_cell_is_compiled(zoo_cell):
    explanation = fc.explain(fc.Recurrent(zoo_cell.make(5, 8)))
    assert (explanation.runner, explanation.training_runner, explanation.reasons) == ("compiled", "compiled", ())


@pytest.mark.parametrize(
    "module",
    [
        fc.GRU(5, 10, num_layers=2, bidirectional=True),
        fc.Bidirectional(fc.Recurrent(fc.GRUCell(5, 8)), fc.Recurrent(fc.LSTMCell(5, 6))),
        fc.Sequential(fc.Recurrent(fc.Stack(fc.GRUCell(5, 8), fc.LSTMCell(8, 3))), nn.Linear(3, 2)),
        fc.GRUCell(5, 8).double(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_layers_are_walked_to_their_cells(module):
    explanation = fc.explain(module)
    assert explanation.runner == "compiled"
    assert "in the loop" in str(explanation)
    assert "FLOPs" in str(explanation)
    assert "with gradients, the forward also saves" in str(explanation)


def test_the_input_product_leaves_the_loop():
    text = str(fc.explain(fc.GRUCell(5, 10)))
    before, _, rest = text.partition("before the loop")[2].partition("in the loop")
    inside, _, backward = rest.partition("with gradients")
    assert all(f"{gate}.input" in before for gate in "rzn")
    assert ".input" not in inside
    assert all(f" {gate}," in inside for gate in ("r", "z", "n"))
    assert ", the forward also saves h, r, z, n.hidden, n: 320 bytes per row and step" in backward
    assert "summed over all rows and steps: weight_ih, bias_ih, weight_hh, bias_hh" in backward


def test_the_figures_of_a_plain_gru():
    text = str(fc.explain(fc.GRUCell(64, 128)))
    flops = 2 * 3 * 128 * (64 + 128)
    assert f"{flops:,} FLOPs in matrix products per row and step" in text
    assert f"{4 * (3 * 128 * (64 + 128) + 6 * 128):,} bytes of weights" in text


def test_frozen_weights_need_no_backward():
    layer = fc.Recurrent(fc.GRUCell(5, 10))
    layer.requires_grad_(False)
    assert "with gradients" not in str(fc.explain(layer))


class Attending(fc.Cell):
    inputs = ("x", "context")

    def __init__(self, input_size, hidden_size, context_size):
        super().__init__(input_size, hidden_size)
        self.mix = nn.Linear(input_size + context_size, hidden_size)

    def step(self, x, state):
        x, context = x
        (h,) = state
        h = torch.tanh(self.mix(torch.cat([x, context], -1)) + h)
        return h, (h,)


def test_several_inputs_need_their_widths():
    layer = fc.Recurrent(Attending(5, 10, 3))
    with pytest.raises(ValueError, match=r"Attending takes 2 inputs \(x, context\), .*input_sizes"):
        fc.explain(layer)
    with pytest.raises(ValueError, match="got 1 input_sizes"):
        fc.explain(layer, input_sizes=(5,))
    assert fc.explain(layer, input_sizes=(5, 3)).runner == "compiled"


def test_reasons_carry_the_users_line():
    explanation = fc.explain(fc.Recurrent(fc.Stack(fc.GRUCell(4, 4), Branches(4, 4))))
    assert explanation.runner == "eager"
    assert any("if h.sum() > 0" in reason for reason in explanation.reasons)
    with torch.no_grad(), fc.runner("compiled"), pytest.raises(fc.NotCompilable):
        fc.scan(Branches(4, 4), torch.randn(2, 3, 4))


def test_the_eager_runner_is_reported():
    with fc.runner("eager"):
        explanation = fc.explain(fc.GRU(5, 10))
    assert explanation.runner == explanation.training_runner == "eager"
    assert explanation.reasons == ("The eager runner is in force.",)


def test_no_cell_is_an_error():
    with pytest.raises(TypeError, match="Linear"):
        fc.explain(nn.Linear(2, 3))
