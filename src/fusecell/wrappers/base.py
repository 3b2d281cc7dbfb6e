"""``Wrapper``, the base class of cells around a cell: sizes, states, inputs and noise are the inner cell's."""

from __future__ import annotations

from typing import Any

import torch

from fusecell.cell import Cell
from fusecell.execution.options import State
from fusecell.shapes import Outputs, OutputSize, Size

__all__ = ["Wrapper", "check_probability"]


class Wrapper(Cell):
    r"""Base class of cells around a cell: override :meth:`around`; all else is the inner cell's by default.

    .. math:: (y_t, s_t) = \mathrm{around}(x_t, s_{t-1}, \mathrm{noise}_t)

    Example:
        >>> import torch, fusecell as fc
        >>> class Negated(fc.wrappers.Wrapper):
        ...     def around(self, x, state, noise):
        ...         y, state = self.cell.step(x, state)
        ...         return -y, state
        >>> y, h = fc.Recurrent(Negated(fc.GRUCell(5, 10)))(torch.randn(7, 3, 5))

    Arguments:
        cell: any cell, a wrapper included; kept as ``cell``.

    Raises:
        TypeError: if ``cell`` is not a cell.
    """

    def __init__(self, cell: Cell) -> None:
        name = type(self).__name__
        if not isinstance(cell, Cell):
            raise TypeError(
                f"{name} goes around a fusecell cell, got {type(cell).__name__}. Pass layer.cell for a layer."
            )
        super().__init__(cell.input_size, cell.hidden_size)
        self.cell = cell

    # Properties, not copies made in __init__: the inner cell may change them, with its training mode for example.
    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.cell.states

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of the cell's inputs, then those of the wrapper's noise."""
        names = list(self.cell.inputs)
        for name in self.noise_names():
            while name in names:  # the cell inside is wrapped in the same class of wrapper
                name += "_"
            names.append(name)
        return tuple(names)

    @property
    def state_sizes(self) -> tuple[Size, ...]:
        return self.cell.state_sizes

    @property
    def output_size(self) -> OutputSize:
        return self.cell.output_size

    def noise_names(self) -> tuple[str, ...]:
        """Return the names of the tensors that :meth:`noise` draws in the present mode; none by default."""
        return ()

    def noise(
        self, steps: int, batch_size: int, *, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> State:
        """Draw the wrapper's own random inputs, once per call; none by default.

        Returns:
            Tensors (steps, batch_size, ...), or (1, batch_size, ...) for one that is constant over time.
        """
        return ()

    def around(self, x: Any, state: State, noise: State) -> tuple[Outputs, State]:
        """Compute one time step; by default the inner cell's, unchanged.

        Arguments:
            x, state: as the inner cell's ``step`` takes them.
            noise: the step's part of what :meth:`noise` drew, (batch_size, ...) each.

        Returns:
            The output and the new state, as from ``step``.
        """
        return self.cell.step(x, state)

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        return self.cell.initial_state(batch_size, dtype=dtype, device=device)

    def draw(
        self,
        steps: int,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        inner = self.cell.draw(steps, batch_size, dtype=dtype, device=device)
        return inner + self.noise(steps, batch_size, dtype=dtype, device=device)

    def step(self, x: Any, state: State) -> tuple[Outputs, State]:
        inputs = tuple(x) if isinstance(x, tuple | list) else (x,)
        count = len(self.cell.inputs)
        return self.around(inputs[:count] if count > 1 else inputs[0], state, inputs[count:])

    def extra_repr(self) -> str:
        return ""


def check_probability(where: str, value: float) -> float:
    """Return ``value`` as a float, or raise ValueError unless it is in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{where} must be a probability in [0, 1), got {value!r}.")
    return float(value)
