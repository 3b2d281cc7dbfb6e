"""Eligibility of a call: why it cannot or should not be compiled, whatever its cell; whether it needs gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.compiler.frontend.dtypes import COMPILED_DTYPES, has_16_bits
from fusecell.compiler.refusal import Refusal
from fusecell.execution.options import State, steps_of
from fusecell.torch_internals import in_dispatch_mode
from fusecell.torch_transforms import in_forward_mode, in_functorch_transform

__all__ = [
    "INTEGERS",
    "as_numbers",
    "call_reasons",
    "integers_reason",
    "loop_is_faster",
    "needs_gradient",
    "tensor_reasons",
]

# A subclass may give any operator another meaning.
_EXACT = (Tensor, nn.Parameter)
# A call of a 16-bit cell converts all weights. With 0.9 million weights and more, that and one or two steps in float32
# took 1.1 to 2.3 times as long as the loop, whose products read 16 bits (inference of GRU and LSTM, 384 to 1024 units,
# 1 and 16 rows, Zen 4 with AVX512_BF16). With 0.4 million, or from eight steps of one row on, the loop took longer.
_LARGE_CELL = 2**19
_FEW_STEPS = 2
_EXACT_INTEGERS = {torch.float32: 2**24, torch.float64: 2**53, torch.bfloat16: 2**8, torch.float16: 2**11}
"""The largest number up to which a dtype has every integer."""
INTEGERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
"""The dtypes of inputs that kernels take as numbers of the cell's own dtype."""


def call_reasons(inputs: State, state: State) -> tuple[str, ...]:
    """Return why a call must run eagerly, whatever its cell; empty if it can be compiled."""
    dtype = inputs[0].dtype
    # One pass for the usual case: this runs in every call on the slow path.
    usual = dtype in COMPILED_DTYPES
    for value in (*inputs, *state):
        usual = usual and type(value) in _EXACT and value.is_cpu and value.layout is torch.strided
        usual = usual and value.dtype is dtype and not value.is_neg() and value.numel() > 0
        usual = usual and not value._is_zerotensor()
    if not usual:
        return tensor_reasons((*inputs, *state))
    if in_dispatch_mode() or in_functorch_transform():
        return ("A transform of torch.func or a dispatch mode is active.",)
    if in_forward_mode():
        return ("Forward-mode differentiation is active.",)
    return ()


def tensor_reasons(tensors: State) -> tuple[str, ...]:
    """Return the reason why a call's tensors can't be read by a kernel; empty if they can."""
    first = tensors[0]
    if not all(type(value) in _EXACT for value in tensors):
        return ("An input or state is a subclass of Tensor.",)
    if not all(value.is_cpu and value.layout is torch.strided for value in tensors):
        return ("An input or state is not a dense tensor on the CPU.",)
    if first.dtype not in COMPILED_DTYPES or any(value.dtype != first.dtype for value in tensors):
        kinds = ", ".join(sorted({str(value.dtype) for value in tensors}))
        return (f"Inputs and states must be of one dtype, float32, float64, bfloat16 or float16, got {kinds}.",)
    if any(value.is_neg() for value in tensors):
        return ("An input or state is a lazy negation.",)
    if any(value._is_zerotensor() for value in tensors):  # as a tangent may be
        return ("An input or state is a tensor of zeros without memory.",)
    return ("The input is empty: T, N or a size is 0.",) if any(value.numel() == 0 for value in tensors) else ()


def as_numbers(inputs: State, dtype: torch.dtype) -> State | Refusal:
    """Return inputs with integers and bools as the numbers of the dtype of the cell's states, which kernels take.

    Only integers that each are such a number: a token's id beyond is another token's.
    """
    for value in inputs:
        if value.dtype in INTEGERS and value.dtype is not torch.bool and dtype in _EXACT_INTEGERS:
            most = _EXACT_INTEGERS[dtype]
            if value.numel() and not (type(value) in _EXACT and value.is_cpu):
                return inputs
            if value.numel() and (int(value.max()) > most or int(value.min()) < -most):
                kind = str(dtype).removeprefix("torch.")
                return Refusal(
                    (
                        f"An input has integers up to {max(int(value.max()), -int(value.min())):,}, and a kernel takes "
                        f"integers as {kind}, which has all of them up to {most:,} only. Convert the model with "
                        ".double(), or look the ids up outside the cell.",
                    )
                )
    return tuple([value.to(dtype) if value.dtype in INTEGERS else value for value in inputs])


def integers_reason(inputs: State, largest: int | None) -> Refusal | None:
    """Return why a step can't run on inputs whose integers it computes with; None where all it computes is exact.

    Arguments:
        largest: the largest integer of an input with which it is; None for any.
    """
    for value in inputs:
        if largest is not None and value.dtype in INTEGERS and value.dtype is not torch.bool and value.numel():
            most = max(int(value.max()), -int(value.min()))
            if most > largest:
                return Refusal(
                    (
                        f"An input has integers up to {most:,}, and of more than {largest:,} the step computes others "
                        "that a kernel, which has them as floating-point numbers, has not exactly. Convert the model "
                        "with .double(), or compute them outside the cell.",
                    )
                )
    return None


def loop_is_faster(cell: Cell, inputs: State) -> bool:
    """Whether the Python loop takes less time than converting the cell's 16-bit weights and running a kernel."""
    return has_16_bits(inputs[0].dtype) and steps_of(inputs) <= _FEW_STEPS and _numbers(cell) >= _LARGE_CELL


def _numbers(module: nn.Module) -> int:
    """Count the elements of a module's parameters, buffers and tensor attributes."""
    tables = (module._parameters, module._buffers, vars(module))
    count = sum(value.numel() for table in tables for value in table.values() if isinstance(value, Tensor))
    return count + sum(_numbers(part) for part in module._modules.values() if part is not None)


def needs_gradient(cell: Cell, tensors: State) -> bool:
    """Whether a call of a cell with these tensors has results with gradients."""
    if not torch.is_grad_enabled():
        return False
    return any(value.requires_grad for value in tensors) or _has_trainable(cell)


def _has_trainable(module: nn.Module) -> bool:
    """Whether a parameter or tensor attribute requires a gradient; ``Module.parameters()`` takes several times as long.

    The cells of drop-in layers have the layer's parameters as plain attributes.
    """
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return True
    for value in vars(module).values():
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return any(part is not None and _has_trainable(part) for part in module._modules.values())
