"""Cells with one gate or two: MGU, UGRNN, minGRU and FastGRNN, smaller relatives of the GRU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusecell.cells.base import Device, WeightCell
from fusecell.execution.options import State

__all__ = ["FastGRNNCell", "MGUCell", "MinGRUCell", "UGRNNCell"]


class MGUCell(WeightCell):
    r"""The minimal gated unit: one gate both forgets and resets.

    .. math::
        f  &= \sigma(W_{if} x + b_f + W_{hf} h) \\
        n  &= \tanh(W_{in} x + b_n + W_{hn} (f \odot h)) \\
        h' &= (1-f) \odot h + f \odot n

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.Recurrent(fc.cells.MGUCell(5, 10))(torch.randn(7, 3, 5))
        >>> y.shape
        torch.Size([7, 3, 10])

    Arguments:
        input_size, hidden_size: features of x and of h; the blocks of rows of the weights are f, n.
        bias: learn b.

    Paper: Zhou et al., "Minimal gated unit for recurrent neural networks", 2016, arXiv:1603.09420.
    """

    gates = ("f", "n")
    updates = "f"

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
            weight_ih=(2 * hidden_size, input_size),
            weight_hh=(2 * hidden_size, hidden_size),
            bias_ih=(2 * hidden_size,),
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        x_f, x_n = F.linear(x, self.weight_ih, self.bias_ih).chunk(2, -1)
        w_f, w_n = self.weight_hh.chunk(2)  # two products, because the candidate's needs f
        f = self.note("f", torch.sigmoid(x_f + F.linear(h, w_f)))  # forget gate
        n = self.note("n", torch.tanh(x_n + F.linear(f * h, w_n)))  # candidate
        h = (1 - f) * h + f * n
        return h, (h,)


class UGRNNCell(WeightCell):
    r"""The update gate RNN: a plain RNN with one gate between the old state and the candidate.

    .. math::
        g  &= \sigma(W_{ig} x + b_g + W_{hg} h + \beta) \\
        n  &= \tanh(W_{in} x + b_n + W_{hn} h) \\
        h' &= g \odot h + (1-g) \odot n

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.Recurrent(fc.cells.UGRNNCell(5, 10))(torch.randn(7, 3, 5))
        >>> y.shape
        torch.Size([7, 3, 10])

    Arguments:
        input_size, hidden_size: features of x and of h; the blocks of rows of the weights are g, n.
        forget_bias: beta, a constant added to the gate, so that training starts with little forgetting.
        bias: learn b.

    Paper: Collins, Sohl-Dickstein and Sussillo, "Capacity and trainability in recurrent neural networks", 2017,
    arXiv:1611.09913.
    """

    gates = ("g", "n")
    keeps = "g"
    options = ("forget_bias",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        forget_bias: float = 1.0,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            weight_ih=(2 * hidden_size, input_size),
            weight_hh=(2 * hidden_size, hidden_size),
            bias_ih=(2 * hidden_size,),
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.forget_bias = forget_bias

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        both = F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh)
        g, n = both.chunk(2, -1)
        g = self.note("g", torch.sigmoid(g + self.forget_bias))  # update gate
        n = self.note("n", torch.tanh(n))  # candidate
        h = g * h + (1 - g) * n
        return h, (h,)


class MinGRUCell(WeightCell):
    r"""A GRU whose gate and candidate see only the input, so that the recurrence is linear.

    .. math::
        z  &= \sigma(W_{iz} x + b_z) \\
        n  &= W_{in} x + b_n \\
        h' &= (1-z) \odot h + z \odot n

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.Recurrent(fc.cells.MinGRUCell(5, 10))(torch.randn(7, 3, 5))
        >>> y.shape
        torch.Size([7, 3, 10])

    Arguments:
        input_size, hidden_size: features of x and of h; the blocks of rows of the weights are z, n.
        bias: learn b.

    Paper: Feng et al., "Were RNNs all we needed?", 2024, arXiv:2410.01201.
    """

    gates = ("z", "n")
    updates = "z"

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
            weight_ih=(2 * hidden_size, input_size),
            bias_ih=(2 * hidden_size,),
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        z, n = F.linear(x, self.weight_ih, self.bias_ih).chunk(2, -1)
        z = self.note("z", torch.sigmoid(z))  # update gate
        n = self.note("n", n)  # candidate
        h = (1 - z) * h + z * n
        return h, (h,)


class FastGRNNCell(WeightCell):
    r"""The fast gated RNN: gate and candidate share both matrices and differ in their biases only.

    .. math::
        z  &= \sigma(W_{ih} x + W_{hh} h + b_z) \\
        n  &= \tanh(W_{ih} x + W_{hh} h + b_n) \\
        h' &= (\sigma(\zeta)\,(1-z) + \sigma(\nu)) \odot n + z \odot h

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.Recurrent(fc.cells.FastGRNNCell(5, 10))(torch.randn(7, 3, 5))
        >>> y.shape
        torch.Size([7, 3, 10])

    Arguments:
        input_size, hidden_size: features of x and of h. ``zeta`` and ``nu``, (1,), are trained and start at 1 and -4.
            ``bias_z`` and ``bias_n`` start at 1 and can't be left out: nothing else distinguishes z from n.

    Paper: Kusupati et al., "FastGRNN: a fast, accurate, stable and tiny kilobyte sized gated recurrent neural
    network", 2018, arXiv:1901.02358; full-rank matrices, initial values of the biases and scalars as in its code.
    """

    # No `gates`: the matrices' rows belong to gate and candidate alike. fusecell.init finds z by the name bias_z.
    keeps = "z"

    bias_z: Tensor
    bias_n: Tensor
    zeta: Tensor
    nu: Tensor

    def __init__(
        self, input_size: int, hidden_size: int, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            weight_ih=(hidden_size, input_size),
            weight_hh=(hidden_size, hidden_size),
            bias_z=(hidden_size,),
            bias_n=(hidden_size,),
            zeta=(1,),
            nu=(1,),
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for parameter, value in ((self.bias_z, 1.0), (self.bias_n, 1.0), (self.zeta, 1.0), (self.nu, -4.0)):
            nn.init.constant_(parameter, value)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        both = F.linear(x, self.weight_ih) + F.linear(h, self.weight_hh)
        z = self.note("z", torch.sigmoid(both + self.bias_z))  # update gate
        n = self.note("n", torch.tanh(both + self.bias_n))  # candidate
        h = (torch.sigmoid(self.zeta) * (1 - z) + torch.sigmoid(self.nu)) * n + z * h
        return h, (h,)
