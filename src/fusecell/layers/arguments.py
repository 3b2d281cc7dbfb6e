"""Validate the arguments of a layer, and bring them to one layout: time-major, batched, tuples of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.execution.options import State
from fusecell.shapes import feature_shape, size_text
from fusecell.validation import check_dtype, check_features

__all__ = ["Lengths", "SequenceShape", "check_inputs"]

Lengths = Tensor | Sequence[int] | np.ndarray[Any, Any]


def check_inputs(cell: Cell, inputs: State, batch_first: bool) -> tuple[State, bool]:
    """Validate the inputs of a sequence; return them as (T, N, ...) each, and whether they had no dimension N.

    Arguments:
        inputs: as the user passed them: (T, N, input_size), (N, T, input_size) if ``batch_first``, or (T, input_size);
            the second and further ones likewise, where T may be 1.

    Raises:
        TypeError, ValueError: naming the input that doesn't fit.
    """
    name = type(cell).__name__
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        kinds = ", ".join(type(value).__name__ for value in inputs)
        raise TypeError(f"{name} takes tensors for its inputs ({', '.join(cell.inputs)}), got ({kinds}).")
    first = inputs[0]
    if first.is_nested:
        raise TypeError(f"{name} takes no nested tensor. Pad it, first.to_padded_tensor(0.0), and pass lengths=.")
    rank = len(feature_shape(cell.input_size))
    if first.dim() - rank not in (1, 2):
        leading = ("N", "T") if batch_first else ("T", "N")
        fix = "" if rank == 1 else " Reshape the input, or set the cell's input_size to the shape of a row."
        raise ValueError(
            f"{name} expected a sequence of shape {size_text(cell.input_size, *leading)} or "
            f"{size_text(cell.input_size, 'T')}, got {tuple(first.shape)}.{fix}"
        )
    check_features(cell, first)
    unbatched = first.dim() == rank + 1
    leading_dims = 1 if unbatched else 2
    for label, value in zip(cell.inputs[1:], inputs[1:], strict=False):
        if value.dim() < leading_dims:
            raise ValueError(
                f"{name} expected input {label} with a time {'' if unbatched else 'and a batch '}dimension, as "
                f"{cell.inputs[0]} has, got {tuple(value.shape)}. An input that is constant over time has a T of 1."
            )
    if unbatched:
        inputs = tuple(value[:, None] for value in inputs)
    elif batch_first:
        inputs = tuple(value.transpose(0, 1) for value in inputs)
    if len(inputs) > 1:
        _check_agreement(cell, inputs)
    check_dtype(cell, f"input {cell.inputs[0]}", inputs[0])
    return inputs, unbatched


def _check_agreement(cell: Cell, inputs: State) -> None:
    """Raise ValueError unless several inputs have equal numbers of rows, and of steps or 1."""
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
            "or be 1 for an input that is constant over time."
        )


@dataclass(frozen=True, slots=True)
class SequenceShape:
    """The steps and rows of a call's sequences, with which its lengths, resets and mask must agree.

    Arguments:
        steps, rows, device: of the first input.
        batch_first, unbatched: the layout in which the user passed it; resets and mask come in the same.
    """

    steps: int
    rows: int
    device: torch.device
    batch_first: bool
    unbatched: bool

    def lengths(self, lengths: Lengths | None) -> Tensor | None:
        """Validate lengths; return them as (N,) int64 on the input's device.

        Raises:
            TypeError: for anything but integers.
            ValueError: for another shape, or a length outside [0, T].
        """
        if lengths is None:
            return None
        result = _tensor("lengths", "integers", lengths, self.device)
        if result.numel() == 0 and not isinstance(lengths, Tensor):
            result = result.long()  # torch.as_tensor([]) is float32
        if result.dtype == torch.bool or result.is_floating_point() or result.is_complex():
            raise TypeError(
                f"lengths must be integers, got {result.dtype}. For a (T, N) mask of valid steps that end "
                "each row, pass lengths=mask.sum(0)."
            )
        result = result.reshape(-1) if result.dim() == 0 else result  # one number, for a single row
        if tuple(result.shape) != (self.rows,):
            raise ValueError(f"lengths must have one entry per row, shape ({self.rows},), got {tuple(result.shape)}.")
        result = result.to(device=self.device, dtype=torch.int64)
        # While torch traces, and on the meta device, there are no values to look at.
        if not torch.compiler.is_compiling() and self.rows and result.device.type != "meta":
            low, high = int(result.min()), int(result.max())
            if low < 0 or high > self.steps:
                raise ValueError(
                    f"lengths must be between 0 and the {self.steps} steps of the input, got {low} to {high}."
                )
        return result

    def resets(self, resets: Any) -> Tensor | None:
        """Validate resets; return them as (T, N) bool.

        Raises:
            TypeError: for anything but booleans.
            ValueError: for another shape.
        """
        return self._flags("resets", "True where a row starts anew before the step at t", "reset", resets)

    def mask(self, mask: Any) -> Tensor | None:
        """Validate a mask; return it as (T, N) bool.

        Raises:
            TypeError: for anything but booleans.
            ValueError: for another shape.
        """
        return self._flags("mask", "True where a row takes part in the step at t", "valid", mask)

    def _flags(self, name: str, meaning: str, word: str, flags: Any) -> Tensor | None:
        if flags is None:
            return None
        result = _tensor(name, "booleans", flags, self.device)
        # Numbers are refused, not converted: a 0/1 mask is as often the opposite one (1 where a row is padding).
        if result.dtype != torch.bool:
            raise TypeError(
                f"{name} must be bool, {meaning}, got {result.dtype}. Pass {name}.bool() if nonzero means {word}."
            )
        expected: tuple[int, ...] = (self.steps, self.rows)
        if self.unbatched:
            expected = (self.steps,)
        elif self.batch_first:
            expected = (self.rows, self.steps)
        if tuple(result.shape) != expected:
            raise ValueError(
                f"{name} must have shape {expected}, one flag per step and row, got {tuple(result.shape)}."
            )
        if self.unbatched:
            result = result[:, None]
        elif self.batch_first:
            result = result.t()
        return result.to(self.device)


def _tensor(name: str, expected: str, value: Any, device: torch.device) -> Tensor:
    """Convert an argument to a dense tensor, not on the meta device unless the input is.

    Arguments:
        name, expected: the argument's name and what it should be, for the message.
        value: as the user passed it.
        device: that of the input.

    Raises:
        TypeError, ValueError: if that is impossible.
    """
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"{name} must be {expected}, as a tensor, an array or a list, got {value!r}.") from error
    tensor: Tensor = value
    if tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else "sparse"
        raise TypeError(f"{name} must be {expected} in a plain tensor, got a {kind} one.")
    if tensor.device.type == "meta" != device.type:
        raise ValueError(f"{name} is on the meta device and has no values, the input is on {device}.")
    return tensor
