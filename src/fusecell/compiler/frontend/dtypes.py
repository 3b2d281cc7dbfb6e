"""The dtypes that steps are compiled in, and the dtype that the kernels of each compute in.

Kernels of bfloat16 and float16 layers compute in float32: their callers' tensors are converted on the way in, and
results are rounded once on the way out. A graph so says ``f32`` for three dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fusecell.compiler.ir.sizes import DType

__all__ = [
    "COMPILED_DTYPES",
    "GRAPH_DTYPES",
    "casts_of",
    "has_16_bits",
    "kernel_dtype",
    "mixes_with",
    "rounded",
    "widened",
    "widens",
]

GRAPH_DTYPES: Mapping[torch.dtype, DType] = {
    torch.float32: DType.F32,
    torch.float64: DType.F64,
    torch.bfloat16: DType.F32,
    torch.float16: DType.F32,
}
COMPILED_DTYPES = tuple(GRAPH_DTYPES)
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def has_16_bits(dtype: torch.dtype) -> bool:
    """Return whether a dtype is bfloat16 or float16."""
    return dtype in _SIXTEEN_BITS


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that kernels compute in for a layer of a dtype."""
    return torch.float32 if dtype in _SIXTEEN_BITS else dtype


def mixes_with(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return the dtypes that values of a step may have: a 16-bit step may compute in float32 between its casts.

    In a kernel both are float32, so that such a cast is none. That leaves out roundings, and adds no error.
    """
    return (dtype, torch.float32) if dtype in _SIXTEEN_BITS else (dtype,)


def casts_of(dtype: torch.dtype) -> Mapping[torch.dtype, str]:
    """Return the narrower dtypes that a step may go through, and the primitive that rounds to the numbers of each."""
    halves = {torch.float16: "to_float16", torch.bfloat16: "to_bfloat16"}
    return {torch.float32: halves, torch.float64: {**halves, torch.float32: "to_float32"}}.get(dtype, {})


def widens(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Return whether ``other`` has all numbers of a dtype that kernels compute in, and more."""
    return dtype == torch.float32 and other == torch.float64


def widened(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Convert the 16-bit tensors among some to float32, exactly; autograd rounds their gradients back."""
    return tuple([value.to(torch.float32) if value.dtype in _SIXTEEN_BITS else value for value in tensors])


def rounded(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Convert the results of a kernel to the dtype of its layer, to the nearest number, or to even between two."""
    return tuple([value.to(dtype) for value in tensors])
