"""Initial values: which rows change, and to what."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.cells import CELLS

H = 7


def test_orthogonal_blocks():
    for module, blocks in (
        (fc.LSTMCell(5, H), 4),
        (fc.GRU(5, H, 2, bidirectional=True), 3),
        (fc.cells.LeakyCell(5, H), 1),
    ):
        assert fc.init.orthogonal_(module, 2.0) is module
        matrices = [value for name, value in module.named_parameters() if name.startswith("weight_hh")]
        for block in (block for value in matrices for block in value.detach().chunk(blocks)):
            torch.testing.assert_close(block @ block.T, 4 * torch.eye(H), atol=1e-5, rtol=1e-5)


def sums(cell):
    return (cell.bias_ih + cell.bias_hh).detach().chunk(len(cell.gates))


def test_forget_bias_sets_one_gate_alone():
    for cell, place in ((fc.LSTMCell(5, H), 1), (fc.GRUCell(5, H), 1)):
        before = [value.clone() for value in sums(cell)]
        fc.init.forget_bias_(cell, 1.5)
        for index, (old, new) in enumerate(zip(before, sums(cell), strict=True)):
            torch.testing.assert_close(new, torch.full((H,), 1.5) if index == place else old)


def test_layers_and_models():
    model = nn.ModuleDict({"a": fc.LSTM(5, H, num_layers=2), "b": fc.Recurrent(fc.Zoneout(fc.cells.MGUCell(5, H)))})
    fc.init.forget_bias_(model, 2.0)
    for layer in range(2):
        total = getattr(model["a"], f"bias_ih_l{layer}") + getattr(model["a"], f"bias_hh_l{layer}")
        assert torch.equal(total[H : 2 * H].detach(), torch.full((H,), 2.0))
    # an MGU's one gate lets the new in: it begins closed
    assert torch.equal(model["b"].cell.cell.bias_ih[:H].detach(), torch.full((H,), -2.0))


def test_chrono():
    cell = fc.LSTMCell(5, 2000)
    fc.init.chrono_(cell, 100)
    i, f, *_ = sums(cell)
    spans = f.exp()
    assert spans.min() >= 1
    assert spans.max() <= 99
    assert 47 < spans.mean() < 53
    assert torch.equal(i, -f)


@pytest.mark.parametrize("entry", CELLS, ids=[entry.name for entry in CELLS])
def test_a_gate_that_keeps_keeps(entry):
    """With a large forget bias every cell's state stays the same; with its negative it doesn't."""
    cell = entry.make(5, H).double().eval()
    if not (cell.keeps or cell.updates):
        with pytest.raises(ValueError, match="found no gate with a bias"):
            fc.init.forget_bias_(cell, 1.0)
        return
    state = tuple(torch.rand(3, size, dtype=torch.float64) for size in cell.state_sizes)
    changes = []
    for bias in (30.0, -30.0):
        fc.init.forget_bias_(cell, bias)
        if "f" in cell.gates and cell.updates == "i":
            fc.init.gate_bias_(cell, "i", -30.0)
        _, after = fc.step(cell, torch.zeros(3, 5, dtype=torch.float64), state)
        changes.append((after[-1] - state[-1]).abs().max().item())
    assert changes[0] < 0.05 * max(changes[1], 1e-3) or changes[0] < 1e-6


def test_errors():
    with pytest.raises(ValueError, match="found no bias of a gate 'q' in GRUCell; its gates are n, r, z"):
        fc.init.gate_bias_(fc.GRUCell(5, H), "q", 1.0)
    with pytest.raises(ValueError, match="found no gate with a bias in GRU"):
        fc.init.forget_bias_(fc.GRU(5, H, bias=False))
    with pytest.raises(ValueError, match="found no weight_hh in Linear"):
        fc.init.orthogonal_(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="more than 2 steps, got 2"):
        fc.init.chrono_(fc.GRUCell(5, H), 2)


@pytest.mark.parametrize("name", sorted(fc.cells.activations.ACTIVATIONS))
def test_activations_compile_and_agree_with_the_loop(name):
    x = torch.randn(9, 3, 5, dtype=torch.float64)
    gated = fc.GRU if len(name) % 2 else fc.LSTM  # each with half of them
    for layer in (fc.RNN(5, H, activation=name), gated(5, H, activation=name, gate_activation="hardsigmoid")):
        layer.double()
        results = []
        for runner in ("compiled", "eager"):
            layer.zero_grad()
            with fc.runner(runner):
                y, _ = layer(x)
            y.square().sum().backward()
            results.append([y, *(parameter.grad for parameter in layer.parameters())])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
        assert name == "tanh" or f"activation={name!r}" in repr(layer)


def test_an_activation_by_hand():
    cell = fc.GRUCell(5, H, activation="softsign", gate_activation="hardsigmoid")
    x, h = torch.randn(3, 5), torch.randn(3, H)
    x_r, x_z, x_n = (x @ cell.weight_ih.T + cell.bias_ih).chunk(3, -1)
    h_r, h_z, h_n = (h @ cell.weight_hh.T + cell.bias_hh).chunk(3, -1)
    r, z = ((a / 6 + 0.5).clamp(0, 1) for a in (x_r + h_r, x_z + h_z))
    n = x_n + r * h_n
    n = n / (1 + n.abs())
    torch.testing.assert_close(cell(x, h), (1 - z) * n + z * h)


def test_an_activation_that_there_is_not():
    for make in (fc.RNNCell, fc.GRUCell, fc.LSTMCell, fc.RNN, fc.GRU, fc.LSTM):
        with pytest.raises(ValueError, match=r"activation must be one of elu, .* got 'tanhh'"):
            make(5, H, activation="tanhh")


def test_what_torch_cannot_compute_is_not_turned_back():
    for layer in (fc.GRU(5, H, activation="relu"), fc.LSTM(5, H, tbptt=3), fc.RNN(5, H, activation="sin")):
        with pytest.raises(ValueError, match=r"torch\.nn can't compute"):
            fc.replace(layer, back=True)
