"""The step of any cell with its intermediates let out, held values and weights let in, as a cell of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fusecell.cell import Cell, capture_intermediates, rewrite_intermediates
from fusecell.execution.options import State

__all__ = ["PlayCell"]


class PlayCell(Cell):
    r"""A cell whose every value can be read, held and changed from outside, between any two steps.

    .. math::
        v  &= \text{the step's value where its hold is NaN, else the hold} \\
        y  &= W h' + b

    Exported, a step is a function of its input and its state alone. So weights are *states* here, which a step leaves
    as they are and whoever runs it may set; holds are part of the input; noted values are part of the output.

    Example:
        >>> import torch, fusecell as fc
        >>> from torch import nn
        >>> from fusecell.play import PlayCell
        >>> cell = PlayCell(fc.GRUCell(5, 10), nn.Linear(10, 3))
        >>> cell.names, cell.input_size, cell.output_size
        (('r', 'z', 'n', 'h'), 45, 43)
        >>> x = torch.full((7, 1, 45), torch.nan)
        >>> x[..., :5] = torch.randn(7, 1, 5)
        >>> x[..., cell.holds["z"]] = 1  # an update gate that keeps everything
        >>> y, (h, *weights) = fc.Recurrent(cell)(x)
        >>> h.abs().sum().item()
        0.0

    Arguments:
        cell: a cell of one flat input and of flat states, whose output is its first state; most of the zoo.
        readout: maps (hidden_size,) to the prediction; its weights are states too.

    Attributes:
        names: what can be read and held: the values that the step notes, then its other states.
        holds, values: where each of them lies in the input, behind x, and in the output, behind y.
        weights: the names and shapes of the parameters, the states behind the cell's own.

    Raises:
        ValueError: for any other cell.
    """

    def __init__(self, cell: Cell, readout: nn.Linear) -> None:
        sizes = _sizes_of_values(cell)
        super().__init__(cell.input_size, cell.hidden_size)
        self.cell, self.readout = cell, readout
        self.names = tuple(sizes)
        self.holds = _slices(cell.input_size, sizes)
        self.values = _slices(readout.out_features, sizes)
        self.weights = {name.replace(".", "_"): tuple(value.shape) for name, value in self.named_parameters()}
        self.states = (*cell.states, *self.weights)  # type: ignore[misc]
        self.state_sizes = (*cell.state_sizes, *self.weights.values())
        self.input_size = cell.input_size + sum(sizes.values())
        self.output_size = readout.out_features + sum(sizes.values())

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        weights = [value.detach().to(device, dtype) for value in self.parameters()]
        own = self.cell.initial_state(batch_size, dtype=dtype, device=device)
        return (*own, *[value.expand(batch_size, *value.shape).clone() for value in weights])

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        count, parts = len(self.cell.states), _HeldStep(self.cell, self.readout, self.holds)
        names = [name for name, _ in self.named_parameters()]

        def row(x: Tensor, own: State, weights: State) -> tuple[Tensor, State]:
            result: tuple[Tensor, State] = functional_call(parts, dict(zip(names, weights, strict=True)), (x, own))
            return result

        # Each row has weights of its own: vmap turns the step's products with a matrix into products of rows.
        outputs, own = vmap(row)(x, state[:count], state[count:])
        return outputs, (*own, *state[count:])


class _HeldStep(nn.Module):
    """One row's step and readout as a ``forward``, which is what functional_call calls."""

    def __init__(self, cell: Cell, readout: nn.Linear, holds: dict[str, slice]) -> None:
        super().__init__()
        self.cell, self.readout, self.holds = cell, readout, holds

    def forward(self, x: Tensor, own: State) -> tuple[Tensor, State]:
        noted: dict[str, Tensor] = {}

        def held(name: str, value: Tensor) -> Tensor:
            hold = x[self.holds[name]]
            noted[name] = torch.where(torch.isnan(hold), value, hold)
            return noted[name]

        # The step's own notes are of one row, inside vmap: nobody outside can read them.
        with rewrite_intermediates(lambda _, name, value: held(name, value)), capture_intermediates(_ignore):
            _, after = self.cell.step(x[None, : self.cell.input_size], tuple(each[None] for each in own))
        # A state that the step noted is held already; the others are here.
        states = zip(self.cell.states, after, strict=True)
        after = tuple(value if name in noted else held(name, value) for name, value in states)
        values = [noted[name][0] for name in self.holds]
        return torch.cat((self.readout(after[0])[0], *values)), tuple(value[0] for value in after)


def _ignore(cell: Cell, name: str, value: Tensor) -> None:
    """Keep no note."""


def _sizes_of_values(cell: Cell) -> dict[str, int]:
    """Return the features of every value that a step notes, and of the states, by running one step.

    Raises:
        ValueError: if it is no step from one input to a state that is also its output.
    """
    kind = type(cell).__name__
    if len(cell.inputs) != 1 or not all(isinstance(size, int) for size in (cell.input_size, *cell.state_sizes)):
        raise ValueError(
            f"PlayCell takes a cell of one flat input and flat states, got {kind} with inputs {cell.inputs}, "
            f"input_size {cell.input_size} and state_sizes {cell.state_sizes}."
        )
    noted: dict[str, Tensor] = {}
    like = next(cell.parameters())
    x = torch.linspace(-1, 1, cell.input_size).to(like)[None]
    with torch.no_grad(), capture_intermediates(lambda _, name, value: noted.update({name: value})):
        output, after = cell.step(x, cell.initial_state(1, dtype=like.dtype, device=like.device))
    if not isinstance(output, Tensor) or not torch.equal(output, after[0]):
        raise ValueError(
            f"PlayCell takes a cell whose output is its first state, as a state that is held must show in it; {kind}'s "
            f"is another than {cell.states[0]}."
        )
    noted |= {name: value for name, value in zip(cell.states, after, strict=True) if name not in noted}
    return {name: value[0].numel() for name, value in noted.items()}


def _slices(start: int, sizes: dict[str, int]) -> dict[str, slice]:
    """Lay values one behind the other."""
    slices = {}
    for name, size in sizes.items():
        slices[name] = slice(start, start + size)
        start += size
    return slices
