"""Gradients of gradients and torch's transforms: exact, by the Python loop, or else an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import fusecell as fc


@pytest.fixture
def x():
    return torch.randn(7, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own forward-mode rules
def test_transforms_are_exact(x):
    torch.manual_seed(5)
    layer = fc.Recurrent(fc.GRUCell(5, 4)).double()
    weights = dict(layer.named_parameters())

    def loss(weights, x):
        return functional_call(layer, weights, (x,))[0].square().sum()

    with fc.runner("eager"):
        expected = {name: torch.autograd.grad(loss(weights, x), value)[0] for name, value in weights.items()}
    for name, value in grad(loss)(weights, x).items():
        close(value, expected[name])
    each = vmap(grad(loss), in_dims=(None, 1))(weights, x[:, :, None])
    for name, value in each.items():
        close(value.sum(0), expected[name])
    short = x[:2, :1]
    jacobian = jacrev(lambda x: layer(x)[0])(short)
    tangent = torch.randn_like(short)
    _, along = jvp(lambda x: layer(x)[0], (short,), (tangent,))
    close(along, torch.einsum("abcdef,def->abc", jacobian, tangent))
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(short, tangent))[0]
        close(forward_ad.unpack_dual(y).tangent, along)
        # A dual number among the weights alone.
        dual = {name: forward_ad.make_dual(value.detach(), torch.ones_like(value)) for name, value in weights.items()}
        change = forward_ad.unpack_dual(loss(dual, x)).tangent
    close(change, sum(value.sum() for value in expected.values()))


def test_many_backwards_at_once(x):
    """After a compiled forward, a batch of incoming gradients is handled by torch."""
    torch.manual_seed(6)
    layer, leaf = fc.GRU(5, 4).double(), x[:2, :1].clone().requires_grad_()
    y = layer(leaf)[0]
    leaves, units = [leaf, *layer.parameters()], torch.eye(y.numel(), dtype=x.dtype).reshape(-1, *y.shape)
    one_by_one = [torch.autograd.grad(y, leaves, unit, retain_graph=True) for unit in units]
    batched = torch.autograd.grad(y, leaves, units, is_grads_batched=True, retain_graph=True)
    mapped = vmap(lambda unit: torch.autograd.grad(y, leaves, unit, retain_graph=True))(units)
    for expected, *gradients in zip(map(torch.stack, zip(*one_by_one, strict=True)), batched, mapped, strict=True):
        for value in gradients:
            assert not value.requires_grad
            close(value, expected)
    vectorised = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x[:2, :1], vectorize=True)
    close(vectorised.reshape(len(units), -1), batched[0].reshape(len(units), -1))


def test_gradients_have_gradients(zoo_cell):
    """With lengths, resets and reverse, in input, states and parameters, by finite differences."""
    torch.manual_seed(7)
    cell = zoo_cell.make(3, 5, dtype=torch.float64)
    names = [f"cell.{name}" for name, _ in cell.named_parameters()]
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    states = [torch.randn(2, size, dtype=torch.float64) for size in cell.state_sizes]
    resets = torch.tensor([[False, False], [True, False], [False, False]])
    layer = fc.Recurrent(cell, reverse=True)

    def run(x, *rest):
        state, weights = rest[: len(states)], dict(zip(names, rest[len(states) :], strict=True))
        arguments = (x, state if len(state) > 1 else state[0])
        outputs, after = functional_call(layer, weights, arguments, {"lengths": [3, 2], "resets": resets})
        return (outputs, *(after if isinstance(after, tuple) else (after,)))

    arguments = [value.detach().clone().requires_grad_() for value in (x, *states, *cell.parameters())]
    assert torch.autograd.gradgradcheck(run, arguments, fast_mode=True, atol=1e-4)


class Gain(fc.Cell):
    """What a step may read beside its weights: a number, a buffer, its mode, its submodules."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.inp, self.rec = nn.Linear(input_size, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.gain = 0.5
        self.register_buffer("leak", torch.tensor(0.3))

    def step(self, x, state):
        (h,) = state
        h = torch.tanh(self.inp(x) + self.gain * self.rec(h) + self.leak * h)
        h = h if self.training else h / 2
        return h, (h,)


TENSORS = {
    "a parameter replaced": lambda cell: setattr(cell.inp, "weight", nn.Parameter(torch.zeros(4, 5).double())),
    "a parameter frozen": lambda cell: cell.requires_grad_(False),
    "a buffer replaced": lambda cell: setattr(cell, "leak", torch.tensor(9.0).double()),
    "a submodule replaced": lambda cell: setattr(cell, "rec", nn.Linear(4, 4).double()),
}
OTHERS = {
    "a number": lambda cell: setattr(cell, "gain", 2.0),
    "the mode": lambda cell: cell.eval(),
    "a hook": lambda cell: cell.inp.register_forward_hook(lambda *_: 3 * _[-1]),
}


def penalty(runner, x, change):
    """The gradients of a gradient's square, the cell having changed after the forward."""
    torch.manual_seed(8)
    layer, leaf = fc.Recurrent(Gain(5, 4)).double(), x.clone().requires_grad_()
    with fc.runner(runner):
        loss = layer(leaf)[0].square().sum()
        change(layer.cell)
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    leaves = [value for value in (leaf, *layer.parameters()) if value.requires_grad]
    return [first, *torch.autograd.grad(first.square().sum(), leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("kind", [*TENSORS, *OTHERS])
def test_second_order_uses_the_tensors_of_the_forward(kind, x):
    """Tensors are those of the forward; anything else that has changed is an error."""
    if kind in OTHERS:
        with pytest.raises(RuntimeError, match="An attribute, mode or hook of Gain has changed since its forward"):
            penalty("auto", x, OTHERS[kind])
        return
    for actual, loop in zip(penalty("auto", x, TENSORS[kind]), penalty("eager", x, TENSORS[kind]), strict=True):
        close(actual, loop)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own forward-mode rules
def test_third_order_and_torchs_own_helpers(x):
    torch.manual_seed(9)
    layer, short = fc.Recurrent(fc.LSTMCell(5, 3)).double(), x[:2, :1]

    def loss(x):
        return layer(x)[0].sin().sum()

    results = []
    for name in ("auto", "eager"):
        leaf = short.clone().requires_grad_()
        with fc.runner(name):
            first = torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0].square().sum()
            second = torch.autograd.grad(first, leaf, create_graph=True)[0].square().sum()
            third = torch.autograd.grad(second, [leaf, *layer.parameters()])
            curved = torch.autograd.functional.hessian(loss, short)
            along = torch.autograd.functional.jvp(lambda x: layer(x)[0], short, torch.ones_like(short))[1]
        results.append([*third, curved, along])
    for actual, loop in zip(*results, strict=True):
        close(actual, loop)
    close(results[0][-2], hessian(loss)(short))
