"""Turn a runner's results into what users get; dimensions are changed in place, so that no result is a view.

torch refuses ``h.detach_()`` for a view. A runner's results share memory with nothing, so changing their own dimensions
is safe. While torch traces, be it torch.compile, torch.export or a dispatch mode as of ``torch.func.linearize``, which
can't follow that, they are views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusecell.execution.natively import natively
from fusecell.execution.options import State
from fusecell.torch_internals import in_dispatch_mode

__all__ = ["public_state", "swap_time_and_batch", "with_dim", "without_dim"]


@natively
def public_state(state: State) -> Tensor | State:
    """Return a state as users see it: the tensor where there is one, else the tuple."""
    return state[0] if len(state) == 1 else state


def swap_time_and_batch(outputs: Tensor) -> Tensor:
    """Turn (T, N, ...) into (N, T, ...) without moving memory."""
    return outputs.transpose(0, 1) if _is_traced() else outputs.transpose_(0, 1)


def with_dim(value: Tensor) -> Tensor:
    """Add a leading dimension of size 1."""
    return value.unsqueeze(0) if _is_traced() else value.unsqueeze_(0)


def without_dim(value: Tensor, dim: int) -> Tensor:
    """Remove a dimension of size 1."""
    return value.squeeze(dim) if _is_traced() else value.squeeze_(dim)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or in_dispatch_mode()
