"""Wrappers that add a part to a cell: a skip connection, a learnt initial state, a readout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.execution.options import State
from fusecell.shapes import Size, feature_shape, size_text
from fusecell.validation import weights_dtype
from fusecell.wrappers.base import Wrapper

__all__ = ["LearnedState", "Projected", "Residual", "WithReadout"]


class Residual(Wrapper):
    r"""Add the cell's input to its output: a residual connection.

    .. math:: y_t = x_t + \mathrm{step}(x_t, s_{t-1})

    Example:
        >>> import torch, fusecell as fc
        >>> deep = fc.Stack(fc.GRUCell(5, 8), *(fc.Residual(fc.GRUCell(8, 8)) for _ in range(3)))
        >>> y, state = fc.Recurrent(deep)(torch.randn(7, 3, 5))

    Arguments:
        cell: a cell whose output is as wide as its input.

    Raises:
        TypeError: if ``cell`` is not a cell.
        ValueError: if the sizes differ.

    Paper: He et al., "Deep residual learning for image recognition", 2016, arXiv:1512.03385.
    """

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        if cell.input_size != cell.output_size:
            raise ValueError(
                f"Residual adds a cell's input to its output: {type(cell).__name__} takes {cell.input_size} features "
                f"and gives {cell.output_size}. Projected(cell, {cell.input_size}) makes them agree."
            )

    def around(self, x: Any, state: State, noise: State) -> tuple[Tensor, State]:
        output, state = self.cell.step(x, state)
        return output + (x[0] if isinstance(x, tuple) else x), state


class LearnedState(Wrapper):
    r"""Make the initial state a parameter: sequences begin with it, and a reset goes back to it.

    .. math:: s_0 = \theta

    Example:
        >>> import torch, fusecell as fc
        >>> layer = fc.Recurrent(fc.LearnedState(fc.GRUCell(5, 10)))
        >>> y, h = layer(torch.randn(7, 3, 5), resets=torch.rand(7, 3) < 0.1)
        >>> layer.cell.initial_h.shape
        torch.Size([10])

    Arguments:
        cell: any cell. The parameters, (size,) or (d1, ..., dk) each, are called ``initial_h`` and so on after its
            states, and start as its own initial state.

    Raises:
        TypeError: if ``cell`` is not a cell.
    """

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        # On the cell's device: the wrapper may be built after model.to(...).
        like = next(cell.parameters(), torch.zeros(()))
        start = cell.initial_state(1, dtype=weights_dtype(cell), device=like.device)
        for name, value in zip(cell.states, start, strict=True):
            setattr(self, f"initial_{name}", nn.Parameter(value[0].detach().clone()))

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        parameters = [getattr(self, f"initial_{name}") for name in self.states]
        # Cloned: states must not share memory with a parameter, nor rows with one another.
        return tuple([value.to(device, dtype).expand(batch_size, *value.shape).clone() for value in parameters])


class WithReadout(Wrapper):
    r"""Apply a module to the cell's output, inside the step.

    .. math:: y_t = \mathrm{module}(\mathrm{step}(x_t, s_{t-1}))

    Example:
        >>> import torch, fusecell as fc
        >>> from torch import nn
        >>> readout = nn.Sequential(nn.Linear(10, 3), nn.Sigmoid())
        >>> y, h = fc.Recurrent(fc.WithReadout(fc.GRUCell(5, 10), readout))(torch.randn(7, 3, 5))
        >>> y.shape, h.shape
        (torch.Size([7, 3, 3]), torch.Size([3, 10]))

    Arguments:
        cell: any cell.
        module: maps (N, cell.output_size) to (N, ...), each row independently of the others.

    Raises:
        TypeError: if ``cell`` is not a cell or ``module`` not a module.
        ValueError: if the module doesn't take the cell's output.
    """

    def __init__(self, cell: Cell, module: nn.Module) -> None:
        super().__init__(cell)
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"{type(self).__name__} takes a module to read the output with, a torch.nn.Module, got "
                f"{type(module).__name__}."
            )
        self.module = module
        self._width = self._output_size()

    def _output_size(self) -> Size:
        """Run the module on one row of zeros; return the size of its output."""
        like = next(self.module.parameters(), next(self.cell.parameters(), torch.zeros(())))
        trial = torch.zeros((1, *feature_shape(self.cell.output_size)), dtype=like.dtype, device=like.device)
        # In eval(): a BatchNorm refuses a single row in training, and a trial must not move its averages.
        training = self.module.training
        try:
            with torch.no_grad():
                output: Tensor = self.module.eval()(trial)
        except RuntimeError as error:
            raise ValueError(
                f"{type(self).__name__}: the module doesn't take {type(self.cell).__name__}'s output of "
                f"{self.cell.output_size} features: {error}"
            ) from error
        finally:
            self.module.train(training)
        if output.dim() < 1 or output.shape[0] != 1:
            raise ValueError(
                f"{type(self).__name__}: the module made {tuple(output.shape)} of an output of shape "
                f"{size_text(self.cell.output_size, 1)}; it must give a row for each row."
            )
        return output.shape[1] if output.dim() == 2 else tuple(output.shape[1:])

    @property
    def output_size(self) -> Size:
        return self._width

    def around(self, x: Any, state: State, noise: State) -> tuple[Tensor, State]:
        output, state = self.cell.step(x, state)
        return self.module(output), state


class Projected(WithReadout):
    r"""Project the cell's output to another size; the state is left as it is.

    .. math:: y_t = W \, \mathrm{step}(x_t, s_{t-1})

    To feed the projection back into the next step, as an LSTMP does, use ``LSTMCell(proj_size=...)``.

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.Recurrent(fc.Projected(fc.GRUCell(5, 10), 3))(torch.randn(7, 2, 5))
        >>> y.shape
        torch.Size([7, 2, 3])

    Arguments:
        cell: any cell.
        size: features of the output.
        bias: whether the projection has a bias.

    Raises:
        TypeError: if ``cell`` is not a cell.
    """

    def __init__(self, cell: Cell, size: int, *, bias: bool = False) -> None:
        if not isinstance(cell, Cell):
            super().__init__(cell, nn.Identity())  # raises the TypeError of every wrapper
        like = next(cell.parameters(), torch.zeros(()))
        super().__init__(cell, nn.Linear(cell.output_size, size, bias, dtype=weights_dtype(cell), device=like.device))
