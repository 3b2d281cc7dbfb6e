"""Multiply-accumulates of the matrix products and convolutions that a function runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["count_macs"]


# Not torch.utils.flop_counter, which leaves out mv and dot, which a step may use.
class _MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class is untyped
    """Add up the multiply-accumulates of the matrix products that run inside the block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        contraction = _CONTRACTED_AXIS.get(func.overloadpacket)
        if contraction is not None:
            # Each element of a product is a sum over the axis that both operands have in common.
            factor, axis = contraction
            self.macs += result.numel() * args[factor].shape[axis]
        elif func.overloadpacket is torch.ops.aten.convolution:
            weight = args[1]
            transposed = args[6]
            # Each output element of a convolution, or input element of a transposed one, meets one filter.
            self.macs += (args[0] if transposed else result).numel() * math.prod(weight.shape[1:])
        return result


_CONTRACTED_AXIS = {
    torch.ops.aten.mm: (0, -1),
    torch.ops.aten.mv: (0, -1),
    torch.ops.aten.dot: (0, -1),
    torch.ops.aten.bmm: (0, -1),
    torch.ops.aten.linear: (0, -1),
    torch.ops.aten.addmm: (1, -1),
    torch.ops.aten.addmv: (1, -1),
    torch.ops.aten.baddbmm: (1, -1),
    torch.ops.aten.addbmm: (1, -1),
}
"""For each product: an argument, by position, and the axis of it that is summed over."""


def count_macs(function: Any, *args: Any) -> tuple[int, Any]:
    """Return the multiply-accumulates of a call, and its result."""
    with _MacCounter() as counter:
        result = function(*args)
    return counter.macs, result
