"""Steps from papers: attention and RWKV."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import FEATURES, HEADS, SIZE, Table, linear, weight

TABLE = Table()
_D = SIZE // HEADS
_MATRIX = {"S": (HEADS, _D, _D)}


def _qkv(*, gates: int = 0) -> dict[str, Any]:
    return {"maps": linear(FEATURES, 3 * SIZE + gates * HEADS), "out": linear(SIZE, SIZE)}


def _heads(value: Tensor) -> Tensor:
    return value.view(-1, HEADS, _D)


# --- attention


def _memory(features: int) -> Any:
    def made(steps: int, rows: int) -> tuple[Tensor, ...]:
        return torch.randn(steps, rows, FEATURES), torch.randn(1, rows, 7, features)

    return made


@TABLE.paper(
    "Luong attention",
    "arXiv:1508.04025",
    "attention",
    lambda: {"gru": nn.GRUCell(FEATURES + SIZE, SIZE), "W": linear(SIZE, SIZE), "both": linear(2 * SIZE, SIZE)},
    {"h": SIZE, "a": SIZE},
    names=("x", "memory"),
    inputs=_memory(SIZE),
)
def _luong(c: Any, x: Tensor, memory: Tensor, h: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    h = c.gru(torch.cat([x, a], -1), h)
    share = F.softmax(torch.bmm(memory, c.W(h).unsqueeze(2)).squeeze(2), -1)
    a = torch.tanh(c.both(torch.cat([torch.bmm(share.unsqueeze(1), memory).squeeze(1), h], -1)))
    return a, h, a


@TABLE.paper(
    "multi-head attention over a memory",
    "arXiv:1706.03762",
    "attention",
    lambda: {
        "gru": nn.GRUCell(FEATURES + SIZE, SIZE),
        "attention": nn.MultiheadAttention(SIZE, HEADS, batch_first=True),
    },
    names=("x", "memory"),
    inputs=_memory(SIZE),
)
def _multihead(c: Any, x: Tensor, memory: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    read, _ = c.attention(h[:, None], memory, memory, need_weights=False)
    h = c.gru(torch.cat([x, read[:, 0]], -1), h)
    return h, h


@TABLE.paper(
    "attention over a ring of the last states",
    "arXiv:1601.06733",
    "attention",
    lambda: {"gru": nn.GRUCell(FEATURES + SIZE, SIZE), "q": linear(SIZE, SIZE)},
    {"h": SIZE, "ring": (5, SIZE)},
)
def _ring(c: Any, x: Tensor, h: Tensor, ring: Tensor) -> tuple[Tensor, ...]:
    read = F.scaled_dot_product_attention(c.q(h)[:, None], ring, ring)[:, 0]
    h = c.gru(torch.cat([x, read], -1), h)
    return h, h, torch.cat([ring[:, 1:], h[:, None]], 1)


@TABLE.paper(
    "pointer network step",
    "arXiv:1506.03134",
    "attention",
    lambda: {"lstm": nn.LSTMCell(4, SIZE), "W": linear(SIZE, 8), "U": linear(4, 8), "v": linear(8, 1)},
    {"h": SIZE, "c": SIZE, "taken": 7, "last": 4},
    names=("x", "memory"),
    inputs=_memory(4),
    output_size=7,
    start="zeros",
)
def _pointer(
    c: Any, x: Tensor, memory: Tensor, h: Tensor, m: Tensor, taken: Tensor, last: Tensor
) -> tuple[Tensor, ...]:
    h, m = c.lstm(last, (h, m))
    score = c.v(torch.tanh(c.W(h)[:, None] + c.U(memory))).squeeze(-1) + x[:, :7] * 0.1
    score = score.masked_fill(taken > 0.5, -1e4)
    place = score.argmax(-1, keepdim=True)
    taken = taken.scatter(1, place, 1.0)
    taken = taken * (taken.sum(-1, keepdim=True) < 6.5)
    last = memory.gather(1, place[..., None].expand(-1, 1, 4))[:, 0]
    return F.log_softmax(score, -1), h, m, taken, last


@TABLE.paper(
    "gaussian window of handwriting synthesis",
    "arXiv:1308.0850",
    "attention",
    lambda: {"lstm": nn.LSTMCell(FEATURES + 4, SIZE), "w": linear(SIZE, 9)},
    {"h": SIZE, "c": SIZE, "k": 3, "r": 4},
    names=("x", "memory"),
    inputs=_memory(4),
    start="zeros",
)
def _window(c: Any, x: Tensor, memory: Tensor, h: Tensor, m: Tensor, k: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    h, m = c.lstm(torch.cat([x, r], -1), (h, m))
    a, b, step = torch.exp(c.w(h) * 0.3).chunk(3, -1)
    k = k + step
    places = torch.arange(7, dtype=x.dtype)
    share = (a[..., None] * torch.exp(-b[..., None] * (k[..., None] - places) ** 2)).sum(1)
    r = torch.bmm(share[:, None], memory)[:, 0]
    return torch.cat([h, r], -1)[:, :SIZE], h, m, k, r


@TABLE.paper(
    "relational memory core",
    "arXiv:1806.01822",
    "attention",
    lambda: {
        "inp": linear(FEATURES, _D),
        "attention": nn.MultiheadAttention(_D, 2, batch_first=True),
        "mlp": nn.Sequential(linear(_D, _D), nn.ReLU()),
        "n1": nn.LayerNorm(_D),
        "n2": nn.LayerNorm(_D),
        "gate_maps": linear(_D, 2 * _D),
        "U": linear(_D, 2 * _D),
    },
    {"M": (HEADS, _D)},
    output_size=SIZE,
)
def _relational(c: Any, x: Tensor, M: Tensor) -> tuple[Tensor, ...]:
    x = c.inp(x)[:, None]
    everything = torch.cat([M, x], 1)
    new = c.n1(M + c.attention(M, everything, everything, need_weights=False)[0])
    new = c.n2(new + c.mlp(new))
    i, f = (c.gate_maps(x) + c.U(torch.tanh(M))).chunk(2, -1)
    M = torch.sigmoid(i) * torch.tanh(new) + torch.sigmoid(f + 1) * M
    return M.flatten(1), M


# --- RWKV


def _mixes(count: int) -> dict[str, Any]:
    return {"mix": nn.Parameter(torch.rand(count, FEATURES)), "out": linear(SIZE, FEATURES)}


def _mixed(c: Any, x: Tensor, last: Tensor) -> list[Tensor]:
    return [torch.lerp(last, x, mix) for mix in c.mix]


@TABLE.paper(
    "RWKV-4",
    "arXiv:2305.13048",
    "rwkv",
    lambda: {
        **_mixes(3),
        "k": linear(FEATURES, SIZE),
        "v": linear(FEATURES, SIZE),
        "r": linear(FEATURES, SIZE),
        "w": weight(SIZE),
        "u": weight(SIZE),
    },
    {"last": FEATURES, "a": SIZE, "b": SIZE, "p": SIZE},
    start="zeros",
)
def _rwkv4(c: Any, x: Tensor, last: Tensor, a: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    xk, xv, xr = _mixed(c, x, last)
    k, v, r = c.k(xk), c.v(xv), torch.sigmoid(c.r(xr))
    top = torch.maximum(p, c.u + k)
    old, new = torch.exp(p - top), torch.exp(c.u + k - top)
    y = (old * a + new * v) / (old * b + new)
    decayed = p - torch.exp(c.w)
    top = torch.maximum(decayed, k)
    old, new = torch.exp(decayed - top), torch.exp(k - top)
    return c.out(r * y), x, old * a + new * v, old * b + new, top


@TABLE.paper(
    "RWKV-5",
    "arXiv:2404.05892",
    "rwkv",
    lambda: {
        **_mixes(4),
        "maps": nn.ModuleList([linear(FEATURES, SIZE) for _ in range(4)]),
        "w": weight(HEADS, _D),
        "u": weight(HEADS, _D),
        "norm": nn.GroupNorm(HEADS, SIZE),
    },
    {"last": FEATURES, **_MATRIX},
)
def _rwkv5(c: Any, x: Tensor, last: Tensor, S: Tensor) -> tuple[Tensor, ...]:
    r, k, v, g = (layer(part) for layer, part in zip(c.maps, _mixed(c, x, last), strict=True))
    kv = _heads(k)[..., None] * _heads(v)[:, :, None]
    y = (_heads(r)[:, :, None] @ (S + c.u[..., None] * kv)).reshape(-1, SIZE)
    S = torch.exp(-torch.exp(c.w))[..., None] * S + kv
    return c.out(c.norm(y) * F.silu(g)), x, S


@TABLE.paper(
    "RWKV-6",
    "arXiv:2404.05892",
    "rwkv",
    lambda: {
        **_mixes(4),
        "maps": nn.ModuleList([linear(FEATURES, SIZE) for _ in range(4)]),
        "lora": nn.Sequential(linear(FEATURES, 4), nn.Tanh(), linear(4, SIZE)),
        "u": weight(HEADS, _D),
    },
    {"last": FEATURES, **_MATRIX},
)
def _rwkv6(c: Any, x: Tensor, last: Tensor, S: Tensor) -> tuple[Tensor, ...]:
    r, k, v, g = (layer(part) for layer, part in zip(c.maps, _mixed(c, x, last), strict=True))
    decay = torch.exp(-torch.exp(_heads(c.lora(x))))
    kv = torch.einsum("nhk,nhv->nhkv", _heads(k), _heads(v))
    y = torch.einsum("nhk,nhkv->nhv", _heads(r), S + c.u[..., None] * kv)
    return c.out(F.layer_norm(y, (_D,)).flatten(1) * F.silu(g)), x, decay[..., None] * S + kv


@TABLE.paper(
    "RWKV channel mixing",
    "arXiv:2305.13048",
    "rwkv",
    lambda: {
        "mix": nn.Parameter(torch.rand(2, FEATURES)),
        "k": linear(FEATURES, SIZE),
        "v": linear(SIZE, FEATURES),
        "r": linear(FEATURES, FEATURES),
    },
    {"last": FEATURES},
)
def _channels(c: Any, x: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    xk, xr = _mixed(c, x, last)
    return torch.sigmoid(c.r(xr)) * c.v(torch.relu(c.k(xk)) ** 2), x
