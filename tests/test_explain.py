"""``explain`` says what a call does, and a call does what it says."""

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
    found = fc.explain(fc.Recurrent(zoo_cell.make(5, 8)))
    assert (found.runner, found.reasons) == ("compiled", ())


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
    found = fc.explain(module)
    assert found.runner == "compiled"
    assert "in the loop" in str(found)
    assert "multiply-adds" in str(found)


def test_the_input_product_leaves_the_loop():
    lines = str(fc.explain(fc.GRUCell(5, 10))).splitlines()
    before = next(line for line in lines if "before the loop" in line)
    inside = next(line for line in lines if "in the loop" in line)
    assert "lifted" in before
    assert "lifted" not in inside
    assert all(f" {gate}," in inside for gate in ("r", "z", "n"))


def test_reasons_carry_the_users_line():
    found = fc.explain(fc.Recurrent(fc.Stack(fc.GRUCell(4, 4), Branches(4, 4))))
    assert found.runner == "eager"
    assert any("if h.sum() > 0" in reason for reason in found.reasons)
    with torch.no_grad(), fc.runner("compiled"), pytest.raises(fc.NotCompilable):
        fc.scan(Branches(4, 4), torch.randn(2, 3, 4))


def test_the_runner_in_force_is_said():
    with fc.runner("eager"):
        found = fc.explain(fc.GRU(5, 10))
    assert found.runner == found.training_runner == "eager"
    assert found.reasons == ("The eager runner is in force.",)


def test_no_cell_is_an_error():
    with pytest.raises(TypeError, match="Linear"):
        fc.explain(nn.Linear(2, 3))
