"""Allocate results, large ones on huge pages where the system has them on request."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fusecell.compiler.backend import tuning
from fusecell.compiler.ir.sizes import ALIGNMENT, align_up

__all__ = ["aligned", "new_aligned", "new_empty"]

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def new_empty(like: Tensor, *shape: int, rows_first: bool = False) -> Tensor:
    """Return an uninitialised tensor on the CPU with the dtype of another.

    It is no view, which autograd would forbid its owner to detach and change in place.

    Arguments:
        rows_first: for memory as (T, N, size), return a tensor of shape (N, T, size).
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


def new_aligned(like: Tensor, *shape: int) -> Tensor:
    """Return what :func:`new_empty` does, from an address on that is a multiple of a cache line."""
    count = math.prod(shape)
    if count * like.element_size() < tuning.TUNING.huge_result_bytes:
        memory = like.new_empty(shape)
        if memory.data_ptr() % ALIGNMENT == 0:  # as torch's own allocator has it
            return memory
    longer = np.empty(count + ALIGNMENT // like.element_size(), _NUMPY[like.dtype])
    start = (align_up(longer.ctypes.data) - longer.ctypes.data) // like.element_size()
    return torch.from_numpy(longer[start : start + count].reshape(shape))


def aligned(saved: Tensor) -> Tensor:
    """Return what a forward wrote to memory of :func:`new_aligned` in such memory, though it has been copied since.

    Hooks on saved tensors, such as those that keep them on disk, and compiled programs return copies at any address.
    """
    if saved.data_ptr() % ALIGNMENT == 0 and saved.is_contiguous():
        return saved
    return new_aligned(saved, *saved.shape).copy_(saved)
