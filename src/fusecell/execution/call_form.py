"""The layout of a call: which dimensions its tensors have, and how a module makes the cell that is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from fusecell.execution.options import State

if TYPE_CHECKING:
    from fusecell.cell import Cell

__all__ = ["CallForm", "CellFactory"]


class CallForm(NamedTuple):
    """How a call without lengths and resets hands over its input and state, as they are given, and takes its results.

    Outputs come as the input does, states as they are given.

    Arguments:
        steps: the input has a dimension of steps; else it is one step.
        batched: input and state have a dimension of rows.
        batch_first: the input's rows come before its steps.
        layered: the state has a dimension of layers, of which there is one.
        outputs: the outputs are wanted, not only the state.
        reverse, recompute: as in :class:`Options`.
        part: which of an owner's cells it is that is called.
    """

    steps: bool = False
    batched: bool = True
    batch_first: bool = False
    layered: bool = False
    outputs: bool = True
    reverse: bool = False
    recompute: bool = False
    part: int = 0

    def fits(self, given: State) -> bool:
        """Whether an input, and the states if they are given, have the right number of dimensions."""
        rank = 1 + self.batched
        return given[0].dim() == rank + self.steps and all(value.dim() == rank + self.layered for value in given[1:])

    def sequence(self, value: Tensor) -> Tensor:
        """The input as (T, N, ...)."""
        if not self.batched:
            value = value[..., None, :]
        elif self.batch_first:
            value = value.transpose(0, 1)
        return value if self.steps else value[None]

    def rows_of(self, state: Tensor) -> Tensor:
        """A state as (N, size)."""
        state = state[0] if self.layered else state
        return state if self.batched else state[None]

    def state(self, rows: Tensor) -> Tensor:
        """A state as it is given, of (N, size)."""
        state = rows if self.batched else rows[0]
        return state[None] if self.layered else state

    def output(self, outputs: Tensor) -> Tensor:
        """Outputs as they are returned, of (T, N, size)."""
        outputs = outputs if self.steps else outputs[0]
        outputs = outputs if self.batched else outputs[..., 0, :]
        return outputs.transpose(0, 1) if self.rows_first else outputs

    def scanned(self, outputs: Tensor) -> Tensor:
        """Outputs as (T, N, size), of what is returned."""
        outputs = outputs.transpose(0, 1) if self.rows_first else outputs
        outputs = outputs if self.batched else outputs[..., None, :]
        return outputs if self.steps else outputs[None]

    @property
    def rows_first(self) -> bool:
        """Whether outputs are (N, T, size)."""
        return self.steps and self.batched and self.batch_first

    def output_shape(self, steps: int, rows: int, size: int) -> tuple[int, ...]:
        """The shape of outputs in memory, where steps come before rows whichever comes first in what is returned."""
        return (steps,) * self.steps + (rows,) * self.batched + (size,)

    def state_shape(self, rows: int, size: int) -> tuple[int, ...]:
        return (1,) * self.layered + (rows,) * self.batched + (size,)


class CellFactory(NamedTuple):
    """What a module that is no cell itself makes a cell of, each time it is called.

    Arguments:
        cell: makes it.
        attributes: the names of all the module's attributes that go into it.
        weights: the name of the module's parameter for each of the cell's.
    """

    cell: Callable[[], Cell]
    attributes: Sequence[str]
    weights: Mapping[str, str]
