"""Ensembles: every member's numbers are its own, to the bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fusecell as fc


class Tied(nn.Module):
    """A layer whose readout shares a weight with its map of the input."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.layer = fc.GRU(3, 3)
        self.outer = nn.Linear(3, 3)
        self.outer.weight = self.inner.weight
        self.register_buffer("gain", torch.rand(3))

    def forward(self, x, h=None):
        y, h = self.layer(self.inner(x), h)
        return self.outer(y) * self.gain, h


MODELS = {
    "sequential": lambda: fc.Sequential(fc.GRU(3, 8), nn.Linear(8, 2)),
    "layers": lambda: fc.LSTM(3, 7, num_layers=2, bidirectional=True),
    "own": lambda: fc.Recurrent(fc.Stack(fc.cells.MGUCell(3, 8), fc.cells.LeakyCell(8, 5))),
    "tied": Tied,
}


@pytest.fixture(params=MODELS)
def models(request):
    torch.manual_seed(0)
    return fc.Ensemble(MODELS[request.param], 5)


def flat(result):
    y, state = result
    return [y, *(state if isinstance(state, tuple) else (state,))]


@pytest.mark.parametrize("each", [False, True])
def test_a_member_has_the_bits_that_it_has_alone(models, each):
    x = torch.randn(*([5] if each else []), 11, 3, 3)
    together = flat(models(x, each=each))
    sum(value.square().sum() for value in together).backward()
    for number in range(5):
        member = models.member(number)
        alone = flat(member(x[number] if each else x))
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other[number])
        sum(value.square().sum() for value in alone).backward()
        gradients = dict(models.stacked.named_parameters())
        for name, parameter in member.named_parameters():
            torch.testing.assert_close(gradients[name].grad[number], parameter.grad, atol=1e-6, rtol=1e-5)


def test_members_are_made_one_by_one(models):
    weights = [value for value in models.parameters() if value.dim() > 2]
    assert all(not torch.equal(value[0], value[1]) for value in weights)
    assert [name.removeprefix("stacked.") for name, _ in models.named_parameters()] == [
        name for name, _ in models.member(0).named_parameters()
    ]


def test_what_is_shared_stays_shared():
    models = fc.Ensemble(Tied, 3)
    assert models.stacked.outer.weight is models.stacked.inner.weight
    member = models.member(1)
    assert member.outer.weight is member.inner.weight
    assert torch.equal(member.gain, models.stacked.gain[1])


def test_states_go_on():
    models = fc.Ensemble([fc.GRU(3, 4) for _ in range(3)])
    x = torch.randn(9, 2, 3)
    y, h = models(x)
    first, state = models(x[:5])
    second, last = models(x[5:], state)
    assert torch.equal(torch.cat([first, second], 1), y)
    assert torch.equal(last, h)
    lengths = torch.tensor([9, 4])
    assert torch.equal(models(x, lengths=lengths)[0][1], models.member(1)(x, lengths=lengths)[0])


def test_double_no_grad_copies_and_files():
    models = fc.Ensemble(lambda: fc.Recurrent(fc.LSTMCell(3, 4), batch_first=True), 2).double()
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    with torch.no_grad():
        y, _ = models(x)
        assert y.shape == (2, 5, 7, 4)
        assert torch.equal(copy.deepcopy(models)(x)[0], y)
        other = fc.Ensemble(lambda: fc.Recurrent(fc.LSTMCell(3, 4), batch_first=True), 2).double()
        other.load_state_dict(models.state_dict())
        assert torch.equal(other(x)[0], y)
        assert torch.equal(nn.Sequential(models)(x)[0], y)
    plain = fc.Ensemble([fc.GRU(3, 4), fc.GRU(3, 4)])
    assert torch.equal(pickle.loads(pickle.dumps(plain))(x.float())[0], plain(x.float())[0])
    assert len(models) == len(list(models)) == 2


def test_members_draw_noise_of_their_own():
    models = fc.Ensemble([fc.Recurrent(fc.Zoneout(fc.VariationalDropout(fc.GRUCell(3, 16), output=0.2), 0.3))] * 2)
    x = torch.randn(9, 4, 3)
    y, _ = models(x)
    assert not torch.equal(y[0], y[1])
    y.sum().backward()
    models.eval()
    y, _ = models(x)
    assert torch.equal(y[0], y[1])
    assert torch.equal(y[0], models.member(0)(x)[0])


def test_rows_are_reset_in_all_members():
    models, resets = fc.Ensemble(lambda: fc.Recurrent(fc.cells.MGUCell(3, 4)), 2), torch.rand(9, 3) < 0.3
    x = torch.randn(9, 3, 3)
    y, _ = models(x, resets=resets)
    torch.testing.assert_close(y[1], models.member(1)(x, resets=resets)[0])


def test_training_one_member_leaves_the_others():
    models, x = fc.Ensemble(lambda: fc.GRU(3, 4), 3), torch.randn(5, 2, 3)
    before = [value.detach().clone() for value in models.parameters()]
    optimizer = torch.optim.SGD(models.parameters(), lr=0.1)
    models(x)[0][1].square().mean().backward()
    optimizer.step()
    for old, new in zip(before, models.parameters(), strict=True):
        assert torch.equal(old[[0, 2]], new[[0, 2]])
        assert not torch.equal(old[1], new[1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fc.Ensemble([]), ValueError, "one member at least"),
        (lambda: fc.Ensemble(lambda: fc.GRU(3, 4), 0), ValueError, "one member at least"),
        (lambda: fc.Ensemble(fc.GRU(3, 4), 3), TypeError, r"write fc\.Ensemble\(lambda"),
        (lambda: fc.Ensemble(lambda: fc.GRU(3, 4)), TypeError, "the number of members, got None"),
        (lambda: fc.Ensemble([fc.GRU(3, 4), fc.GRU(3, 5)]), ValueError, r"weight_ih_l0 is .*12.*15"),
        (lambda: fc.Ensemble([fc.GRU(3, 4), fc.GRU(3, 4, bias=False)]), ValueError, "bias_ih_l0 is"),
        (lambda: fc.Ensemble([fc.GRU(3, 4)], 2), ValueError, "1 members and the size 2"),
        (lambda: fc.Ensemble(lambda: 3, 2), TypeError, "takes modules as members, got int"),
        (lambda: fc.Ensemble([fc.GRU(3, 4)] * 2)(torch.zeros(3, 1, 3), each=True), ValueError, "goes without each"),
        (lambda: fc.Ensemble([fc.GRU(3, 4)] * 2)(torch.zeros(3, 1, 3), torch.zeros(1, 1, 4)), ValueError, "a state of"),
        (lambda: fc.Ensemble([fc.GRU(3, 4)] * 2).member(2), IndexError, "2 members, got the number 2"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
