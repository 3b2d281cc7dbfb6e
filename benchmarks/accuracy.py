"""``python -m benchmarks.accuracy``: how far compiled results are from float64, for docs/numerics.md."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fusecell as fc
from fusecell.cells.activations import ACTIVATIONS

__all__ = ["main"]

_OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log1p": lambda x: torch.log1p(x.abs()),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1e-3),
    "softmax": lambda x: F.softmax(x, -1),
}


class _Applied(fc.Cell):
    """A function of the input, in a step."""

    states = ()

    def __init__(self, size: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(size, size)
        self.function = function

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.function(x), ()


def of_activation(function: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
    """The largest errors over 200,000 numbers: in units of the last place, torch's likewise, and absolute."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat((torch.randn(400, 256, generator=generator) * 4, torch.randn(400, 256, generator=generator) * 0.01))
    with torch.no_grad(), fc.runner("compiled"):
        found = fc.scan(_Applied(256, function), x[:, None])[0][:, 0].double()
    exact = function(x.double())
    error, theirs = (found - exact).abs(), (function(x).double() - exact).abs()
    unit = torch.from_numpy(np.spacing(exact.abs().float().numpy())).double()
    normal = exact.abs() > 2.0**-120
    return float((error / unit)[normal].max()), float((theirs / unit)[normal].max()), float(error.max())


def of_cell(member: fc.cells.ZooCell) -> tuple[float, float]:
    """The largest errors of outputs over 100 steps: compiled, and in torch's own float32."""
    torch.manual_seed(0)
    cell, x = member.make(64, 128).eval(), torch.randn(100, 8, 64)
    with torch.no_grad():
        with fc.runner("compiled"):
            mine, _ = fc.scan(cell, x)
        with fc.runner("eager"):
            theirs, _ = fc.scan(cell, x)
            exact, _ = fc.scan(cell.double(), x.double())
    return float((mine - exact).abs().max()), float((theirs - exact).abs().max())


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("| activation | ulp | torch's ulp | absolute |\n|---|---:|---:|---:|")
    for name, function in {**ACTIVATIONS, **_OTHERS}.items():
        if name != "identity":
            ulp, theirs, absolute = of_activation(function)
            print(f"| {name} | {ulp:.4g} | {theirs:.4g} | {absolute:.1e} |")
    print("\n| cell | compiled | torch, float32 |\n|---|---:|---:|")
    for member in fc.CELLS:
        mine, theirs = of_cell(member)
        print(f"| {member.name} | {mine:.1e} | {theirs:.1e} |")


if __name__ == "__main__":
    main()
