"""Ensembles: every member's numbers are its own, to the bit."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.compiler.dispatch import fast_path


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
    "one layer": lambda: fc.GRU(3, 8),
    "batch first": lambda: fc.LSTM(3, 7, batch_first=True),
    "reversed": lambda: fc.Recurrent(fc.cells.MGUCell(3, 5), reverse=True, recompute=True),
}
PREPARED = ("one layer", "batch first", "reversed")


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


def prepared_calls(models) -> int:
    owners = [calls for key, calls in fast_path._CALLS.items() if calls.owner() in set(models.modules())]
    return sum(call is not None for calls in owners for call in calls.calls.values())


@pytest.mark.parametrize("threads", [1, 2, 5])  # more than there are members: one after the other, on all of them
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("name", PREPARED)
def test_prepared_calls_have_the_numbers_of_the_first(name, each, states, threads):
    torch.manual_seed(1)
    models = fc.Ensemble(MODELS[name], 3).double()
    x = torch.randn(*([3] if each else []), 6, 2, 3, dtype=torch.float64, requires_grad=True)
    start = []
    if states:
        start = [value.detach() + 1 for value in flat(models(x, each=each))[1:]]
    leaves = [x, *models.parameters(), *(value.requires_grad_() for value in start)]
    results, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            values = flat(models(x, *([tuple(start) if len(start) > 1 else start[0]] if states else []), each=each))
            loss = sum(
                (value.sin() * torch.linspace(0, 1, value.numel()).reshape(value.shape)).sum() for value in values
            )
            gradients = torch.autograd.grad(loss, leaves, create_graph=True)
            second = torch.autograd.grad(sum(value.square().sum() for value in gradients), leaves)
            with torch.no_grad():
                again = flat(models(x, each=each))
            results.append([*values, *gradients, *second, *again])
    finally:
        torch.set_num_threads(before)
    assert prepared_calls(models) >= 2
    count = len(values)
    for others in results[1:]:
        for place, (value, expected) in enumerate(zip(others, results[0], strict=True)):
            torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
            assert place >= count or value.stride() == expected.stride()


def test_weights_learn_after_a_call_without_gradients():
    """Also where the first call of all is one: of an ensemble, and of ``torch.vmap``."""
    torch.manual_seed(2)
    x = torch.randn(6, 2, 3)
    for models in (fc.Ensemble(lambda: fc.GRU(3, 13), 3), fc.Ensemble(lambda: fc.Sequential(fc.LSTM(3, 13)), 3)):
        fc.refresh()
        with torch.no_grad():
            models(x)
        for _ in range(3):
            gradients = torch.autograd.grad(models(x)[0].sum(), list(models.parameters()))
            assert all(value.abs().sum() > 0 for value in gradients)
    layer = fc.GRU(3, 13)
    weights = {name: torch.stack([value, 2 * value]).detach() for name, value in layer.named_parameters()}
    for value in weights.values():
        value.requires_grad_()
    fc.refresh()
    for recording in (False, True):
        with torch.set_grad_enabled(recording):
            y = torch.vmap(lambda w: torch.func.functional_call(layer, w, (x,))[0])(weights)
    assert all(value.abs().sum() > 0 for value in torch.autograd.grad(y.sum(), list(weights.values())))


def test_prepared_calls_keep_no_weight_alive():
    models, x = fc.Ensemble(lambda: fc.Recurrent(fc.cells.MGUCell(3, 4)), 2), torch.randn(5, 2, 3)
    for _ in range(3):
        models(x)[0].sum().backward()
    assert prepared_calls(models) == 1
    weights = [weakref.ref(value) for value in models.parameters()]
    models.zero_grad()
    for module in models.modules():
        for name, value in list(module._parameters.items()):
            module._parameters[name] = nn.Parameter(value.detach().clone())
    del module, value
    gc.collect()
    assert all(weight() is None for weight in weights)


def test_hooks_and_changes_of_a_layer_are_seen():
    torch.manual_seed(3)
    models, x, seen = fc.Ensemble(lambda: fc.GRU(3, 4), 2), torch.randn(5, 2, 3), []
    before = [models(x)[0] for _ in range(3)][-1]
    handle = models.stacked.register_forward_hook(lambda *_: seen.append(1))
    models(x)
    assert seen
    handle.remove()
    with torch.no_grad():
        models.stacked.weight_hh_l0.mul_(0.5)
    after = models(x)[0]
    assert not torch.equal(after, before)
    assert torch.equal(after[1], models.member(1)(x)[0])
    models.stacked.batch_first = True
    assert torch.equal(models(x)[0][0], models.member(0)(x)[0])
    longer = torch.randn(9, 4, 3)
    assert torch.equal(models(longer)[0][1], models.member(1)(longer)[0])


def test_parts_without_weights_come_first():
    torch.manual_seed(4)
    models = fc.Ensemble(lambda: fc.Sequential(nn.Dropout(0.5), fc.GRU(3, 4), nn.Tanh(), nn.Linear(4, 2)), 3)
    x = torch.randn(5, 2, 3)
    y, (h,) = models(x)
    assert y.shape == (3, 5, 2, 2)
    assert h.shape == (3, 1, 2, 4)
    models.eval()
    for _ in range(3):
        y, (h,) = models(x, (h.detach(),))
    y.sum().backward()
    assert all(value.grad is not None for value in models.parameters())


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
