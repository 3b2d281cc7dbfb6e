"""Kernels compiled for a lower CPU level than this machine's."""

from __future__ import annotations

import pytest
import torch

import fusecell as fc
from tests.compiler.cpu_levels import runs_here


@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3"])
def test_levels_without_and_with_fma(level, monkeypatch, zoo_cell):
    """Both are accurate, and each gives the same bits for a row alone and for a sequence in pieces."""
    if not runs_here(level):
        pytest.skip(f"this CPU is below {level}")
    monkeypatch.setenv("FUSECELL_TARGET", level)
    torch.manual_seed(2)
    cell = zoo_cell.make(5, 13)
    x = torch.randn(9, 5, 5)
    fc.refresh()  # what was compiled for the other level
    try:
        with torch.no_grad(), fc.runner("compiled"):
            y, _ = fc.scan(cell, x)
            alone, _ = fc.scan(cell, x[:, 2:3])
            first, state = fc.scan(cell, x[:4])
            rest, _ = fc.scan(cell, x[4:], state)
    finally:
        fc.refresh()
    assert torch.equal(alone, y[:, 2:3])
    assert torch.equal(torch.cat((first, rest)), y)
    with torch.no_grad(), fc.runner("eager"):
        exact, eager = fc.scan(cell.double(), x.double())[0], fc.scan(cell.float(), x)[0]
    largest = exact.abs().max()
    assert (y - exact).abs().max() / largest <= max(4 * (eager - exact).abs().max() / largest, 2e-6)
