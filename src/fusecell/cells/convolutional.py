"""Cells over images: the convolutional GRU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.execution.options import State

__all__ = ["ConvGRUCell"]


class ConvGRUCell(Cell):
    r"""The convolutional GRU: a GRU at each place of an image, whose products are convolutions.

    .. math::
        z, r &= \sigma(W * [x, h]) \\
        n &= \tanh(U * [x, r \odot h]) \\
        h' &= (1-z) \odot h + z \odot n

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.Recurrent(fc.cells.ConvGRUCell(3, 4, size=(6, 5)))(torch.randn(7, 2, 3, 6, 5))
        >>> y.shape
        torch.Size([7, 2, 4, 6, 5])

    Arguments:
        input_channels, hidden_channels: of x and of h.
        size: height and width of the images.
        kernel: height and width of the convolutions, an odd number.

    Paper: Ballas et al., "Delving deeper into convolutional networks for learning video representations", 2015,
    arXiv:1511.06432.
    """

    def __init__(self, input_channels: int, hidden_channels: int, *, size: tuple[int, int], kernel: int = 3) -> None:
        super().__init__((input_channels, *size), (hidden_channels, *size))
        if kernel % 2 == 0:
            raise ValueError(f"ConvGRUCell: kernel must be odd, so that images keep their size, got {kernel}.")
        both = input_channels + hidden_channels
        self.gate_map = nn.Conv2d(both, 2 * hidden_channels, kernel, padding=kernel // 2)
        self.candidate = nn.Conv2d(both, hidden_channels, kernel, padding=kernel // 2)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        z, r = torch.sigmoid(self.gate_map(torch.cat((x, h), 1))).chunk(2, 1)
        n = torch.tanh(self.candidate(torch.cat((x, r * h), 1)))
        h = (1 - z) * h + z * n
        return h, (h,)
