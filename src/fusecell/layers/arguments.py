"""What users hand to a layer, checked and brought to one form: time-major, batched, a tuple of states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusecell.cell import Cell
from fusecell.execution.options import State
from fusecell.validation import check_dtype

__all__ = ["Form", "Lengths", "Packing", "check_inputs", "check_packed"]

Lengths = Tensor | Sequence[int] | np.ndarray[Any, Any]


def check_inputs(cell: Cell, given: State, batch_first: bool) -> tuple[State, bool]:
    """Bring a sequence's inputs to (T, N, ...) each.

    Arguments:
        given: (T, N, input_size), (N, T, input_size) if ``batch_first``, or (T, input_size); extras likewise, where
            T may be 1.

    Returns:
        The time-major inputs, and whether they came without a batch.
    """
    name = type(cell).__name__
    if not given or not all(isinstance(value, Tensor) for value in given):
        kinds = ", ".join(type(value).__name__ for value in given)
        raise TypeError(f"{name} takes tensors for its inputs ({', '.join(cell.inputs)}), got ({kinds}).")
    first = given[0]
    if first.is_nested:
        raise TypeError(f"{name} takes no nested tensor. Pad it, first.to_padded_tensor(0.0), and pass lengths=.")
    if first.dim() not in (2, 3):
        form = "(N, T, {0})" if batch_first else "(T, N, {0})"
        raise ValueError(
            f"{name} expected a sequence of shape {form.format(cell.input_size)} or (T, {cell.input_size}), "
            f"got {tuple(first.shape)}."
        )
    if first.shape[-1] != cell.input_size:
        raise ValueError(
            f"{name} expected {cell.input_size} input features, got {first.shape[-1]} "
            f"in an input of shape {tuple(first.shape)}."
        )
    unbatched = first.dim() == 2
    for label, value in zip(cell.inputs[1:], given[1:], strict=False):
        if value.dim() < first.dim() - 1:
            raise ValueError(
                f"{name} expected input {label} with a time {'' if unbatched else 'and a batch '}dimension, as "
                f"{cell.inputs[0]} has, got {tuple(value.shape)}. What is constant over time has a T of 1."
            )
    if unbatched:
        inputs = tuple(value[:, None] for value in given)
    else:
        inputs = tuple(value.transpose(0, 1) for value in given) if batch_first else given
    if len(inputs) > 1:
        _check_extras(cell, inputs)
    check_dtype(cell, f"input {cell.inputs[0]}", inputs[0])
    return inputs, unbatched


def _check_extras(cell: Cell, inputs: State) -> None:
    name, rows = type(cell).__name__, inputs[0].shape[1]
    for label, value in zip(cell.inputs, inputs, strict=False):
        if value.shape[1] != rows:
            raise ValueError(
                f"{name} expected input {label} with {rows} rows, as {cell.inputs[0]} has, "
                f"got (time-major) {tuple(value.shape)}."
            )
    steps = {value.shape[0] for value in inputs if value.shape[0] != 1}
    if len(steps) > 1:
        lengths = ", ".join(str(value.shape[0]) for value in inputs)
        raise ValueError(
            f"{name}'s inputs ({', '.join(cell.inputs)}) have ({lengths}) steps; they must agree, "
            "or be 1 for what is constant over time."
        )


@dataclass(frozen=True, slots=True)
class Form:
    """The form of a call's sequences, which its lengths and flags must have too."""

    steps: int
    rows: int
    device: torch.device
    batch_first: bool
    unbatched: bool

    def lengths(self, lengths: Lengths | None) -> Tensor | None:
        """Lengths as (N,) int64.

        Raises:
            TypeError: for anything but whole numbers.
            ValueError: for another shape, or a length outside [0, T].
        """
        if lengths is None:
            return None
        found = _tensor("lengths", "whole numbers", lengths, self.device)
        if found.numel() == 0 and not isinstance(lengths, Tensor):
            found = found.long()
        if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
            raise TypeError(
                f"lengths must be whole numbers, got {found.dtype}. For a (T, N) mask of valid steps that end "
                "each row, pass lengths=mask.sum(0)."
            )
        found = found.reshape(-1) if found.dim() == 0 else found
        if tuple(found.shape) != (self.rows,):
            raise ValueError(f"lengths must have one entry per row, shape ({self.rows},), got {tuple(found.shape)}.")
        found = found.to(device=self.device, dtype=torch.int64)
        # While torch traces there are no values to look at.
        if not torch.compiler.is_compiling() and self.rows and found.device.type != "meta":
            low, high = int(found.min()), int(found.max())
            if low < 0 or high > self.steps:
                raise ValueError(
                    f"lengths must be between 0 and the {self.steps} steps of the input, got {low} to {high}."
                )
        return found

    def resets(self, resets: Any) -> Tensor | None:
        """Resets as (T, N) bool.

        Raises:
            TypeError: for anything but booleans; 0/1 numbers are as often the opposite mask.
            ValueError: for another shape.
        """
        return self._flags("resets", "True where a row starts anew before the step at t", "reset", resets)

    def mask(self, mask: Any) -> Tensor | None:
        """A mask as (T, N) bool.

        Raises:
            TypeError: for anything but booleans.
            ValueError: for another shape.
        """
        return self._flags("mask", "True where a row takes part in the step at t", "valid", mask)

    def _flags(self, name: str, meaning: str, word: str, flags: Any) -> Tensor | None:
        if flags is None:
            return None
        found = _tensor(name, "booleans", flags, self.device)
        if found.dtype != torch.bool:
            raise TypeError(
                f"{name} must be bool, {meaning}, got {found.dtype}. Pass {name}.bool() if nonzero means {word}."
            )
        expected: tuple[int, ...] = (self.steps, self.rows)
        if self.unbatched:
            expected = (self.steps,)
        elif self.batch_first:
            expected = (self.rows, self.steps)
        if tuple(found.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, one flag per step and row, got {tuple(found.shape)}.")
        if self.unbatched:
            found = found[:, None]
        elif self.batch_first:
            found = found.t()
        return found.to(self.device)


def _tensor(name: str, expected: str, given: Any, device: torch.device) -> Tensor:
    """What a user hands over as a tensor with values."""
    if not isinstance(given, Tensor):
        try:
            given = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"{name} must be {expected}, as a tensor, an array or a list, got {given!r}.") from error
    found: Tensor = given
    if found.is_nested or found.is_quantized or found.layout is not torch.strided:
        kind = "nested" if found.is_nested else "quantized" if found.is_quantized else "sparse"
        raise TypeError(f"{name} must be {expected} in a plain tensor, got a {kind} one.")
    if found.device.type == "meta" != device.type:
        raise ValueError(f"{name} is on the meta device and has no values, the input is on {device}.")
    return found


