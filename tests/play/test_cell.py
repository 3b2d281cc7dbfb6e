"""The step whose values, holds and weights are reached from outside, against torch.nn and against NumPy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.play import PlayCell
from tests.play.reference import held_gru

STEPS, ROWS, FEATURES, UNITS, OUT = 9, 3, 5, 13, 4
NEAR = {"atol": 1e-5, "rtol": 0}


def made(kind: str) -> PlayCell:
    torch.manual_seed(0)
    (member,) = [member for member in fc.CELLS if member.name == kind]
    return PlayCell(member.make(FEATURES, UNITS), nn.Linear(UNITS, OUT))


def free(cell: PlayCell) -> torch.Tensor:
    """Return an input of random numbers, with nothing held."""
    x = torch.full((STEPS, ROWS, cell.input_size), torch.nan)
    x[..., :FEATURES] = torch.randn(STEPS, ROWS, FEATURES)
    return x


@pytest.mark.parametrize(("kind", "theirs"), [("gru", nn.GRU), ("lstm", nn.LSTM), ("rnn_tanh", nn.RNN)])
@pytest.mark.parametrize("runner", ["eager", "compiled"])
def test_without_holds_it_is_torchs(kind, theirs, runner):
    cell = made(kind)
    layer = theirs(FEATURES, UNITS)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.cell.state_dict().items()})
    x = free(cell)
    with fc.runner(runner), torch.no_grad():
        y, states = fc.Recurrent(cell)(x)
        expected, _ = layer(x[..., :FEATURES])
        torch.testing.assert_close(y[..., cell.values["h"]], expected, **NEAR)
        torch.testing.assert_close(y[..., :OUT], cell.readout(expected), **NEAR)
    torch.testing.assert_close(states[0], expected[-1], **NEAR)


def test_each_row_has_weights_of_its_own():
    cell = made("gru")
    layers = [nn.GRU(FEATURES, UNITS) for _ in range(ROWS)]
    parameters = [[each.detach() for each in layer.parameters()] for layer in layers]
    weights = [torch.stack(values) for values in zip(*parameters, strict=True)]
    x, start = free(cell), cell.initial_state(ROWS)
    with torch.no_grad():
        y, _ = fc.Recurrent(cell)(x, (start[0], *weights, *start[5:]))
        expected = torch.cat([layer(x[:, [row], :FEATURES])[0] for row, layer in enumerate(layers)], 1)
    torch.testing.assert_close(y[..., cell.values["h"]], expected, **NEAR)


@pytest.mark.parametrize("kind", ["gru", "gru_reset_before"])
@pytest.mark.parametrize("runner", ["eager", "compiled"])
def test_held_values_of_a_gru(kind, runner):
    cell = made(kind)
    holds = {("r", 3): 0.0, ("z", 7): 0.25, ("n", 2): -0.5, ("h", 11): 0.75}
    x = free(cell)
    for (name, unit), number in holds.items():
        x[..., cell.holds[name].start + unit] = number
    with fc.runner(runner), torch.no_grad():
        y, _ = fc.Recurrent(cell)(x)
    for row in range(ROWS):
        expected = held_gru(cell.cell, x[:, row, :FEATURES], holds, after=kind == "gru")
        np.testing.assert_allclose(y[:, row, cell.values["h"]], expected, atol=1e-5)


def test_a_memory_that_is_held_reaches_the_output_of_the_same_step():
    cell = made("lstm")
    x = free(cell)
    x[..., cell.holds["c"]] = 0.5
    x[..., cell.holds["o"]] = 1.0
    with torch.no_grad():
        y, (h, c, *_) = fc.Recurrent(cell)(x)
    torch.testing.assert_close(h, torch.full((ROWS, UNITS), 0.5).tanh(), **NEAR)
    assert (c == 0.5).all()
    assert (y[..., cell.values["o"]] == 1).all()


def plays(member) -> bool:
    try:
        PlayCell(member.make(FEATURES, UNITS), nn.Linear(member.make(FEATURES, UNITS).output_size, OUT))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", [member.name for member in fc.CELLS if plays(member)])
def test_every_cell_of_the_zoo_is_itself(kind):
    """Its own layer, compiled without any of this, gives the same states; and it is a cell of the contract."""
    torch.manual_seed(0)
    (member,) = [member for member in fc.CELLS if member.name == kind]
    inner = member.make(FEATURES, UNITS)
    cell = PlayCell(inner, nn.Linear(inner.output_size, OUT))
    x = free(cell)
    with torch.no_grad():
        y, _ = fc.Recurrent(cell)(x)
        torch.testing.assert_close(
            y[..., cell.values[inner.states[0]]], fc.Recurrent(inner)(x[..., :FEATURES])[0], **NEAR
        )


def test_it_is_a_cell_of_the_contract():
    fc.testing.check_cell(made("rnn_tanh"))


def test_most_of_the_zoo_can_be_played_with():
    assert [member.name for member in fc.CELLS if not plays(member)] == ["scrn"]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (lambda: fc.wrappers.WithReadout(fc.GRUCell(5, 4), nn.Linear(4, 2)), "WithReadout's is another than h"),
        (lambda: fc.cells.GRUDCell(5, 4), "GRUDCell with inputs ('x', 'mask', 'delta')"),
        (lambda: fc.cells.LRUCell(5, 4), "LRUCell with inputs ('x',), input_size 5 and state_sizes ((4, 2),)"),
    ],
)
def test_cells_that_do_not_fit(cell, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PlayCell(cell(), nn.Linear(4, 2))
