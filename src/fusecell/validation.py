"""What a cell is given: inputs and a state as users hand them over, held to what the cell says it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusecell.execution.natively import natively
from fusecell.execution.options import State, steps_of
from fusecell.execution.runners import autocasting

if TYPE_CHECKING:
    from fusecell.cell import Cell

__all__ = [
    "StateLike",
    "all_inputs",
    "bare",
    "check_count",
    "check_dtype",
    "check_state",
    "check_step_input",
    "compute_dtype",
    "first_state",
    "start_state",
    "state_tuple",
    "weights_dtype",
]

StateLike = Tensor | Sequence[Tensor]
"""A state as users hand it over: the tensor where a cell has one state, else a sequence of tensors."""


@natively
def bare(state: State) -> Tensor | State:
    """One state comes and goes bare, several as a tuple."""
    return state[0] if len(state) == 1 else state


def state_tuple(cell: Cell, state: StateLike) -> State:
    """The state as a tuple, from what a user hands over.

    Raises:
        TypeError, ValueError: if it is not as many tensors as the cell has states.
    """
    found = (state,) if isinstance(state, Tensor) else tuple(state)
    names = ", ".join(cell.states)
    if not all(isinstance(value, Tensor) for value in found):
        kinds = ", ".join(type(value).__name__ for value in found)
        raise TypeError(f"{_name(cell)} takes a state of tensors ({names}), got ({kinds}).")
    if len(found) != len(cell.state_sizes):
        raise ValueError(
            f"{_name(cell)} has {len(cell.state_sizes)} states ({names}), got {len(found)}. "
            "One state comes and goes bare, several as a tuple in that order."
        )
    return found


def start_state(cell: Cell, state: StateLike | None, inputs: State, *, unbatched: bool) -> State:
    """The state that time-major inputs start from, (N, size) each: the one given, checked, or the cell's own."""
    first = inputs[0]
    rows, dtype = first.shape[1], compute_dtype(cell, first)
    if state is None:
        return first_state(cell, rows, dtype=dtype, device=first.device)
    found = state_tuple(cell, state)
    if unbatched:
        found = tuple(value[None] if value.dim() == 1 else value for value in found)
    check_state(cell, found, rows)
    if weights_dtype(cell) is None:
        return found
    for name, value in zip(cell.states, found, strict=True):
        check_dtype(cell, f"state {name}", value)
    return _cast(found, dtype)


def first_state(cell: Cell, rows: int, *, dtype: torch.dtype | None, device: torch.device | str) -> State:
    """``cell.initial_state``, held to the shapes it promises: machine code reads as much as it was told.

    Raises:
        TypeError, ValueError: if it is not (rows, its size) for each state.
    """
    found = state_tuple(cell, cell.initial_state(rows, dtype=dtype, device=device))
    check_state(cell, found, rows)
    return found


def all_inputs(cell: Cell, given: State, start: State) -> State:
    """Time-major inputs with what the cell draws, in the dtype of its state.

    Raises:
        ValueError: if given and drawn together are not what the cell takes.
    """
    first = given[0]
    like = start[0] if start else first
    steps = steps_of(given)
    drawn = cell.draw(steps, first.shape[1], dtype=like.dtype, device=first.device)
    check_count(cell, len(given), len(drawn))
    for value in drawn:
        if value.shape[1:2] != first.shape[1:2] or value.shape[0] not in (1, steps):
            raise ValueError(
                f"{_name(cell)}.draw returned a tensor of shape {tuple(value.shape)} for {steps} steps of "
                f"{first.shape[1]} rows, expected ({steps}, {first.shape[1]}, ...), or (1, {first.shape[1]}, ...) for "
                "what is constant over time."
            )
    return _cast(given + drawn, like.dtype)


def check_count(cell: Cell, given: int, drawn: int) -> None:
    """Raise ValueError unless so many inputs given and drawn are all the cell has."""
    names = cell.inputs
    if given + drawn != len(names):
        raise ValueError(
            f"{_name(cell)} takes the inputs ({', '.join(names)}) and draws {drawn} of them: it must be given "
            f"{len(names) - drawn}, got {given}. Several go in as a tuple; in a Stack only the bottom cell is given "
            "any, those above must draw theirs."
        )


