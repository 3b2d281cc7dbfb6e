"""Steps from papers: missing data, and generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import FEATURES, SIZE, Inputs, Table, filled, linear, weight

TABLE = Table()
_IMAGE = (3, 6, 5)
_STATE = (4, 6, 5)


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
