"""Elementwise operations, each as a function of two tensors, and the intervals that their arguments come from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["DOMAINS", "FUNCTIONS"]

Function = Callable[[Tensor, Tensor], Tensor]
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
        "angle": lambda x, h: torch.angle(x) * h,
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
        "half_by_copying": lambda x, h: torch.zeros_like(x.half()).copy_(x * h).to(x.dtype),
        "double": lambda x, h: x.double().to(x.dtype) * h,
        "float": lambda x, h: (x.float() * 1.1).to(x.dtype) * h,
        "long": lambda x, h: (x.long() + 1).to(x.dtype) * h + x,
        "int_arithmetic": lambda x, h: (x.int() // 2 + x.int() % 3).to(x.dtype) * h + x,
        "int_reciprocal": lambda x, h: 1 / x.long().to(x.dtype).detach() * h,
        "bool": lambda x, h: (x > 0).to(x.dtype) * h + x.round().bool() * x,
        "pad": lambda x, h: F.pad(x[:, 2:-1], (2, 1), value=1.5) * h,
        "pad_rows_of_heads": lambda x, h: F.pad(x[:, :6].view(-1, 2, 3), (0, 0, 1, 2), value=-2.0).flatten(1)[:, :7],
        **{
            name: lambda x, h, name=name: getattr(torch.special, name)(2 * x) + h
            for name in ("i0", "i0e", "i1", "i1e", "erfcx", "log_ndtr", "ndtr")
        },
        "i1e_far": lambda x, h: torch.special.i1e(40 * x) + torch.special.i0e(40 * h),
        "log_ndtr_far": lambda x, h: torch.special.log_ndtr(12 * x),
        "erfcx_far": lambda x, h: torch.special.erfcx(100 * x.abs()).detach() * x + torch.special.erfcx(-h.abs()),
        "nextafter": lambda x, h: torch.nextafter(x.detach(), h.detach()) * x,
        "frexp": lambda x, h: torch.frexp(x).mantissa * h,
        "frexp_exponent": lambda x, h: torch.frexp(100 * x).exponent.to(x.dtype) * h,
        "polygamma_3_negative": lambda x, h: torch.polygamma(3, x.detach().floor() + torch.sigmoid(h) / 5 + 0.1),
        "square_root_of_square": lambda x, h: (x**2 + 1) ** 0.5 + x**3,
    },
    POSITIVE: {
        **_torch("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "lgamma", "digamma"),
        **_pairs("xlogy", "pow"),
        "powers": lambda x, h: x**1.5 + x**-2 + x**-0.5 + 2.0**x + x**0.0,
        "float_power": lambda x, h: torch.pow(h, -1.3) + x.pow(2.0),
        "xlog1py": torch.special.xlog1py,
        "entropy": lambda x, h: torch.special.entr(x),
        "log_of_gamma": lambda x, h: torch.special.gammaln(x + h),
    },
    UNIT: {**_torch("acos", "asin", "atanh", "erfinv"), "arctan": lambda x, h: torch.arctan(x)},
    PROBABILITY: {
        **_torch("logit"),
        "logit_eps": lambda x, h: torch.logit(x, 0.2),
        "ndtri": lambda x, h: torch.special.ndtri(x),
        "ndtri_tails": lambda x, h: torch.special.ndtri(x**3) + torch.special.ndtri(1 - h**3),
        "logit_of_sigmoid": lambda x, h: torch.logit(torch.sigmoid(4 * x)),
    },
    ABOVE_ONE: {
        **_torch("acosh"),
        "polygamma": lambda x, h: torch.polygamma(0, x),
        "polygamma_2": lambda x, h: torch.polygamma(2, x.abs()) + h.abs().polygamma(5),
    },
}
FUNCTIONS = {name: function for table in TABLES.values() for name, function in table.items()}
DOMAINS = {name: domain for domain, table in TABLES.items() for name in table}
