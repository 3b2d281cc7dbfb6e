"""Cells with heads, matrices, images, spikes or several inputs: against the loop, and maths of another form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecell as fc
from fusecell.cells import STRUCTURED_CELLS, StructuredCell
from fusecell.testing import check_cell


def _inputs(entry: StructuredCell, steps: int, rows: int) -> tuple[Tensor, ...]:
    inputs = entry.inputs(steps, rows, 12)
    return tuple(value.double() for value in (inputs if isinstance(inputs, tuple) else (inputs,)))


def _results(cell: fc.Cell, inputs: tuple[Tensor, ...], runner: str, **options: Any) -> list[Tensor]:
    """Outputs, states and gradients, with the same noise each time."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    torch.manual_seed(1)
    with fc.runner(runner):
        output, state = fc.Recurrent(cell)(tuple(leaves) if len(leaves) > 1 else leaves[0], **options)
    outputs = list(output.values()) if isinstance(output, dict) else [output]
    states = list(state) if isinstance(state, tuple) else [state]
    loss = sum((value * torch.linspace(-1, 1, value.numel()).double().reshape(value.shape)).sum() for value in outputs)
    loss = loss + sum((value**2).sum() for value in states)
    gradients = torch.autograd.grad(loss, [*leaves, *cell.parameters()], allow_unused=True)
    return [*outputs, *states, *(torch.zeros(()) if each is None else each for each in gradients)]


