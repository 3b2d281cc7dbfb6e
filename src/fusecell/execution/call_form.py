"""The layout of a call: which dimensions its tensors have, and how a module builds the cell that is called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fusecell.execution.natively import natively
from fusecell.execution.options import State

if TYPE_CHECKING:
    from fusecell.cell import Cell

__all__ = ["CallForm", "CellFactory", "sequence_form", "step_form"]


class CallForm(NamedTuple):
    """The layout of a call without lengths and resets: the dimensions of its tensors, and what it returns.

    Outputs have the layout of the input, returned states that of the states passed.

    Arguments:
        steps: the input has a dimension of steps; without, it is one step.
        batched: input and states have a dimension of rows.
        batch_first: the input's dimension of rows comes before that of steps.
        layered: the states have a leading dimension of layers, of size 1, as torch.nn's layers have.
        outputs: the call returns outputs; without, only states.
        reverse, recompute: as in :class:`fusecell.execution.options.Options`.
        inputs: how many inputs there are, whose first is one vector of features per row and step.
        members: how many models of an ensemble run side by side: weights, states and results have a first dimension
            for them, which all else here leaves out; 0 for one model alone.
        each: every member has inputs of its own.
    """

    steps: bool = False
    batched: bool = True
    batch_first: bool = False
    layered: bool = False
    outputs: bool = True
    reverse: bool = False
    recompute: bool = False
    inputs: int = 1
    members: int = 0
    each: bool = False

    def own(self, count: int) -> list[bool]:
        """Return for each of a call's first tensors, inputs and states, whether every member has its own."""
        return [self.each if index < self.inputs else True for index in range(count)]

    def fits(self, tensors: State, ranks: Sequence[int]) -> bool:
        """Return whether the inputs, and the states after them, have the number of dimensions of this form.

        Arguments:
            ranks: dimensions of a row of each state.
        """
        leading = self.batched + self.steps
        if tensors[0].dim() != 1 + leading or any(value.dim() < leading for value in tensors[1 : self.inputs]):
            return False
        states, leading = tensors[self.inputs :], self.batched + self.layered
        return not states or [value.dim() - leading for value in states] == [*ranks]

    # From the caller's layout to a kernel's, always by views.

    def sequence(self, value: Tensor) -> Tensor:
        """Return an input as (T, N, ...)."""
        if not self.batched:
            value = value.unsqueeze(int(self.steps))
        elif self.batch_first:
            value = value.transpose(0, 1)
        return value if self.steps else value[None]

    def rows_of(self, state: Tensor) -> Tensor:
        """Return a state as (N, ...)."""
        state = state[0] if self.layered else state
        return state if self.batched else state[None]

    def scanned(self, outputs: Tensor) -> Tensor:
        """Return outputs, or their gradient, as (T, N, size): the inverse of :meth:`output`."""
        outputs = outputs.transpose(0, 1) if self.rows_first else outputs
        outputs = outputs if self.batched else outputs[..., None, :]
        return outputs if self.steps else outputs[None]

    # And back.

    def state(self, rows: Tensor) -> Tensor:
        """Return a state (N, ...) in the caller's layout."""
        state = rows if self.batched else rows[0]
        return state[None] if self.layered else state

    def output(self, outputs: Tensor) -> Tensor:
        """Return outputs (T, N, size) in the caller's layout."""
        outputs = outputs if self.steps else outputs[0]
        outputs = outputs if self.batched else outputs[..., 0, :]
        return outputs.transpose(0, 1) if self.rows_first else outputs

    @property
    def rows_first(self) -> bool:
        """Whether outputs are (N, T, size)."""
        return self.steps and self.batched and self.batch_first

    def output_shape(self, steps: int, rows: int, size: int) -> tuple[int, ...]:
        """Return the shape that outputs have in memory: steps before rows, even where (N, T, size) is returned."""
        return (steps,) * self.steps + (rows,) * self.batched + (size,)

    def state_shape(self, rows: int, *shape: int) -> tuple[int, ...]:
        """Return the shape of a state, a row of which has a shape, in the caller's layout."""
        return (1,) * self.layered + (rows,) * self.batched + shape


# Cached: building a named tuple takes longer than looking one up, and a small call has few microseconds in all.


@functools.cache
@natively
def step_form(batched: bool, outputs: bool, inputs: int = 1) -> CallForm:
    """Return the form of one step."""
    return CallForm(batched=batched, outputs=outputs, inputs=inputs)


@functools.cache
@natively
def sequence_form(
    batched: bool, batch_first: bool, layered: bool, reverse: bool = False, recompute: bool = False, inputs: int = 1
) -> CallForm:
    """Return the form of a scan over a sequence."""
    return CallForm(True, batched, batch_first, layered, reverse=reverse, recompute=recompute, inputs=inputs)


class CellFactory(NamedTuple):
    """How a module that is no cell itself builds one for each call.

    Arguments:
        cell: builds it.
        attributes: the names of all the module's attributes that it depends on.
        weights: the name of the module's parameter for each parameter of the cell.
    """

    cell: Callable[[], Cell]
    attributes: Sequence[str]
    weights: Mapping[str, str]


class PreparedArguments(NamedTuple):
    """What the cache of calls takes of a layer's plain call; see :func:`fusecell.execution.call_path.call`.

    Arguments:
        owner: the cell, or the module that builds one for each call.
        form: of the call.
        factory: of an owner that is no cell itself, called with it.
    """

    owner: Any
    form: CallForm
    factory: Callable[[Any], CellFactory] | None = None
