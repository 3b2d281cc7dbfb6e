"""Measure the errors of compiled results against float64, for docs/numerics.md: ``python -m benchmarks.accuracy``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
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


def _unit(x: Tensor) -> Tensor:
    return 0.999 * torch.tanh(x)


def _positive(x: Tensor) -> Tensor:
    return x.abs() + 0.01


# Rarer operations, of an argument that is first taken to where they are defined, or to a pair of them.
_SPECIAL: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    **{
        name: (getattr(torch, name), torch.clone)
        for name in ("round", "frac", "atan", "sinh", "cosh", "asinh", "tan", "exp2", "sinc", "erf", "erfc")
    },
    **{name: (getattr(torch, name), _unit) for name in ("asin", "acos", "atanh", "erfinv")},
    **{name: (getattr(torch, name), _positive) for name in ("log", "log2", "log10", "lgamma", "digamma")},
    "acosh": (torch.acosh, lambda x: x.abs() + 1),
    "logit": (torch.logit, lambda x: 0.001 + 0.998 * torch.sigmoid(x)),
    "remainder": (lambda x: torch.remainder(x, 0.75), torch.clone),
    "fmod": (lambda x: torch.fmod(x, 0.75), torch.clone),
    **{
        name: (lambda x, name=name: getattr(torch, name)(x, x.flip(-1)), torch.clone)
        for name in ("atan2", "hypot", "logaddexp", "logaddexp2")
    },
    "xlogy": (lambda x: torch.xlogy(x, x.flip(-1)), _positive),
    **{f"special.{name}": (getattr(torch.special, name), torch.clone) for name in ("i0", "i0e", "i1", "i1e")},
    "special.erfcx": (torch.special.erfcx, lambda x: x / 2),
    "special.log_ndtr": (torch.special.log_ndtr, torch.clone),
    "special.ndtri": (torch.special.ndtri, lambda x: 0.001 + 0.998 * torch.sigmoid(x)),
    **{
        f"polygamma of order {order}": (lambda x, order=order: torch.polygamma(order, x), _positive) for order in (2, 3)
    },
}


class _Applied(fc.Cell):
    """A cell whose step applies a function to the input."""

    states = ()

    def __init__(self, size: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(size, size)
        self.function = function

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.function(x), ()


def of_activation(
    function: Callable[[Tensor], Tensor], domain: Callable[[Tensor], Tensor] = torch.clone
) -> tuple[float, float, float]:
    """Return a function's largest errors over 200,000 numbers: in ulp, torch's in ulp, and absolute.

    Arguments:
        function: of float32 or float64 tensors.
        domain: what takes a normal number to an argument of the function.
    """
    generator = torch.Generator().manual_seed(0)
    # Half of the inputs wide, where activations saturate, half near 0, where they cancel.
    x = torch.cat((torch.randn(400, 256, generator=generator) * 4, torch.randn(400, 256, generator=generator) * 0.01))
    x = domain(x)
    with torch.no_grad(), fc.runner("compiled"):
        outputs = fc.scan(_Applied(256, function), x[:, None])[0][:, 0].double()
    exact = function(x.double())
    error, torch_error = (outputs - exact).abs(), (function(x).double() - exact).abs()
    ulp = torch.from_numpy(np.spacing(exact.abs().float().numpy())).double()
    # Near the denormals, which count as zero in kernels, an ulp says nothing.
    normal = exact.abs() > 2.0**-120
    return float((error / ulp)[normal].max()), float((torch_error / ulp)[normal].max()), float(error.max())


def of_cell(member: fc.cells.ZooCell) -> tuple[float, float]:
    """Return the largest errors of a cell's outputs over 100 steps: compiled, and of torch in float32."""
    torch.manual_seed(0)
    cell, x = member.make(64, 128).eval(), torch.randn(100, 8, 64)
    with torch.no_grad():
        with fc.runner("compiled"):
            compiled, _ = fc.scan(cell, x)
        with fc.runner("eager"):
            eager, _ = fc.scan(cell, x)
            exact, _ = fc.scan(cell.double(), x.double())
    return float((compiled - exact).abs().max()), float((eager - exact).abs().max())


