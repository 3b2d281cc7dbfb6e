"""``grid_sample`` in a step: every mode and padding, inside and far outside of images and volumes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecell as fc


class Sampling(fc.Cell):
    """A state is an image of two channels, or a volume, that is read at places of the input."""

    def __init__(self, sizes: tuple[int, ...], places: tuple[int, ...], mode: str, padding: str, aligned: bool) -> None:
        super().__init__((*places, len(sizes)), (2, *sizes))
        self.output_size = (2, *places)
        self.mode, self.padding, self.aligned = mode, padding, aligned
        self.gain = nn.Parameter(torch.ones(()))

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        (image,) = state
        read = F.grid_sample(image, x * self.gain, self.mode, self.padding, self.aligned)
        decayed = 0.5 * image + torch.tanh(read).flatten(2).mean(2).reshape(-1, 2, *[1] * (image.dim() - 2))
        return read, (decayed,)


IMAGES = [((3, 4), (2, 3)), ((1, 5), (5, 1))]
VOLUMES = [((2, 3, 4), (2, 1, 3))]
CASES = [
    *((sizes, mode) for sizes in IMAGES for mode in ("bilinear", "nearest", "bicubic")),
    *((sizes, mode) for sizes in VOLUMES for mode in ("bilinear", "nearest")),
]
PADDINGS = [("zeros", True), ("zeros", False), ("border", True), ("reflection", True), ("reflection", False)]


@pytest.mark.parametrize(("padding", "aligned"), PADDINGS)
@pytest.mark.parametrize(("sizes", "mode"), CASES)
def test_numbers_are_torchs(sizes, mode: str, padding: str, aligned: bool) -> None:
    compare(sizes, mode, padding, aligned, torch.float64)


@pytest.mark.parametrize(("sizes", "mode"), CASES[2:4] + CASES[-1:])
def test_float32(sizes, mode: str) -> None:
    compare(sizes, mode, "reflection", False, torch.float32)


def compare(sizes, mode: str, padding: str, aligned: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cell = Sampling(*sizes, mode, padding, aligned).to(dtype)
    steps, rows = 3, 2
    x = torch.randn(steps, rows, *sizes[1], len(sizes[0]), dtype=dtype) * 1.5
    x[1] *= 4  # several reflections away
    start, results = torch.randn(rows, 2, *sizes[0], dtype=dtype), []
    for runner in ("compiled", "eager"):
        leaves = [x.clone().requires_grad_(), start.clone().requires_grad_()]
        with fc.runner(runner):
            y, h = fc.scan(cell, leaves[0], (leaves[1],))
        loss = (y * torch.linspace(0.5, 1.5, y.numel(), dtype=dtype).view_as(y)).sum() + h.square().sum()
        results.append((y, h, *torch.autograd.grad(loss, [*leaves, cell.gain])))
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_an_image_is_read_at_its_own_elements(mode: str) -> None:
    """At the places of the elements themselves all kernels give these; compiled, without torch to compare with."""
    cell = Sampling((3, 4), (3, 4), mode, "reflection", True).double()
    image = torch.arange(24, dtype=torch.float64).view(1, 2, 3, 4)
    grid = F.affine_grid(torch.eye(2, 3, dtype=torch.float64)[None], [1, 2, 3, 4], align_corners=True)
    with torch.no_grad(), fc.runner("compiled"):
        y, _ = fc.scan(cell, grid[None], (image,))
    torch.testing.assert_close(y[0], image, rtol=1e-14, atol=1e-12)
    assert math.isfinite(float(y.sum()))
