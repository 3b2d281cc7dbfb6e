"""The first few of a line: as a stable sort has them, and the gradients that belong to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fusecell as fc


class Sparse(fc.Cell):
    """A state of which each step keeps the k largest elements, or the smallest."""

    def __init__(self, size: int, k: int, *, largest: bool = True, by_sorting: bool = False) -> None:
        super().__init__(size, size)
        self.k, self.largest, self.by_sorting = k, largest, by_sorting

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
        h = torch.maximum(state[0], x)
        if self.by_sorting:
            values, places = (each[:, : self.k] for each in h.sort(dim=1, descending=self.largest, stable=True))
        else:
            values, places = h.topk(self.k, 1, self.largest)
        kept = torch.zeros_like(h).scatter(1, places, values)
        ranks = torch.arange(self.k, dtype=h.dtype)
        return kept + (places * (ranks + 1)).sum(1, keepdim=True) / 64, (kept,)


def lines(kind: str, size: int, dtype: torch.dtype) -> Tensor:
    """Five steps of three rows, most of whose elements are equal."""
    x = torch.randn(5, 3, size, dtype=dtype).mul(2).round().div(2)
    often = torch.rand(x.shape) < 0.9
    numbers = {"ties": x, "low": torch.where(often, -math.inf, x), "high": torch.where(often, math.inf, x)}
    numbers |= {"nan": torch.where(torch.rand(x.shape) < 0.1, math.nan, x), "zeros": x * 0}
    return numbers[kind]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["ties", "low", "high", "nan", "zeros"])
@pytest.mark.parametrize(("size", "k"), [(7, 1), (33, 8), (64, 3), (513, 8)])
@pytest.mark.parametrize("largest", [True, False])
def test_a_few_are_the_first_of_a_stable_sort(size: int, k: int, largest: bool, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    x, results = lines(kind, size, dtype), []
    for by_sorting, runner in ((False, "compiled"), (True, "eager"), (True, "compiled")):
        leaf = x.clone().requires_grad_()
        with fc.runner(runner):
            y, _ = fc.scan(Sparse(size, k, largest=largest, by_sorting=by_sorting), leaf)
        seed = torch.linspace(0.5, 1.5, y.numel(), dtype=dtype).view_as(y)
        results.append((y, *torch.autograd.grad(y, leaf, seed)))
    for selected, sorted_by_torch, sorted_here in zip(*results, strict=True):
        torch.testing.assert_close(selected, sorted_here, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(selected, sorted_by_torch, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_the_kth_of_a_long_line_needs_no_sorting() -> None:
    class Kth(fc.Cell):
        def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
            h = 0.5 * state[0] + x
            values, places = h.view(-1, 2, 50).kthvalue(7, 2, keepdim=True)
            return h - values.repeat_interleave(50, 2).flatten(1) + places.sum((1, 2))[:, None], (h,)

    cell, x, results = Kth(100, 100), torch.randn(4, 3, 100), []
    assert '"first": 7' in str(fc.explain(cell).graph)
    for runner in ("compiled", "eager"):
        leaf = x.clone().requires_grad_()
        with fc.runner(runner):
            y, _ = fc.scan(cell, leaf)
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaf)))
    torch.testing.assert_close(*results)