def of_gradients(kind: str, steps: int, dtype: torch.dtype = torch.float32) -> list[tuple[float, float]]:
    """Return the error over its norm of the output, and the largest such of a gradient, for fusecell and for torch."""
    torch.manual_seed(0)
    reference = getattr(nn, kind)(64, 128).to(dtype)  # all three layers get its weights
    x, weight = torch.randn(steps, 8, 64).to(dtype), torch.randn(steps, 8, 128).to(dtype)
    results = []
    for module, each in ((nn, torch.float64), (fc, dtype), (nn, dtype)):
        layer = getattr(module, kind)(64, 128).to(each)
        layer.load_state_dict(reference.state_dict())
        leaf = x.to(each, copy=True).requires_grad_()
        output = layer(leaf)[0]
        output.backward(weight.to(each))
        gradients = [value.grad for value in (leaf, *layer.parameters())]
        results.append([value.detach().double() for value in (output, *gradients)])
    exact = results[0]
    errors = [
        [float((one - true).norm() / true.norm()) for one, true in zip(values, exact, strict=True)]
        for values in results[1:]
    ]
    return [(each[0], max(each[1:])) for each in errors]


def loss_curve(module: Any, kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Return the losses of 200 steps of Adam: a layer and a readout fit random targets to random sequences."""
    torch.manual_seed(seed)
    model = nn.ModuleList([getattr(module, kind)(16, 64), nn.Linear(64, 4)])
    x, y = torch.randn(40, 16, 16).to(dtype), torch.randn(40, 16, 4).to(dtype)
    optimizer = torch.optim.Adam(model.to(dtype).parameters(), lr=1e-3)
    losses = []
    for _ in range(200):
        loss = (model[1](model[0](x)[0]) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def of_training(kind: str) -> tuple[float, float, float, float]:
    """Return the first and last loss, and the largest differences of fusecell's and torch's curves from float64's.

    The differences are medians over five seeds, because how rounding errors grow along a curve is a matter of chance.
    """
    differences = []
    for seed in range(5):
        exact, curve, torch_curve = (
            loss_curve(module, kind, dtype, seed)
            for module, dtype in ((nn, torch.float64), (fc, torch.float32), (nn, torch.float32))
        )
        differences.append([float((each - exact).abs().max()) for each in (curve, torch_curve)])
    median = torch.tensor(differences).median(0).values
    return float(exact[0]), float(exact[-1]), float(median[0]), float(median[1])


def main() -> None:
    """Print the tables."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("| activation | ulp | torch's ulp | absolute |\n|---|---:|---:|---:|")
    for name, function in {**ACTIVATIONS, **_OTHERS}.items():
        if name != "identity":
            ulp, torch_error, absolute = of_activation(function)
            print(f"| {name} | {ulp:.4g} | {torch_error:.4g} | {absolute:.1e} |")
    print("\n| operation | ulp | torch's ulp | absolute |\n|---|---:|---:|---:|")
    for name, (function, domain) in _SPECIAL.items():
        ulp, torch_error, absolute = of_activation(function, domain)
        print(f"| {name} | {ulp:.4g} | {torch_error:.4g} | {absolute:.1e} |")
    print("\n| cell | compiled | torch, float32 |\n|---|---:|---:|")
    for member in fc.CELLS:
        error, torch_error = of_cell(member)
        print(f"| {member.name} | {error:.1e} | {torch_error:.1e} |")
    print("\n| layer | steps | fusecell | torch, float32 |\n|---|---:|---:|---:|")
    for kind in ("RNN", "GRU", "LSTM"):
        for steps in (35, 1000):
            (_, error), (_, torch_error) = of_gradients(kind, steps)
            print(f"| {kind} | {steps} | {error:.1e} | {torch_error:.1e} |")
    print("\n| layer | dtype | output | torch's | gradient | torch's |\n|---|---|---:|---:|---:|---:|")
    for kind in ("RNN", "GRU", "LSTM"):
        for dtype in (torch.bfloat16, torch.float16):
            (output, gradient), (torch_output, torch_gradient) = of_gradients(kind, 100, dtype)
            name = str(dtype).removeprefix("torch.")
            print(f"| {kind} | {name} | {output:.1e} | {torch_output:.1e} | {gradient:.1e} | {torch_gradient:.1e} |")
    print("\n| layer | first loss | last loss | fusecell | torch, float32 |\n|---|---:|---:|---:|---:|")
    for kind in ("RNN", "GRU", "LSTM"):
        first, last, error, torch_error = of_training(kind)
        print(f"| {kind} | {first:.4f} | {last:.4f} | {error:.1e} | {torch_error:.1e} |")


if __name__ == "__main__":
    main()
