"""Steps from papers: sampling and graphs; and the zoo's published cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecell as fc

from .case import FEATURES, SIZE, Table, linear, weight

TABLE = Table()
_IMAGE = (3, 6, 5)
_STATE = (4, 6, 5)


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
