"""A decoder that attends: a GRU that looks at a memory in each of its steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.execution.options import State

__all__ = ["AttentionGRUCell"]


class AttentionGRUCell(Cell):
    r"""A GRU decoder with Bahdanau's attention over the states of an encoder.

    .. math::
        e_s &= v^\top \tanh(W h + U m_s), \quad a = \mathrm{softmax}(e) \\
        h' &= \mathrm{GRU}([x, \textstyle\sum_s a_s m_s], h)

    Example:
        >>> import torch, fusecell as fc
        >>> memory = torch.randn(1, 3, 9, 6)  # constant over time: T is 1
        >>> y, h = fc.Recurrent(fc.cells.AttentionGRUCell(5, 10, memory=(9, 6)))((torch.randn(7, 3, 5), memory))
        >>> y.shape
        torch.Size([7, 3, 10])

    Arguments:
        input_size, hidden_size: features of x and of h.
        memory: how many places the memory has, and features of each. Inputs are x and the memory.
        attention: units that places and h are compared in; hidden_size by default.

    Paper: Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate", 2014,
    arXiv:1409.0473.
    """

    inputs = ("x", "memory")

    def __init__(
        self, input_size: int, hidden_size: int, *, memory: tuple[int, int], attention: int | None = None
    ) -> None:
        super().__init__(input_size, hidden_size)
        units = hidden_size if attention is None else attention
        self.query = nn.Linear(hidden_size, units)
        self.key = nn.Linear(memory[1], units, bias=False)
        self.score = nn.Parameter(torch.randn(units) / units**0.5)
        self.gru = nn.GRUCell(input_size + memory[1], hidden_size)

    def step(self, x: tuple[Tensor, ...], state: State) -> tuple[Tensor, State]:
        value, memory = x
        (h,) = state
        compared = torch.tanh(self.query(h)[:, None, :] + self.key(memory))
        weights = self.note("weights", torch.softmax(compared @ self.score, -1))
        context = torch.einsum("ns,nsd->nd", weights, memory)
        h = self.gru(torch.cat((value, context), -1), h)
        return h, (h,)
