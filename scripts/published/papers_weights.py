"""Steps from papers: recurrent weights in blocks, normed or parametrised; and steps that choose what to compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import FEATURES, HEADS, SIZE, Table, filled, linear, weight

TABLE = Table()
_D = SIZE // HEADS
_PAIR = {"h": SIZE, "c": SIZE}


def _maps(inputs: int, outputs: int, hidden: int = SIZE) -> dict[str, Any]:
    return {"W": linear(inputs, outputs), "U": linear(hidden, outputs, bias=False)}


# --- block-diagonal


@TABLE.paper(
    "GRU in blocks, einsum",
    "arXiv:2301.04104",
    "block-diagonal",
    lambda: {"W": linear(FEATURES, 3 * SIZE), "U": weight(HEADS, _D, 3 * _D)},
)
def _blocks(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    hidden = torch.einsum("nhd,hde->nhe", h.view(-1, HEADS, _D), c.U)
    r, z, n = c.W(x).view(-1, HEADS, 3 * _D).chunk(3, -1)
    hr, hz, hn = hidden.chunk(3, -1)
    r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
    h = ((1 - z) * torch.tanh(n + r * hn)).flatten(1) + z.flatten(1) * h
    return h, h


@TABLE.paper(
    "LSTM in blocks, bmm",
    "arXiv:1703.10722",
    "block-diagonal",
    lambda: {"W": linear(FEATURES, 4 * SIZE), "U": weight(HEADS, _D, 4 * _D)},
    _PAIR,
)
def _block_lstm(c: Any, x: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    hidden = torch.bmm(h.view(-1, HEADS, _D).transpose(0, 1), c.U).transpose(0, 1)
    i, f, g, o = (c.W(x).view(-1, HEADS, 4 * _D) + hidden).chunk(4, -1)
    m = (torch.sigmoid(f) * m.view(-1, HEADS, _D) + torch.sigmoid(i) * torch.tanh(g)).flatten(1)
    h = torch.sigmoid(o).flatten(1) * torch.tanh(m)
    return h, h, m


@TABLE.paper(
    "one weight for all blocks",
    "arXiv:1806.01261",
    "block-diagonal",
    lambda: {"W": linear(FEATURES, SIZE), "U": nn.Linear(_D, _D)},
)
def _shared(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    h = torch.tanh(c.W(x) + c.U(h.view(-1, HEADS, _D)).flatten(1))
    return h, h


# --- normed


@TABLE.paper(
    "batch norm in the step, evaluation",
    "arXiv:1603.09025",
    "normed",
    lambda: {**_maps(FEATURES, 3 * SIZE), "norm": nn.BatchNorm1d(3 * SIZE)},
    trains=False,
)
def _batch_normed(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    r, z, n = c.norm(c.W(x) + c.U(h)).chunk(3, -1)
    z = torch.sigmoid(z)
    h = (1 - z) * torch.tanh(torch.sigmoid(r) * n) + z * h
    return h, h


@TABLE.paper(
    "group norm in the step",
    "arXiv:1803.08494",
    "normed",
    lambda: {**_maps(FEATURES, SIZE), "norm": nn.GroupNorm(HEADS, SIZE)},
)
def _group_normed(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    h = torch.tanh(c.norm(c.W(x) + c.U(h)))
    return h, h


@TABLE.paper(
    "RMS norm in the step", "arXiv:1910.07467", "normed", lambda: {**_maps(FEATURES, SIZE), "norm": nn.RMSNorm(SIZE)}
)
def _rms_normed(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    h = h + F.silu(c.norm(c.W(x) + c.U(h)))
    return h, h


# --- parametrised


def _normed_weight(name: str) -> dict[str, Any]:
    parametrise = getattr(nn.utils.parametrizations, name)
    return {"W": linear(FEATURES, SIZE), "U": parametrise(linear(SIZE, SIZE, bias=False))}


for _name, _paper in (
    ("weight_norm", "arXiv:1602.07868"),
    ("orthogonal", "arXiv:1901.08428"),
    ("spectral_norm", "arXiv:1802.05957"),
):
    # spectral_norm takes a step of its power iteration in training mode: evaluation is what is pure.
    @TABLE.paper(
        f"torch's {_name}",
        _paper,
        "parametrised",
        lambda name=_name: _normed_weight(name),
        trains=_name != "spectral_norm",
    )
    def _parametrised(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        h = torch.tanh(c.W(x) + c.U(h))
        return h, h


@TABLE.paper(
    "exponential of a skew matrix",
    "arXiv:1901.08428",
    "parametrised",
    lambda: {"W": linear(FEATURES, SIZE), "A": weight(SIZE, SIZE)},
)
def _exponential(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    h = torch.relu(c.W(x) + h @ torch.matrix_exp(c.A.triu(1) - c.A.triu(1).T))
    return h, h


@TABLE.paper(
    "Cayley transform",
    "arXiv:1707.09520",
    "parametrised",
    lambda: {"W": linear(FEATURES, SIZE), "A": weight(SIZE, SIZE), "I": torch.eye(SIZE)},
)
def _cayley(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    A = c.A - c.A.T
    h = torch.tanh(c.W(x) + h @ torch.linalg.solve(c.I + A, c.I - A))
    return h, h


@TABLE.paper(
    "Lipschitz RNN",
    "arXiv:2006.12070",
    "parametrised",
    lambda: {"W": linear(FEATURES, SIZE), "A": weight(SIZE, SIZE), "B": weight(SIZE, SIZE), "I": torch.eye(SIZE)},
)
def _lipschitz(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    A = 0.35 * (c.A + c.A.T) + 0.65 * (c.A - c.A.T) - 0.001 * c.I
    B = 0.35 * (c.B + c.B.T) + 0.65 * (c.B - c.B.T) - 0.001 * c.I
    h = h + 0.03 * (h @ A.T + torch.tanh(h @ B.T + c.W(x)))
    return h, h


@TABLE.paper(
    "low rank and diagonal",
    "arXiv:1603.03116",
    "parametrised",
    lambda: {"W": linear(FEATURES, SIZE), "L": weight(SIZE, 2), "R": weight(2, SIZE), "d": weight(SIZE)},
)
def _low_rank(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    h = torch.tanh(c.W(x) + h @ (c.L @ c.R) + c.d * h)
    return h, h


@TABLE.paper(
    "hypernetwork LSTM",
    "arXiv:1609.09106",
    "parametrised",
    lambda: {
        "hyper": nn.LSTMCell(FEATURES + SIZE, 6),
        "z": linear(6, 8 * SIZE),
        **_maps(FEATURES, 4 * SIZE),
        "b": filled(0.1, 4 * SIZE),
    },
    {"h": SIZE, "c": SIZE, "hh": 6, "hc": 6},
)
def _hyper(c: Any, x: Tensor, h: Tensor, m: Tensor, hh: Tensor, hc: Tensor) -> tuple[Tensor, ...]:
    hh, hc = c.hyper(torch.cat([x, h], -1), (hh, hc))
    dx, dh = c.z(hh).chunk(2, -1)
    i, f, g, o = (dx * c.W(x) + dh * c.U(h) + c.b).chunk(4, -1)
    m = torch.sigmoid(f) * m + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(m)
    return h, h, m, hh, hc


@TABLE.paper(
    "multiplicative RNN",
    "Sutskever 2011",
    "parametrised",
    lambda: {
        "Wf": linear(FEATURES, SIZE),
        "Uf": linear(SIZE, SIZE),
        "V": linear(SIZE, SIZE),
        "W": linear(FEATURES, SIZE),
    },
)
def _multiplicative(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    h = torch.tanh(c.V(c.Wf(x) * c.Uf(h)) + c.W(x))
    return h, h


@TABLE.paper(
    "bilinear, second order", "Giles 1992", "parametrised", lambda: {"both": nn.Bilinear(FEATURES, SIZE, SIZE)}
)
def _second_order(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    h = torch.tanh(c.both(x, h))
    return h, h


@TABLE.paper(
    "unitary rotations, GORU",
    "arXiv:1706.02761",
    "parametrised",
    lambda: {
        "W": linear(FEATURES, 3 * SIZE),
        "U": linear(SIZE, 2 * SIZE),
        "angles": weight(2, SIZE // 2),
        "b": filled(0.1, SIZE),
    },
)
def _rotated(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    r, z, n = c.W(x).chunk(3, -1)
    hr, hz = c.U(h).chunk(2, -1)
    turned = h
    for angle in c.angles:
        a, b = turned[:, ::2], turned[:, 1::2]
        turned = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(1)
        turned = turned.roll(1, -1)
    n = n + torch.sigmoid(r + hr) * turned
    z = torch.sigmoid(z + hz)
    h = z * h + (1 - z) * torch.sign(n) * torch.relu(n.abs() + c.b)
    return h, h
