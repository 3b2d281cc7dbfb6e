"""The GRU of Dreamer, whose recurrent weights are blocks: features mix within their block only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.cells.heads import head_size
from fusecell.execution.options import State

__all__ = ["BlockGRUCell"]


class BlockGRUCell(Cell):
    r"""A GRU with block-diagonal recurrent weights and normed gates.

    .. math::
        [r, n, u] &= \mathrm{norm}(W x + R h), \quad R \mathrm{\ block\ diagonal} \\
        n &= \tanh(\sigma(r) \odot n), \quad u = \sigma(u - 1) \\
        h' &= u \odot n + (1-u) \odot h

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.Recurrent(fc.cells.BlockGRUCell(5, 8, blocks=2))(torch.randn(7, 3, 5))
        >>> y.shape
        torch.Size([7, 3, 8])

    Arguments:
        input_size, hidden_size: features of x and of h.
        blocks: of the recurrent weights; they divide hidden_size.

    Paper: Hafner et al., "Mastering diverse domains through world models", 2023, arXiv:2301.04104.
    """

    def __init__(self, input_size: int, hidden_size: int, *, blocks: int = 8) -> None:
        super().__init__(input_size, hidden_size)
        size = head_size("BlockGRUCell", hidden_size, blocks)
        self.blocks = blocks
        self.input = nn.Linear(input_size, 3 * hidden_size)
        self.recurrent = nn.Parameter(torch.randn(blocks, size, 3 * size) / size**0.5)
        self.norm = nn.RMSNorm(3 * size, eps=1e-4)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        by_block = torch.einsum("nbd,bde->nbe", h.unflatten(1, (self.blocks, -1)), self.recurrent)  # type: ignore[no-untyped-call]
        gates = self.norm(by_block + self.input(x).unflatten(1, (self.blocks, -1)))
        r, n, u = (gate.flatten(1) for gate in gates.chunk(3, -1))
        n = self.note("n", torch.tanh(torch.sigmoid(r) * n))
        u = self.note("u", torch.sigmoid(u - 1))
        h = u * n + (1 - u) * h
        return h, (h,)
