"""Steps from papers: state spaces and complex states, and xLSTM."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import FEATURES, HEADS, SIZE, Table, filled, linear, weight

TABLE = Table()
_D = SIZE // HEADS
_MATRIX = {"S": (HEADS, _D, _D)}


def _qkv(*, gates: int = 0) -> dict[str, Any]:
    return {"maps": linear(FEATURES, 3 * SIZE + gates * HEADS), "out": linear(SIZE, SIZE)}


def _heads(value: Tensor) -> Tensor:
    return value.view(-1, HEADS, _D)


# --- state spaces


@TABLE.paper(
    "S4D-real",
    "arXiv:2206.11893",
    "ssm",
    lambda: {
        "u": linear(FEATURES, SIZE),
        "A": weight(SIZE, 4),
        "B": weight(SIZE, 4),
        "C": weight(SIZE, 4),
        "dt": weight(SIZE),
    },
    {"s": (SIZE, 4)},
    output_size=SIZE,
)
def _s4d(c: Any, x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    A, u = -torch.exp(c.A), c.u(x)
    turn = torch.exp(A * torch.exp(c.dt)[:, None])
    s = turn * s + ((turn - 1) / A * c.B) * u[..., None]
    return F.gelu((s * c.C).sum(-1)), s


@TABLE.paper(
    "selective scan, Mamba",
    "arXiv:2312.00752",
    "ssm",
    lambda: {
        "inp": linear(FEATURES, 2 * SIZE),
        "conv": nn.Conv1d(SIZE, SIZE, 4, groups=SIZE),
        "xp": linear(SIZE, 2 + 8),
        "dt": linear(2, SIZE),
        "A": weight(SIZE, 4),
        "D": filled(1.0, SIZE),
        "out": linear(SIZE, FEATURES),
    },
    {"s": (SIZE, 4), "taps": (SIZE, 3)},
    output_size=FEATURES,
)
def _selective(c: Any, x: Tensor, s: Tensor, taps: Tensor) -> tuple[Tensor, ...]:
    u, z = c.inp(x).chunk(2, -1)
    taps = torch.cat([taps, u[..., None]], -1)
    u = F.silu(c.conv(taps)[..., 0])
    dt, B, C = c.xp(u).split([2, 4, 4], -1)
    dt = F.softplus(c.dt(dt))
    s = torch.exp(dt[..., None] * -torch.exp(c.A)) * s + (dt * u)[..., None] * B[:, None]
    y = torch.einsum("nds,ns->nd", s, C) + c.D * u
    return c.out(y * F.silu(z)), s, taps[..., 1:]


@TABLE.paper(
    "LMU",
    "Voelker 2019",
    "ssm",
    lambda: {
        "e": linear(FEATURES + SIZE + 6, 1),
        "A": torch.eye(6) - 0.1 * torch.ones(6, 6).tril(),
        "B": torch.randn(6, 1),
        "W": linear(FEATURES + SIZE + 6, SIZE),
    },
    {"h": SIZE, "m": 6},
)
def _legendre(c: Any, x: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    u = c.e(torch.cat([x, h, m], -1))
    m = m @ c.A.T + u @ c.B.T
    h = torch.tanh(c.W(torch.cat([x, h, m], -1)))
    return h, h, m


@TABLE.paper(
    "HiPPO-LegT, gated",
    "arXiv:2008.07669",
    "ssm",
    lambda: {
        "gru": nn.GRUCell(FEATURES + 5, SIZE),
        "f": linear(SIZE, 1),
        "A": torch.eye(5) * 0.9,
        "B": torch.randn(5) * 0.3,
    },
    {"h": SIZE, "m": 5},
)
def _hippo(c: Any, x: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    h = c.gru(torch.cat([x, m], -1), h)
    m = F.linear(m, c.A) + c.B * c.f(h)
    return h, h, m


@TABLE.paper("minLSTM", "arXiv:2410.01201", "ssm", lambda: {"W": linear(FEATURES, 3 * SIZE)})
def _min_lstm(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    f, i, n = c.W(x).chunk(3, -1)
    f, i = torch.sigmoid(f), torch.sigmoid(i)
    h = f / (f + i) * h + i / (f + i) * torch.where(n >= 0, n + 0.5, torch.sigmoid(n))
    return h, h


@TABLE.paper(
    "RG-LRU with its convolution",
    "arXiv:2402.19427",
    "ssm",
    lambda: {
        "inp": linear(FEATURES, 2 * SIZE),
        "conv": nn.Conv1d(SIZE, SIZE, 4, groups=SIZE),
        "gate_maps": nn.ModuleList([linear(SIZE, SIZE) for _ in range(2)]),
        "L": filled(1.0, SIZE),
        "out": linear(SIZE, FEATURES),
    },
    {"h": SIZE, "taps": (SIZE, 3)},
    output_size=FEATURES,
)
def _griffin(c: Any, x: Tensor, h: Tensor, taps: Tensor) -> tuple[Tensor, ...]:
    u, gate = c.inp(x).chunk(2, -1)
    taps = torch.cat([taps, u[..., None]], -1)
    u = c.conv(taps)[..., 0]
    r, i = (torch.sigmoid(layer(u)) for layer in c.gate_maps)
    log = -8.0 * F.softplus(c.L) * r
    h = torch.exp(log) * h + torch.sqrt(-torch.expm1(2 * log)) * (i * u)
    return c.out(h * F.gelu(gate)), h, taps[..., 1:]


# --- complex states


@TABLE.paper(
    "LRU, complex",
    "arXiv:2303.06349",
    "complex",
    lambda: {
        "nu": weight(8),
        "theta": weight(8),
        "B": nn.Parameter(torch.randn(8, FEATURES, dtype=torch.complex64) * 0.2),
        "C": nn.Parameter(torch.randn(SIZE, 8, dtype=torch.complex64) * 0.2),
        "D": linear(FEATURES, SIZE),
    },
    {"s": (8, 2)},
    output_size=SIZE,
)
def _lru(c: Any, x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    size = torch.exp(-torch.exp(c.nu))
    turn = torch.polar(size, torch.exp(c.theta))
    now = turn * torch.view_as_complex(s) + torch.sqrt(1 - size**2) * (x.to(c.B.dtype) @ c.B.T)
    return (now @ c.C.T).real + c.D(x), torch.view_as_real(now)


@TABLE.paper(
    "S5, complex, ZOH",
    "arXiv:2208.04933",
    "complex",
    lambda: {"A": weight(8, 2), "B": weight(8, FEATURES, 2), "C": weight(SIZE, 8, 2), "dt": weight(8)},
    {"s": (8, 2)},
    output_size=SIZE,
)
def _s5(c: Any, x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    A = torch.complex(-torch.exp(c.A[:, 0]), c.A[:, 1])
    turn = torch.exp(A * torch.exp(c.dt))
    B, C = torch.view_as_complex(c.B), torch.view_as_complex(c.C)
    drive = torch.einsum("pf,nf->np", ((turn - 1) / A)[:, None] * B, x.to(B.dtype))
    now = turn * torch.view_as_complex(s) + drive
    return 2 * torch.einsum("hp,np->nh", C, now).real, torch.view_as_real(now)


@TABLE.paper(
    "unitary evolution RNN",
    "arXiv:1511.06464",
    "complex",
    lambda: {
        "V": linear(FEATURES, 16),
        "phases": weight(3, 8),
        "r": weight(2, 8, 2),
        "b": filled(0.1, 8),
        "order": torch.randperm(8),
        "out": linear(16, SIZE),
    },
    {"s": (8, 2)},
    output_size=SIZE,
)
def _unitary(c: Any, x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    def reflected(z: Tensor, v: Tensor) -> Tensor:
        return z - 2 * v * (z @ v.conj())[:, None] / (v.abs() ** 2).sum()

    D = [torch.polar(torch.ones_like(angle), angle) for angle in c.phases]
    r = torch.view_as_complex(c.r)
    z = torch.fft.fft(torch.view_as_complex(s) * D[0])
    z = D[1] * reflected(z, r[0])[:, c.order]
    z = D[2] * reflected(torch.fft.ifft(z), r[1]) + torch.view_as_complex(c.V(x).view(-1, 8, 2))
    size = z.abs() + 1e-5
    z = F.relu(size + c.b) / size * z
    now = torch.view_as_real(z)
    return c.out(now.flatten(1)), now


@TABLE.paper(
    "holographic memory, circular convolution",
    "arXiv:1602.03032",
    "complex",
    lambda: {"key": linear(FEATURES, SIZE), "value": linear(FEATURES, SIZE), "query": linear(FEATURES, SIZE)},
)
def _holographic(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    key, value, query = (torch.fft.rfft(torch.tanh(layer(x))) for layer in (c.key, c.value, c.query))
    h = 0.9 * h + torch.fft.irfft(key * value, n=SIZE)
    return torch.fft.irfft(query.conj() * torch.fft.rfft(h), n=SIZE), h


# --- xLSTM


@TABLE.paper(
    "sLSTM with blocks",
    "arXiv:2405.04517",
    "xlstm",
    lambda: {"W": linear(FEATURES, 4 * SIZE), "R": weight(4, HEADS, _D, _D)},
    {"h": SIZE, "c": SIZE, "n": SIZE, "m": SIZE},
    start="zeros",
)
def _slstm(c: Any, x: Tensor, h: Tensor, m: Tensor, n: Tensor, top: Tensor) -> tuple[Tensor, ...]:
    hidden = torch.einsum("nhd,ghde->nghe", h.view(-1, HEADS, _D), c.R).flatten(2)
    i, f, z, o = (c.W(x).view(-1, 4, SIZE) + hidden).unbind(1)
    new = torch.maximum(F.logsigmoid(f) + top, i)
    i, f = torch.exp(i - new), torch.exp(F.logsigmoid(f) + top - new)
    m, n = f * m + i * torch.tanh(z), f * n + i
    h = torch.sigmoid(o) * m / n
    return h, h, m, n, new


@TABLE.paper(
    "mLSTM",
    "arXiv:2405.04517",
    "xlstm",
    lambda: {**_qkv(gates=2), "o": linear(FEATURES, SIZE)},
    {**_MATRIX, "n": (HEADS, _D), "m": HEADS},
    output_size=SIZE,
    start="zeros",
)
def _mlstm(c: Any, x: Tensor, S: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    q, k, v, i, f = c.maps(x).split([SIZE, SIZE, SIZE, HEADS, HEADS], -1)
    q, k, v = _heads(q), _heads(k) / math.sqrt(_D), _heads(v)
    new = torch.maximum(F.logsigmoid(f) + m, i)
    i, f = torch.exp(i - new), torch.exp(F.logsigmoid(f) + m - new)
    S = f[..., None, None] * S + i[..., None, None] * torch.einsum("nhv,nhk->nhvk", v, k)
    n = f[..., None] * n + i[..., None] * k
    below = torch.maximum((n * q).sum(-1).abs(), torch.exp(-new))[..., None]
    y = torch.einsum("nhvk,nhk->nhv", S, q) / below
    return torch.sigmoid(c.o(x)) * y.flatten(1), S, n, new