@pytest.mark.parametrize("entry", STRUCTURED_CELLS, ids=lambda entry: entry.name)
def test_the_kernel_equals_the_loop(entry: StructuredCell) -> None:
    torch.manual_seed(0)
    cell = entry.make(12, 40).double()
    inputs = _inputs(entry, 6, 3)
    options = {"lengths": torch.tensor([6, 2, 4]), "resets": torch.rand(6, 3) < 0.3}
    compiled, eager = (_results(cell, inputs, runner, **options) for runner in ("compiled", "eager"))
    for actual, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(actual, expected.expand_as(actual), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("entry", STRUCTURED_CELLS, ids=lambda entry: entry.name)
def test_the_graph_is_as_long_for_large_sizes(entry: StructuredCell) -> None:
    from fusecell.compiler.frontend import Traced, trace

    lengths = []
    for features, size in ((16, 16), (128, 128)):
        cell = entry.make(features, size)
        inputs = entry.inputs(1, 1, features)
        shapes = [tuple(value.shape[2:]) for value in (inputs if isinstance(inputs, tuple) else (inputs,))]
        shapes += [tuple(value.shape[2:]) for value in cell.draw(1, 1)]
        traced = trace(cell, shapes, torch.float32, gradients=True)
        assert isinstance(traced, Traced), traced
        lengths.append(len(traced.graph.nodes))
    assert abs(lengths[1] - lengths[0]) <= 2, lengths


def test_delta_net_replaces_what_a_key_stood_for() -> None:
    """With alpha = beta = 1 the memory returns a value for its key exactly, however often it was overwritten."""
    cell = fc.cells.GatedDeltaNetCell(6, 4, heads=1).double()
    with torch.no_grad():
        cell.gate_map.weight.zero_()
        cell.gate_map.bias.fill_(50.0)
    x = torch.randn(5, 2, 6, dtype=torch.float64)
    _, S = fc.Recurrent(cell)(x)
    _, k, v = cell.maps(x[-1]).chunk(3, -1)
    torch.testing.assert_close((S[:, 0] @ F.normalize(k, dim=-1)[..., None])[..., 0], v)


def test_lru_equals_its_convolution() -> None:
    """A linear recurrence is a sum over the past: s_t = sum of lambda^k gamma B x_(t-k)."""
    cell = fc.cells.LRUCell(3, 5, memory=4).double()
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    y, _ = fc.Recurrent(cell)(x)
    size = torch.exp(-torch.exp(cell.nu))
    turn = torch.polar(size, torch.exp(cell.theta))
    real, imaginary = cell.input(x).chunk(2, -1)
    driven = torch.sqrt(1 - size**2) * torch.complex(real, imaginary)
    s = sum(turn**k * driven[5 - k] for k in range(6))
    torch.testing.assert_close(y[-1], cell.output(torch.view_as_real(s).flatten(1)) + cell.skip(x[-1]))


def test_mamba_is_attention() -> None:
    """The duality of the paper: y_t = sum over s of C_t B_s (decay from s to t) delta_s x_s."""
    cell = fc.cells.Mamba2Cell(3, 4, heads=2, memory=3, taps=1).double()
    x = torch.randn(5, 1, 3, dtype=torch.float64)
    y, _ = fc.Recurrent(cell)(x)
    z, u, delta = cell.input(x).split([4, 10, 2], -1)
    mixed = F.silu(u * cell.conv.weight.view(-1) + cell.conv.bias)
    u, B, C = mixed.split([4, 3, 3], -1)
    u, delta = u.unflatten(-1, (2, 2)), F.softplus(delta)
    decays = -(delta * torch.exp(cell.log_A)).cumsum(0)
    expected = cell.D[:, None] * u[-1]
    for s in range(5):
        weight = (C[-1] * B[s]).sum(-1)[:, None] * torch.exp(decays[-1] - decays[s]) * delta[s]
        expected = expected + weight[..., None] * u[s]
    torch.testing.assert_close(y[-1], expected.flatten(1) * F.silu(z[-1]))


def test_conv_gru_of_a_point_is_a_gru() -> None:
    """With images of one pixel, a convolution is a product with the middle of its kernel."""
    cell = fc.cells.ConvGRUCell(3, 4, size=(1, 1)).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    y, _ = fc.Recurrent(cell)(x[..., None, None])
    h = torch.zeros(2, 4, dtype=torch.float64)
    gates, candidate = (conv.weight[:, :, 1, 1] for conv in (cell.gate_map, cell.candidate))
    for value in x:
        z, r = torch.sigmoid(torch.cat((value, h), 1) @ gates.T + cell.gate_map.bias).chunk(2, 1)
        n = torch.tanh(torch.cat((value, r * h), 1) @ candidate.T + cell.candidate.bias)
        h = (1 - z) * h + z * n
    torch.testing.assert_close(y[-1, :, :, 0, 0], h)


def test_gru_d_without_gaps_is_a_gru() -> None:
    cell = fc.cells.GRUDCell(3, 4).double()
    with torch.no_grad():
        cell.decay_h.weight.zero_()
        cell.decay_h.bias.fill_(-1.0)
    x, ones = torch.randn(5, 2, 3).double(), torch.ones(5, 2, 3).double()
    y, _ = fc.Recurrent(cell)((x, ones, ones))
    h = torch.zeros(2, 4, dtype=torch.float64)
    for value in x:
        h = cell.gru(torch.cat((value, torch.ones_like(value)), -1), h)
    torch.testing.assert_close(y[-1], h)


def test_neurons_spike_at_the_rate_of_their_input() -> None:
    """Without leak or feedback a neuron of constant input spikes once for every threshold that came in."""
    cell = fc.cells.LIFCell(1, 1, beta=1.0)
    with torch.no_grad():
        cell.input.weight.zero_()
        cell.input.bias.fill_(0.23)
        cell.recurrent.weight.zero_()
    spikes, _ = fc.Recurrent(cell)(torch.zeros(1000, 1, 1))
    assert abs(float(spikes.detach().sum()) - 230) <= 2


def test_attention_of_equal_places_is_their_mean() -> None:
    cell = fc.cells.AttentionGRUCell(3, 4, memory=(5, 2)).double()
    memory = torch.randn(1, 2, 1, 2).double().expand(1, 2, 5, 2)
    x = torch.randn(4, 2, 3).double()
    y, _ = fc.Recurrent(cell)((x, memory))
    h = torch.zeros(2, 4, dtype=torch.float64)
    for value in x:
        h = cell.gru(torch.cat((value, memory[0, :, 0]), -1), h)
    torch.testing.assert_close(y[-1], h)


def test_slstm_stays_finite_where_exponentials_would_not() -> None:
    cell = fc.cells.SLSTMCell(2, 8, heads=2)
    with torch.no_grad():
        cell.input.weight.mul_(300)
    y, _ = fc.Recurrent(cell)(torch.randn(50, 3, 2) * 10)
    assert y.isfinite().all()
    assert float(y.detach().abs().max()) <= 1 + 1e-5


def test_heads_divide_the_features() -> None:
    with pytest.raises(ValueError, match="MLSTMCell: heads must divide the features, got 3 heads for 8 features"):
        fc.cells.MLSTMCell(2, 8, heads=3)
    with pytest.raises(ValueError, match="kernel must be odd"):
        fc.cells.ConvGRUCell(2, 3, size=(4, 4), kernel=2)


def test_a_submodule_may_not_hide_behind_an_attribute() -> None:
    class Hidden(fc.Cell):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.inputs = nn.Linear(3, 8)

    with pytest.raises(TypeError, match=r"Hidden\.inputs is an attribute of fusecell.Cell"):
        Hidden()


class Gated(fc.Cell):
    """A cell whose layers have the names of attributes."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.gates, self.updates = nn.Linear(7, 4), nn.Linear(7, 4)
        self.keeps = nn.Linear(4, 4, bias=False)

    def step(self, x: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
        both = torch.cat([x, state[0]], 1)
        z = torch.sigmoid(self.gates(both))
        h = z * self.keeps(state[0]) + (1 - z) * torch.tanh(self.updates(both))
        return h, (h,)


def test_a_submodule_may_be_called_gates() -> None:
    """As may those called keeps and updates, which only help to initialise weights."""

    cell = Gated().double()
    assert list(cell.state_dict()) == [
        *("gates.weight", "gates.bias", "updates.weight", "updates.bias", "keeps.weight")
    ]
    check_cell(cell)
    copied = copy.deepcopy(cell)
    copied.gates = nn.Linear(7, 4, bias=False).double()
    assert copied.gates.bias is None
    assert cell.gates.bias is not None
    for layer in (fc.Recurrent(cell), fc.Recurrent(copied)):
        results = []
        for runner in ("compiled", "eager"):
            with fc.runner(runner):
                torch.manual_seed(0)
                y, _ = layer(torch.randn(5, 2, 3, dtype=torch.float64))
                results.append((y, *torch.autograd.grad(y.sum(), list(layer.parameters()))))
        torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match="found no gate with a bias in Gated"):
        fc.init.forget_bias_(cell)
    with pytest.raises(ValueError, match="its gates are unnamed"):
        fc.init.gate_bias_(cell, "z", 1.0)
    assert fc.Cell.gates == ()
    assert fc.Cell(3, 4).keeps == ""