def weights_dtype(cell: nn.Module) -> torch.dtype | None:
    """The dtype a cell computes in: its first floating-point parameter's, None for a cell without any."""
    weight = _first_weight(cell)
    return None if weight is None else weight.dtype


def _first_weight(cell: nn.Module) -> Tensor | None:
    # The order of cell.parameters(), whose generators would take longer than a small cell's step.
    for parameter in cell._parameters.values():
        if parameter is not None and (parameter.is_floating_point() or parameter.is_complex()):
            return parameter
    for part in cell._modules.values():
        found = None if part is None else _first_weight(part)
        if found is not None:
            return found
    return None


def compute_dtype(cell: Cell, first: Tensor) -> torch.dtype:
    """The dtype of a cell's states: its weights', else that of its first input, else the default."""
    fallback = first.dtype if first.is_floating_point() else torch.get_default_dtype()
    return weights_dtype(cell) or fallback


def check_dtype(cell: Cell, label: str, value: Tensor) -> None:
    """Raise ValueError where an input or state is not on the weights' device, or not in their dtype.

    Autocast may cast; whole numbers and booleans are for the step to take or not.
    """
    weight = _first_weight(cell)
    if weight is None:
        return
    if not (weight.is_cpu and value.is_cpu) and weight.device != value.device:
        raise ValueError(
            f"{_name(cell)}'s weights are on {weight.device} and {label} is on {value.device}. "
            f"Move it with .to('{weight.device}'), or the model: model.to('{value.device}')."
        )
    expected, kind = weight.dtype, value.dtype
    if kind is expected or not (value.is_floating_point() or value.is_complex() or value.is_quantized):
        return
    if autocasting(value.device.type):
        return
    raise ValueError(
        f"{_name(cell)}'s weights are {expected} and {label} is {value.dtype}. "
        f"Convert it with .to({expected}), or the model: model.to({value.dtype})."
    )


def _cast(values: State, dtype: torch.dtype) -> State:
    for value in values:
        if value.dtype is not dtype:
            return tuple(value.to(dtype) if value.is_floating_point() else value for value in values)
    return values


def check_state(cell: Cell, state: State, batch_size: int) -> None:
    """Raise ValueError unless each state is (batch_size, its size)."""
    for name, size, value in zip(cell.states, cell.state_sizes, state, strict=True):
        if value.is_nested:
            raise TypeError(f"{_name(cell)} takes no nested tensor as state {name}: its rows are all of one size.")
        if tuple(value.shape) != (batch_size, size):
            raise ValueError(
                f"{_name(cell)} expected state {name} of shape ({batch_size}, {size}), got {tuple(value.shape)}. "
                "A state has a row for each row of the input and is never batch-first or broadcast."
            )


def check_step_input(cell: Cell, given: State) -> bool:
    """Raise ValueError unless ``given`` fits one step of the cell; return whether it lacks the batch dimension."""
    if not given or not all(isinstance(value, Tensor) for value in given):
        kinds = ", ".join(type(value).__name__ for value in given)
        raise TypeError(f"{_name(cell)} takes tensors for its inputs ({', '.join(cell.inputs)}), got ({kinds}).")
    first = given[0]
    if first.dim() not in (1, 2):
        raise ValueError(
            f"{_name(cell)} expected an input of shape (N, {cell.input_size}) or ({cell.input_size},) for one step, "
            f"got {tuple(first.shape)}. For a whole sequence use fusecell.Recurrent(cell)."
        )
    if first.shape[-1] != cell.input_size:
        raise ValueError(
            f"{_name(cell)} expected {cell.input_size} input features, got {first.shape[-1]} "
            f"in an input of shape {tuple(first.shape)}."
        )
    unbatched = first.dim() == 1
    for name, value in zip(cell.inputs[1:], given[1:], strict=False):
        if not unbatched and (value.dim() < 1 or value.shape[0] != first.shape[0]):
            raise ValueError(
                f"{_name(cell)} expected input {name} with {first.shape[0]} rows, as {cell.inputs[0]} has, "
                f"got {tuple(value.shape)}."
            )
    return unbatched


def _name(cell: Cell) -> str:
    return type(cell).__name__
