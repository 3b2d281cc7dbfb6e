"""What a sequence is run with besides its input and state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Options", "State", "steps_of"]

State = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """How a sequence is run beside its input and state; every tensor is time-major and already checked.

    Arguments:
        lengths: (N,) int64, row n is valid for t < lengths[n].
        resets: (T, N) bool, True puts a row back to the initial state before the step at t.
        reverse: run from the last step to the first.
        recompute: keep the states only for the backward, which computes everything else again.
    """

    lengths: Tensor | None = None
    resets: Tensor | None = None
    reverse: bool = False
    recompute: bool = False


def steps_of(inputs: State) -> int:
    """The steps of a sequence: those of any input that is not constant over time."""
    for value in inputs:
        if value.shape[0] != 1:
            return value.shape[0]
    return 1
