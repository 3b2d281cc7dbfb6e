"""Replay of the random draws of a step: a call draws them in the order in which the Python loop would."""

from __future__ import annotations

import torch

from fusecell.compiler.frontend import Traced
from fusecell.compiler.frontend.draws import Draw
from fusecell.execution.options import Options, State, steps_of

__all__ = ["is_in_order", "with_draws"]


def with_draws(inputs: State, traced: Traced, options: Options) -> State:
    """Return a call's inputs, and behind them what its steps draw: (T, N, features) each, from torch's generator."""
    draws = traced.draws
    if not draws:
        return inputs
    steps, rows = steps_of(inputs), inputs[0].shape[1]
    memory = [torch.empty(steps, *_shape(draw, rows), dtype=draw.dtype) for draw in draws]
    # One step after the other, each draw in its place: the generator then ends where the loop's does, too.
    for t in range(steps - 1, -1, -1) if options.reverse else range(steps):
        for draw, numbers in zip(draws, memory, strict=True):
            getattr(numbers[t], draw.method)(*draw.args)
    return (*inputs, *(_by_rows(*each, rows, traced.dtype) for each in zip(draws, memory, strict=True)))


def is_in_order(row: torch.Tensor) -> bool:
    """Whether what is drawn like a step's tensor, as ``randn_like(x)`` is, has its elements in order in memory."""
    strides = [stride for size, stride in zip(row.shape, row.stride(), strict=True) if size > 1 and stride]
    return strides == sorted(strides, reverse=True)


def _shape(draw: Draw, rows: int) -> list[int]:
    """Return the shape of a draw for a number of rows."""
    return [size * rows if axis == draw.axis else size for axis, size in enumerate(draw.shape)]


def _by_rows(draw: Draw, numbers: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the draws of all steps as (T, N, features)."""
    numbers = numbers.to(dtype)
    if draw.axis is None:
        return numbers.reshape(len(numbers), 1, -1).expand(-1, rows, -1)
    axis = draw.axis + 1
    sizes = numbers.shape
    split = numbers.reshape(*sizes[:axis], rows, draw.shape[draw.axis], *sizes[axis + 1 :])
    return split.movedim(axis, 1).flatten(2)
