"""Every elementwise operation, compiled, against torch: values and gradients, in both precisions, edges included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fusecell as fc
from tests.compiler.elementwise_functions import DOMAINS, FUNCTIONS

WIDTH = 7
NAMES = sorted(FUNCTIONS)
GROUPS = [tuple(NAMES[start : start + 12]) for start in range(0, len(NAMES), 12)]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
every_group = pytest.mark.parametrize("names", GROUPS, ids=lambda names: f"{names[0]}-{names[-1]}")


PARTS = ("value", "gradient of x", "gradient of h")
INEXACT = {
    **dict.fromkeys(
        [("digamma", PARTS[1]), ("polygamma", PARTS[1])],
        (2e-9, "torch's trigamma is that far off; test_vector_math holds ours against mpmath"),
    ),
    **dict.fromkeys(
        [("half_composite", part) for part in PARTS],
        (2e-3, "a function's last bit may decide to which float16 it is rounded"),
    ),
}
ROUNDED = (
    "half",
    "half_by_copying",
    "half_composite",
    "bfloat16",
    "float",
    "div_floor",
    "floor_divide",
    "int_reciprocal",
)
"""Rounded to a narrower format, or to integers, in the way of the dtype: float64 has other numbers."""
AT_POLES = (("digamma", PARTS[1]), ("polygamma", PARTS[1]))
"""torch's trigamma is some large number at its poles, of either sign; ours is infinite."""
EITHER_ZERO = ("maximum", "minimum", "clamp", "relu")
"""Of 0 and -0 torch itself returns one or the other, by whether an element is in a whole vector."""


class SideBySide(fc.Cell):
    """Each function on columns of its own of the input and of the state, so that one kernel computes them all."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(WIDTH * len(names), WIDTH * len(names))
        self.names = names

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        (h,) = state
        parts = [
            FUNCTIONS[name](x[:, start : start + WIDTH], h[:, start : start + WIDTH])
            for start, name in zip(range(0, WIDTH * len(self.names), WIDTH), self.names, strict=True)
        ]
        return torch.cat(parts, 1), (h,)


def evaluate(
    names: tuple[str, ...], runner: str, x: Tensor, h: Tensor, *, gradients: bool = True
) -> dict[str, tuple[Tensor, ...]]:
    """One step by a runner: for each function its value, and its gradients where asked for."""
    cell = SideBySide(names).to(x.dtype)
    x, h = x.clone().requires_grad_(gradients), h.clone().requires_grad_(gradients)
    with fc.runner(runner):
        output, _ = fc.scan(cell, x[None], (h,))
    results = [output[0]]
    if gradients:
        seed = torch.linspace(0.5, 1.5, output.numel(), dtype=x.dtype).view_as(output)
        results += torch.autograd.grad(output, [x, h], seed, allow_unused=True, materialize_grads=True)
    parts = [each.detach().split(WIDTH, 1) for each in results]
    return {name: tuple(part[position] for part in parts) for position, name in enumerate(names)}


def _close(got: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def draw(names: tuple[str, ...], rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    columns = []
    for name in names:
        low, high = DOMAINS[name]
        columns.append(low + (high - low) * torch.rand(2, rows, WIDTH, generator=generator, dtype=torch.float64))
    x, h = torch.cat(columns, 2)
    return x, h


@every_group
def test_float64_is_torchs(names: tuple[str, ...]) -> None:
    x, h = draw(names)
    compiled, eager = (evaluate(names, runner, x, h) for runner in ("compiled", "eager"))
    with torch.no_grad():
        inference = evaluate(names, "compiled", x, h, gradients=False)
    for name in names:
        assert torch.equal(inference[name][0], compiled[name][0]), name
        for part, got, expected in zip(PARTS, compiled[name], eager[name], strict=True):
            tolerance, _ = INEXACT.get((name, part), (1e-12, ""))
            _close(got, expected, tolerance, f"{name}, {part}")


@every_group
def test_float32_is_as_near_to_float64_as_torchs(names: tuple[str, ...]) -> None:
    x, h = (value.float() for value in draw(names))
    compiled, eager = (evaluate(names, runner, x, h) for runner in ("compiled", "eager"))
    exact = evaluate(names, "eager", x.double(), h.double())
    for name in names:
        for got, torchs, true in zip(compiled[name], eager[name], exact[name], strict=True):
            if name in ROUNDED:
                _close(got, torchs, INEXACT.get((name, "value"), (1e-6, ""))[0], name)
                continue
            unit = torch.finfo(torch.float32).eps * true.abs().max()
            error, torch_error = ((each.double() - true).abs().max() for each in (got, torchs))
            assert error <= 4 * torch_error + 2 * unit, (name, float(error), float(torch_error))


NUMBERS = [0.0, 0.5, 1.5, 1.0, 3.0, 0.3, math.inf, 1e30]
EDGES = [*NUMBERS, *(-number for number in NUMBERS), 2.5, 6.0, 20.5, math.nan]
WITHOUT_EDGES = {
    "long": "torch's own conversion of infinity and NaN to integers is undefined",
    "int_arithmetic": "the same",
    "int_reciprocal": "the same",
}


@both_dtypes
@every_group
def test_edges_are_torchs(names: tuple[str, ...], dtype: torch.dtype) -> None:
    names = tuple(name for name in names if name not in WITHOUT_EDGES)
    edges = torch.tensor(EDGES, dtype=dtype)
    pairs = torch.cartesian_prod(edges, edges)
    pairs = torch.cat([pairs, pairs[: -len(pairs) % WIDTH]]).view(-1, WIDTH, 2)
    x, h = (pairs[..., side].repeat(1, len(names)).contiguous() for side in (0, 1))
    compiled, eager = (evaluate(names, runner, x, h) for runner in ("compiled", "eager"))
    for name in names:
        for part, got, expected in zip(PARTS, compiled[name], eager[name], strict=True):
            if (name, part) not in AT_POLES:
                tolerance, _ = INEXACT.get((name, part), (1e-6 if dtype == torch.float32 else 1e-12, ""))
                _close(got, expected, tolerance, f"{name}, {part}")
        if name in EITHER_ZERO:
            continue
        value, expected = compiled[name][0], eager[name][0]
        zero = (expected == 0) & (value == 0)
        assert torch.equal(value[zero].signbit(), expected[zero].signbit()), name


class Rounded(fc.Cell):
    """A cell that rounds to 16 bits and back."""

    def __init__(self, dtype):
        super().__init__(8, 8)
        self.to = dtype
        self.gain = nn.Parameter(torch.ones(8, dtype=torch.float64))

    def step(self, x, state):
        y = (x * self.gain).to(self.to).to(x.dtype)
        return y, (y,)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_float64_is_rounded_to_16_bits_by_way_of_float32(dtype, bits):
    x = 1 + 2.0**-bits + torch.tensor([[[s * 2.0**-p for p in (24, 26, 30, 40) for s in (1, -1)]]], dtype=torch.float64)
    with fc.runner("compiled"):
        y, _ = fc.scan(Rounded(dtype), x)
    assert torch.equal(y, x.to(dtype).double())
