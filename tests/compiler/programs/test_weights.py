"""Weights that are shared, copied, pickled or tensor subclasses give the results of a plain loop."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fusecell as fc
from tests.compiler.fresh_cells import both, fresh_layer


class Doubled(torch.Tensor):
    """A tensor subclass without memory of its own, as quantised and distributed weights are; twice its inner tensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        plain = [2 * value.inner if isinstance(value, cls) else value for value in args]
        return func(*plain, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_weights_that_are_a_subclass_of_tensor(training):
    """Regression: a kernel would have read at address 0."""
    fc.refresh()  # so that it warns once more
    layer, x = fc.Recurrent(fc.GRUCell(5, 9)), torch.randn(6, 3, 5)
    weight = layer.cell.weight_ih.detach()
    layer.cell.weight_ih = nn.Parameter(Doubled(weight), requires_grad=False)
    with torch.set_grad_enabled(training):
        with pytest.warns(fc.EagerWarning, match="weight_ih is a Doubled, a subclass of Tensor"):
            output = layer(x)[0]
        layer.cell.weight_ih = nn.Parameter(2 * weight)
        torch.testing.assert_close(output, layer(x)[0])


def test_copied_and_pickled_after_it_ran():
    torch.manual_seed(1)
    layer, x = fc.Recurrent(fc.LSTMCell(5, 9)), torch.randn(6, 3, 5)
    expected = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], expected)
        with torch.no_grad():
            other.cell.weight_ih.mul_(2)
        assert not torch.equal(other(x)[0], expected)
    assert torch.equal(layer(x)[0], expected)


def test_cells_that_share_weights():
    layer = fresh_layer()
    other = type(layer.cell)(5, 9)
    other.inp = layer.cell.inp
    x = torch.randn(6, 3, 5)
    with torch.no_grad():
        fc.scan(other, x)
        layer.cell.inp.weight.mul_(3)
        for compiled, loop in (both(layer, x), both(fc.Recurrent(other), x)):
            torch.testing.assert_close(compiled, loop)


class Wide(fc.Cell):
    """A cell with a weight for each pair of units, and so with a gradient of many columns."""

    def __init__(self, size):
        super().__init__(size, size)
        self.pairs, self.rec = nn.Parameter(torch.randn(size, size)), nn.Linear(size, size)

    def step(self, x, state):
        h = torch.tanh((torch.sigmoid(self.pairs * x.unsqueeze(-1)) * state[0].unsqueeze(1)).mean(-1) + self.rec(x))
        return h, (h,)


@pytest.mark.parametrize("size", [24, 25, 40])
def test_gradients_of_many_columns(size):
    torch.manual_seed(0)
    cell, x = Wide(size).double(), torch.randn(5, 3, size, dtype=torch.float64, requires_grad=True)
    results = []
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            y, _ = fc.scan(cell, x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *cell.parameters()])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_code_of_a_gradient_does_not_grow_with_its_columns():
    lengths = [len(fc.explain(Wide(size)).backward.llvm) for size in (64, 128)]
    assert lengths[1] < 1.5 * lengths[0]  # of four times as many columns
