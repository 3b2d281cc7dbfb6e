"""torch.nn's layers in a model are replaced by fusecell's and back; nothing else changes."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

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


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_is_not_replaced_is_named_with_the_reason():
    class OwnMaths(nn.GRU):
        def forward(self, input, hx=None):
            return input.cumsum(0), None

    class Clashing(nn.GRUCell):
        def step(self):
            return "a method of its own"

    class Drawing:
        """A class beside torch.nn's, as a mixin is."""

        def state_sizes(self):
            return "a method of its own"

    class Mixed(Drawing, nn.LSTM):
        pass

    class GatedRNN(nn.Module):
        """One that is written out, as many are."""

    model = nn.ModuleDict({"plain": nn.GRU(5, 9), "normed": nn.GRU(5, 9), "own": OwnMaths(5, 9)})
    model.update(
        {
            "mixed": Mixed(5, 9),
            "cell": Clashing(5, 9),
            "other": GatedRNN(),
            "script": torch.jit.script(nn.LSTMCell(5, 9)),
        }
    )
    parametrizations.weight_norm(model["normed"], "weight_hh_l0")
    kinds = {name: type(module) for name, module in model.items()}
    replaced = fc.replace(model)
    assert [path for path, *_ in replaced.changed] == ["plain"]
    reasons = dict(replaced.left)
    assert reasons["normed"] == "a subclass, ParametrizedGRU: parametrized, which changes its class: replace it before"
    assert reasons["own"] == "a subclass, OwnMaths: the forward of OwnMaths is its own"
    assert reasons["cell"] == "a subclass, Clashing: Clashing has step, a name that fusecell's GRUCell has too"
    assert reasons["mixed"] == "a subclass, Mixed: Mixed has state_sizes, a name that fusecell's LSTM has too"
    assert reasons["other"] == "GatedRNN is no class of torch.nn; fusecell.wrap takes one that computes a step"
    assert reasons["script"] == "a TorchScript of LSTMCell: replace it before torch.jit.script"
    assert "normed: left alone, a subclass" in str(replaced)
    assert {name: type(module) for name, module in model.items() if name != "plain"} == {
        name: kind for name, kind in kinds.items() if name != "plain"
    }


class Inits:
    """Comes before torch.nn's class, as pytorch-forecasting's base class does."""

    def init_hidden(self, input):
        return input.new_zeros(self.num_layers, input.shape[1], self.hidden_size)


class Named(Inits, nn.LSTM):
    """Adds methods, and no forward."""


class OnlyOutputs(nn.GRU):
    """Calls torch.nn's forward."""

    def forward(self, input):
        return super().forward(input)[0]


class Scaled(nn.GRUCell):
    def __init__(self, scale, *args):
        super().__init__(*args)
        self.scale = scale

    def forward(self, input, hx=None):
        return super().forward(self.scale * input, hx)


class WithSubclasses(nn.Module):
    def __init__(self):
        super().__init__()
        self.named, self.outputs, self.cell = Named(5, 8), OnlyOutputs(8, 7), Scaled(0.5, 7, 6)

    def forward(self, x):
        y, _ = self.named(x, (self.named.init_hidden(x),) * 2)
        h = None
        for step in self.outputs(y):
            h = self.cell(step, h)
        return h


def test_subclasses_are_replaced_where_torchs_forward_is_what_runs(tmp_path):
    torch.manual_seed(0)
    model, x = WithSubclasses().double(), torch.randn(7, 3, 5, dtype=torch.float64)
    before, kinds = model(x), [type(module) for module in model.children()]
    replaced = fc.replace(model)
    assert [path for path, *_ in replaced.changed] == ["named", "outputs", "cell"]
    assert replaced.left == ()
    for module, kind, fusecells in zip(model.children(), kinds, (fc.LSTM, fc.GRU, fc.GRUCell), strict=True):
        assert isinstance(module, kind)
        assert isinstance(module, fusecells)
        assert type(module).__name__ == kind.__name__
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert fc.explain(model).runner == "compiled"
    # It is pickled and copied as the user's class would be.
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert [type(module) for module in twin.children()] == [type(module) for module in model.children()]
        assert torch.equal(twin(x), model(x))
    assert len(fc.replace(model, back=True).changed) == 3
    assert [type(module) for module in model.children()] == kinds
    assert torch.equal(model(x), before)


def test_models_of_others_are_built_with_fusecells_classes():
    from torch.nn import GRU as ImportedByName

    def build():
        inner = nn.Sequential(nn.Linear(5, 5), ImportedByName(5, 9, batch_first=True))
        return nn.ModuleDict(
            {"inner": inner, "cells": nn.ModuleList([nn.LSTMCell(9, 4), nn.Identity()]), "own": Named(4, 4)}
        )

    torch.manual_seed(0)
    plain = build()
    torch.manual_seed(0)
    with fc.accelerate() as report:
        model = build()
    assert type(model["inner"][1]) is fc.GRU
    assert type(model["cells"][0]) is fc.LSTMCell
    assert isinstance(model["own"], fc.LSTM)
    assert [path for path, *_ in report.changed] == ["Sequential.1", "ModuleList.0", "ModuleDict.own"]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    # After the block, and in other threads inside it, torch.nn's classes are torch.nn's.
    assert type(build()["inner"][1]) is nn.GRU
    with fc.accelerate() as report, ThreadPoolExecutor(1) as pool:
        assert type(pool.submit(build).result()["inner"][1]) is nn.GRU
    assert str(report) == "nothing to replace"


def test_the_gain_is_measured_on_a_sample():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.norm = nn.GRU(5, 9), nn.BatchNorm1d(9)
            self.calls = 0

        def forward(self, x, h):
            self.calls += 1
            return self.norm(self.rnn(x, h)[0].flatten(0, 1))

    model, sample = Model(), (torch.randn(7, 3, 5), torch.zeros(1, 3, 9))
    buffers = [value.clone() for value in model.buffers()]
    generator = torch.get_rng_state()
    speedup = fc.replace(model, sample=sample).speedup
    assert speedup.forward > 0
    assert speedup.training > 0
    assert "on the sample: forward" in str(speedup)
    assert model.calls == 0
    assert all(torch.equal(one, two) for one, two in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(generator, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    model = Model().requires_grad_(False)
    assert fc.replace(model, sample=sample).speedup.training is None


def test_what_torch_cannot_compute_does_not_go_back():
    model = nn.ModuleList([fc.GRU(5, 9), fc.GRU(9, 4, reset_after=False)])
    with pytest.raises(ValueError, match=r"1 has reset_after=False, which torch.* can't compute; nothing"):
        fc.replace(model, back=True)
    assert [type(layer) for layer in model] == [fc.GRU, fc.GRU]
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got list"):
        fc.replace([nn.GRU(5, 9)])
