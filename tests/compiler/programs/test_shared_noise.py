"""Weights that a step changes by numbers of its own at each step, the same for all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusecell as fc

Body = Callable[[Any, Tensor, Tensor], Tensor]


class _Masked(torch.autograd.Function):
    """A product whose weight has a gradient in some places only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, mask = ctx.saved_tensors
        return gradient @ weight.T, (x.T @ gradient) * mask, None


# Of a step's tanh z, 6 features, and d, a square weight of which the step drops elements.
BODIES: dict[str, Body] = {
    "right": lambda c, z, d: z @ d,
    "left": lambda c, z, d: F.linear(z, d),
    "parts": lambda c, z, d: F.linear(z[:, :3], d[:, :3]) + z * d[0] + z * d[:, 2] + z * d[-1, 1],
    "twice": lambda c, z, d: F.linear(torch.tanh(F.linear(z, d)), d.T),
    "heads": lambda c, z, d: torch.einsum("nhd,hde->nhe", z.view(-1, 3, 2), d.view(3, 2, 6)[..., :2]).flatten(1),
    "one of several": lambda c, z, d: F.pad(z[:, :2] @ d.view(6, 2, 3)[1], (0, 3)) + z @ d,
    "kernel": lambda c, z, d: F.conv1d(z[:, None], d.view(12, 1, 3), padding=1).sum(1),
    "rows of a table": lambda c, z, d: F.embedding((z[:, :2] > 0).long(), d).sum(1),
    "triangle": lambda c, z, d: z @ torch.tril(d) + z @ torch.triu(d, 1).T,
    "sums": lambda c, z, d: z @ d + z * d[1:5].sum(0) + z * d[:, ::2].sum(),
    "normed": lambda c, z, d: z @ F.normalize(d, dim=0),
    "softmax": lambda c, z, d: z @ d.softmax(-1) + z @ d.softmax(0),
    "functions": lambda c, z, d: z @ (d.tanh() + d.sigmoid() + d.relu() + F.elu(d) + F.gelu(d) + F.hardtanh(d)),
    "chosen": lambda c, z, d: z @ torch.where(c.mask, d, 0.0) + z @ d.masked_fill(c.mask, 0.0),
    "product of weights": lambda c, z, d: z @ (d.T @ c.other) + z @ (c.other @ d),
    "scaled": lambda c, z, d: z @ (d * c.vector[:, None] / (c.vector.square() + 1)),
    "stacked": lambda c, z, d: z @ torch.stack([d[1], d[0], d[2], d[3], d[5], d[4]]),
    "noise": lambda c, z, d: F.linear(z, c.other + torch.randn_like(c.other) * F.softplus(c.weight)),
    "noise for each line": lambda c, z, d: F.linear(z, c.weight * (1 + torch.randn(6, 1, dtype=z.dtype))),
    "masked gradient": lambda c, z, d: _Masked.apply(z, c.weight, c.mask),
}


class Dropped(fc.Cell):
    def __init__(self, body: Body) -> None:
        super().__init__(3, 6)
        self.body = body
        self.linear = nn.Linear(9, 6)
        self.weight, self.other = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
        self.vector = nn.Parameter(torch.rand(6))
        self.register_buffer("mask", torch.rand(6, 6) > 0.4)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        z = torch.tanh(self.linear(torch.cat([x, state[0]], 1)))
        h = torch.sin(self.body(self, z, F.dropout(self.weight, 0.3, self.training)))
        return h, (h,)


@pytest.mark.parametrize("name", BODIES)
def test_gradients_are_those_of_the_loop(name: str) -> None:
    torch.manual_seed(0)
    cell, results = Dropped(BODIES[name]).double(), []
    x = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    for runner in ("eager", "compiled"):
        torch.manual_seed(3)
        with fc.runner(runner):
            y = fc.scan(cell, x, lengths=[5, 3, 0, 4])[0]
        gradients = torch.autograd.grad(y.sin().sum(), [x, *cell.parameters()], allow_unused=True)
        results.append([y, *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected.expand_as(actual), rtol=1e-11, atol=1e-11, check_dtype=False)


def test_large_weights_are_left_to_the_loop() -> None:
    class Wide(fc.Cell):
        def __init__(self) -> None:
            super().__init__(80, 80)
            self.weight = nn.Parameter(torch.randn(80, 80))

        def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
            h = torch.tanh(x + state[0] @ F.dropout(self.weight, 0.3, self.training))
            return h, (h,)

    cell, x = Wide(), torch.randn(3, 2, 80)
    with (
        pytest.raises(fc.NotCompilable, match=r"a weight of 6,400 elements .* fusecell.WeightDrop"),
        fc.runner("compiled"),
    ):
        fc.scan(cell, x)
    with fc.runner("compiled"):
        fc.scan(cell.eval(), x)
