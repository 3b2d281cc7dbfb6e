"""Cells whose memory is a matrix that keys write and queries read: gated DeltaNet, RWKV-7, and the step of Mamba-2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusecell.cell import Cell
from fusecell.cells.heads import head_size
from fusecell.execution.options import State

__all__ = ["GatedDeltaNetCell", "Mamba2Cell", "RWKV7Cell"]


class GatedDeltaNetCell(Cell):
    r"""Gated DeltaNet: the memory decays, and what it says of a key is replaced by a new value, to a part.

    .. math::
        S' &= \alpha S (I - \beta k k^\top) + \beta v k^\top, \quad \|k\| = \|q\| = 1 \\
        y &= S' q

    Example:
        >>> import torch, fusecell as fc
        >>> y, S = fc.Recurrent(fc.cells.GatedDeltaNetCell(5, 8, heads=2))(torch.randn(7, 3, 5))
        >>> y.shape, S.shape
        (torch.Size([7, 3, 8]), torch.Size([3, 2, 4, 4]))

    Arguments:
        input_size, hidden_size: features of x and of the output.
        heads: memories, each of (hidden_size / heads)^2 numbers.

    Paper: Yang, Kautz and Hatamizadeh, "Gated delta networks", 2024, arXiv:2412.06464.
    """

    states = ("S",)

    def __init__(self, input_size: int, hidden_size: int, *, heads: int = 4) -> None:
        super().__init__(input_size, hidden_size)
        size = head_size("GatedDeltaNetCell", hidden_size, heads)
        self.heads = heads
        self.state_sizes = ((heads, size, size),)
        self.maps = nn.Linear(input_size, 3 * hidden_size)
        self.gate_map = nn.Linear(input_size, 2 * heads)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (S,) = state
        q, k, v = (part.unflatten(1, (self.heads, -1)) for part in self.maps(x).chunk(3, -1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        alpha, beta = torch.sigmoid(self.gate_map(x)).chunk(2, -1)
        S = self.note("alpha", alpha)[..., None, None] * S
        told = torch.einsum("nhvk,nhk->nhv", S, k)
        change = self.note("beta", beta)[..., None] * (v - told)
        S = S + change[..., :, None] * k[..., None, :]
        return torch.einsum("nhvk,nhk->nhv", S, q).flatten(1), (S,)


class RWKV7Cell(Cell):
    r"""The time mixing of RWKV-7: a decay per channel, and a removal along one direction by another.

    .. math::
        S' &= S \, (\mathrm{diag}(w) - \hat\kappa (a \odot \hat\kappa)^\top) + v \tilde k^\top \\
        y &= S' r

    where r, v, k come from a mixture of x and the x before it, :math:`\hat\kappa` is k normalised per head, and
    the decay w and the rate a have maps of low rank.

    Example:
        >>> import torch, fusecell as fc
        >>> y, (S, last) = fc.Recurrent(fc.cells.RWKV7Cell(5, 8, heads=2))(torch.randn(7, 3, 5))
        >>> y.shape, S.shape
        (torch.Size([7, 3, 8]), torch.Size([3, 2, 4, 4]))

    Arguments:
        input_size, hidden_size: features of x and of the output.
        heads: memories, each of (hidden_size / heads)^2 numbers.
        rank: of the maps of decay and rate.

    Paper: Peng et al., "RWKV-7 Goose with expressive dynamic state evolution", 2025, arXiv:2503.14456.
    """

    states = ("S", "last")

    def __init__(self, input_size: int, hidden_size: int, *, heads: int = 4, rank: int = 8) -> None:
        super().__init__(input_size, hidden_size)
        size = head_size("RWKV7Cell", hidden_size, heads)
        self.heads = heads
        self.state_sizes = ((heads, size, size), input_size)
        self.mix = nn.Parameter(torch.full((5, input_size), 0.5))
        self.receptance, self.key, self.value = (nn.Linear(input_size, hidden_size, bias=False) for _ in range(3))
        self.decay = nn.Sequential(nn.Linear(input_size, rank, bias=False), nn.Tanh(), nn.Linear(rank, hidden_size))
        self.rate = nn.Sequential(nn.Linear(input_size, rank, bias=False), nn.Linear(rank, hidden_size))
        self.removal = nn.Parameter(torch.ones(hidden_size))
        self.gain = nn.Parameter(torch.ones(hidden_size))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        S, last = state
        x_r, x_k, x_v, x_w, x_a = (x + (last - x) * mix for mix in self.mix)
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        w = torch.exp(-torch.exp(torch.tensor(-0.5)) * torch.sigmoid(self.decay(x_w)))
        a = torch.sigmoid(self.rate(x_a))
        kappa = F.normalize((k * self.removal).unflatten(1, (self.heads, -1)), dim=-1)
        k = k * (1 + (a - 1) * self.gain)
        r, k, v, w, a = (part.unflatten(1, (self.heads, -1)) for part in (r, k, v, w, a))
        removed = torch.einsum("nhvk,nhk->nhv", S, kappa)
        S = S * w[..., None, :] - removed[..., :, None] * (a * kappa)[..., None, :] + v[..., :, None] * k[..., None, :]
        return torch.einsum("nhvk,nhk->nhv", S, r).flatten(1), (S, x)


class Mamba2Cell(Cell):
    r"""One step of Mamba-2: a short convolution over the last inputs, and a decaying outer-product state per head.

    .. math::
        [x, B, C] &= \mathrm{silu}(\mathrm{conv}(\mathrm{the\ last\ } k \mathrm{\ steps\ of\ } W u)) \\
        S' &= e^{\Delta A} S + \Delta \, x B^\top, \quad y = S' C + D x \\
        \mathrm{out} &= y \odot \mathrm{silu}(z)

    Example:
        >>> import torch, fusecell as fc
        >>> y, (S, window) = fc.Recurrent(fc.cells.Mamba2Cell(5, 8, heads=2, memory=3))(torch.randn(7, 3, 5))
        >>> y.shape, S.shape, window.shape
        (torch.Size([7, 3, 8]), torch.Size([3, 2, 4, 3]), torch.Size([3, 14, 3]))

    Arguments:
        input_size, hidden_size: features of x and of the output.
        heads: groups of channels with one decay each.
        memory: numbers that each channel remembers, N in the paper.
        taps: steps that the convolution sees.

    Paper: Dao and Gu, "Transformers are SSMs", 2024, arXiv:2405.21060.
    """

    states = ("S", "window")

    def __init__(self, input_size: int, hidden_size: int, *, heads: int = 4, memory: int = 16, taps: int = 4) -> None:
        super().__init__(input_size, hidden_size)
        size = head_size("Mamba2Cell", hidden_size, heads)
        self.heads, self.memory = heads, memory
        channels = hidden_size + 2 * memory
        self.state_sizes = ((heads, size, memory), (channels, taps - 1))
        self.input = nn.Linear(input_size, hidden_size + channels + heads)
        self.conv = nn.Conv1d(channels, channels, taps, groups=channels)
        self.log_A = nn.Parameter(torch.log(torch.linspace(1, 8, heads)))
        self.D = nn.Parameter(torch.ones(heads))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        S, window = state
        channels = window.shape[1]
        z, u, delta = self.input(x).split([self.hidden_size, channels, self.heads], -1)
        window = torch.cat((window, u[..., None]), -1)
        mixed = F.silu(self.conv(window).squeeze(-1))
        u, B, C = mixed.split([self.hidden_size, self.memory, self.memory], -1)  # type: ignore[no-untyped-call]
        u = u.unflatten(1, (self.heads, -1))
        delta = F.softplus(delta)
        decay = self.note("decay", torch.exp(-delta * torch.exp(self.log_A)))
        S = decay[..., None, None] * S + (delta[..., None] * u)[..., :, None] * B[:, None, None, :]
        y = (S * C[:, None, None, :]).sum(-1) + self.D[:, None] * u
        return y.flatten(1) * F.silu(z), (S, window[..., 1:])
