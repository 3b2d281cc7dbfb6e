"""Spiking neurons: leaky integrate-and-fire, with a threshold that stays or adapts. Their gradient is a surrogate's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.execution.options import State

__all__ = ["ALIFCell", "LIFCell", "spike"]


def spike(v: Tensor, slope: float = 5.0) -> Tensor:
    """Return 1 where v is above 0 and else 0, with the gradient of a sigmoid of that slope."""
    soft = torch.sigmoid(slope * v)
    return (v > 0).to(v.dtype) + (soft - soft.detach())


class LIFCell(Cell):
    r"""Leaky integrate-and-fire neurons that see each other's spikes.

    .. math::
        v' &= \beta v + W x + U s - \vartheta s \\
        s' &= [v' > \vartheta]

    Backward, the step function counts as a sigmoid.

    Example:
        >>> import torch, fusecell as fc
        >>> spikes, (v, s) = fc.Recurrent(fc.cells.LIFCell(5, 10))(torch.randn(7, 3, 5))
        >>> spikes.detach().unique()
        tensor([0., 1.])

    Arguments:
        input_size, hidden_size: features of x, and neurons.
        beta: how much of the potential stays from step to step.
        threshold: the potential above which a neuron spikes.

    Paper: Neftci, Mostafa and Zenke, "Surrogate gradient learning in spiking neural networks", 2019, arXiv:1901.09948.
    """

    states = ("v", "s")

    def __init__(self, input_size: int, hidden_size: int, *, beta: float = 0.9, threshold: float = 1.0) -> None:
        super().__init__(input_size, hidden_size)
        self.input, self.recurrent = (
            nn.Linear(input_size, hidden_size),
            nn.Linear(hidden_size, hidden_size, bias=False),
        )
        self.beta, self.threshold = beta, threshold

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        v, s = state
        v = self.beta * v + self.input(x) + self.recurrent(s) - self.threshold * s
        s = spike(v - self.threshold)
        return s, (v, s)


class ALIFCell(Cell):
    r"""Leaky integrate-and-fire neurons whose threshold rises with their spikes.

    .. math::
        b' &= \rho b + (1-\rho) s, \quad \vartheta = \vartheta_0 + 1.8 \, b' \\
        v' &= \beta v + (1-\beta) (W x + U s) - \vartheta s \\
        s' &= [v' > \vartheta]

    Example:
        >>> import torch, fusecell as fc
        >>> spikes, (v, s, b) = fc.Recurrent(fc.cells.ALIFCell(5, 10))(torch.randn(7, 3, 5))
        >>> spikes.shape
        torch.Size([7, 3, 10])

    Arguments:
        input_size, hidden_size: features of x, and neurons.
        beta, rho: how much of the potential, and of the adaptation, stays from step to step.
        threshold: of a neuron that hasn't spiked.

    Paper: Bellec et al., "Long short-term memory and learning-to-learn in networks of spiking neurons", 2018,
    arXiv:1803.09574.
    """

    states = ("v", "s", "b")

    def __init__(
        self, input_size: int, hidden_size: int, *, beta: float = 0.9, rho: float = 0.97, threshold: float = 0.1
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.input, self.recurrent = (
            nn.Linear(input_size, hidden_size),
            nn.Linear(hidden_size, hidden_size, bias=False),
        )
        self.beta, self.rho, self.threshold = beta, rho, threshold

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        v, s, b = state
        b = self.rho * b + (1 - self.rho) * s
        threshold = self.threshold + 1.8 * b
        v = self.beta * v + (1 - self.beta) * (self.input(x) + self.recurrent(s)) - threshold * s
        s = spike(v - threshold)
        return s, (v, s, b)
