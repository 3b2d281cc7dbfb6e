"""``Options``, the arguments of a runner besides the cell, its inputs and its state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["Options", "Recompute", "State", "check_recompute", "steps_of"]

State = tuple[Tensor, ...]
Recompute = bool | Literal["chunk"]


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a run over a sequence; tensors are time-major and validated.

    Arguments:
        lengths: (N,) int64, row n is valid for t < lengths[n].
        resets: (T, N) bool, True puts a row back to the initial state before the step at t.
        reverse: run from the last step to the first.
        recompute: True: save only the states for the backward, which computes everything else again; "chunk": only
            those before each of some square root of T chunks.
    """

    lengths: Tensor | None = None
    resets: Tensor | None = None
    reverse: bool = False
    recompute: Recompute = False


def check_recompute(where: str, value: object) -> Recompute:
    """Return a ``recompute`` that a user gave.

    Raises:
        ValueError: for anything but True, False and "chunk", naming the class or function that it was given to.
    """
    if value == "chunk":
        return "chunk"
    if isinstance(value, str) or value not in (True, False):
        raise ValueError(f"{where}: recompute must be True, False or 'chunk', got {value!r}.")
    return bool(value)


def steps_of(inputs: State) -> int:
    """Return the number of steps of a sequence: that of any input that is not constant over time."""
    for value in inputs:
        if value.shape[0] != 1:
            return value.shape[0]
    return 1
