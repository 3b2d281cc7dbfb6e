"""``Options``, the arguments of a runner besides the cell, its inputs and its state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Options", "State", "steps_of"]

State = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a run over a sequence; tensors are time-major and validated.

    Arguments:
        lengths: (N,) int64, row n is valid for t < lengths[n].
        resets: (T, N) bool, True puts a row back to the initial state before the step at t.
        reverse: run from the last step to the first.
        recompute: save only the states for the backward, which computes everything else again.
    """

    lengths: Tensor | None = None
    resets: Tensor | None = None
    reverse: bool = False
    recompute: bool = False


def steps_of(inputs: State) -> int:
    """Return the number of steps of a sequence: that of any input that is not constant over time."""
    for value in inputs:
        if value.shape[0] != 1:
            return value.shape[0]
    return 1
