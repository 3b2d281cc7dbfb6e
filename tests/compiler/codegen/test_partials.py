"""Partial results of reductions outside the loop: each thread has its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusecell as fc
from fusecell.compiler.runtime import guard_pages
from tests.compiler import force_threads


class Largest(fc.Cell):
    """A reduction of the input alone, which leaves the loop."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.output_size = 1
        self.gain = nn.Parameter(torch.randn(3))

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return (x * self.gain).amax(1, keepdim=True), (state[0] * 0.5 + x[:, :2],)


def test_two_threads_reduce_their_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gaps between threads' buffers, as in the check mode, partial results by the row alone would overlap."""
    force_threads.always(monkeypatch)
    monkeypatch.setattr(guard_pages, "ENABLED", True)
    layer, x = fc.Recurrent(Largest()), torch.randn(30, 9, 3)
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            torch.set_num_threads(1)
            expected = layer(x)[0]
            torch.set_num_threads(2)
            wrong = sum(not torch.equal(layer(x)[0], expected) for _ in range(300))
    finally:
        torch.set_num_threads(before)
    assert wrong == 0
