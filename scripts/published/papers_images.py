"""Steps from papers: images and audio."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import FEATURES, SIZE, Table, linear, weight

TABLE = Table()
_IMAGE = (3, 6, 5)
_STATE = (4, 6, 5)


# --- convolutional


def _conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


_IMAGES: dict[str, Any] = {"input_size": _IMAGE}


@TABLE.paper(
    "ConvLSTM",
    "arXiv:1506.04214",
    "convolutional",
    lambda: {"conv": _conv(7, 16), "p": weight(3, *_STATE, scale=0.1)},
    {"h": _STATE, "c": _STATE},
    **_IMAGES,
)
def _conv_lstm(c: Any, x: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    i, f, g, o = c.conv(torch.cat([x, h], 1)).chunk(4, 1)
    m = torch.sigmoid(f + c.p[0] * m) * m + torch.sigmoid(i + c.p[1] * m) * torch.tanh(g)
    h = torch.sigmoid(o + c.p[2] * m) * torch.tanh(m)
    return h, h, m


@TABLE.paper(
    "ConvGRU",
    "arXiv:1511.06432",
    "convolutional",
    lambda: {"gate_maps": _conv(7, 8), "n": _conv(7, 4)},
    {"h": _STATE},
    **_IMAGES,
)
def _conv_gru(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    z, r = torch.sigmoid(c.gate_maps(torch.cat([x, h], 1))).chunk(2, 1)
    h = z * h + (1 - z) * torch.tanh(c.n(torch.cat([x, r * h], 1)))
    return h, h


@TABLE.paper(
    "PredRNN's spatiotemporal LSTM",
    "arXiv:2103.09504",
    "convolutional",
    lambda: {"cx": _conv(3, 28), "ch": _conv(4, 16), "cm": _conv(4, 12), "o": _conv(8, 4), "last": _conv(8, 4, 1)},
    {"h": _STATE, "c": _STATE, "m": _STATE},
    **_IMAGES,
)
def _predrnn(c: Any, x: Tensor, h: Tensor, m: Tensor, M: Tensor) -> tuple[Tensor, ...]:
    i, f, g, i2, f2, g2, o = c.cx(x).chunk(7, 1)
    ih, fh, gh, oh = c.ch(h).chunk(4, 1)
    im, fm, gm = c.cm(M).chunk(3, 1)
    m = torch.sigmoid(f + fh + 1) * m + torch.sigmoid(i + ih) * torch.tanh(g + gh)
    M = torch.sigmoid(f2 + fm + 1) * M + torch.sigmoid(i2 + im) * torch.tanh(g2 + gm)
    both = torch.cat([m, M], 1)
    h = torch.sigmoid(o + oh + c.o(both)) * torch.tanh(c.last(both))
    return h, h, m, M


@TABLE.paper(
    "RAFT's separable ConvGRU",
    "arXiv:2003.12039",
    "convolutional",
    lambda: {
        "h": nn.ModuleList([nn.Conv2d(7, 4, (1, 5), padding=(0, 2)) for _ in range(3)]),
        "v": nn.ModuleList([nn.Conv2d(7, 4, (5, 1), padding=(2, 0)) for _ in range(3)]),
    },
    {"s": _STATE},
    **_IMAGES,
)
def _separable(c: Any, x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    for z_map, r_map, n_map in (c.h, c.v):
        both = torch.cat([s, x], 1)
        z, r = torch.sigmoid(z_map(both)), torch.sigmoid(r_map(both))
        s = (1 - z) * s + z * torch.tanh(n_map(torch.cat([r * s, x], 1)))
    return s, s


@TABLE.paper(
    "neural cellular automaton",
    "Mordvintsev 2020",
    "convolutional",
    lambda: {
        "see": nn.Conv2d(4, 12, 3, padding=1, groups=4, padding_mode="circular"),
        "a": _conv(15, 8, 1),
        "b": _conv(8, 4, 1),
    },
    {"s": _STATE},
    **_IMAGES,
)
def _automaton(c: Any, x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    alive = F.max_pool2d(s[:, :1], 3, 1, 1) > 0.1
    s = s + c.b(torch.relu(c.a(torch.cat([c.see(s), x], 1))))
    s = s * alive
    return s, s


@TABLE.paper(
    "TrajGRU's warped states",
    "arXiv:1706.03458",
    "convolutional",
    lambda: {"flow": _conv(7, 2), "x": _conv(3, 12), "h": _conv(4, 12, 1)},
    {"s": _STATE},
    **_IMAGES,
)
def _trajectory(c: Any, x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    flow = 0.3 * torch.tanh(c.flow(torch.cat([x, s], 1))).permute(0, 2, 3, 1)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 6), torch.linspace(-1, 1, 5), indexing="ij")
    grid = torch.stack([columns, rows], -1).to(s.dtype) + flow
    warped = F.grid_sample(s, grid, align_corners=True)
    z, r, n = c.x(x).chunk(3, 1)
    hz, hr, hn = c.h(warped).chunk(3, 1)
    z = torch.sigmoid(z + hz)
    s = (1 - z) * F.leaky_relu(n + torch.sigmoid(r + hr) * hn, 0.2) + z * s
    return s, s


@TABLE.paper(
    "quaternion RNN",
    "arXiv:1806.04418",
    "complex",
    lambda: {"W": linear(FEATURES, SIZE), "q": weight(4, SIZE // 4)},
    {"h": SIZE},
)
def _quaternion(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    a, b, d, e = h.chunk(4, -1)
    p, q, r, s = c.q
    turned = torch.cat(
        [
            a * p - b * q - d * r - e * s,
            a * q + b * p + d * s - e * r,
            a * r - b * s + d * p + e * q,
            a * s + b * r - d * q + e * p,
        ],
        -1,
    )
    h = torch.tanh(c.W(x) + turned)
    return h, h


# --- audio


@TABLE.paper(
    "WaveNet, one step with rings",
    "arXiv:1609.03499",
    "audio",
    lambda: {
        "inp": linear(FEATURES, 8),
        "convs": nn.ModuleList([nn.Conv1d(8, 16, 2, dilation=d) for d in (1, 2, 4)]),
        "skip": nn.ModuleList([linear(8, 8) for _ in range(3)]),
    },
    {"r0": (8, 1), "r1": (8, 2), "r2": (8, 4)},
    output_size=8,
)
def _wavenet(c: Any, x: Tensor, *rings: Tensor) -> tuple[Tensor, ...]:
    x, total, after = c.inp(x), 0.0, []
    for conv, skip, ring in zip(c.convs, c.skip, rings, strict=True):
        taps = torch.cat([ring, x[..., None]], -1)
        f, g = conv(taps)[..., 0].chunk(2, -1)
        y = torch.tanh(f) * torch.sigmoid(g)
        total, x = total + skip(y), x + y
        after.append(taps[..., 1:])
    return total, *after


@TABLE.paper(
    "WaveRNN, mu-law ids",
    "arXiv:1802.08435",
    "audio",
    lambda: {"table": nn.Embedding(32, 8), "gru": nn.GRUCell(8, SIZE), "a": linear(SIZE, SIZE), "b": linear(SIZE, 32)},
    {"h": SIZE},
    input_size=(),
    output_size=32,
    inputs=lambda steps, rows: torch.randint(0, 32, (steps, rows)),
)
def _wavernn(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    h = c.gru(c.table(x), h)
    return c.b(torch.relu(c.a(h))), h


@TABLE.paper(
    "location-sensitive attention, Tacotron 2",
    "arXiv:1712.05884",
    "audio",
    lambda: {
        "lstm": nn.LSTMCell(FEATURES + 4, SIZE),
        "q": linear(SIZE, 8),
        "k": linear(4, 8),
        "conv": nn.Conv1d(2, 3, 5, padding=2),
        "l": linear(3, 8),
        "v": linear(8, 1),
    },
    {"h": SIZE, "c": SIZE, "r": 4, "w": 7, "total": 7},
    names=("x", "memory"),
    inputs=lambda steps, rows: (torch.randn(steps, rows, FEATURES), torch.randn(1, rows, 7, 4)),
    start="zeros",
)
def _location(
    c: Any, x: Tensor, memory: Tensor, h: Tensor, m: Tensor, r: Tensor, w: Tensor, total: Tensor
) -> tuple[Tensor, ...]:
    h, m = c.lstm(torch.cat([x, r], -1), (h, m))
    places = c.l(c.conv(torch.stack([w, total], 1)).transpose(1, 2))
    w = F.softmax(c.v(torch.tanh(c.q(h)[:, None] + c.k(memory) + places)).squeeze(-1), -1)
    r = torch.bmm(w[:, None], memory)[:, 0]
    return torch.cat([h, r], -1)[:, :SIZE], h, m, r, w, total + w


@TABLE.paper("biquad filters", "Nercessian 2021", "audio", lambda: {"f": linear(FEATURES, 5)}, {"z1": 1, "z2": 1})
def _biquad(c: Any, x: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    b0, b1, b2, a1, a2 = c.f(x).chunk(5, -1)
    a1 = 2 * torch.tanh(a1)
    a2 = ((2 - a1.abs()) * torch.tanh(a2) + a1.abs()) / 2
    y = b0 * x[:, :1] + z1
    return y, b1 * x[:, :1] - a1 * y + z2, b2 * x[:, :1] - a2 * y


@TABLE.paper(
    "RNNoise's three GRUs",
    "arXiv:1709.08243",
    "audio",
    lambda: {
        "d": linear(FEATURES, 8),
        "vad": nn.GRUCell(8, 8),
        "noise": nn.GRUCell(28, 12),
        "clean": nn.GRUCell(32, SIZE),
        "gain": linear(SIZE, 6),
        "voice": linear(8, 1),
    },
    {"v": 8, "n": 12, "g": SIZE},
    output_size={"gains": 6, "voice": 1},
)
def _rnnoise(c: Any, x: Tensor, v: Tensor, n: Tensor, g: Tensor) -> tuple[Any, ...]:
    dense = torch.tanh(c.d(x))
    v = c.vad(dense, v)
    n = c.noise(torch.cat([dense, v, x], -1), n)
    g = c.clean(torch.cat([v, n, x], -1), g)
    return {"gains": torch.sigmoid(c.gain(g)), "voice": torch.sigmoid(c.voice(v))}, v, n, g


@TABLE.paper(
    "DDSP harmonic oscillator, phases",
    "arXiv:2001.04643",
    "audio",
    lambda: {
        "gru": nn.GRUCell(FEATURES, SIZE),
        "f": linear(SIZE, 1),
        "a": linear(SIZE, 6),
        "n": torch.arange(1.0, 7.0),
    },
    {"h": SIZE, "phase": 1},
    output_size=1,
)
def _harmonic(c: Any, x: Tensor, h: Tensor, phase: Tensor) -> tuple[Tensor, ...]:
    h = c.gru(x, h)
    f = torch.sigmoid(c.f(h))
    phase = torch.fmod(phase + f, 1.0)
    share = F.softmax(c.a(h), -1) * (c.n * f < 3)
    return (share * torch.sin(2 * torch.pi * c.n * phase)).sum(-1, keepdim=True), h, phase
