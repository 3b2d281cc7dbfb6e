"""Every elementwise operation, compiled, against torch: values and gradients, in float64 and float32, at kinks and edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fusecell as fc

Function = Callable[[Tensor, Tensor], Tensor]
WIDTH = 7

# Intervals that arguments are drawn from.
REAL = (-3.0, 3.0)
POSITIVE = (0.1, 4.0)
UNIT = (-0.95, 0.95)
PROBABILITY = (0.05, 0.95)
ABOVE_ONE = (1.1, 4.0)


def _torch(*names: str) -> dict[str, Function]:
    return {name: lambda x, h, name=name: getattr(torch, name)(x) for name in names}


def _functional(*names: str) -> dict[str, Function]:
    return {name: lambda x, h, name=name: getattr(F, name)(x) for name in names}


def _pairs(*names: str) -> dict[str, Function]:
    return {name: lambda x, h, name=name: getattr(torch, name)(x, h) for name in names}


def _where(condition: Callable[[Tensor, Tensor], Tensor]) -> Function:
    return lambda x, h: torch.where(condition(x, h), x, 2 * h)


TABLES: dict[tuple[float, float], dict[str, Function]] = {
    REAL: {
        **_torch("round", "frac", "trunc", "floor", "ceil", "atan", "sinh", "cosh", "asinh", "tan", "exp2", "expm1"),
        **_torch("exp", "sin", "cos", "tanh", "sigmoid", "abs", "neg", "square", "sign", "sgn", "erf", "erfc", "sinc"),
        **_torch("deg2rad", "rad2deg", "nan_to_num", "relu", "positive", "selu", "celu"),
        **_functional("softsign", "tanhshrink", "hardshrink", "softshrink", "hardtanh", "relu6", "elu", "mish", "silu"),
        **_functional("hardswish", "hardsigmoid", "logsigmoid", "gelu", "softplus", "leaky_relu", "rrelu"),
        **_pairs("atan2", "hypot", "logaddexp", "logaddexp2", "copysign", "maximum", "minimum", "fmax", "fmin"),
        **_pairs("fmod", "remainder", "add", "sub", "mul", "div"),
        "round_decimals": lambda x, h: torch.round(x, decimals=1),
        "round_tens": lambda x, h: torch.round(x * 20, decimals=-1),
        "fmod_number": lambda x, h: torch.fmod(x, 0.7),
        "percent": lambda x, h: x % 0.7,
        "percent_of_number": lambda x, h: 2.5 % h.detach() * x,
        "percent_negative": lambda x, h: x % -0.7,
        "div_trunc": lambda x, h: torch.div(x, h, rounding_mode="trunc") * x,
        "div_floor": lambda x, h: torch.div(x, h, rounding_mode="floor") * x,
        "floor_divide": lambda x, h: (x.detach() // 0.7) * x,
        "signbit": _where(lambda x, h: torch.signbit(x)),
        "isfinite": _where(lambda x, h: torch.isfinite(x)),
        "isnan": _where(lambda x, h: torch.isnan(x) | torch.isposinf(h) | torch.isneginf(h)),
        "isinf": _where(lambda x, h: ~torch.isinf(x)),
        "masks": _where(lambda x, h: torch.logical_xor(x > 0, h > 0) & ~(x > 1) | (h < -1)),
        "logical": _where(lambda x, h: torch.logical_not(torch.logical_or(x > 0, torch.logical_and(h > 0, x < -1)))),
        "bitwise_xor": _where(lambda x, h: (x > h) ^ (h > 0)),
        "heaviside": lambda x, h: torch.heaviside(x.detach(), h.detach()) * x,
        "gelu_tanh": lambda x, h: F.gelu(x, approximate="tanh"),
        "prelu": lambda x, h: F.prelu(x, torch.full((1,), 0.3, dtype=x.dtype)),
        "threshold": lambda x, h: F.threshold(x, 0.3, -0.7),
        "softplus_sharp": lambda x, h: F.softplus(x, 3.0, 1.0),
        "lerp": lambda x, h: torch.lerp(x, h, 0.3) + torch.lerp(x, h, torch.sigmoid(x)),
        "addcmul": lambda x, h: torch.addcmul(x, x, h, value=0.5),
        "addcdiv": lambda x, h: torch.addcdiv(x, x, h.abs() + 1, value=0.5),
        "clamp": lambda x, h: x.clamp(-0.5, 0.7) + x.clamp(min=h) + torch.clamp(x, -h.abs(), h.abs()),
        "nan_to_num_given": lambda x, h: torch.nan_to_num(x, 0.5, 2.0, -2.0),
        "fake_quantize": lambda x, h: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, -20, 15),
        "half": lambda x, h: (x.half() * h.half()).to(x.dtype),
        "half_composite": lambda x, h: (F.silu(x.half()) + 1).to(x.dtype) * h,
        "bfloat16": lambda x, h: x.bfloat16().to(x.dtype) * h,
        "double": lambda x, h: x.double().to(x.dtype) * h,
        "float": lambda x, h: (x.float() * 1.1).to(x.dtype) * h,
        "long": lambda x, h: (x.long() + 1).to(x.dtype) * h + x,
        "int_arithmetic": lambda x, h: (x.int() // 2 + x.int() % 3).to(x.dtype) * h + x,
        "int_reciprocal": lambda x, h: 1 / x.long().to(x.dtype).detach() * h,
        "bool": lambda x, h: (x > 0).to(x.dtype) * h + x.round().bool() * x,
        "pad": lambda x, h: F.pad(x[:, 2:-1], (2, 1), value=1.5) * h,
        "pad_rows_of_heads": lambda x, h: F.pad(x[:, :6].view(-1, 2, 3), (0, 0, 1, 2), value=-2.0).flatten(1)[:, :7],
        "square_root_of_square": lambda x, h: (x**2 + 1) ** 0.5 + x**3,
    },
    POSITIVE: {
        **_torch("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "lgamma", "digamma"),
        **_pairs("xlogy", "pow"),
        "powers": lambda x, h: x**1.5 + x**-2 + x**-0.5 + 2.0**x + x**0.0,
        "float_power": lambda x, h: torch.pow(h, -1.3) + x.pow(2.0),
        "xlog1py": lambda x, h: torch.special.xlog1py(x, h),
        "entropy": lambda x, h: torch.special.entr(x),
        "log_of_gamma": lambda x, h: torch.special.gammaln(x + h),
    },
    UNIT: {**_torch("acos", "asin", "atanh", "erfinv"), "arctan": lambda x, h: torch.arctan(x)},
    PROBABILITY: {
        **_torch("logit"),
        "logit_eps": lambda x, h: torch.logit(x, 0.2),
        "logit_of_sigmoid": lambda x, h: torch.logit(torch.sigmoid(4 * x)),
    },
    ABOVE_ONE: {**_torch("acosh"), "polygamma": lambda x, h: torch.polygamma(0, x)},
}
FUNCTIONS = {name: function for table in TABLES.values() for name, function in table.items()}
DOMAINS = {name: domain for domain, table in TABLES.items() for name in table}
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
ROUNDED = ("half", "half_composite", "bfloat16", "float", "div_floor", "floor_divide", "int_reciprocal")
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
