"""Allocate results, large ones on huge pages where the system has them on request."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["new_empty"]

# From this size on NumPy asks Linux for huge pages (madvise); torch does not. The first touch of each page is a page
# fault, and with pages of 4 kB these can take as long as the kernel that fills the memory.
_HUGE_PAGES_BYTES = 1 << 22
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def new_empty(like: Tensor, *shape: int, rows_first: bool = False) -> Tensor:
    """Return an uninitialised tensor on the CPU with the dtype of another.

    It is no view, which autograd would forbid its owner to detach and change in place.

    Arguments:
        rows_first: for memory as (T, N, size), return a tensor of shape (N, T, size).
    """
    if math.prod(shape) * like.element_size() < _HUGE_PAGES_BYTES:
        if not rows_first:
            return like.new_empty(shape)
        steps, rows, size = shape
        return like.new_empty_strided((rows, steps, size), (size, rows * size, 1))
    memory = np.empty(shape, _NUMPY[like.dtype])
    return torch.from_numpy(memory.transpose(1, 0, 2) if rows_first else memory)
