"""Steps from papers: classic and gated cells."""

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


# --- classic


@TABLE.paper(
    "Elman, then a readout",
    "Elman 1990",
    "classic",
    lambda: {**_maps(FEATURES, SIZE), "V": linear(SIZE, 3)},
    output_size=3,
)
def _elman(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    h = torch.tanh(c.W(x) + c.U(h))
    return c.V(h), h


@TABLE.paper("Jordan", "Jordan 1986", "classic", lambda: {**_maps(FEATURES, SIZE, 3), "V": linear(SIZE, 3)}, {"y": 3})
def _jordan(c: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    y = torch.sigmoid(c.V(torch.tanh(c.W(x) + c.U(y))))
    return y, y


@TABLE.paper(
    "NARX, four taps",
    "Lin 1996",
    "classic",
    lambda: {"W": linear(FEATURES + 12, SIZE), "V": linear(SIZE, 3)},
    {"taps": (4, 3)},
    output_size=3,
)
def _narx(c: Any, x: Tensor, taps: Tensor) -> tuple[Tensor, ...]:
    y = c.V(torch.tanh(c.W(torch.cat([x, taps.flatten(1)], -1))))
    return y, torch.cat([taps[:, 1:], y[:, None]], 1)


@TABLE.paper(
    "echo state network",
    "Jaeger 2001",
    "classic",
    lambda: {
        "W": torch.randn(SIZE, FEATURES) * 0.3,
        "U": torch.randn(SIZE, SIZE) * 0.2,
        "V": linear(SIZE + FEATURES, 3),
    },
    output_size=3,
)
def _echo(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    h = 0.7 * h + 0.3 * torch.tanh(F.linear(x, c.W) + F.linear(h, c.U))
    return c.V(torch.cat([h, x], -1)), h


@TABLE.paper(
    "clockwork RNN",
    "arXiv:1402.3511",
    "conditional",
    lambda: {
        **_maps(FEATURES, SIZE),
        "periods": torch.tensor([1.0, 2.0, 4.0, 8.0]).repeat_interleave(_D),
        "mask": torch.ones(SIZE, SIZE).triu(),
    },
    {"h": SIZE, "t": 1},
    start="zeros",
)
def _clockwork(c: Any, x: Tensor, h: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    new = torch.tanh(c.W(x) + F.linear(h, c.U.weight * c.mask))
    h = torch.where(torch.remainder(t, c.periods) < 0.5, new, h)
    return h, h, t + 1


@TABLE.paper(
    "two torch.nn.GRUCells with a residual",
    "arXiv:1609.08144",
    "classic",
    lambda: {"a": nn.GRUCell(FEATURES, SIZE), "b": nn.GRUCell(SIZE, SIZE)},
    {"h": SIZE, "g": SIZE},
)
def _two_grus(c: Any, x: Tensor, h: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    h = c.a(x, h)
    g = c.b(h, g)
    return h + g, h, g


# --- gated


@TABLE.paper("LSTM, coupled gates", "arXiv:1503.04069", "gated zoo", lambda: _maps(FEATURES, 3 * SIZE), _PAIR)
def _coupled(c: Any, x: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    f, o, g = (c.W(x) + c.U(h)).chunk(3, -1)
    f = torch.sigmoid(f)
    m = f * m + (1 - f) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(m)
    return h, h, m


@TABLE.paper(
    "GRU, reset before",
    "arXiv:1406.1078v3",
    "gated zoo",
    lambda: {"W": linear(FEATURES, 3 * SIZE), "U": linear(SIZE, 2 * SIZE), "V": linear(SIZE, SIZE)},
)
def _gru_before(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    a, n = c.W(x).split([2 * SIZE, SIZE], -1)
    z, r = torch.sigmoid(a + c.U(h)).chunk(2, -1)
    h = torch.lerp(torch.tanh(n + c.V(r * h)), h, z)
    return h, h


@TABLE.paper(
    "SRU",
    "arXiv:1709.02755",
    "gated zoo",
    lambda: {"W": linear(FEATURES, 3 * SIZE), "v": weight(2, SIZE), "skip": linear(FEATURES, SIZE)},
    {"c": SIZE},
)
def _sru(c: Any, x: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    u, f, r = c.W(x).chunk(3, -1)
    f, r = torch.sigmoid(f + c.v[0] * m), torch.sigmoid(r + c.v[1] * m)
    m = f * m + (1 - f) * u
    return r * torch.tanh(m) + (1 - r) * c.skip(x), m


@TABLE.paper(
    "QRNN, fo-pooling, two taps",
    "arXiv:1611.01576",
    "gated zoo",
    lambda: {"W": linear(2 * FEATURES, 3 * SIZE)},
    {"c": SIZE, "last": FEATURES},
)
def _quasi(c: Any, x: Tensor, m: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    z, f, o = c.W(torch.cat([last, x], -1)).chunk(3, -1)
    f = torch.sigmoid(f)
    m = f * m + (1 - f) * torch.tanh(z)
    return torch.sigmoid(o) * m, m, x


@TABLE.paper(
    "recurrent highway, depth 3",
    "arXiv:1607.03474",
    "gated zoo",
    lambda: {"W": linear(FEATURES, 2 * SIZE), "R": nn.ModuleList([linear(SIZE, 2 * SIZE) for _ in range(3)])},
)
def _highway(c: Any, x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    for depth, layer in enumerate(c.R):
        h, t = (layer(s) + (c.W(x) if depth == 0 else 0)).chunk(2, -1)
        t = torch.sigmoid(t)
        s = torch.tanh(h) * t + s * (1 - t)
    return s, s


@TABLE.paper(
    "mogrifier LSTM",
    "arXiv:1909.01792",
    "gated zoo",
    lambda: {
        "lstm": nn.LSTMCell(FEATURES, SIZE),
        "Q": nn.ModuleList([linear(SIZE, FEATURES) for _ in range(2)]),
        "R": nn.ModuleList([linear(FEATURES, SIZE) for _ in range(2)]),
    },
    _PAIR,
)
def _mogrifier(c: Any, x: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    for Q, R in zip(c.Q, c.R, strict=True):
        x = 2 * torch.sigmoid(Q(h)) * x
        h = 2 * torch.sigmoid(R(x)) * h
    h, m = c.lstm(x, (h, m))
    return h, h, m


@TABLE.paper("ON-LSTM", "arXiv:1810.09536", "gated zoo", lambda: _maps(FEATURES, 4 * SIZE + 2 * HEADS), _PAIR)
def _ordered(c: Any, x: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    masters, i, f, o, g = (c.W(x) + c.U(h)).split([2 * HEADS, *[SIZE] * 4], -1)
    forget, enter = masters.chunk(2, -1)
    forget = torch.cumsum(F.softmax(forget, -1), -1).repeat_interleave(_D, -1)
    enter = (1 - torch.cumsum(F.softmax(enter, -1), -1)).repeat_interleave(_D, -1)
    overlap = forget * enter
    f = torch.sigmoid(f) * overlap + (forget - overlap)
    i = torch.sigmoid(i) * overlap + (enter - overlap)
    m = f * m + i * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(m)
    return h, h, m


@TABLE.paper(
    "phased LSTM",
    "arXiv:1610.09513",
    "conditional",
    lambda: {
        "lstm": nn.LSTMCell(FEATURES, SIZE),
        "period": weight(SIZE, scale=0.3),
        "shift": weight(SIZE),
        "ratio": filled(0.3, SIZE),
    },
    {**_PAIR, "t": 1},
    start="zeros",
)
def _phased(c: Any, x: Tensor, h: Tensor, m: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    period = torch.exp(c.period) + 2
    phase = torch.remainder(t - c.shift, period) / period
    up, down = 2 * phase / c.ratio, 2 - 2 * phase / c.ratio
    gate = torch.where(phase < c.ratio / 2, up, torch.where(phase < c.ratio, down, 0.001 * phase))
    new, memory = c.lstm(x, (h, m))
    h, m = gate * new + (1 - gate) * h, gate * memory + (1 - gate) * m
    return h, h, m, t + 1


@TABLE.paper(
    "skip RNN",
    "arXiv:1708.06834",
    "conditional",
    lambda: {"gru": nn.GRUCell(FEATURES, SIZE), "p": linear(SIZE, 1)},
    {"h": SIZE, "u": 1},
)
def _skip(c: Any, x: Tensor, h: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    u = torch.sigmoid(u)
    hard = u + (torch.round(u) - u).detach()
    h = hard * c.gru(x, h) + (1 - hard) * h
    delta = torch.sigmoid(c.p(h))
    return h, h, hard * delta + (1 - hard) * torch.clamp(u + torch.minimum(delta, 1 - u), max=1)


@TABLE.paper(
    "adaptive computation, three ponders",
    "arXiv:1603.08983",
    "conditional",
    lambda: {"gru": nn.GRUCell(FEATURES + 1, SIZE), "p": linear(SIZE, 1)},
)
def _ponder(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    mean, left = torch.zeros_like(h), torch.ones_like(h[:, :1])
    for n in range(3):
        h = c.gru(torch.cat([x, torch.full_like(left, float(n == 0))], -1), h)
        p = torch.sigmoid(c.p(h)) if n < 2 else torch.ones_like(left)
        share = torch.where(left < 0.01, torch.zeros_like(left), torch.minimum(p, left))
        mean, left = mean + share * h, left - share
    return mean, mean


@TABLE.paper(
    "mixture of three GRUs",
    "arXiv:1701.06538",
    "conditional",
    lambda: {"cells": nn.ModuleList([nn.GRUCell(FEATURES, SIZE) for _ in range(3)]), "route": linear(FEATURES, 3)},
)
def _mixture(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    share = F.softmax(c.route(x), -1)
    h = (torch.stack([cell(x, h) for cell in c.cells], 1) * share[..., None]).sum(1)
    return h, h


@TABLE.paper(
    "hard routing to the best of three",
    "arXiv:2101.03961",
    "conditional",
    lambda: {"cells": nn.ModuleList([nn.GRUCell(FEATURES, SIZE) for _ in range(3)]), "route": linear(FEATURES, 3)},
)
def _routed(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    p = F.softmax(c.route(x), -1)
    best, place = p.max(-1, keepdim=True)
    share = torch.zeros_like(p).scatter(1, place, best)
    h = (torch.stack([cell(x, h) for cell in c.cells], 1) * share[..., None]).sum(1)
    return h, h


@TABLE.paper(
    "hierarchical multiscale RNN, two layers",
    "arXiv:1609.01704",
    "conditional",
    lambda: {"low": linear(FEATURES + 2 * SIZE, SIZE + 1), "high": linear(2 * SIZE, SIZE)},
    {"h": SIZE, "g": SIZE, "z": 1},
)
def _multiscale(c: Any, x: Tensor, h: Tensor, g: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    new, slope = c.low(torch.cat([x, h * (1 - z), g * z], -1)).split([SIZE, 1], -1)
    h = torch.tanh(new)
    soft = torch.clamp((2 * slope + 1) / 2, 0, 1)
    z = soft + ((soft > 0.5).to(soft.dtype) - soft).detach()
    g = z * torch.tanh(c.high(torch.cat([h, g], -1))) + (1 - z) * g
    return torch.cat([h, g], -1)[:, ::2], h, g, z


@TABLE.paper(
    "recurrent independent mechanisms",
    "arXiv:1909.10893",
    "conditional",
    lambda: {
        "keys": linear(FEATURES, _D),
        "query": weight(HEADS, _D, _D),
        "prior": weight(HEADS),
        "value": linear(FEATURES, _D),
        "W": weight(HEADS, _D, _D),
        "U": weight(HEADS, _D, _D),
    },
    {"h": (HEADS, _D)},
    output_size=(HEADS, _D),
)
def _mechanisms(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    score = (torch.einsum("nhd,hde->nhe", h, c.query) * c.keys(x)[:, None]).sum(-1) + c.prior
    chosen = torch.zeros_like(score).scatter(1, score.topk(2, -1).indices, 1.0)
    inputs = torch.sigmoid(score)[..., None] * c.value(x)[:, None]
    new = torch.tanh(torch.einsum("nhd,hde->nhe", inputs, c.W) + torch.einsum("nhd,hde->nhe", h, c.U))
    h = torch.where(chosen[..., None] > 0, new, h)
    return h, h
