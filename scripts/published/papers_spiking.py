"""Steps from papers: spiking neurons with surrogate gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .case import FEATURES, SIZE, Table, filled, linear, weight

TABLE = Table()


class FastSigmoid(torch.autograd.Function):
    """A step whose gradient is that of a fast sigmoid."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return grad / (1 + 10 * v.abs()) ** 2


class Triangle(torch.autograd.Function):
    """A step whose gradient is a triangle of a given width."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.width = width
        return torch.heaviside(v, torch.zeros_like(v))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return grad * torch.relu(1 - v.abs() / ctx.width), None


def _both() -> dict[str, Any]:
    return {"W": linear(FEATURES, SIZE), "U": linear(SIZE, SIZE, bias=False)}


@TABLE.paper("LIF with a fast sigmoid", "arXiv:1705.11146", "spiking", _both, {"v": SIZE, "z": SIZE})
def _superspike(c: Any, x: Tensor, v: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    v = 0.9 * v * (1 - z.detach()) + c.W(x) + c.U(z)
    z = FastSigmoid.apply(v - 1)
    return z, v, z


@TABLE.paper("LSNN with adaptation", "arXiv:1803.09574", "spiking", _both, {"v": SIZE, "z": SIZE, "a": SIZE})
def _adaptive(c: Any, x: Tensor, v: Tensor, z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    a = 0.95 * a + z
    v = 0.9 * v + c.W(x) + c.U(z) - z
    z = Triangle.apply(v - 1 - 0.1 * a, 0.5)
    return z, v, z, a


@TABLE.paper("straight-through threshold", "arXiv:1308.3432", "spiking", _both, {"v": SIZE})
def _straight_through(c: Any, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    v = 0.8 * v + c.W(x)
    soft = torch.sigmoid(4 * (v - 1))
    spikes = soft + ((v > 1).to(v.dtype) - soft).detach()
    return spikes, v - spikes


@TABLE.paper(
    "delays by a ring of spikes",
    "arXiv:2306.17670",
    "spiking",
    lambda: {**_both(), "d": weight(5, SIZE)},
    {"v": SIZE, "ring": (5, SIZE)},
)
def _delayed(c: Any, x: Tensor, v: Tensor, ring: Tensor) -> tuple[Tensor, ...]:
    late = (F.softmax(c.d, 0) * ring).sum(1)
    v = 0.9 * v + c.W(x) + c.U(late)
    z = FastSigmoid.apply(v - 1)
    return z, v - z, torch.cat([z[:, None], ring[:, :-1]], 1)


@TABLE.paper(
    "resonate and fire",
    "Izhikevich 2001",
    "spiking",
    lambda: {"W": linear(FEATURES, SIZE), "omega": weight(SIZE), "b": filled(0.3, SIZE)},
    {"u": SIZE, "v": SIZE},
)
def _resonate(c: Any, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    decay = torch.exp(-F.softplus(c.b))
    cos, sin = decay * torch.cos(c.omega), decay * torch.sin(c.omega)
    u, v = cos * u - sin * v + c.W(x), sin * u + cos * v
    z = FastSigmoid.apply(u - 1)
    return z, u * (1 - z), v


@TABLE.paper(
    "two compartments", "Zhang 2024", "spiking", lambda: {**_both(), "g": weight(2, SIZE)}, {"d": SIZE, "s": SIZE}
)
def _compartments(c: Any, x: Tensor, d: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    d = d + torch.tanh(c.g[0]) * s + c.W(x)
    s = s + torch.tanh(c.g[1]) * d
    z = FastSigmoid.apply(s - 1)
    return z, d - 0.5 * z, s - z


@TABLE.paper(
    "refractory by a counter", "Gerstner 2002", "spiking", _both, {"v": SIZE, "z": SIZE, "count": SIZE}, start="zeros"
)
def _refractory(c: Any, x: Tensor, v: Tensor, z: Tensor, count: Tensor) -> tuple[Tensor, ...]:
    free = count <= 0
    v = torch.where(free, 0.9 * v + c.W(x) + c.U(z), torch.zeros_like(v))
    z = FastSigmoid.apply(v - 0.5) * free
    return z, v, z, torch.where(z > 0.5, torch.full_like(count, 2.0), (count - 1).clamp(min=0))


@TABLE.paper("stochastic spikes", "Jang 2019", "sampling", _both, {"v": SIZE})
def _stochastic(c: Any, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    v = 0.9 * v + c.W(x)
    p = torch.sigmoid(3 * (v - 0.5))
    z = torch.bernoulli(p.detach()) - p.detach() + p
    return z, v * (1 - z.detach())


@TABLE.paper("lateral inhibition, one winner", "Maass 2000", "spiking", _both, {"v": SIZE})
def _winner(c: Any, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    v = 0.9 * v + c.W(x)
    best = F.one_hot(v.argmax(-1), SIZE).to(v.dtype)
    z = best * FastSigmoid.apply(v - 0.5)
    return z, v * (1 - best)


@TABLE.paper(
    "e-prop's eligibility traces", "Bellec 2020", "spiking", _both, {"v": SIZE, "z": SIZE, "trace": (SIZE, FEATURES)}
)
def _eligibility(c: Any, x: Tensor, v: Tensor, z: Tensor, trace: Tensor) -> tuple[Tensor, ...]:
    v = 0.9 * v + c.W(x) + c.U(z) - z
    z = Triangle.apply(v - 1, 1.0)
    trace = 0.9 * trace + torch.relu(1 - (v - 1).abs())[..., None] * x[:, None]
    return z, v, z, trace


@TABLE.paper(
    "STDP",
    "Bi 1998",
    "spiking",
    lambda: {"W": linear(FEATURES, SIZE)},
    {"v": SIZE, "pre": FEATURES, "post": SIZE, "w": (SIZE, FEATURES)},
)
def _stdp(c: Any, x: Tensor, v: Tensor, pre: Tensor, post: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    s = (x > 0.5).to(x.dtype)
    v = 0.9 * v + c.W(x) + torch.bmm(w, s[..., None])[..., 0]
    z = FastSigmoid.apply(v - 1)
    pre, post = 0.8 * pre + s, 0.8 * post + z
    w = (w + 0.05 * z[..., None] * pre[:, None] - 0.04 * post[..., None] * s[:, None]).clamp(-1, 1)
    return z, v * (1 - z), pre, post, w


@TABLE.paper(
    "Hodgkin-Huxley, small steps",
    "Hodgkin 1952",
    "neuroscience",
    lambda: {"W": linear(FEATURES, SIZE)},
    {"v": SIZE, "m": SIZE, "h": SIZE, "n": SIZE},
)
def _hodgkin(c: Any, x: Tensor, v: Tensor, m: Tensor, h: Tensor, n: Tensor) -> tuple[Tensor, ...]:
    m, h, n = (value.sigmoid() for value in (m, h, n))
    for _ in range(2):
        current = 1.2 * m**3 * h * (v - 0.5) + 0.36 * n**4 * (v + 0.77) + 0.03 * (v + 0.54)
        v = v + 0.05 * (c.W(x) - current)
        rise, fall = F.softplus(5 * v + 1), torch.exp(-2 * v).clamp(max=4)
        m, n = m + 0.05 * (rise * (1 - m) - fall * m), n + 0.05 * (0.3 * rise * (1 - n) - 0.2 * fall * n)
        h = h + 0.05 * (0.1 * fall * (1 - h) - rise * h)
    return v, v, torch.logit(m, eps=1e-3), torch.logit(h, eps=1e-3), torch.logit(n, eps=1e-3)
