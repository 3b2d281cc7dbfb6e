"""Cells that are linear in their state, with gates or weights that keep it stable: RG-LRU and LRU."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusecell.cell import Cell
from fusecell.execution.options import State

__all__ = ["LRUCell", "RGLRUCell"]


class RGLRUCell(Cell):
    r"""The real-gated linear recurrent unit of Griffin and RecurrentGemma.

    .. math::
        r &= \sigma(W_a x), \quad i = \sigma(W_x x), \quad a = \sigma(\Lambda)^{8 r} \\
        h' &= a \odot h + \sqrt{1 - a^2} \odot (i \odot u), \quad u = W x

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.Recurrent(fc.cells.RGLRUCell(5, 10))(torch.randn(7, 3, 5))
        >>> y.shape
        torch.Size([7, 3, 10])

    Arguments:
        input_size, hidden_size: features of x and of h.

    Paper: De et al., "Griffin: mixing gated linear recurrences with local attention", 2024, arXiv:2402.19427.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.input = nn.Linear(input_size, 3 * hidden_size)
        # So that a lies between 0.9 and 0.999, as in the paper.
        decay = torch.rand(hidden_size) * 0.099 + 0.9
        self.log_decay = nn.Parameter(torch.log(torch.expm1(-torch.log(decay) / 8)))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        u, r, i = self.input(x).chunk(3, -1)
        log_a = -8 * torch.sigmoid(r) * F.softplus(self.log_decay)
        a = self.note("a", torch.exp(log_a))
        h = a * h + torch.sqrt(-torch.expm1(2 * log_a)) * torch.sigmoid(i) * u
        return h, (h,)


class LRUCell(Cell):
    r"""The linear recurrent unit, and the recurrence of S5: complex states that turn and decay, each by itself.

    .. math::
        \lambda &= e^{-e^{\nu} + i e^{\theta}}, \quad \gamma = \sqrt{1 - |\lambda|^2} \\
        s' &= \lambda \odot s + \gamma \odot (B x) \\
        y &= \mathrm{Re}(C s') + D \odot W x

    Example:
        >>> import torch, fusecell as fc
        >>> y, s = fc.Recurrent(fc.cells.LRUCell(5, 10, memory=6))(torch.randn(7, 3, 5))
        >>> y.shape, s.shape
        (torch.Size([7, 3, 10]), torch.Size([3, 6, 2]))

    Arguments:
        input_size, hidden_size: features of x and of the output.
        memory: complex numbers of the state, each a pair of real ones; hidden_size by default.
        r_min, r_max: between which lambda's size begins.

    Paper: Orvieto et al., "Resurrecting recurrent neural networks for long sequences", 2023, arXiv:2303.06349; Smith,
    Warrington and Linderman, "Simplified state space layers for sequence modeling", 2022, arXiv:2208.04933.
    """

    states = ("s",)

    def __init__(
        self, input_size: int, hidden_size: int, *, memory: int | None = None, r_min: float = 0.5, r_max: float = 0.99
    ) -> None:
        super().__init__(input_size, hidden_size)
        size = hidden_size if memory is None else memory
        self.state_sizes = ((size, 2),)
        radius = torch.sqrt(torch.rand(size) * (r_max**2 - r_min**2) + r_min**2)
        self.nu = nn.Parameter(torch.log(-torch.log(radius)))
        self.theta = nn.Parameter(torch.log(torch.rand(size) * math.pi / 2 + 1e-3))
        self.input = nn.Linear(input_size, 2 * size, bias=False)
        self.output = nn.Linear(2 * size, hidden_size, bias=False)
        self.skip = nn.Linear(input_size, hidden_size)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        s = torch.view_as_complex(state[0])
        size = torch.exp(-torch.exp(self.nu))
        turn = torch.polar(size, torch.exp(self.theta))
        real, imaginary = self.input(x).chunk(2, -1)
        s = turn * s + torch.sqrt(1 - size**2) * torch.complex(real, imaginary)
        s = torch.view_as_real(s)
        return self.output(s.flatten(1)) + self.skip(x), (s,)
