"""Eligibility of a call: why it can't be compiled, whatever its cell, and whether it needs gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fusecell.cell import Cell
from fusecell.execution.options import State

__all__ = ["call_reasons", "needs_gradient"]

_EXACT = (Tensor, nn.Parameter)


def call_reasons(inputs: State, state: State) -> tuple[str, ...]:
    """Return why a call must run eagerly, whatever its cell; empty if it need not."""
    # One pass that only tells whether there is a reason: this runs in every call that is not cached.
    dtype = inputs[0].dtype
    eligible = dtype is torch.float32 or dtype is torch.float64
    for value in (*inputs, *state):
        eligible = eligible and type(value) in _EXACT and value.is_cpu and value.layout is torch.strided
        eligible = eligible and value.dtype is dtype and not value.is_neg() and value.numel() > 0
    if not eligible:
        return _tensor_reasons((*inputs, *state))
    # A kernel reads memory at addresses: modes and transforms that follow operations on tensors would see none.
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return ("A transform of torch.func or a dispatch mode is active.",)
    if forward_ad._current_level >= 0:
        return ("Forward-mode differentiation is active.",)
    return ()


def _tensor_reasons(tensors: State) -> tuple[str, ...]:
    """Return what is ineligible about the tensors of a call."""
    first = tensors[0]
    for value in tensors:
        if type(value) not in _EXACT:
            return (f"An input or state is a {type(value).__name__}, a subclass of Tensor.",)
        if not value.is_cpu or value.layout is not torch.strided:
            return (f"An input or state is on {value.device} and {value.layout}, not a dense tensor on the CPU.",)
    if first.dtype not in (torch.float32, torch.float64) or any(value.dtype != first.dtype for value in tensors):
        kinds = ", ".join(sorted({str(value.dtype) for value in tensors}))
        return (f"Inputs and states must all be float32 or all float64, got {kinds}.",)
    if any(value.is_neg() for value in tensors):
        return ("An input or state is a lazy negation; pass its resolve_neg().",)
    return ("An input or state is empty: T, N or a number of features is 0.",)


def needs_gradient(cell: Cell, tensors: State) -> bool:
    """Return whether autograd must see a call: gradients are on, and a tensor or a weight requires one."""
    if not torch.is_grad_enabled():
        return False
    return any(value.requires_grad for value in tensors) or _is_trainable(cell)


def _is_trainable(module: nn.Module) -> bool:
    """Return whether a parameter requires a gradient, or a plain attribute: in a drop-in layer's cell, a weight."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return True
    for value in vars(module).values():
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return any(part is not None and _is_trainable(part) for part in module._modules.values())
