"""Check the inputs and the state of a call against what the cell declares, and fill in what was left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusecell.execution.forked_child import one_thread_after_fork
from fusecell.execution.options import State, steps_of
from fusecell.execution.runners import autocasting
from fusecell.shapes import feature_shape, size_text

if TYPE_CHECKING:
    from fusecell.cell import Cell

__all__ = [
    "StateLike",
    "all_inputs",
    "check_count",
    "check_dtype",
    "check_features",
    "check_state",
    "check_step_input",
    "compute_dtype",
    "first_state",
    "first_weight",
    "start_state",
    "state_tuple",
    "weights_dtype",
]

StateLike = Tensor | Sequence[Tensor]
"""A state as users hand it over: the tensor where a cell has one state, else a sequence of tensors."""


def state_tuple(cell: Cell, state: StateLike) -> State:
    """Return the state that a user passed as a tuple.

    Raises:
        TypeError, ValueError: if it is not one tensor for each of the cell's states.
    """
    several = not isinstance(state, Tensor) and isinstance(state, Iterable)
    tensors = tuple(state) if several else (state,)
    names = ", ".join(cell.states)
    if not all(isinstance(value, Tensor) for value in tensors):
        kinds = ", ".join(type(value).__name__ for value in tensors)
        raise TypeError(f"{_name(cell)} takes a state of tensors ({names}), got ({kinds}).")
    if len(tensors) != len(cell.state_sizes):
        raise ValueError(
            f"{_name(cell)} has {len(cell.state_sizes)} states ({names}), got {len(tensors)}. "
            "Pass one state as the tensor itself, several as a tuple in that order."
        )
    return tensors


def start_state(cell: Cell, state: StateLike | None, inputs: State, *, unbatched: bool) -> State:
    """Return the state a call starts from, (N, size) each: the user's, checked and cast, or the cell's initial one.

    Arguments:
        state: as the user passed it; None for ``cell.initial_state``.
        inputs: time-major, (T, N, ...).
        unbatched: the user's tensors have no dimension N, which is added to the state here.

    Raises:
        TypeError, ValueError: where the state doesn't fit the cell or the inputs.
    """
    first = inputs[0]
    rows, dtype = first.shape[1], compute_dtype(cell, first)
    if state is None:
        return first_state(cell, rows, dtype=dtype, device=first.device)
    states = state_tuple(cell, state)
    if unbatched:
        ranks = [len(feature_shape(size)) for size in cell.state_sizes]
        states = tuple(value[None] if value.dim() == rank else value for value, rank in zip(states, ranks, strict=True))
    check_state(cell, states, rows)
    # A cell without weights computes in whatever dtype it gets.
    if weights_dtype(cell) is None:
        return states
    for name, value in zip(cell.states, states, strict=True):
        check_dtype(cell, f"state {name}", value)
    return _cast(states, dtype)


def first_state(cell: Cell, rows: int, *, dtype: torch.dtype | None, device: torch.device | str) -> State:
    """Return ``cell.initial_state`` after checking its shapes, which machine code relies on.

    Raises:
        TypeError, ValueError: if it is not (rows, its size) for each state.
    """
    with one_thread_after_fork():
        state = state_tuple(cell, cell.initial_state(rows, dtype=dtype, device=device))
    check_state(cell, state, rows)
    return state


def all_inputs(cell: Cell, inputs: State, start: State) -> State:
    """Return the caller's time-major inputs and those that the cell draws, in the dtype of its state.

    Raises:
        ValueError: if these are not as many as ``cell.inputs``, or one that is drawn has the wrong shape.
    """
    first = inputs[0]
    like = start[0] if start else first
    steps = steps_of(inputs)
    with one_thread_after_fork():
        drawn = cell.draw(steps, first.shape[1], dtype=like.dtype, device=first.device)
    check_count(cell, len(inputs), len(drawn))
    for value in drawn:
        if value.shape[1:2] != first.shape[1:2] or value.shape[0] not in (1, steps):
            raise ValueError(
                f"{_name(cell)}.draw returned a tensor of shape {tuple(value.shape)} for {steps} steps of "
                f"{first.shape[1]} rows, expected ({steps}, {first.shape[1]}, ...), or (1, {first.shape[1]}, ...) for "
                "one that is constant over time."
            )
    return _cast(inputs + drawn, like.dtype)


def check_count(cell: Cell, passed: int, drawn: int) -> None:
    """Raise ValueError unless the inputs passed by the caller and those drawn by the cell are as many as it takes."""
    names = cell.inputs
    if passed + drawn != len(names):
        raise ValueError(
            f"{_name(cell)} takes the inputs ({', '.join(names)}) and draws {drawn} of them: it must be given "
            f"{len(names) - drawn}, got {passed}. Several go in as a tuple; in a Stack only the bottom cell is given "
            "any, those above must draw their own."
        )


def weights_dtype(cell: nn.Module) -> torch.dtype | None:
    """Return the dtype a cell computes in: that of its first floating-point weight, None for a cell without any."""
    weight = first_weight(cell)
    return None if weight is None else weight.dtype


def first_weight(module: nn.Module) -> Tensor | None:
    """Return the first floating-point weight of a module: a parameter, or a drop-in layer's weight in one of its cells.

    A complex weight is returned only where there is no real one: next to real weights it takes part in a real cell.
    The cells that a drop-in layer builds around its weights hold them as plain attributes. Of plain attributes only
    those called ``weight...`` count: any other tensor is a constant of the user's, which decides no dtype.
    """
    weight = _first(module, _is_weight)
    if weight is not None and weight.is_complex():
        real = _first(module, Tensor.is_floating_point)
        return weight if real is None else real
    return weight


def _first(module: nn.Module, is_weight: Callable[[Tensor], bool]) -> Tensor | None:
    # In the order of module.parameters(), whose generators would take longer than a small cell's step.
    for parameter in module._parameters.values():
        if parameter is not None and is_weight(parameter):
            return parameter
    for part in module._modules.values():
        weight = None if part is None else _first(part, is_weight)
        if weight is not None:
            return weight
    for name, value in module.__dict__.items():
        if name.startswith("weight") and isinstance(value, Tensor) and is_weight(value):
            return value
    return None


def _is_weight(value: Tensor) -> bool:
    # An integer parameter (requires_grad=False) says nothing about the dtype of inputs.
    return value.is_floating_point() or value.is_complex()


def compute_dtype(cell: Cell, first: Tensor) -> torch.dtype:
    """Return the dtype of a cell's states: its weights', else that of its first input, else the default."""
    fallback = first.dtype if first.is_floating_point() else torch.get_default_dtype()
    dtype = weights_dtype(cell) or fallback
    # Complex weights alone may multiply a real input.
    return fallback if dtype.is_complex and first.dtype == dtype.to_real() else dtype


def check_dtype(cell: Cell, label: str, value: Tensor) -> None:
    """Raise ValueError where an input or state is not on the weights' device, or not in their dtype.

    Under autocast another floating-point dtype is allowed. Integers and booleans always are: the step decides.
    """
    weight = first_weight(cell)
    if weight is None:
        return
    # is_cpu is an attribute; comparing two torch.device objects takes several times as long.
    if not (weight.is_cpu and value.is_cpu) and weight.device != value.device:
        raise ValueError(
            f"{_name(cell)}'s weights are on {weight.device} and {label} is on {value.device}. "
            f"Move it with .to('{weight.device}'), or the model: model.to('{value.device}')."
        )
    expected, dtype = weight.dtype, value.dtype
    if dtype is expected or not (value.is_floating_point() or value.is_complex() or value.is_quantized):
        return
    if autocasting(value.device.type) or (expected.is_complex and dtype == expected.to_real()):
        return
    raise ValueError(
        f"{_name(cell)}'s weights are {expected} and {label} is {dtype}. "
        f"Convert it with .to({expected}), or the model: model.to({dtype})."
    )


def _cast(values: State, dtype: torch.dtype) -> State:
    """Convert the floating-point tensors among ``values``; return the same tuple where there is nothing to do."""
    for value in values:
        if value.dtype is not dtype:
            return tuple(value.to(dtype) if value.is_floating_point() else value for value in values)
    return values


def check_state(cell: Cell, state: State, batch_size: int) -> None:
    """Raise ValueError unless each state has the shape (batch_size, its size)."""
    for name, size, value in zip(cell.states, cell.state_sizes, state, strict=True):
        if value.is_nested:
            raise TypeError(f"{_name(cell)} takes no nested tensor as state {name}: its rows are all of one size.")
        shape = (batch_size, *size) if isinstance(size, tuple | list) else (batch_size, size)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{_name(cell)} expected state {name} of shape {shape}, got {tuple(value.shape)}. "
                "A state has a row for each row of the input and is never batch-first or broadcast."
            )


def check_step_input(cell: Cell, inputs: State) -> bool:
    """Check the inputs of one step; return whether they lack the batch dimension.

    Raises:
        TypeError, ValueError: where an input is not a tensor, or its shape doesn't fit.
    """
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        kinds = ", ".join(type(value).__name__ for value in inputs)
        raise TypeError(f"{_name(cell)} takes tensors for its inputs ({', '.join(cell.inputs)}), got ({kinds}).")
    first, shape = inputs[0], feature_shape(cell.input_size)
    if first.dim() - len(shape) not in (0, 1):
        raise ValueError(
            f"{_name(cell)} expected an input of shape {size_text(shape, 'N')} or {tuple(shape)} for one step, "
            f"got {tuple(first.shape)}. For a whole sequence use fusecell.Recurrent(cell)."
        )
    check_features(cell, first)
    unbatched = first.dim() == len(shape)
    for name, value in zip(cell.inputs[1:], inputs[1:], strict=False):
        if not unbatched and (value.dim() < 1 or value.shape[0] != first.shape[0]):
            raise ValueError(
                f"{_name(cell)} expected input {name} with {first.shape[0]} rows, as {cell.inputs[0]} has, "
                f"got {tuple(value.shape)}."
            )
    return unbatched


def check_features(cell: Cell, first: Tensor) -> None:
    """Raise ValueError unless the last dimensions of an input are the cell's features."""
    size = cell.input_size
    if not isinstance(size, tuple | list):
        if first.shape[-1] != size:
            raise ValueError(
                f"{_name(cell)} expected {size} input features, got {first.shape[-1]} "
                f"in an input of shape {tuple(first.shape)}."
            )
    elif tuple(first.shape[first.dim() - len(size) :]) != tuple(size):
        raise ValueError(
            f"{_name(cell)} expected an input whose last dimensions are {tuple(size)}, as its input_size says, "
            f"got a shape of {tuple(first.shape)}. Permute or reshape the input, or set the cell's input_size."
        )


def _name(cell: Cell) -> str:
    return type(cell).__name__
