"""Kernels of what is computed along axes, forward and backward, against the Python loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fusecell as fc
from tests.compiler.axis_cells import AXES, AxisCell

SINGLE = ("a_weight_per_head", "matrices_of_a_row", "conv2d", "extremes_of_dim", "cumulative", "topk", "embedding")


def _results(cell: fc.Cell, x: Tensor, h: Tensor, runner: str) -> list[Tensor]:
    """Outputs, states, and gradients of all that has one."""
    with fc.runner(runner):
        output, state = fc.Recurrent(cell)(x, h)
    loss = (output * torch.linspace(-1, 1, output.numel(), dtype=x.dtype).reshape(output.shape)).sum()
    leaves = [x, h, *cell.parameters()]
    gradients = torch.autograd.grad(loss + (state**2).sum(), leaves, allow_unused=True)
    zeros = [torch.zeros_like(leaf) for leaf in leaves]
    return [output, state, *(zero if each is None else each for each, zero in zip(gradients, zeros, strict=True))]


@pytest.mark.parametrize("name", AXES)
def test_kernels_along_axes(name: str) -> None:
    torch.manual_seed(0)
    cell = AxisCell(AXES[name]).double()
    sizes = [(3, torch.float64, 1e-11), (1, torch.float32, 2e-3)]
    # Single precision has its own vector width, and is otherwise the same text.
    for rows, dtype, tolerance in sizes if name in SINGLE else sizes[:1]:
        cell.to(dtype)
        x = torch.randn(4, rows, 5, dtype=dtype, requires_grad=True)
        h = torch.randn(rows, 24, dtype=dtype, requires_grad=True)
        compiled, eager = (_results(cell, x, h, runner) for runner in ("compiled", "eager"))
        for actual, expected in zip(compiled, eager, strict=True):
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