@dataclass(frozen=True, slots=True)
class Packing:
    """A PackedSequence opened: rows in its own order (longest first), and the way back."""

    packed: PackedSequence
    lengths: Tensor  # (N,) int64, in the packed order
    places: Tensor  # (sum of lengths,): where each entry of the packed data stands in (T * N)

    @classmethod
    def open(cls, packed: PackedSequence) -> Packing:
        sizes = packed.batch_sizes.to(packed.data.device)
        valid = torch.arange(int(packed.batch_sizes[0]), device=sizes.device) < sizes[:, None]
        return cls(packed, valid.sum(0), valid.flatten().nonzero()[:, 0])

    def padded(self, data: Tensor) -> Tensor:
        """(T, N, ...) from packed data, zero beyond each row's length."""
        steps, rows = self.packed.batch_sizes.shape[0], self.lengths.shape[0]
        return (
            data.new_zeros(steps * rows, *data.shape[1:])
            .index_copy(0, self.places, data)
            .reshape(steps, rows, *data.shape[1:])
        )

    def data(self, padded: Tensor) -> Tensor:
        """Packed data from (T, N, ...)."""
        return padded.flatten(0, 1).index_select(0, self.places)

    def repack(self, padded: Tensor) -> PackedSequence:
        """A PackedSequence like the one opened, around new values."""
        return self.packed._replace(data=self.data(padded))

    def sort(self, value: Tensor, dim: int = 0) -> Tensor:
        """Rows from the caller's order to the packed order."""
        order = self.packed.sorted_indices
        return value if order is None else value.index_select(dim, order)

    def unsort(self, value: Tensor, dim: int = 0) -> Tensor:
        """Rows from the packed order to the caller's."""
        order = self.packed.unsorted_indices
        return value if order is None else value.index_select(dim, order)


def check_packed(packed: PackedSequence) -> None:
    """Whether a PackedSequence, which torch takes as it comes, is what packing makes.

    Raises:
        ValueError: if its sizes are not those of its data, or its indices not those of its rows.
    """
    if torch.compiler.is_compiling() or packed.batch_sizes.device.type == "meta":
        return
    sizes, count = [int(size) for size in packed.batch_sizes.tolist()], packed.data.shape[0]
    falling = all(above >= below for above, below in pairwise(sizes))
    if not sizes or sizes[-1] < 0 or not falling or sum(sizes) != count:
        raise ValueError(
            f"A PackedSequence's batch_sizes must fall from step to step and add up to its {count} rows of data, "
            f"got {sizes}. Make it with torch.nn.utils.rnn.pack_padded_sequence."
        )
    for name in ("sorted_indices", "unsorted_indices"):
        found: Tensor | None = getattr(packed, name)
        if found is None or found.device.type == "meta":
            continue
        if not torch.equal(found.cpu().long().sort()[0], torch.arange(sizes[0])):
            raise ValueError(
                f"A PackedSequence's {name} must name each of its {sizes[0]} rows once, got {found.tolist()}. "
                "Make it with torch.nn.utils.rnn.pack_padded_sequence."
            )
