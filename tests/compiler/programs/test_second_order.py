"""Gradients of gradients, by kernels, against those of torch through the Python loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusecell as fc
from fusecell.cells import CELLS
from fusecell.compiler.programs import second_order, tangent_step


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """Whether each gradient of gradients came from kernels."""
    seen = []
    gradients = second_order.SecondOrder.gradients

    def spy(*args):
        result = gradients(*args)
        seen.append(isinstance(result, list))
        return result

    monkeypatch.setattr(second_order.SecondOrder, "gradients", spy)
    return seen


def all_gradients(cell: fc.Cell, runner: str, **options) -> list[Tensor]:
    """The gradients of a loss of outputs and last states, and of a sum of theirs with weights of their own."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    start = [torch.full((3, size), 0.1, dtype=torch.float64, requires_grad=True) for size in cell.state_sizes]
    leaves = [x, *start, *cell.parameters()]
    with fc.runner(runner):
        y, after = fc.scan(cell, x, tuple(start) if len(start) > 1 else start[0], **options)
        loss = y.sin().sum() + sum((part**2).sum() for part in (after if isinstance(after, tuple) else (after,)))
        first = [g for g in torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True) if g is not None]
        weighted = sum((g * torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype).reshape(g.shape)).sum() for g in first)
        second = torch.autograd.grad(weighted, leaves, allow_unused=True)
    return [*first, *(torch.zeros(1) if g is None else g for g in second)]


def check(cell: fc.Cell, **options) -> None:
    expected = all_gradients(cell, "eager", **options)
    for actual, value in zip(all_gradients(cell, "compiled", **options), expected, strict=True):
        torch.testing.assert_close(actual.double(), value.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("zoo_cell", CELLS[::3], ids=lambda zoo_cell: zoo_cell.name)
def test_cells_of_the_zoo(zoo_cell, calls) -> None:
    torch.manual_seed(0)
    check(zoo_cell.make(4, 6).double())
    assert calls == [True]


@pytest.mark.parametrize(
    "options",
    [{"reverse": True}, {"lengths": torch.tensor([5, 2, 4])}, {"lengths": torch.tensor([1, 5, 4]), "reverse": True}],
)  # fmt: skip
def test_options(options, calls) -> None:
    torch.manual_seed(0)
    check(fc.LSTMCell(4, 5).double(), **options)
    assert calls == [True]


def test_resets_go_through_the_loop(calls) -> None:
    torch.manual_seed(0)
    check(fc.GRUCell(4, 5).double(), resets=torch.arange(15).reshape(5, 3) % 4 == 0)
    assert calls == []


def test_norms(calls) -> None:
    """Their tangents have no right gradient in torch."""

    class Normed(fc.Cell):
        def __init__(self) -> None:
            super().__init__(4, 6)
            self.linear, self.layer, self.group = nn.Linear(10, 6), nn.LayerNorm(6), nn.GroupNorm(2, 6)

        def step(self, x, state):
            h = torch.tanh(self.group(self.layer(self.linear(torch.cat((x, state[0]), -1)))))
            return h, (h,)

    torch.manual_seed(0)
    check(Normed().double())
    assert calls == [True]


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def test_what_torch_has_no_tangent_of_goes_through_the_loop(calls) -> None:
    class Custom(fc.Cell):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.w = nn.Parameter(torch.randn(4))

        def step(self, x, state):
            h = torch.tanh(Square.apply(x + self.w * state[0]))
            return h, (h,)

    torch.manual_seed(0)
    check(Custom().double())
    assert calls == [False]


def test_a_kernel_that_disagrees_with_the_loop_is_not_used(calls, monkeypatch) -> None:
    monkeypatch.setattr(tangent_step._SpelledOut, "functions", {torch.tanh: torch.sin})
    torch.manual_seed(0)
    check(fc.cells.MGUCell(4, 5).double())
    assert calls == [False]


def test_products_with_the_hessian_and_third_derivatives() -> None:
    torch.manual_seed(0)
    cell = fc.GRUCell(4, 5).double()
    x = torch.randn(4, 2, 4, dtype=torch.float64)
    results = []
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            weights = list(cell.parameters())
            first = torch.autograd.grad(fc.scan(cell, x)[0].square().sum(), weights, create_graph=True)
            product = torch.autograd.grad(sum(g.sum() for g in first), weights, create_graph=True)
            third = torch.autograd.grad(sum(g.square().sum() for g in product), weights)
        results.append([*product, *third])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_a_gradient_weighted_with_its_own_weight() -> None:
    """It is compiled as any other: the next direction is another tensor."""
    torch.manual_seed(1)
    cell = fc.cells.MGUCell(4, 7).double()
    x, weights, results = torch.randn(4, 2, 4, dtype=torch.float64), list(cell.parameters()), []
    fc.refresh()
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            for directions in (weights, [value.cos() for value in weights]):
                along = [value.detach() for value in directions]
                first = torch.autograd.grad(fc.scan(cell, x)[0].square().sum(), weights, create_graph=True)
                results.append(torch.autograd.grad(first, weights, along))
    torch.testing.assert_close(results[:2], results[2:], rtol=1e-9, atol=1e-9)


def test_of_a_layer_called_twice(calls) -> None:
    """The second call takes the fast path."""
    torch.manual_seed(0)
    layer = fc.GRU(4, 5).double()
    x = torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for runner in ("compiled", "compiled", "compiled", "eager"):
        with fc.runner(runner):
            (g,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
            results.append(torch.autograd.grad(g.norm(dim=-1).sub(1).square().mean(), list(layer.parameters())))
    for result in results[:3]:
        torch.testing.assert_close(result, results[3], rtol=1e-9, atol=1e-9)
    assert calls == [True] * 3


def test_tangents_that_are_zero_are_not_multiplied(monkeypatch):
    """Of inputs without tangents: a GRU has products with the tangents of states, and none with those of inputs."""
    kernels = []
    compiled = second_order.SecondOrder.kernels

    def spy(self, tangents, shapes):
        kernels.append(compiled(self, tangents, shapes))
        return kernels[-1]

    monkeypatch.setattr(second_order.SecondOrder, "kernels", spy)
    size, width = 24, 16
    cell, x = fc.GRUCell(width, size), torch.randn(5, 3, width)
    weights = list(cell.parameters())
    first = torch.autograd.grad(fc.scan(cell, x)[0].square().sum(), weights, create_graph=True)
    torch.autograd.grad(sum(value.square().sum() for value in first), weights)
    (training,) = [each for flags, each in kernels[0]._trainings.items() if not flags[1]]
    recurrent = 3 * size * size
    assert training.backward.kernel.macs == 5 * recurrent + 3 * size * width


def test_the_first_forward_is_run_once(monkeypatch):
    """What a prepared call saved serves its gradients of gradients too."""
    from fusecell.compiler.programs.training import Call

    cell, x = fc.GRUCell(4, 5), torch.randn(6, 2, 4)
    weights = list(cell.parameters())
    runs = []
    run_forward = Call.run_forward
    monkeypatch.setattr(Call, "run_forward", lambda self, *rest: runs.append(self) or run_forward(self, *rest))

    def hessian_product():
        loss = fc.scan(cell, x)[0].square().sum()
        first = torch.autograd.grad(loss, weights, create_graph=True)
        return torch.autograd.grad(sum(value.square().sum() for value in first), weights)

    hessian_product()
    hessian_product()
    runs.clear()
    product = hessian_product()
    assert len(runs) == 1  # of the step with tangents; the cell's own is the prepared call
    with fc.runner("eager"):
        torch.testing.assert_close(product, hessian_product(), atol=1e-4, rtol=1e-4)
