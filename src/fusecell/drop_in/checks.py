"""Validate the arguments of a drop-in layer, with torch.nn's texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusecell.cells.torch_nn import RNNCell
from fusecell.execution.options import State
from fusecell.execution.runners import autocasting

if TYPE_CHECKING:
    from fusecell.drop_in.base import Scanned

__all__ = ["check_hidden", "check_input"]


def check_input(layer: Scanned, input: Any, weight: Tensor) -> Tensor:
    """Validate the input; return the tensor, of a PackedSequence its data."""
    name, packed = type(layer).__name__, isinstance(input, PackedSequence)
    x = input.data if packed else input
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} expected input as a tensor or a PackedSequence, got {type(input).__name__}.")
    if x.is_nested:
        raise TypeError(f"{name} takes no nested tensor. Pad it, input.to_padded_tensor(0.0), and pass lengths=.")
    if packed and x.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {x.dim()}")
    if x.dim() not in (2, 3):
        noun = " tensor" if layer.cell_type is RNNCell else ""
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {x.dim()}D{noun} instead")
    if x.dtype != weight.dtype and not autocasting(x.device.type):
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
        )
    if x.shape[-1] != layer.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {layer.input_size}, got {x.shape[-1]}"
        )
    _check_device(x, "parameter", weight)
    return x


def check_hidden(layer: Scanned, hx: Any, x: Tensor, rows: int, unbatched: bool, packed: bool) -> State:
    """Validate a state; return it as a tuple of (num_layers * directions, N, size) tensors."""
    states = _hidden_tensors(layer, hx)
    rank = 2 if unbatched else 3
    if not packed and any(value.dim() != rank and not value.is_nested for value in states):
        kind = "unbatched" if unbatched else "batched"
        ranks = ", ".join(f"{value.dim()}-D" for value in states)
        got = f"hx should also be {rank}-D but got {ranks} tensor"
        if len(states) > 1:
            got = f"hx and cx should also be {rank}-D but got ({ranks}) tensors"
        raise RuntimeError(f"For {kind} {rank}-D input, {got}")
    if unbatched:
        states = tuple(value if value.is_nested else value[:, None] for value in states)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = layer.state_sizes()
    for index, value in enumerate(states):
        label = "hidden" if len(states) == 1 else f"hidden[{index}]"
        if value.is_nested:
            raise TypeError(f"{type(layer).__name__} takes no nested tensor as {label}: its rows are all of one size.")
        expected = (count, rows, sizes[index])
        if tuple(value.shape) != expected:
            raise RuntimeError(f"Expected {label} size {expected}, got {list(value.shape)}")
        _check_device(x, "hidden", value)
        if value.dtype != x.dtype and not autocasting(x.device.type):
            raise RuntimeError(
                f"Input and hidden tensors are not the same dtype, found input tensor with {x.dtype} and {label} "
                f"tensor with {value.dtype}. Convert it: .to({x.dtype})"
            )
    return states


def _hidden_tensors(layer: Scanned, hx: Any) -> State:
    """Return ``hx`` as a tuple of tensors, one for each of the cells' states."""
    name, count = type(layer).__name__, len(layer.cell_type.states)
    if count == 1:
        if not isinstance(hx, Tensor):
            raise TypeError(f"{name} expected hx as one tensor h_0, got {type(hx).__name__}.")
        return (hx,)
    tensors = (hx,) if isinstance(hx, Tensor) else tuple(hx) if isinstance(hx, tuple | list) else ()
    if not isinstance(hx, tuple | list) or not all(isinstance(value, Tensor) for value in tensors):
        kinds = ", ".join(type(value).__name__ for value in tensors)
        raise TypeError(f"{name} expected hx as a pair of tensors (h_0, c_0), got {type(hx).__name__} ({kinds}).")
    if len(tensors) != count:
        raise ValueError(f"{name} expected hx as a pair of tensors (h_0, c_0), got {len(tensors)} of them.")
    return tensors


def _check_device(x: Tensor, kind: str, other: Tensor) -> None:
    """Raise RuntimeError, with torch.nn's text, unless a parameter or state is on the input's device."""
    # is_cpu is an attribute; comparing two torch.device objects takes several times as long.
    if not (x.is_cpu and other.is_cpu) and x.device != other.device:
        raise RuntimeError(
            f"Input and {kind} tensors are not at the same device, found input tensor at {x.device} "
            f"and {kind} tensor at {other.device}"
        )
