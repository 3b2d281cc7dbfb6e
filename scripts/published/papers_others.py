"""Steps from papers: images, audio, missing data, generation, sampling and graphs; and the zoo's published cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecell as fc

from .case import FEATURES, SIZE, Inputs, Table, filled, linear, weight

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


# --- missing data


def _gaps(steps: int, rows: int) -> tuple[Tensor, ...]:
    shape = (steps, rows, FEATURES)
    return torch.randn(shape), (torch.rand(shape) < 0.6).float(), torch.rand(shape)


def _nans(steps: int, rows: int) -> Inputs:
    x = torch.randn(steps, rows, FEATURES)
    return torch.where(torch.rand(x.shape) < 0.3, torch.nan, x)


_GAPS: dict[str, Any] = {"names": ("x", "mask", "delta"), "inputs": _gaps}


@TABLE.paper(
    "GRU-D",
    "arXiv:1606.01865",
    "missing data",
    lambda: {
        "dx": weight(FEATURES),
        "dh": linear(FEATURES, SIZE),
        "mean": torch.zeros(FEATURES),
        "gru": nn.GRUCell(2 * FEATURES, SIZE),
    },
    {"h": SIZE, "last": FEATURES},
    **_GAPS,
)
def _grud(c: Any, x: Tensor, mask: Tensor, delta: Tensor, h: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    last = torch.where(mask > 0.5, x, last)
    decay = torch.exp(-torch.relu(c.dx * delta))
    filled_in = mask * x + (1 - mask) * (decay * last + (1 - decay) * c.mean)
    h = c.gru(torch.cat([filled_in, mask], -1), torch.exp(-torch.relu(c.dh(delta))) * h)
    return h, h, last


@TABLE.paper(
    "T-LSTM",
    "Baytas 2017",
    "missing data",
    lambda: {"lstm": nn.LSTMCell(FEATURES, SIZE), "d": linear(SIZE, SIZE)},
    {"h": SIZE, "c": SIZE},
    names=("x", "dt"),
    inputs=lambda steps, rows: (torch.randn(steps, rows, FEATURES), torch.rand(steps, rows, 1) * 5),
)
def _time_aware(c: Any, x: Tensor, dt: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    short = torch.tanh(c.d(m))
    h, m = c.lstm(x, (h, m - short + short / torch.log(torch.e + dt)))
    return h, h, m


@TABLE.paper(
    "NaN in, filled by the prediction",
    "arXiv:1805.10572",
    "missing data",
    lambda: {"gru": nn.GRUCell(2 * FEATURES, SIZE), "p": linear(SIZE, FEATURES)},
    inputs=_nans,
    output_size=FEATURES,
)
def _filled(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    guess = c.p(h)
    seen = ~torch.isnan(x)
    x = torch.where(seen, torch.nan_to_num(x), guess)
    return guess, c.gru(torch.cat([x, seen.to(x.dtype)], -1), h)


@TABLE.paper(
    "neural Hawkes process",
    "arXiv:1612.09328",
    "missing data",
    lambda: {"W": linear(FEATURES + SIZE, 7 * SIZE), "rate": linear(SIZE, 5)},
    {"h": SIZE, "c": SIZE, "bar": SIZE},
    names=("x", "dt"),
    inputs=lambda steps, rows: (torch.randn(steps, rows, FEATURES), torch.rand(steps, rows, 1)),
    output_size=5,
)
def _hawkes(c: Any, x: Tensor, dt: Tensor, h: Tensor, m: Tensor, bar: Tensor) -> tuple[Tensor, ...]:
    i, f, z, o, ib, fb, d = c.W(torch.cat([x, h], -1)).chunk(7, -1)
    now = torch.sigmoid(f) * m + torch.sigmoid(i) * torch.tanh(z)
    bar = torch.sigmoid(fb) * bar + torch.sigmoid(ib) * torch.tanh(z)
    m = bar + (now - bar) * torch.exp(-F.softplus(d) * dt)
    h = torch.sigmoid(o) * torch.tanh(m)
    return F.softplus(c.rate(h)), h, m, bar


@TABLE.paper(
    "Kalman filter, learned noise",
    "arXiv:1511.05121",
    "missing data",
    lambda: {
        "F": weight(4, 4),
        "H": weight(2, 4),
        "q": filled(0.1, 4),
        "r": filled(0.2, 2),
        "x": linear(FEATURES, 2),
        "I": torch.eye(4),
    },
    {"m": 4, "P": (4, 4)},
    start="zeros",
)
def _kalman(c: Any, x: Tensor, m: Tensor, P: Tensor) -> tuple[Tensor, ...]:
    m, P = m @ c.F.T, c.F @ P @ c.F.T + torch.diag(c.q)
    S = c.H @ P @ c.H.T + torch.diag(c.r)
    K = torch.linalg.solve(S, c.H @ P).mT
    m = m + (K @ (c.x(x) - m @ c.H.T)[..., None]).squeeze(-1)
    P = (c.I - K @ c.H) @ P
    return m, m, P


@TABLE.paper(
    "forward algorithm of an HMM",
    "Rabiner 1989",
    "missing data",
    lambda: {"A": weight(6, 6), "e": linear(FEATURES, 6)},
    {"a": 6},
    start="zeros",
)
def _forward(c: Any, x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    a = torch.logsumexp(a[:, :, None] + F.log_softmax(c.A, -1), 1) + F.log_softmax(c.e(x), -1)
    return F.log_softmax(a, -1), a


@TABLE.paper(
    "Viterbi, max-plus",
    "arXiv:1802.03676",
    "missing data",
    lambda: {"A": weight(6, 6), "e": linear(FEATURES, 6)},
    {"a": 6},
)
def _viterbi(c: Any, x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    a = (a[:, :, None] + c.A).max(1).values + c.e(x)
    return a, a


# --- generation


@TABLE.paper(
    "greedy decoder, ids fed back",
    "arXiv:1409.3215",
    "generation",
    lambda: {"table": nn.Embedding(20, 8), "gru": nn.GRUCell(8 + FEATURES, SIZE), "out": linear(SIZE, 20)},
    {"h": SIZE, "last": 20},
    output_size=20,
)
def _greedy(c: Any, x: Tensor, h: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    token = last.argmax(-1)
    h = c.gru(torch.cat([c.table(token), x], -1), h)
    logits = c.out(h)
    return logits, h, logits


@TABLE.paper(
    "scheduled mixing of teacher and model",
    "arXiv:1506.03099",
    "generation",
    lambda: {"table": weight(20, 8), "gru": nn.GRUCell(8, SIZE), "out": linear(SIZE, 20)},
    {"h": SIZE, "p": 20},
    input_size=(),
    output_size=20,
    inputs=lambda steps, rows: torch.randint(0, 20, (steps, rows)),
)
def _scheduled(c: Any, x: Tensor, h: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    teacher = F.one_hot(x, 20).to(h.dtype)
    h = c.gru((0.7 * teacher + 0.3 * torch.softmax(p, -1)) @ c.table, h)
    logits = c.out(h)
    return F.log_softmax(logits, -1), h, logits


@TABLE.paper(
    "copy mechanism",
    "arXiv:1603.06393",
    "generation",
    lambda: {"gru": nn.GRUCell(FEATURES, SIZE), "g": linear(SIZE, 20), "q": linear(SIZE, 4), "gate": linear(SIZE, 1)},
    names=("x", "memory", "ids"),
    inputs=lambda steps, rows: (
        torch.randn(steps, rows, FEATURES),
        torch.randn(1, rows, 7, 4),
        torch.randint(0, 20, (1, rows, 7)),
    ),
    output_size=20,
)
def _copying(c: Any, x: Tensor, memory: Tensor, ids: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    h = c.gru(x, h)
    share = F.softmax((memory * c.q(h)[:, None]).sum(-1), -1)
    gate = torch.sigmoid(c.gate(h))
    copied = torch.zeros_like(h[:, :1]).expand(-1, 20).scatter_add(1, ids, share)
    return torch.log(gate * F.softmax(c.g(h), -1) + (1 - gate) * copied + 1e-9), h


@TABLE.paper(
    "transducer's prediction network",
    "arXiv:1211.3711",
    "generation",
    lambda: {"table": nn.Embedding(20, 8, padding_idx=0), "lstm": nn.LSTMCell(8, SIZE), "join": linear(SIZE, 20)},
    {"h": SIZE, "c": SIZE},
    input_size=(),
    output_size=20,
    inputs=lambda steps, rows: torch.randint(0, 20, (steps, rows)),
)
def _transducer(c: Any, x: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    new, memory = c.lstm(c.table(x), (h, m))
    blank = (x == 0)[:, None]  # a blank leaves the state
    h, m = torch.where(blank, h, new), torch.where(blank, m, memory)
    return c.join(torch.tanh(h)), h, m


@TABLE.paper(
    "DRAW, deterministic",
    "arXiv:1502.04623",
    "generation",
    lambda: {
        "enc": nn.GRUCell(2 * FEATURES, SIZE),
        "z": linear(SIZE, 4),
        "dec": nn.GRUCell(4, SIZE),
        "write": linear(SIZE, FEATURES),
    },
    {"he": SIZE, "hd": SIZE, "canvas": FEATURES},
    output_size=FEATURES,
)
def _draw(c: Any, x: Tensor, he: Tensor, hd: Tensor, canvas: Tensor) -> tuple[Tensor, ...]:
    he = c.enc(torch.cat([x, x - torch.sigmoid(canvas)], -1), he)
    hd = c.dec(c.z(he), hd)
    canvas = canvas + c.write(hd)
    return torch.sigmoid(canvas), he, hd, canvas


# --- sampling


@TABLE.paper(
    "RSSM, straight-through categorical",
    "arXiv:2010.02193",
    "sampling",
    lambda: {
        "inp": linear(FEATURES, SIZE),
        "mix": linear(SIZE + 12, SIZE),
        "gru": nn.GRUCell(SIZE, SIZE),
        "post": linear(2 * SIZE, 12),
    },
    {"h": SIZE, "z": (3, 4)},
    output_size={"h": SIZE, "logits": (3, 4)},
)
def _rssm(c: Any, x: Tensor, h: Tensor, z: Tensor) -> tuple[Any, ...]:
    embedded = c.inp(x)
    h = c.gru(F.elu(c.mix(torch.cat([embedded, z.flatten(1)], -1))), h)
    logits = c.post(torch.cat([h, embedded], -1)).view(-1, 3, 4)
    p = F.softmax(logits, -1)
    z = F.one_hot(torch.multinomial(p.reshape(-1, 4), 1).view(-1, 3), 4).to(p.dtype) + p - p.detach()
    return {"h": h, "logits": logits}, h, z


@TABLE.paper(
    "VRNN",
    "arXiv:1506.02216",
    "sampling",
    lambda: {"prior": linear(SIZE, 8), "post": linear(SIZE + FEATURES, 8), "gru": nn.GRUCell(FEATURES + 4, SIZE)},
    output_size=1,
)
def _vrnn(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    pm, ps = c.prior(h).chunk(2, -1)
    qm, qs = c.post(torch.cat([h, x], -1)).chunk(2, -1)
    prior, post = (
        torch.distributions.Normal(pm, F.softplus(ps) + 0.1),
        torch.distributions.Normal(qm, F.softplus(qs) + 0.1),
    )
    z = post.rsample()
    divergence = torch.distributions.kl_divergence(post, prior).sum(-1, keepdim=True)
    return divergence, c.gru(torch.cat([x, z], -1), h)


@TABLE.paper(
    "Gumbel softmax, hard",
    "arXiv:1611.01144",
    "sampling",
    lambda: {"gru": nn.GRUCell(FEATURES + 6, SIZE), "out": linear(SIZE, 6)},
    {"h": SIZE, "y": 6},
)
def _gumbel(c: Any, x: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    h = c.gru(torch.cat([x, y], -1), h)
    return h, h, F.gumbel_softmax(c.out(h), tau=0.7, hard=True)


@TABLE.paper(
    "recurrent dropout, a mask each step",
    "arXiv:1603.05118",
    "sampling",
    lambda: {"W": linear(FEATURES, 4 * SIZE), "U": linear(SIZE, 4 * SIZE), "drop": nn.Dropout(0.3)},
    {"h": SIZE, "c": SIZE},
)
def _dropped(c: Any, x: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    i, f, g, o = (c.W(x) + c.U(h)).chunk(4, -1)
    m = torch.sigmoid(f) * m + torch.sigmoid(i) * c.drop(torch.tanh(g))
    h = torch.sigmoid(o) * torch.tanh(m)
    return h, h, m


@TABLE.paper(
    "zoneout by hand",
    "arXiv:1606.01305",
    "sampling",
    lambda: {"lstm": nn.LSTMCell(FEATURES, SIZE)},
    {"h": SIZE, "c": SIZE},
)
def _zoneout(c: Any, x: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    new, memory = c.lstm(x, (h, m))
    h = torch.where(torch.rand_like(h) < 0.1, h, new)
    m = torch.where(torch.bernoulli(torch.full_like(m, 0.2)) > 0, m, memory)
    return h, h, m


@TABLE.paper(
    "DeepAR, a sample fed back",
    "arXiv:1704.04110",
    "sampling",
    lambda: {"lstm": nn.LSTMCell(FEATURES + 1, SIZE), "mean": linear(SIZE, 1), "scale": linear(SIZE, 1)},
    {"h": SIZE, "c": SIZE, "y": 1},
    output_size=2,
)
def _deepar(c: Any, x: Tensor, h: Tensor, m: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    h, m = c.lstm(torch.cat([x, y], -1), (h, m))
    mean, scale = c.mean(h), F.softplus(c.scale(h)) + 1e-3
    y = mean + scale * torch.randn_like(mean)
    return torch.cat([mean, scale], -1), h, m, y


# --- graphs


@TABLE.paper(
    "gated graph network",
    "arXiv:1511.05493",
    "graph",
    lambda: {"A": (torch.rand(5, 5) < 0.5).float(), "W": linear(4, 4), "gru": nn.GRUCell(4 + 3, 4)},
    {"h": (5, 4)},
    input_size=(5, 3),
)
def _gated_graph(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    message = torch.cat([c.A @ c.W(h), x], -1)
    h = c.gru(message.reshape(-1, 7), h.reshape(-1, 4)).view(-1, 5, 4)
    return h, h


@TABLE.paper(
    "DCRNN, diffusion convolution",
    "arXiv:1707.01926",
    "graph",
    lambda: {"P": torch.rand(5, 5).softmax(-1), "gate_maps": linear(3 * 7, 8), "n": linear(3 * 7, 4)},
    {"h": (5, 4)},
    input_size=(5, 3),
)
def _diffusion(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    def spread(value: Tensor) -> Tensor:
        return torch.cat([value, c.P @ value, c.P @ (c.P @ value)], -1)

    r, u = torch.sigmoid(c.gate_maps(spread(torch.cat([x, h], -1)))).chunk(2, -1)
    h = u * h + (1 - u) * torch.tanh(c.n(spread(torch.cat([x, r * h], -1))))
    return h, h


@TABLE.paper(
    "graph attention in a GRU",
    "arXiv:1710.10903",
    "graph",
    lambda: {
        "W": linear(7, 8),
        "a": weight(2, 8),
        "A": torch.eye(5) + torch.rand(5, 5).round(),
        "gate_maps": linear(8, 12),
        "U": linear(4, 12),
    },
    {"h": (5, 4)},
    input_size=(5, 3),
)
def _graph_attention(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    value = c.W(torch.cat([x, h], -1))
    left, right = value @ c.a[0], value @ c.a[1]
    score = F.leaky_relu(left[:, :, None] + right[:, None], 0.2).masked_fill(c.A < 0.5, -1e9)
    r, z, n = c.gate_maps(F.softmax(score, -1) @ value).chunk(3, -1)
    hr, hz, hn = c.U(h).chunk(3, -1)
    z = torch.sigmoid(z + hz)
    h = (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * h
    return h, h


@TABLE.paper(
    "interaction network, edges from states",
    "arXiv:1612.00222",
    "graph",
    lambda: {"edge": nn.Sequential(linear(8, 8), nn.ReLU(), linear(8, 4)), "node": linear(4 + 4 + 3, 4)},
    {"h": (5, 4)},
    input_size=(5, 3),
)
def _interaction(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    pairs = torch.cat([h[:, :, None].expand(-1, -1, 5, -1), h[:, None].expand(-1, 5, -1, -1)], -1)
    effects = c.edge(pairs).sum(2)
    h = h + 0.1 * torch.tanh(c.node(torch.cat([h, effects, x], -1)))
    return h, h


@TABLE.paper(
    "social pooling, the largest of neighbours",
    "arXiv:1803.10892",
    "graph",
    lambda: {"lstm": nn.LSTMCell(3 + 4, 4), "e": linear(4, 4)},
    {"h": (5, 4), "c": (5, 4)},
    input_size=(5, 3),
)
def _social(c: Any, x: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    pooled = torch.relu(c.e(h[:, None] - h[:, :, None])).amax(2)
    rows = torch.cat([x, pooled], -1).flatten(0, 1)
    h, m = (value.view(-1, 5, 4) for value in c.lstm(rows, (h.flatten(0, 1), m.flatten(0, 1))))
    return h, h, m


# --- the zoo's, where they are one of the published kinds and no case above is the same


def _zoo(name: str) -> fc.Cell:
    return next(entry for entry in fc.CELLS if entry.name == name).make(FEATURES, SIZE)


def _structured(name: str) -> fc.Cell:
    return next(entry for entry in fc.cells.STRUCTURED_CELLS if entry.name == name).make(FEATURES, SIZE)


for _name, _paper, _family in (
    ("lstm_layer_norm", "arXiv:1607.06450", "normed"),
    ("ligru", "arXiv:1803.10225", "audio"),
    ("co_rnn", "arXiv:2010.00951", "oscillators"),
    ("lstm_projected", "arXiv:1402.1128", "audio"),
):
    TABLE.package(f"zoo {_name}", _paper, _family, lambda name=_name: _zoo(name))
for _name, _paper, _family in (
    ("gated_delta_net", "arXiv:2412.06464", "matrix memory"),
    ("rwkv7", "arXiv:2503.14456", "rwkv"),
    ("mamba2", "arXiv:2405.21060", "ssm"),
    ("block_gru", "arXiv:2301.04104", "block-diagonal"),
):
    TABLE.package(f"zoo {_name}", _paper, _family, lambda name=_name: _structured(name))
