"""Cells for measurements at irregular times, or with gaps: GRU-D and CfC."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.execution.options import State

__all__ = ["CfCCell", "GRUDCell"]


class GRUDCell(Cell):
    r"""GRU-D: what is missing decays from its last value to its mean, and so does the state, with the time since then.

    .. math::
        \gamma_x &= e^{-\mathrm{relu}(w_x \odot \delta + b_x)}, \quad \gamma_h = e^{-\mathrm{relu}(W_h \delta + b_h)} \\
        \hat x &= m \odot x + (1-m) \odot (\gamma_x \odot x_{\mathrm{last}} + (1-\gamma_x) \odot \mu) \\
        h' &= \mathrm{GRU}([\hat x, m], \gamma_h \odot h)

    Example:
        >>> import torch, fusecell as fc
        >>> x, mask, delta = torch.randn(7, 3, 5), (torch.rand(7, 3, 5) > 0.5).float(), torch.rand(7, 3, 5)
        >>> y, (h, last) = fc.Recurrent(fc.cells.GRUDCell(5, 10))((x, mask, delta))
        >>> y.shape
        torch.Size([7, 3, 10])

    Arguments:
        input_size, hidden_size: features of x and of h. Inputs are x, the mask, 1 where x was measured and 0 where not,
            and the time since each feature was last measured.

    Paper: Che et al., "Recurrent neural networks for multivariate time series with missing values", 2016,
    arXiv:1606.01865.
    """

    inputs = ("x", "mask", "delta")
    states = ("h", "last")

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.state_sizes = (hidden_size, input_size)
        self.register_buffer("mean", torch.zeros(input_size))
        self.mean: Tensor
        self.decay_x = nn.Parameter(torch.rand(2, input_size))
        self.decay_h = nn.Linear(input_size, hidden_size)
        self.gru = nn.GRUCell(2 * input_size, hidden_size)

    def step(self, x: tuple[Tensor, ...], state: State) -> tuple[Tensor, State]:
        value, mask, delta = x
        h, last = state
        gamma_x = torch.exp(-torch.relu(self.decay_x[0] * delta + self.decay_x[1]))
        gamma_h = torch.exp(-torch.relu(self.decay_h(delta)))
        filled = mask * value + (1 - mask) * (gamma_x * last + (1 - gamma_x) * self.mean)
        last = torch.where(mask > 0, value, last)
        h = self.gru(torch.cat((filled, mask), -1), gamma_h * h)
        return h, (h, last)


class CfCCell(Cell):
    r"""The closed-form continuous-time cell: two heads, mixed by a gate of the time that has passed.

    .. math::
        u &= 1.7159 \tanh(0.666 \, W [x, h]) \\
        \sigma &= \mathrm{sigmoid}(W_a u \cdot t + W_b u) \\
        h' &= \tanh(W_f u) \odot (1-\sigma) + \tanh(W_g u) \odot \sigma

    Example:
        >>> import torch, fusecell as fc
        >>> y, h = fc.Recurrent(fc.cells.CfCCell(5, 10))((torch.randn(7, 3, 5), torch.rand(7, 3, 1)))
        >>> y.shape
        torch.Size([7, 3, 10])

    Arguments:
        input_size, hidden_size: features of x and of h. Inputs are x, and the time since the step before.
        backbone: units of the layer that both heads share.

    Paper: Hasani et al., "Closed-form continuous-time neural networks", 2021, arXiv:2106.13898.
    """

    inputs = ("x", "elapsed")

    def __init__(self, input_size: int, hidden_size: int, *, backbone: int = 32) -> None:
        super().__init__(input_size, hidden_size)
        self.backbone = nn.Linear(input_size + hidden_size, backbone)
        self.heads = nn.Linear(backbone, 4 * hidden_size)

    def step(self, x: tuple[Tensor, ...], state: State) -> tuple[Tensor, State]:
        value, elapsed = x
        (h,) = state
        u = 1.7159 * torch.tanh(0.666 * self.backbone(torch.cat((value, h), -1)))
        f, g, a, b = self.heads(u).chunk(4, -1)
        gate = self.note("gate", torch.sigmoid(a * elapsed + b))
        h = torch.tanh(f) * (1 - gate) + torch.tanh(g) * gate
        return h, (h,)
