"""The peephole LSTM, whose gates read the memory cell."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fusecell.cells.base import Device, WeightCell
from fusecell.execution.options import State

__all__ = ["PeepholeLSTMCell"]


class PeepholeLSTMCell(WeightCell):
    r"""The LSTM with peepholes: input and forget gates read the old memory c, the output gate the new one.

    .. math::
        i  &= \sigma(W_{ii} x + b_i + W_{hi} h + p_i \odot c) \\
        f  &= \sigma(W_{if} x + b_f + W_{hf} h + p_f \odot c) \\
        g  &= \tanh(W_{ig} x + b_g + W_{hg} h) \\
        c' &= f \odot c + i \odot g \\
        o  &= \sigma(W_{io} x + b_o + W_{ho} h + p_o \odot c') \\
        h' &= o \odot \tanh(c')

    Example:
        >>> import torch, fusecell as fc
        >>> y, (h, c) = fc.Recurrent(fc.cells.PeepholeLSTMCell(5, 10))(torch.randn(7, 3, 5))
        >>> c.shape
        torch.Size([3, 10])

    Arguments:
        input_size, hidden_size: features of x and of h; the blocks of rows of the weights are i, f, g, o. The
            peepholes, ``weight_ch`` of shape (3 * hidden_size,), are i, f, o.
        bias: learn b.

    Paper: Gers, Schraudolph and Schmidhuber, "Learning precise timing with LSTM recurrent networks", JMLR 3 (2002).
    """

    gates = ("i", "f", "g", "o")
    keeps, updates = "f", "i"
    states = ("h", "c")
    weight_ch: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            weight_ih=(4 * hidden_size, input_size),
            weight_hh=(4 * hidden_size, hidden_size),
            weight_ch=(3 * hidden_size,),
            bias_ih=(4 * hidden_size,),
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, c = state
        p_i, p_f, p_o = self.weight_ch.chunk(3)
        i, f, g, o = (F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh)).chunk(4, -1)
        i = self.note("i", torch.sigmoid(i + p_i * c))  # input gate
        f = self.note("f", torch.sigmoid(f + p_f * c))  # forget gate
        g = self.note("g", torch.tanh(g))  # candidate
        c = self.note("c", f * c + i * g)
        o = self.note("o", torch.sigmoid(o + p_o * c))  # output gate
        h = o * torch.tanh(c)
        return h, (h, c)
