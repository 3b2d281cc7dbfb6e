"""``linearize``: the Jacobians of a step along a run, as the analysis of a network's dynamics needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from fusecell.cell import Cell
from fusecell.execution.options import State
from fusecell.layers import Recurrent
from fusecell.layers.scan import not_a_cell, scan
from fusecell.shapes import feature_shape, features_of
from fusecell.validation import StateLike, start_state

__all__ = ["Linearized", "linearize"]


@dataclass(frozen=True)
class Linearized:
    r"""A run and its linearisation: :math:`s_t + \delta s_t \approx s_t + A_t\, \delta s_{t-1} + B_t\, \delta x_t`.

    Example:
        >>> import torch, fusecell as fc
        >>> run = fc.linearize(fc.LSTMCell(3, 4), torch.zeros(7, 2, 3))
        >>> run.names["c"], run.of_state[-1][:, run.names["c"], run.names["h"]].shape
        (slice(4, 8, None), torch.Size([2, 4, 4]))

    Attributes:
        states: (T, N, S), the states after each step, all of a cell's side by side.
        of_state: (T, N, S, S), :math:`A_t = \partial s_t / \partial s_{t-1}`.
        of_input: (T, N, S, I), :math:`B_t = \partial s_t / \partial x_t`.
        names: the place of each state among the S, by its name.
    """

    states: Tensor
    of_state: Tensor
    of_input: Tensor
    names: dict[str, slice] = field(default_factory=dict)

    def lyapunov_exponents(self, skip: int = 0) -> Tensor:
        r"""Estimate the Lyapunov exponents, per step, of the largest first: how fast near states part or meet.

        .. math:: Q_t R_t = A_t Q_{t-1}, \qquad \lambda_i = \frac{1}{T} \sum_t \ln |(R_t)_{ii}|

        Arguments:
            skip: how many steps at the beginning are not counted.

        Returns:
            (N, S).

        Source: G. Benettin et al., Lyapunov characteristic exponents for smooth dynamical systems, Meccanica 15, 1980.
        """
        steps, rows, size = self.states.shape
        if not 0 <= skip < steps:
            raise ValueError(f"skip must be at least 0 and less than the {steps} steps, got {skip}.")
        q = torch.eye(size, dtype=self.states.dtype).expand(rows, size, size)
        total = self.states.new_zeros(rows, size)
        for t, jacobian in enumerate(self.of_state):
            q, r = torch.linalg.qr(jacobian @ q)
            if t >= skip:
                total += r.diagonal(dim1=1, dim2=2).abs().log()
        return (total / (steps - skip)).sort(descending=True).values


class _StatesOf(Cell):
    """A cell whose output is all its states, as they are after a step."""

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell.input_size, sum(map(features_of, cell.state_sizes)))
        self.cell = cell
        self.__dict__.update(states=cell.states, inputs=cell.inputs)
        self.state_sizes = cell.state_sizes

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        _, after = self.cell.step(x, state)
        return _flat(after), after


def linearize(
    layer: Cell | Recurrent, input: Tensor, state: StateLike | None = None, *, chunk_size: int | None = None
) -> Linearized:
    r"""Run a cell, and return the Jacobians of its step at each state that it passes through.

    .. math:: A_t = \frac{\partial s_t}{\partial s_{t-1}}, \qquad B_t = \frac{\partial s_t}{\partial x_t}

    The eigenvalues of :math:`A` at a fixed point say whether it attracts; products of :math:`A_t` say how long a
    network remembers; QR decompositions of them are its Lyapunov exponents.

    Example:
        >>> import torch, fusecell as fc
        >>> _ = torch.manual_seed(0)
        >>> layer = fc.Recurrent(fc.RNNCell(3, 20))
        >>> run = fc.linearize(layer, torch.zeros(50, 1, 3))
        >>> run.of_state.shape, run.of_input.shape
        (torch.Size([50, 1, 20, 20]), torch.Size([50, 1, 20, 3]))
        >>> bool((run.lyapunov_exponents(skip=20) < 0).all())  # it comes to rest
        True

    Arguments:
        layer: a cell, or one in a :class:`fusecell.Recurrent`.
        input: (T, N, ...), or (N, T, ...) where the layer is ``batch_first``.
        state: the first state, as the layer takes it.
        chunk_size: the Jacobians that are computed at a time: fewer take less memory.

    Returns:
        A :class:`~fusecell.inspection.linearize.Linearized`, time first, without gradients. Where the layer runs in
        reverse, step t comes after step t + 1.

    Raises:
        TypeError: for a layer of several cells, a cell of several inputs, or an input that is not (T, N, ...).

    See D. Sussillo and O. Barak, Opening the black box, Neural Computation 25, 2013.
    """
    cell, reverse, batch_first = layer, False, False
    if isinstance(layer, Recurrent):
        cell, reverse, batch_first = layer.cell, layer.reverse, layer.batch_first
    if not isinstance(cell, Cell):
        raise TypeError(f"linearize takes a cell or a fusecell.Recurrent: {not_a_cell(layer)}")
    if len(cell.inputs) > 1 or not isinstance(input, Tensor) or input.dim() != 2 + len(feature_shape(cell.input_size)):
        raise TypeError(
            f"linearize takes a cell with one input, (T, N, ...): {type(cell).__name__} takes "
            f"{', '.join(cell.inputs)}, got {tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__}"
        )
    x = input.transpose(0, 1) if batch_first else input
    with torch.no_grad():
        start = _flat(start_state(cell, state, (x,), unbatched=False))
        after, _ = scan(_StatesOf(cell), x, state, reverse=reverse)
        before = torch.cat((after[1:], start[None]) if reverse else (start[None], after[:-1]))
        points = before.flatten(0, 1), x.flatten(0, 1)
        of_state, of_input = vmap(jacrev(_step_of(cell), argnums=(0, 1)), chunk_size=chunk_size)(*points)
    lead = after.shape[:2]
    places, names = 0, {}
    for name, size in zip(cell.states, cell.state_sizes, strict=True):
        names[name] = slice(places, places + features_of(size))
        places += features_of(size)
    return Linearized(
        after, of_state.reshape(*lead, *of_state.shape[1:]), of_input.reshape(*lead, after.shape[2], -1), names
    )


def _flat(state: State) -> Tensor:
    return torch.cat([value.flatten(1) for value in state], 1)


def _step_of(cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the step as a function of one row: from the flat state and the input to the flat new state."""
    shapes = [feature_shape(size) for size in cell.state_sizes]
    sizes = [features_of(size) for size in cell.state_sizes]

    def step(state: Tensor, x: Tensor) -> Tensor:
        parts = [part.reshape(1, *shape) for part, shape in zip(torch.split(state, sizes), shapes, strict=True)]
        return _flat(cell.step(x[None], tuple(parts))[1])[0]

    return step
