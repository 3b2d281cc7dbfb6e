"""The coupled oscillatory RNN: two states and no gates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fusecell.cells.base import Device, WeightCell
from fusecell.execution.options import State

__all__ = ["CoRNNCell"]


class CoRNNCell(WeightCell):
    r"""Coupled, damped, driven oscillators, with positions y and velocities z as states.

    .. math::
        z' &= z + \Delta t\,\big(\tanh(W_{ih} x + b + W_{hh} [y, z]) - \gamma\,y - \varepsilon\,z\big) \\
        y' &= y + \Delta t\,z'

    Example:
        >>> import torch, fusecell as fc
        >>> out, (y, z) = fc.Recurrent(fc.cells.CoRNNCell(5, 10))(torch.randn(7, 3, 5))
        >>> torch.equal(out[-1], y)
        True

    Arguments:
        input_size, hidden_size: features of x, and the number of oscillators.
        dt: the time step.
        gamma: the squared frequency.
        epsilon: the damping; it acts on the old z, as in the authors' code.
        bias: learn b.

    Paper: Rusch and Mishra, "Coupled oscillatory recurrent neural network (coRNN)", 2021, arXiv:2010.00951; the
    defaults are theirs for sequential MNIST.
    """

    states = ("y", "z")
    options = ("dt", "gamma", "epsilon")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        dt: float = 0.042,
        gamma: float = 2.7,
        epsilon: float = 4.7,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            weight_ih=(hidden_size, input_size),
            weight_hh=(hidden_size, 2 * hidden_size),
            bias_ih=(hidden_size,),
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.dt = dt
        self.gamma = gamma
        self.epsilon = epsilon

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, z = state
        drive = F.linear(x, self.weight_ih, self.bias_ih) + F.linear(torch.cat((y, z), -1), self.weight_hh)
        force = self.note("force", torch.tanh(drive))
        z = self.note("z", z + self.dt * (force - self.gamma * y - self.epsilon * z))
        y = y + self.dt * z
        return y, (y, z)
