"""Results brought to the form that a caller sees, in place: a view of them could not be detached or changed there.

torch refuses ``h.detach_()`` for a view. A runner's results share memory with nothing, so their own dimensions are
changed. While torch.compile or torch.export traces, the same is said without a change in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["swap_time_and_batch", "with_dim", "without_dim"]


def swap_time_and_batch(outputs: Tensor) -> Tensor:
    """Turn (T, N, ...) into (N, T, ...), the memory as it is."""
    return outputs.transpose(0, 1) if torch.compiler.is_compiling() else outputs.transpose_(0, 1)


def with_dim(value: Tensor) -> Tensor:
    """Put a dimension of 1 in front."""
    return value.unsqueeze(0) if torch.compiler.is_compiling() else value.unsqueeze_(0)


def without_dim(value: Tensor, dim: int) -> Tensor:
    """Take a dimension of 1 away."""
    return value.squeeze(dim) if torch.compiler.is_compiling() else value.squeeze_(dim)
