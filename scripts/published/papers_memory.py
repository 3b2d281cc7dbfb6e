"""Steps from papers: memories that are matrices, stacks or places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import FEATURES, HEADS, SIZE, Table, linear

TABLE = Table()
_D = SIZE // HEADS
_MATRIX = {"S": (HEADS, _D, _D)}


def _qkv(*, gates: int = 0) -> dict[str, Any]:
    return {"maps": linear(FEATURES, 3 * SIZE + gates * HEADS), "out": linear(SIZE, SIZE)}


def _heads(value: Tensor) -> Tensor:
    return value.view(-1, HEADS, _D)


# --- matrix memories


@TABLE.paper(
    "linear attention",
    "arXiv:2006.16236",
    "matrix memory",
    _qkv,
    {**_MATRIX, "z": (HEADS, _D)},
    output_size=SIZE,
    start="zeros",
)
def _linear_attention(c: Any, x: Tensor, S: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (_heads(part) for part in c.maps(x).chunk(3, -1))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    S = S + torch.einsum("nhk,nhv->nhkv", k, v)
    z = z + k
    y = torch.einsum("nhk,nhkv->nhv", q, S) / ((q * z).sum(-1, keepdim=True) + 1e-6)
    return c.out(y.flatten(1)), S, z


@TABLE.paper(
    "RetNet",
    "arXiv:2307.08621",
    "matrix memory",
    lambda: {**_qkv(), "norm": nn.GroupNorm(HEADS, SIZE), "decay": 1 - 2.0 ** (-2 - torch.arange(HEADS).float())},
    _MATRIX,
    output_size=SIZE,
)
def _retention(c: Any, x: Tensor, S: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (_heads(part) for part in c.maps(x).chunk(3, -1))
    S = c.decay[:, None, None] * S + k.unsqueeze(-1) @ v.unsqueeze(-2)
    return c.out(c.norm((q.unsqueeze(-2) @ S).reshape(-1, SIZE))), S


@TABLE.paper(
    "gated linear attention",
    "arXiv:2312.06635",
    "matrix memory",
    lambda: {**_qkv(), "a": nn.Sequential(linear(FEATURES, 4), linear(4, SIZE))},
    _MATRIX,
    output_size=SIZE,
)
def _gla(c: Any, x: Tensor, S: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (_heads(part) for part in c.maps(x).chunk(3, -1))
    decay = _heads(torch.sigmoid(c.a(x)) ** (1 / 16))
    S = decay[..., None] * S + k[..., None] * v[:, :, None]
    return c.out((q[..., None] * S).sum(2).flatten(1)), S


@TABLE.paper("DeltaNet", "arXiv:2102.11174", "matrix memory", lambda: _qkv(gates=1), _MATRIX, output_size=SIZE)
def _delta(c: Any, x: Tensor, S: Tensor) -> tuple[Tensor, ...]:
    q, k, v, beta = c.maps(x).split([SIZE, SIZE, SIZE, HEADS], -1)
    q, k, v = F.normalize(F.silu(_heads(q)), dim=-1), F.normalize(F.silu(_heads(k)), dim=-1), _heads(v)
    old = torch.einsum("nhk,nhkv->nhv", k, S)
    S = S + torch.einsum("nhk,nhv->nhkv", k, torch.sigmoid(beta)[..., None] * (v - old))
    return c.out(torch.einsum("nhk,nhkv->nhv", q, S).flatten(1)), S


@TABLE.paper(
    "fast weights, three inner steps",
    "arXiv:1610.06258",
    "matrix memory",
    lambda: {"W": linear(FEATURES, SIZE), "U": linear(SIZE, SIZE), "norm": nn.LayerNorm(SIZE)},
    {"h": SIZE, "A": (SIZE, SIZE)},
)
def _fast_weights(c: Any, x: Tensor, h: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    A = 0.95 * A + 0.5 * torch.bmm(h.unsqueeze(2), h.unsqueeze(1))
    base = c.W(x) + c.U(h)
    inner = torch.tanh(base)
    for _ in range(3):
        inner = torch.relu(c.norm(base + torch.bmm(A, inner.unsqueeze(2)).squeeze(2)))
    return inner, inner, A


@TABLE.paper(
    "neural Turing machine",
    "arXiv:1410.5401",
    "matrix memory",
    lambda: {"gru": nn.GRUCell(FEATURES + 4, SIZE), "face": linear(SIZE, 4 + 1 + 1 + 3 + 1 + 8)},
    {"h": SIZE, "M": (6, 4), "w": 6, "r": 4},
    start="zeros",
)
def _turing(c: Any, x: Tensor, h: Tensor, M: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    h = c.gru(torch.cat([x, r], -1), h)
    key, beta, g, shift, gamma, erase, add = c.face(h).split([4, 1, 1, 3, 1, 4, 4], -1)
    score = F.cosine_similarity(M + 1e-3, key[:, None] + 1e-3, dim=-1)
    content = F.softmax(F.softplus(beta) * score, -1)
    g, shift = torch.sigmoid(g), F.softmax(shift, -1)
    w = g * content + (1 - g) * w
    w = sum(shift[:, i : i + 1] * w.roll(i - 1, -1) for i in range(3))
    w = (w + 1e-6) ** (1 + F.softplus(gamma))
    w = w / w.sum(-1, keepdim=True)
    M = M * (1 - w[..., None] * torch.sigmoid(erase)[:, None]) + w[..., None] * torch.tanh(add)[:, None]
    r = torch.einsum("np,npd->nd", w, M)
    return h, h, M, w, r


@TABLE.paper(
    "neural stack",
    "arXiv:1506.02516",
    "matrix memory",
    lambda: {"gru": nn.GRUCell(FEATURES + 4, SIZE), "face": linear(SIZE, 6)},
    {"h": SIZE, "V": (5, 4), "s": 5, "r": 4},
    start="zeros",
)
def _stack(c: Any, x: Tensor, h: Tensor, V: Tensor, s: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    h = c.gru(torch.cat([x, r], -1), h)
    value, push, pop = c.face(h).split([4, 1, 1], -1)
    push, pop = torch.sigmoid(push), torch.sigmoid(pop)
    above = s.flip(-1).cumsum(-1).flip(-1) - s
    s = torch.relu(s - torch.relu(pop - above))
    V = torch.cat([V[:, 1:], torch.tanh(value)[:, None]], 1)
    s = torch.cat([s[:, 1:], push], -1)
    above = s.flip(-1).cumsum(-1).flip(-1) - s
    r = (torch.minimum(s, torch.relu(1 - above))[..., None] * V).sum(1)
    return h, h, V, s, r


@TABLE.paper(
    "Longhorn",
    "arXiv:2407.14207",
    "matrix memory",
    lambda: {"maps": linear(FEATURES, SIZE + 8), "beta": linear(FEATURES, SIZE)},
    {"S": (SIZE, 4)},
    output_size=SIZE,
)
def _longhorn(c: Any, x: Tensor, S: Tensor) -> tuple[Tensor, ...]:
    v, k, q = c.maps(x).split([SIZE, 4, 4], -1)
    beta = torch.sigmoid(c.beta(x))
    epsilon = (beta / (1 + beta * (k * k).sum(-1, keepdim=True)))[..., None]
    S = (1 - epsilon * (k * k)[:, None]) * S + epsilon * v[..., None] * k[:, None]
    return (S @ q[..., None]).squeeze(-1), S


@TABLE.paper(
    "TTT, linear inner model", "arXiv:2407.04620", "matrix memory", _qkv, {"W": (HEADS, _D, _D)}, output_size=SIZE
)
def _test_time(c: Any, x: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (_heads(part) for part in c.maps(x).chunk(3, -1))
    error = torch.einsum("nhk,nhkv->nhv", k, W) + k - v
    W = W - 0.1 * k[..., None] * error[:, :, None]
    read = torch.einsum("nhk,nhkv->nhv", q, W)
    return c.out((q + F.layer_norm(read, (_D,))).flatten(1)), W
