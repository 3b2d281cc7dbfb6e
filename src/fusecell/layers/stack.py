"""A cell made of cells, one above the other."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.execution.options import State
from fusecell.validation import check_count

__all__ = ["Stack"]


class Stack(Cell):
    r"""Cells above one another within a step: the output of each is the input of the next.

    .. math:: (y^l_t, s^l_t) = \mathrm{step}^l(\mathrm{dropout}(y^{l-1}_t) [+ y^{l-2}_t], s^l_{t-1})

    Example:
        >>> import torch, fusecell as fc
        >>> mixed = fc.Recurrent(fc.Stack(fc.GRUCell(5, 32), fc.LSTMCell(32, 16)))
        >>> y, (h0, h1, c1) = mixed(torch.randn(7, 3, 5))
        >>> y.shape, h0.shape, c1.shape
        (torch.Size([7, 3, 16]), torch.Size([3, 32]), torch.Size([3, 16]))

    Arguments:
        cells: bottom first; each takes as many features as the one below gives out. Stacks nest.
        dropout: on the output of every cell but the last, in training. Over a sequence it is one dropout of the
            (T, N, size) output between layers, as torch.nn draws it.
        residual: add a cell's input to its output, after dropout, wherever the sizes agree.
        skip: give every cell above the first the stack's input too, behind the output of the cell below, and put the
            outputs of all cells side by side, as Graves's and Haiku's deep networks do.

    Raises:
        TypeError: for anything that is not a cell.
        ValueError: where sizes don't follow one another, or ``residual`` finds no place.

    Paper, of ``skip``: A. Graves, Generating sequences with recurrent neural networks, 2013, arXiv:1308.0850.
    """

    def __init__(self, *cells: Cell, dropout: float = 0.0, residual: bool = False, skip: bool = False) -> None:
        _check(cells, dropout, residual, skip)
        super().__init__(cells[0].input_size, cells[-1].hidden_size)
        self.cells: nn.ModuleList = nn.ModuleList(cells)
        self.dropout = dropout
        self.residual = residual
        self.skip = skip

    @property
    def layers(self) -> list[Cell]:
        """The cells, bottom first."""
        return cast("list[Cell]", list(self.cells))

    # A stack's names and sizes follow its cells', which may change (a wrapper that draws only in training).
    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        """The cells' states in order, each name with its layer: ``h0``, ``h1``, ``c1``."""
        return tuple(f"{name}{layer}" for layer, cell in enumerate(self.layers) for name in cell.states)

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The bottom cell's inputs, then what the cells above draw for themselves."""
        above = [f"{name}{layer}" for layer, cell in enumerate(self.layers) if layer for name in cell.inputs[1:]]
        return (*self.layers[0].inputs, *above)

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return tuple(size for cell in self.layers for size in cell.state_sizes)

    @property
    def output_size(self) -> int:
        if self.skip:
            return sum(cell.output_size for cell in self.layers)
        return self.layers[-1].output_size

    def step(self, x: Any, state: State) -> tuple[Tensor, State]:
        given = list(x) if len(self.inputs) > 1 else [x]
        taken = len(self.layers[0].inputs)
        own, extras = given[:taken], given[taken:]
        output, after, first = own[0], cast("State", ()), own[0]
        outputs: list[Tensor] = []
        for layer, (cell, part) in enumerate(zip(self.layers, self.split(state), strict=True)):
            if layer:
                count = len(cell.inputs) - 1
                own, extras = [self.feed(output, first), *extras[:count]], extras[count:]
            output, new = cell.step(tuple(own) if len(own) > 1 else own[0], part)
            after += tuple(new)
            outputs.append(output)
            if layer + 1 < len(self.cells):
                output = self.drop(output)
            output = self.join(output, own[0])
        return self.result(output, outputs), after

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        each = (cell.initial_state(batch_size, dtype=dtype, device=device) for cell in self.layers)
        return tuple(value for state in each for value in state)

    def draw(
        self,
        steps: int,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        each = [cell.draw(steps, batch_size, dtype=dtype, device=device) for cell in self.layers]
        for cell, drawn in zip(self.layers[1:], each[1:], strict=True):
            check_count(cell, 1, len(drawn))
        return tuple(value for drawn in each for value in drawn)

    def split(self, state: State) -> list[State]:
        """The state of each cell."""
        parts, start = [], 0
        for cell in self.layers:
            count = len(cell.state_sizes)
            parts.append(tuple(state[start : start + count]))
            start += count
        return parts

    def drop(self, output: Tensor) -> Tensor:
        """Dropout between layers."""
        return nn.functional.dropout(output, self.dropout, self.training)

    def join(self, output: Tensor, below: Tensor) -> Tensor:
        """The residual connection past a cell, where there is one."""
        return output + below if self.residual and output.shape[-1] == below.shape[-1] else output

    def feed(self, below: Tensor, first: Tensor) -> Tensor:
        """What a cell above the first takes: the output below, and the stack's input behind it where that skips."""
        return torch.cat((below, first), -1) if self.skip else below

    def result(self, last: Tensor, outputs: list[Tensor]) -> Tensor:
        """What the stack gives: the last output, or those of all cells, as the cells gave them."""
        return torch.cat(outputs, -1) if self.skip else last

    def extra_repr(self) -> str:
        parts = [f"dropout={self.dropout}"] if self.dropout else []
        return ", ".join(parts + [f"{name}=True" for name in ("residual", "skip") if getattr(self, name)])


def _check(cells: tuple[Cell, ...], dropout: float, residual: bool, skip: bool) -> None:
    if not cells:
        raise ValueError("Stack needs at least one cell, got none.")
    for cell in cells:
        if not isinstance(cell, Cell):
            raise TypeError(f"Stack takes cells, got {type(cell).__name__}. For layers use fusecell.Sequential.")
    if residual and skip:
        raise ValueError("Stack: residual adds a cell's input to its output, skip puts them side by side; choose one.")
    for below, above in pairwise(cells):
        width = below.output_size + (cells[0].input_size if skip else 0)
        if width != above.input_size:
            beside = f", with the stack's {cells[0].input_size} behind them {width}," if skip else ""
            raise ValueError(
                f"Stack: {type(below).__name__} gives {below.output_size} features{beside} and {type(above).__name__} "
                f"above it takes {above.input_size}; they must agree."
            )
    if isinstance(dropout, bool) or not 0 <= dropout <= 1:
        raise ValueError(f"dropout should be a probability in [0, 1], got {dropout!r}.")
    if dropout and len(cells) == 1:
        warnings.warn("Stack drops between cells, and there is only one.", stacklevel=3)
    if residual and not any(cell.input_size == cell.output_size for cell in cells):
        sizes = ", ".join(f"{cell.input_size}->{cell.output_size}" for cell in cells)
        raise ValueError(f"residual=True finds no cell as wide as its input among {sizes}.")
