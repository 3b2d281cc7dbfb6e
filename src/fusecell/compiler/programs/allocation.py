"""New memory for results: large blocks on huge pages, where the system gives them on request."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fusecell.compiler.backend import tuning

__all__ = ["new_empty"]

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def new_empty(like: Tensor, *shape: int, rows_first: bool = False) -> Tensor:
    """A tensor of a shape, of the dtype of another on the CPU, its values left as they are found.

    It is no view: its owner may detach and change it in place.

    Arguments:
        rows_first: hand over what lies in memory as (T, N, size) as (N, T, size).
    """
    # NumPy asks Linux for huge pages for large arrays (madvise), torch doesn't. Touching a page for the first time is a
    # page fault, and with pages of 4 kB these can take as long as the kernel that fills them.
    if math.prod(shape) * like.element_size() < tuning.TUNING.huge_result_bytes:
        if not rows_first:
            return like.new_empty(shape)
        steps, rows, size = shape
        return like.new_empty_strided((rows, steps, size), (size, rows * size, 1))
    memory = np.empty(shape, _NUMPY[like.dtype])
    return torch.from_numpy(memory.transpose(1, 0, 2) if rows_first else memory)
