"""Uses of autograd around a backward, compared with torch.nn or the Python loop."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import fusecell as fc


@pytest.fixture
def pair():
    """A drop-in GRU and torch.nn's with the same weights."""
    torch.manual_seed(0)
    reference = nn.GRU(5, 9).double()
    layer = fc.GRU(5, 9).double()
    layer.load_state_dict(reference.state_dict())
    return layer, reference


@pytest.fixture
def x():
    return torch.randn(7, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def grads(layer, loss):
    """Return the gradients of a loss of the layer, from zero."""
    layer.zero_grad()
    loss(layer).backward()
    return [None if p.grad is None else p.grad.clone() for p in layer.parameters()]


def assert_equal_grads(pair, loss):
    for actual, expected in zip(*(grads(layer, loss) for layer in pair), strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "loss",
    {
        "a sum, whose gradient has no strides": lambda y, h: y.sum(),
        "outputs alone": lambda y, h: y.square().sum(),
        "the last state alone": lambda y, h: h.square().sum(),
        "one step": lambda y, h: y[3].exp().sum(),
        "one row": lambda y, h: y[:, 1].exp().sum(),
        "a transposed gradient": lambda y, h: (y.transpose(0, 2) * torch.arange(7.0)).sum(),
        "every second feature": lambda y, h: y[..., ::2].square().sum(),
    }.items(),
    ids=lambda item: item[0],
)
def test_incoming_gradients_of_every_form(pair, x, loss):
    assert_equal_grads(pair, lambda layer: loss[1](*layer(x)))


def test_only_some_gradients_are_wanted(pair, x):
    for trainable in ("weight_hh_l0", "bias_ih_l0"):
        for layer in pair:
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(name == trainable)
        assert_equal_grads(pair, lambda layer: layer(x)[0].square().sum())
    for layer in pair:
        layer.requires_grad_(False)
    gradients = []
    for layer in pair:
        leaf, start = x.clone().requires_grad_(), torch.zeros(1, 3, 9, dtype=torch.float64, requires_grad=True)
        y, _ = layer(leaf)
        y.square().sum().backward()
        alone = layer(x, start)[0].square().sum()
        alone.backward()
        gradients.append((leaf.grad, start.grad))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_retain_graph(pair, x):
    drop_in, reference = pair
    for layer in pair:
        loss = layer(x)[0].square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    for p, q in zip(drop_in.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-12)


def test_what_changes_in_place_between_forward_and_backward(pair, x):
    def doubled(layer):
        y, _ = layer(x)
        y.mul_(2)
        return y.square().sum()

    assert_equal_grads(pair, doubled)
    for layer in pair:
        loss = layer(x)[0].square().sum()
        with torch.no_grad():
            layer.weight_hh_l0.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    leaf = x.clone()
    loss = pair[0](leaf)[0].square().sum()
    leaf.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_padding_reaches_no_gradient(pair, x):
    layer, _ = pair
    lengths = torch.tensor([7, 0, 4])
    valid = (torch.arange(7)[:, None] < lengths)[..., None]
    gradients = []
    for padding in (0.0, float("nan"), float("inf")):
        layer.zero_grad()
        leaf = torch.where(valid, x, torch.tensor(padding, dtype=x.dtype)).requires_grad_()
        y, _ = layer(leaf, lengths=lengths)
        y.square().sum().backward()
        gradients.append([leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for clean, nan, inf in zip(*gradients, strict=True):
        assert torch.equal(clean, nan)
        assert torch.equal(clean, inf)
    assert gradients[0][0][~valid.expand_as(x)].abs().max() == 0


@pytest.mark.parametrize("kind", ["incoming gradients in the padding", "states that are never used"])
def test_nan_in_padding_reaches_no_gradient(kind, x):
    """NaN and infinity stay where they are: nothing is multiplied by zero."""
    options = (
        {"lengths": [7, 0, 4]} if kind.startswith("incoming") else {"resets": torch.eye(1, 7).bool().T.repeat(1, 3)}
    )
    results = []
    for runner in ("compiled", "eager"):
        torch.manual_seed(2)
        layer, leaf = fc.Recurrent(fc.LSTMCell(5, 9)).double(), x.clone().requires_grad_()
        bad = float("nan") if "resets" in options else 0.5
        state = tuple(torch.full((3, 9), value, dtype=x.dtype, requires_grad=True) for value in (bad, 2 * bad))
        with fc.runner(runner):
            y, _ = layer(leaf, state, **options)
        incoming = torch.ones_like(y)
        if "lengths" in options:
            incoming[4:, 2], incoming[:, 1] = float("nan"), float("inf")
        y.backward(incoming)
        results.append([leaf.grad, *(value.grad for value in state), *(p.grad for p in layer.parameters())])
    for actual, loop in zip(*results, strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, loop, rtol=1e-11, atol=1e-12)


def test_accumulated_in_pieces(pair, x):
    def pieces(layer):
        first, state = layer(x[:3])
        return first.square().sum() + layer(x[3:], state)[0].square().sum()

    drop_in, reference = pair
    for one, other in zip(
        grads(drop_in, pieces), grads(reference, lambda layer: layer(x)[0].square().sum()), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    whole = grads(drop_in, lambda layer: layer(x)[0].sum())
    drop_in(x)[0].sum().backward()
    for parameter, once in zip(drop_in.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * once, rtol=1e-12, atol=1e-12)


def test_hooks_on_tensors_and_parameters(pair, x):
    for layer in pair:
        layer.weight_ih_l0.register_hook(lambda grad: 3 * grad)

    def loss(layer):
        y, _ = layer(x)
        y.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
        return y.square().sum()

    assert_equal_grads(pair, loss)


def test_backward_in_another_thread(pair, x):
    drop_in, _ = pair
    expected = grads(drop_in, lambda layer: layer(x)[0].square().sum())
    drop_in.zero_grad()
    loss = drop_in(x)[0].square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for parameter, value in zip(drop_in.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, value)


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"num_layers": 2, "dropout": 0.4}, {"batch_first": True}])
def test_layers_of_every_form(options, x):
    torch.manual_seed(2)
    reference, drop_in = nn.GRU(5, 9, **options).double(), fc.GRU(5, 9, **options).double()
    drop_in.load_state_dict(reference.state_dict())

    def loss(layer):
        torch.manual_seed(3)
        y, h = layer(x)
        return y.square().sum() + h.exp().sum()

    assert_equal_grads((drop_in, reference), loss)


class Learned(fc.GRUCell):
    """A GRU with a trainable initial state."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.start = nn.Parameter(torch.randn(hidden_size))

    def initial_state(self, batch_size, **options):
        return (self.start.expand(batch_size, -1),)


def test_a_learned_state_that_resets_go_back_to(x):
    torch.manual_seed(4)
    layer = fc.Recurrent(Learned(5, 9)).double()
    resets = torch.zeros(7, 3, dtype=torch.bool)
    resets[0, 1] = resets[4, 2] = True

    def loss(layer):
        return layer(x, resets=resets, lengths=[7, 2, 6])[0].square().sum()

    results = []
    for name in ("compiled", "eager"):
        with fc.runner(name):
            results.append(grads(layer, loss))
    for actual, loop in zip(*results, strict=True):
        torch.testing.assert_close(actual, loop, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_loop_of_the_users_own(rows, x):
    """A user's loop over single steps of the cell, as torch's cells are used."""
    torch.manual_seed(7)
    reference, drop_in = nn.GRUCell(5, 9).double(), fc.GRUCell(5, 9).double()
    drop_in.load_state_dict(reference.state_dict())

    def loss(cell):
        h, total = torch.zeros(rows, 9, dtype=torch.float64), 0
        for step in x[:, :rows]:
            h = cell(step, h)
            total = total + h.square().sum()
        return total

    assert_equal_grads((drop_in, reference), loss)
