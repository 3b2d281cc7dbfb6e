"""Convolutions in a step with the arguments that are rare: even kernels padded alike, dilation, groups, strides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecell as fc

SIZES = {1: (9,), 2: (4, 5), 3: (2, 3, 3)}
CHANNELS = 4


class Convolving(fc.Cell):
    """A convolution of the state, of which a sum goes back to it."""

    def __init__(self, name: str, kernel: tuple[int, ...], options: dict[str, Any]) -> None:
        self.shape = (CHANNELS, *SIZES[len(kernel)])
        super().__init__(self.shape, self.shape)
        groups = options.get("groups", 1)
        self.function, self.options = getattr(F, name), options
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS // groups, *kernel) / 4)
        self.bias = nn.Parameter(torch.randn(CHANNELS) / 4)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        y = self.function(x + state[0], self.weight, self.bias, **self.options)
        ramp = torch.linspace(0.5, 1.5, math.prod(y.shape[2:]), dtype=y.dtype)
        h = torch.tanh(x + (y.flatten(2) * ramp).mean(2).reshape(-1, CHANNELS, *[1] * (x.dim() - 2)))
        return h, (h,)


CASES = [
    ("conv1d", (4,), {"padding": "same"}),
    ("conv1d", (4,), {"padding": "same", "dilation": 3, "groups": 2}),
    ("conv1d", (3,), {"padding": "valid", "stride": 2, "dilation": 2, "groups": 4}),
    ("conv1d", (2,), {"padding": 3, "stride": 3}),
    ("conv1d", (9,), {}),
    ("conv2d", (2, 3), {"padding": "same", "dilation": (1, 2)}),
    ("conv2d", (4, 2), {"padding": "same", "groups": 2}),
    ("conv2d", (2, 2), {"padding": (2, 0), "stride": (1, 2), "dilation": (2, 1), "groups": 4}),
    ("conv3d", (1, 2, 2), {"padding": "same"}),
    ("conv3d", (2, 2, 1), {"stride": (1, 2, 1), "groups": 2, "padding": (1, 0, 0)}),
    ("conv_transpose1d", (4,), {"stride": 3, "padding": 1, "output_padding": 2, "groups": 2}),
    ("conv_transpose1d", (2,), {"dilation": 3}),
    ("conv_transpose2d", (2, 3), {"stride": (2, 1), "output_padding": (1, 0), "dilation": (1, 2)}),
    ("conv_transpose3d", (1, 2, 2), {"stride": (1, 2, 1), "groups": 4}),
]


def results_of(cell: Convolving, runner: str, x: Tensor) -> list[Tensor]:
    """The output and all gradients, by a runner."""
    leaf = x.clone().requires_grad_()
    with fc.runner(runner):
        y, _ = fc.scan(cell, leaf)
    return [y, *torch.autograd.grad(y.sin().sum(), [leaf, *cell.parameters()])]


# Of even kernels torch pads a copy, and says so once.
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("name", "kernel", "options"), CASES)
def test_numbers_are_torchs(name: str, kernel: tuple[int, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    cell = Convolving(name, kernel, options)
    x = torch.randn(3, 2, *cell.shape) / 4
    compiled, eager = (results_of(cell, runner, x) for runner in ("compiled", "eager"))
    wide = cell.double()
    exact = results_of(wide, "eager", x.double())
    for got, expected in zip(results_of(wide, "compiled", x.double()), exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    for got, torchs, true in zip(compiled, eager, exact, strict=True):
        error, torch_error = ((each.double() - true).abs().max() for each in (got, torchs))
        assert error <= 4 * torch_error + 4 * torch.finfo(torch.float32).eps * true.abs().max()
