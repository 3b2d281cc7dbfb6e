"""Which calls, whatever their cell, must run eagerly, and which want gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fusecell.cell import Cell
from fusecell.execution.options import State

__all__ = ["call_reasons", "needs_gradient"]

_EXACT = (Tensor, nn.Parameter)


def call_reasons(inputs: State, state: State) -> tuple[str, ...]:
    """Why this call, whatever its cell, must run eagerly; empty if it need not."""
    dtype = inputs[0].dtype
    usual = dtype is torch.float32 or dtype is torch.float64
    for value in (*inputs, *state):
        usual = usual and type(value) in _EXACT and value.is_cpu and value.layout is torch.strided
        usual = usual and value.dtype is dtype and not value.is_neg() and value.numel() > 0
    if not usual:
        return _tensor_reasons((*inputs, *state))
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return ("A transform of torch.func or a dispatch mode is active.",)
    if forward_ad._current_level >= 0:
        return ("Forward-mode differentiation is active.",)
    return ()


def _tensor_reasons(tensors: State) -> tuple[str, ...]:
    """What is unusual about one of the tensors of a call."""
    first = tensors[0]
    if not all(type(value) in _EXACT for value in tensors):
        return ("An input or state is a subclass of Tensor.",)
    if not all(value.is_cpu and value.layout is torch.strided for value in tensors):
        return ("An input or state is not a dense tensor on the CPU.",)
    if first.dtype not in (torch.float32, torch.float64) or any(value.dtype != first.dtype for value in tensors):
        kinds = ", ".join(sorted({str(value.dtype) for value in tensors}))
        return (f"Inputs and states must all be float32 or all float64, got {kinds}.",)
    if any(value.is_neg() for value in tensors):
        return ("An input or state is a lazy negation.",)
    return ("There is nothing to compute.",)


def needs_gradient(cell: Cell, tensors: State) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(value.requires_grad for value in tensors) or _learns(cell)


def _learns(module: nn.Module) -> bool:
    """Whether a parameter, or a tensor that stands as an attribute of a drop-in layer's cell, wants a gradient."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return True
    for value in vars(module).values():
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return any(part is not None and _learns(part) for part in module._modules.values())
