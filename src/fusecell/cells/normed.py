"""Cells with layer normalisation inside the step: layer-norm GRU and LSTM, and the light GRU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusecell.cells.base import Device, WeightCell, one_of
from fusecell.execution.options import State

__all__ = ["LayerNormGRUCell", "LayerNormLSTMCell", "LiGRUCell"]


class LayerNormGRUCell(WeightCell):
    r"""The GRU with layer normalisation of both products, separately for gates and candidate.

    .. math::
        r, z &= \sigma(\mathrm{LN}_1(W_{i,rz} x) + \mathrm{LN}_2(W_{h,rz} h)) \\
        n    &= \tanh(\mathrm{LN}_3(W_{in} x) + r \odot \mathrm{LN}_4(W_{hn} h)) \\
        h'   &= (1-z) \odot n + z \odot h

    Each LN has its own gain and bias; LN1 and LN2 run over r and z together (2 * hidden_size features), LN3 and LN4
    over n. This is the paper's variant, but for z, which here weighs the old state, as in torch.nn.

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.Recurrent(fc.cells.LayerNormGRUCell(5, 10))(torch.randn(7, 3, 5))
        >>> y.shape
        torch.Size([7, 3, 10])

    Arguments:
        input_size, hidden_size: features of x and of h; the blocks of rows of the weights are r, z, n.
        bias: learn the norms' biases; the products have none.
        eps: added to the variance in the norms.

    Paper: Ba, Kiros and Hinton, "Layer normalization", 2016, arXiv:1607.06450, supplementary material.
    """

    gates = ("r", "z", "n")
    keeps = "z"
    options = ("eps",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        eps: float = 1e-5,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            weight_ih=(3 * hidden_size, input_size),
            weight_hh=(3 * hidden_size, hidden_size),
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.eps = eps
        self.norm_ih_gates = nn.LayerNorm(2 * hidden_size, eps=eps, bias=bias, device=device, dtype=dtype)
        self.norm_hh_gates = nn.LayerNorm(2 * hidden_size, eps=eps, bias=bias, device=device, dtype=dtype)
        self.norm_ih_candidate = nn.LayerNorm(hidden_size, eps=eps, bias=bias, device=device, dtype=dtype)
        self.norm_hh_candidate = nn.LayerNorm(hidden_size, eps=eps, bias=bias, device=device, dtype=dtype)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        sizes = [2 * self.hidden_size, self.hidden_size]
        x_gates, x_n = torch.split(F.linear(x, self.weight_ih), sizes, -1)
        h_gates, h_n = torch.split(F.linear(h, self.weight_hh), sizes, -1)
        r, z = torch.sigmoid(self.norm_ih_gates(x_gates) + self.norm_hh_gates(h_gates)).chunk(2, -1)
        r, z = self.note("r", r), self.note("z", z)  # reset gate, update gate
        n = self.note("n", torch.tanh(self.norm_ih_candidate(x_n) + r * self.norm_hh_candidate(h_n)))  # candidate
        h = (1 - z) * n + z * h
        return h, (h,)


class LayerNormLSTMCell(WeightCell):
    r"""The LSTM with layer normalisation of both products, and of the memory before the output gate.

    .. math::
        a &= \mathrm{LN}_1(W_{ih} x) + \mathrm{LN}_2(W_{hh} h) \\
        i, f, o &= \sigma(a_i), \sigma(a_f), \sigma(a_o) \qquad g = \tanh(a_g) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(\mathrm{LN}_3(c'))

    Each LN has its own gain and bias; LN1 and LN2 run over all four parts together (4 * hidden_size features), as in
    the paper, whose additional bias b is redundant with theirs.

    Example:
        >>> import torch, fusecell as fc
        >>> y, (h, c) = fc.Recurrent(fc.cells.LayerNormLSTMCell(5, 10))(torch.randn(7, 3, 5))
        >>> c.shape
        torch.Size([3, 10])

    Arguments:
        input_size, hidden_size: features of x and of h; the blocks of rows of the weights are i, f, g, o.
        bias: learn the norms' biases; the products have none.
        eps: added to the variance in the norms.

    Paper: Ba, Kiros and Hinton, "Layer normalization", 2016, arXiv:1607.06450, supplementary material.
    """

    gates = ("i", "f", "g", "o")
    keeps, updates = "f", "i"
    states = ("h", "c")
    options = ("eps",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        eps: float = 1e-5,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            weight_ih=(4 * hidden_size, input_size),
            weight_hh=(4 * hidden_size, hidden_size),
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.eps = eps
        self.norm_ih = nn.LayerNorm(4 * hidden_size, eps=eps, bias=bias, device=device, dtype=dtype)
        self.norm_hh = nn.LayerNorm(4 * hidden_size, eps=eps, bias=bias, device=device, dtype=dtype)
        self.norm_c = nn.LayerNorm(hidden_size, eps=eps, bias=bias, device=device, dtype=dtype)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, c = state
        gates = self.norm_ih(F.linear(x, self.weight_ih)) + self.norm_hh(F.linear(h, self.weight_hh))
        i, f, g, o = gates.chunk(4, -1)
        i = self.note("i", torch.sigmoid(i))  # input gate
        f = self.note("f", torch.sigmoid(f))  # forget gate
        g = self.note("g", torch.tanh(g))  # candidate
        o = self.note("o", torch.sigmoid(o))  # output gate
        c = self.note("c", f * c + i * g)
        h = o * torch.tanh(self.norm_c(c))
        return h, (h, c)


class LiGRUCell(WeightCell):
    r"""The light GRU of speech recognition: no reset gate, a relu candidate, normalisation of the input's product.

    .. math::
        z  &= \sigma(\mathrm{norm}(W_i x)_z + W_{hz} h) \\
        n  &= \mathrm{relu}(\mathrm{norm}(W_i x)_n + W_{hn} h) \\
        h' &= z \odot h + (1-z) \odot n

    The norm is a layer norm over z and n together, or none. The paper has batch norm, which is impossible here: it
    mixes the rows of a batch and updates moving averages, while a step is pure and each row independent.

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.Recurrent(fc.cells.LiGRUCell(5, 10))(torch.randn(7, 3, 5))
        >>> y.shape
        torch.Size([7, 3, 10])

    Arguments:
        input_size, hidden_size: features of x and of h; the blocks of rows of the weights are z, n.
        norm: ``"layer"`` or None.
        bias: learn a bias, in the norm if there is one, else in the input's product.

    Raises:
        ValueError: for another ``norm``.

    Paper: Ravanelli et al., "Light gated recurrent units for speech recognition", 2018, arXiv:1803.10225.
    """

    gates = ("z", "n")
    keeps = "z"
    options = ("norm",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        norm: str | None = "layer",
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        one_of("LiGRUCell", "norm", norm, ("layer", None))
        rows = 2 * hidden_size
        super().__init__(
            input_size,
            hidden_size,
            weight_ih=(rows, input_size),
            weight_hh=(rows, hidden_size),
            bias_ih=(rows,) if norm is None else None,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.norm = norm
        self.norm_ih: nn.Module = nn.Identity()
        if norm == "layer":
            self.norm_ih = nn.LayerNorm(rows, bias=bias, device=device, dtype=dtype)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        both = self.norm_ih(F.linear(x, self.weight_ih, self.bias_ih)) + F.linear(h, self.weight_hh)
        z, n = both.chunk(2, -1)
        z = self.note("z", torch.sigmoid(z))  # update gate
        n = self.note("n", torch.relu(n))  # candidate
        h = z * h + (1 - z) * n
        return h, (h,)
