"""``Stack``, a cell made of cells, each above the last."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.execution.options import State
from fusecell.shapes import Outputs, OutputSize, Size
from fusecell.validation import check_count

__all__ = ["Stack"]


class Stack(Cell):
    r"""A cell made of cells: within a step the output of each is the input of the next.

    .. math:: (y^l_t, s^l_t) = \mathrm{step}^l(\mathrm{dropout}(y^{l-1}_t) [+ y^{l-2}_t], s^l_{t-1})

    Example:
        >>> import torch, fusecell as fc
        >>> mixed = fc.Recurrent(fc.Stack(fc.GRUCell(5, 32), fc.LSTMCell(32, 16)))
        >>> y, (h0, h1, c1) = mixed(torch.randn(7, 3, 5))
        >>> y.shape, h0.shape, c1.shape
        (torch.Size([7, 3, 16]), torch.Size([3, 32]), torch.Size([3, 16]))

    Arguments:
        cells: bottom first; the ``input_size`` of each, a number or a shape, is the ``output_size`` of the one below.
            Stacks nest.
        dropout: the probability with which a feature of every cell's output but the last's is dropped, in training.
            Over a sequence it is one dropout of the (T, N, size) output between layers, as torch.nn draws it.
        residual: add a cell's input to its output, after dropout, wherever the sizes agree.
        skip: concatenate the stack's input to the input of every cell above the first, and return the outputs of all
            cells concatenated, as Graves's and Haiku's deep networks do.

    Raises:
        TypeError: for anything that is not a cell.
        ValueError: where the sizes of neighbours disagree, or no cell has the sizes that ``residual`` needs.

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

    # Properties: the cells' names and sizes may change, as those of a wrapper that draws only in training do.
    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        """The cells' states in order, each name with its layer: ``h0``, ``h1``, ``c1``."""
        return tuple(f"{name}{layer}" for layer, cell in enumerate(self.layers) for name in cell.states)

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The bottom cell's inputs, then those that the cells above draw for themselves."""
        above = [f"{name}{layer}" for layer, cell in enumerate(self.layers) if layer for name in cell.inputs[1:]]
        return (*self.layers[0].inputs, *above)

    @property
    def state_sizes(self) -> tuple[Size, ...]:
        return tuple(size for cell in self.layers for size in cell.state_sizes)

    @property
    def output_size(self) -> OutputSize:
        if self.skip:
            return sum(cast("int", cell.output_size) for cell in self.layers)
        return self.layers[-1].output_size

    def step(self, x: Any, state: State) -> tuple[Outputs, State]:
        # As in `inputs`: those of the bottom cell, then what each cell above has drawn, its first input excepted.
        inputs = list(x) if len(self.inputs) > 1 else [x]
        count = len(self.layers[0].inputs)
        cell_inputs, drawn = inputs[:count], inputs[count:]
        output, after, first = cell_inputs[0], cast("State", ()), cell_inputs[0]
        outputs: list[Tensor] = []
        for layer, (cell, part) in enumerate(zip(self.layers, self.split(state), strict=True)):
            if layer:
                count = len(cell.inputs) - 1
                cell_inputs, drawn = [self.feed(output, first), *drawn[:count]], drawn[count:]
            output, new = cell.step(tuple(cell_inputs) if len(cell_inputs) > 1 else cell_inputs[0], part)
            after += tuple(new)
            outputs.append(output)
            if layer + 1 < len(self.cells):
                output = self.drop(output)
            output = self.join(output, cell_inputs[0])
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
        """Split the stack's state into the state of each cell."""
        parts, start = [], 0
        for cell in self.layers:
            count = len(cell.state_sizes)
            parts.append(tuple(state[start : start + count]))
            start += count
        return parts

    def drop(self, output: Tensor) -> Tensor:
        """Apply dropout to an output between layers."""
        return nn.functional.dropout(output, self.dropout, self.training)

    def join(self, output: Tensor, below: Tensor) -> Tensor:
        """Add the residual connection past a cell, where there is one."""
        if not self.residual or output.shape[-1] != below.shape[-1]:
            return output
        return output + below if output.dim() < 4 or output.shape == below.shape else output

    def feed(self, below: Tensor, first: Tensor) -> Tensor:
        """Return the input of a cell above the first: the output below, with ``skip`` and the stack's input."""
        return torch.cat((below, first), -1) if self.skip else below

    def result(self, last: Tensor, outputs: list[Tensor]) -> Tensor:
        """Return the stack's output: the last one, or with ``skip`` those of all cells, before dropout."""
        return torch.cat(outputs, -1) if self.skip else last

    def extra_repr(self) -> str:
        parts = [f"dropout={self.dropout}"] if self.dropout else []
        return ", ".join(parts + [f"{name}=True" for name in ("residual", "skip") if getattr(self, name)])


def _check(cells: tuple[Cell, ...], dropout: float, residual: bool, skip: bool) -> None:
    """Validate the arguments of a Stack."""
    if not cells:
        raise ValueError("Stack needs at least one cell, got none.")
    for cell in cells:
        if not isinstance(cell, Cell):
            raise TypeError(f"Stack takes cells, got {type(cell).__name__}. For layers use fusecell.Sequential.")
    odd = [cell for cell in cells for size in (cell.input_size, cell.output_size) if not isinstance(size, int)]
    if skip and odd:
        raise ValueError(
            f"Stack: skip concatenates vectors of features, {type(odd[0]).__name__}'s input or output has another "
            "shape. Flatten them in the cells, or use residual=True."
        )
    if residual and skip:
        raise ValueError("Stack: residual adds a cell's input to its output, skip concatenates them; choose one.")
    for below, above in pairwise(cells):
        width = below.output_size
        if skip and isinstance(width, int) and isinstance(cells[0].input_size, int):
            width += cells[0].input_size
        if width != above.input_size:
            skipped = f", with the stack's {cells[0].input_size} behind them {width}," if skip else ""
            raise ValueError(
                f"Stack: {type(below).__name__} gives {below.output_size} features{skipped} and {type(above).__name__} "
                f"above it takes {above.input_size}; they must agree."
            )
    if isinstance(dropout, bool) or not 0 <= dropout <= 1:
        raise ValueError(f"dropout should be a probability in [0, 1], got {dropout!r}.")
    if dropout and len(cells) == 1:
        warnings.warn("Stack drops between cells, and there is only one.", stacklevel=3)
    if residual and not any(cell.input_size == cell.output_size for cell in cells):
        sizes = ", ".join(f"{cell.input_size}->{cell.output_size}" for cell in cells)
        raise ValueError(f"residual=True finds no cell as wide as its input among {sizes}.")
