"""The two cells of xLSTM: sLSTM, an LSTM with exponential gates, and mLSTM, whose memory is a matrix per head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusecell.cell import Cell
from fusecell.cells.heads import head_size
from fusecell.execution.options import State

__all__ = ["MLSTMCell", "SLSTMCell"]


class SLSTMCell(Cell):
    r"""The sLSTM of xLSTM: exponential gates, a normaliser, and recurrent weights within each head.

    .. math::
        m' &= \max(\log \sigma(\tilde f) + m, \tilde i) \\
        i &= e^{\tilde i - m'}, \quad f = e^{\log \sigma(\tilde f) + m - m'} \\
        c' &= f \odot c + i \odot \tanh(z), \quad n' = f \odot n + i \\
        h' &= \sigma(\tilde o) \odot c' / n'

    where :math:`\tilde i, \tilde f, z, \tilde o` are :math:`W x + R h + b`, with R a matrix for each head.

    Example:
        >>> import torch, fusecell as fc
        >>> y, (h, c, n, m) = fc.Recurrent(fc.cells.SLSTMCell(5, 8, heads=2))(torch.randn(7, 3, 5))
        >>> y.shape
        torch.Size([7, 3, 8])

    Arguments:
        input_size, hidden_size: features of x and of h.
        heads: groups of features of h; the recurrent weights mix features of one group only.

    Paper: Beck et al., "xLSTM: extended long short-term memory", 2024, arXiv:2405.04517.
    """

    states = ("h", "c", "n", "m")

    def __init__(self, input_size: int, hidden_size: int, *, heads: int = 4) -> None:
        super().__init__(input_size, hidden_size)
        size = head_size("SLSTMCell", hidden_size, heads)
        self.heads = heads
        self.input = nn.Linear(input_size, 4 * hidden_size)
        self.recurrent = nn.Parameter(torch.randn(heads, size, 4 * size) / size**0.5)

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        h, c, _, m = super().initial_state(batch_size, dtype=dtype, device=device)
        return h, c, torch.ones_like(h), m  # of a normaliser of 1 the first step makes i / (f + i)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, c, n, m = state
        by_head = torch.einsum("nhd,hde->nhe", h.unflatten(1, (self.heads, -1)), self.recurrent)  # type: ignore[no-untyped-call]
        gates = self.input(x).unflatten(1, (self.heads, -1)) + by_head
        i, f, z, o = (gate.flatten(1) for gate in gates.chunk(4, -1))
        log_f = F.logsigmoid(f)
        m_new = torch.maximum(log_f + m, i)
        i = self.note("i", torch.exp(i - m_new))
        f = self.note("f", torch.exp(log_f + m - m_new))
        c = f * c + i * torch.tanh(z)
        n = f * n + i
        h = torch.sigmoid(o) * c / n
        return h, (h, c, n, m_new)


class MLSTMCell(Cell):
    r"""The mLSTM of xLSTM: each head remembers values by keys in a matrix, behind exponential gates.

    .. math::
        m' &= \max(\log \sigma(\tilde f) + m, \tilde i) \\
        i &= e^{\tilde i - m'}, \quad f = e^{\log \sigma(\tilde f) + m - m'} \\
        C' &= f C + i \, v k^\top, \quad n' = f n + i k \\
        h &= \sigma(\tilde o) \odot \frac{C' q}{\max(|n'^\top q|, e^{-m'})}

    Example:
        >>> import torch, fusecell as fc
        >>> y, (C, n, m) = fc.Recurrent(fc.cells.MLSTMCell(5, 8, heads=2))(torch.randn(7, 3, 5))
        >>> y.shape, C.shape
        (torch.Size([7, 3, 8]), torch.Size([3, 2, 4, 4]))

    Arguments:
        input_size, hidden_size: features of x and of the output.
        heads: memories, each of (hidden_size / heads)^2 numbers.

    Paper: Beck et al., "xLSTM: extended long short-term memory", 2024, arXiv:2405.04517.
    """

    states = ("C", "n", "m")

    def __init__(self, input_size: int, hidden_size: int, *, heads: int = 4) -> None:
        super().__init__(input_size, hidden_size)
        size = head_size("MLSTMCell", hidden_size, heads)
        self.heads = heads
        self.state_sizes = ((heads, size, size), (heads, size), heads)
        self.maps = nn.Linear(input_size, 4 * hidden_size)
        self.gate_map = nn.Linear(input_size, 2 * heads)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        C, n, m = state
        q, k, v, o = (part.unflatten(1, (self.heads, -1)) for part in self.maps(x).chunk(4, -1))
        k = k * k.shape[-1] ** -0.5
        i, f = self.gate_map(x).chunk(2, -1)
        log_f = F.logsigmoid(f)
        m_new = torch.maximum(log_f + m, i)
        i = self.note("i", torch.exp(i - m_new))
        f = self.note("f", torch.exp(log_f + m - m_new))
        C = f[..., None, None] * C + i[..., None, None] * (v[..., :, None] * k[..., None, :])
        n = f[..., None] * n + i[..., None] * k
        read = (C @ q[..., None]).squeeze(-1)
        size = torch.maximum((n * q).sum(-1).abs(), torch.exp(-m_new))
        h = torch.sigmoid(o) * read / size[..., None]
        return h.flatten(1), (C, n, m_new)
