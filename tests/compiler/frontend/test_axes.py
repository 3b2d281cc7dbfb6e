"""Graphs of steps that compute along axes, forward and backward, against torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusecell as fc
from fusecell.compiler.frontend import Traced, trace
from tests.compiler.axis_cells import AXES, AxisCell, fit, heads
from tests.compiler.traced_cells import compare


@pytest.mark.parametrize("name", AXES)
def test_steps_along_axes(name: str) -> None:
    compare(AxisCell(AXES[name]).double())


@pytest.mark.parametrize("name", AXES)
def test_they_are_traced_in_single_precision(name: str) -> None:
    result = trace(AxisCell(AXES[name]), [(5,)], torch.float32, gradients=True)
    assert isinstance(result, Traced), result


@pytest.mark.filterwarnings("ignore:index_reduce")  # torch calls it a beta
@pytest.mark.parametrize("how", ["mean", "prod", "amax"])
def test_values_reduced_at_positions(how: str) -> None:
    def body(cell, z):
        places = cell.order[:5] % 8
        return fit(heads(z).index_reduce(2, places, heads(z)[..., 3:].sin(), how, include_self=how == "amax"))

    compare(AxisCell(body).double())


class Wide(fc.Cell):
    """A cell of 600 features, of which a function moves many at once."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__(5, 600)
        self.inp, self.body = nn.Linear(5, 600), body

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        h = torch.tanh(self.body(self.inp(x) + state[0]) * 0.5)
        return h, (h,)


@pytest.mark.parametrize(
    "body",
    [
        lambda z: z.view(-1, 20, 30).transpose(1, 2).flatten(1),
        lambda z: z.view(-1, 5, 4, 30).permute(0, 3, 1, 2).flatten(1).flip(1),
        lambda z: torch.stack((z[:, ::2], z[:, 1::2].sin()), -1).flatten(1),
        lambda z: torch.cat((z[:, 1::3], z[:, 2::3].cos(), z[:, ::3]), 1),
        lambda z: nn.functional.interpolate(z[:, ::4].reshape(-1, 1, 10, 15), scale_factor=2).flatten(1),
        lambda z: nn.functional.pad(z.view(-1, 20, 30)[:, 1:], (0, 0, 0, 1)).transpose(1, 2).flatten(1),
        lambda z: (
            (torch.ones(4, 54, dtype=z.dtype).mul(0.1) @ nn.functional.unfold(z.view(-1, 6, 10, 10), 3, padding=1))
            .repeat(1, 1, 2)[:, :, :150]
            .flatten(1)
        ),
    ],
    ids=["transposed", "permuted and flipped", "interleaved", "cut in three", "repeated", "padded", "unfolded"],
)
def test_many_features_that_move_have_axes(body: Callable[[Tensor], Tensor]) -> None:
    cell = Wide(body).double()
    compare(cell)
    result = trace(cell, [(5,)], torch.float64, gradients=True)
    assert isinstance(result, Traced), result
    assert len(result.graph.nodes) < 300  # and not as many as features


@pytest.mark.parametrize(
    "body",
    [
        lambda z: (z * 3).relu().view(-1, 6, 100).cumprod(2).flatten(1),
        lambda z: (z + 1).view(-1, 100, 6).cumprod(1).flatten(1),
        lambda z: (z * 9).logcumsumexp(1),
        lambda z: (z * 90).view(-1, 100, 6).logcumsumexp(1).flatten(1) / 90,
        lambda z: (z * 9).view(-1, 200, 3).logcumsumexp(2).flatten(1),
        lambda z: z.masked_fill(z < 0, -math.inf).logcumsumexp(1).clamp_min(-2),
        lambda z: z.view(-1, 60, 10).masked_fill(z.view(-1, 60, 10) < 0, -math.inf).logcumsumexp(2).exp().flatten(1),
    ],
    ids=["with zeros", "across", "logs", "large logs", "few logs", "of nothing", "few of nothing"],
)
def test_running_values_of_many_features(body: Callable[[Tensor], Tensor]) -> None:
    compare(Wide(body).double())
