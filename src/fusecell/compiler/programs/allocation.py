"""New memory for results: large blocks on huge pages, where the system gives them on request."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["new_empty"]

# From this size NumPy asks Linux for huge pages; torch doesn't. A page is touched first by a fault of the system's,
# which for pages of 4 kB can take as long as a kernel that fills them.
_LARGE = 1 << 22
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def new_empty(like: Tensor, *shape: int) -> Tensor:
    """A tensor of a shape, of the dtype of another on the CPU, its values left as they are found."""
    size = math.prod(shape)
    if size * like.element_size() < _LARGE:
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(size, _NUMPY[like.dtype])).view(shape)
