"""Steps from papers: state spaces, complex states, matrix memories, attention, RWKV and xLSTM."""

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
