"""torch.nn's layers in a model are replaced by fusecell's and back; nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fusecell as fc


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(5, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.parts = nn.ModuleList([nn.GRU(16, 7), nn.RNN(7, 6, nonlinearity="relu")])
        self.cell = nn.GRUCell(6, 4)
        self.more = nn.ModuleDict({"lstm": nn.LSTMCell(4, 3), "rnn": nn.RNNCell(3, 3)})
        self.tied = self.cell

    def forward(self, x):
        y, _ = self.encoder(x)
        for part in self.parts:
            y, _ = part(y)
        h = self.tied(y[:, 0], self.cell(y[:, 1]))
        return self.more["rnn"](self.more["lstm"](h)[0])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().double()


def test_replace_and_back(model):
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    before, names, ids = model(x), list(model.state_dict()), [id(p) for p in model.parameters()]
    kinds = {name: type(module) for name, module in model.named_modules()}
    replaced = fc.replace(model)
    assert len(replaced.changed) == 6
    assert "parts.0: torch.nn.GRU -> fusecell.GRU" in str(replaced).splitlines()
    assert type(model.encoder) is fc.LSTM
    assert type(model.tied) is fc.GRUCell
    assert list(model.state_dict()) == names
    assert [id(p) for p in model.parameters()] == ids
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert fc.explain(model).runner == "compiled"
    assert fc.replace(model).changed == ()
    assert str(fc.replace(nn.Linear(2, 2))) == "nothing to replace"
    assert len(fc.replace(model, back=True).changed) == 6
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert torch.equal(model(x), before)
    fresh = Model()
    for name, module in model.named_modules():
        assert vars(module).keys() == vars(fresh.get_submodule(name)).keys()


def test_an_optimizer_goes_on(model):
    torch.manual_seed(0)
    other = Model().double()
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    for each in (model, other):
        optimizer = torch.optim.Adam(each.parameters(), lr=1e-2)
        for step in range(4):
            if step == 2 and each is model:
                fc.replace(model)
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    for actual, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


def test_a_replaced_layer_has_the_features_of_fusecell():
    layer = nn.GRU(5, 9)
    seen = []
    layer.register_forward_hook(lambda module, args, result: seen.append(type(module)))
    fc.replace(layer)
    y, _ = layer(torch.randn(7, 3, 5), lengths=[7, 0, 2])
    assert y[2:, 2].abs().sum() == 0
    assert seen == [fc.GRU]
    assert repr(layer) == repr(nn.GRU(5, 9))


def test_subclasses_are_not_replaced():
    model = nn.ModuleDict({"plain": nn.GRU(5, 9), "normed": nn.GRU(5, 9)})
    parametrizations.weight_norm(model["normed"], "weight_hh_l0")
    replaced = fc.replace(model)
    assert [path for path, *_ in replaced.changed] == ["plain"]
    assert replaced.left == (("normed", "a subclass, ParametrizedGRU"),)
    assert "normed: left alone" in str(replaced)


def test_what_torch_cannot_compute_does_not_go_back():
    model = nn.ModuleList([fc.GRU(5, 9), fc.GRU(9, 4, reset_after=False)])
    with pytest.raises(ValueError, match=r"1 has reset_after=False, which torch.* can't compute; nothing"):
        fc.replace(model, back=True)
    assert [type(layer) for layer in model] == [fc.GRU, fc.GRU]
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got list"):
        fc.replace([nn.GRU(5, 9)])
