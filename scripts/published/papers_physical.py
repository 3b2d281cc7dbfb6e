"""Steps from papers: liquid cells, ODEs, oscillators and models of neuroscience."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import FEATURES, SIZE, Table, filled, linear, weight

TABLE = Table()


def _both() -> dict[str, Any]:
    return {"W": linear(FEATURES, SIZE), "U": linear(SIZE, SIZE, bias=False)}


def _timed(steps: int, rows: int) -> tuple[Tensor, ...]:
    return torch.randn(steps, rows, FEATURES), torch.rand(steps, rows, 1)


_TIMED: dict[str, Any] = {"names": ("x", "dt"), "inputs": _timed}


# --- liquid


@TABLE.paper(
    "liquid time constants, fused solver",
    "arXiv:2006.04439",
    "liquid",
    lambda: {**_both(), "A": weight(SIZE), "tau": filled(0.5, SIZE)},
)
def _liquid(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    for _ in range(3):
        f = torch.sigmoid(c.W(x) + c.U(h))
        h = (h + 0.3 * f * c.A) / (1 + 0.3 * (F.softplus(c.tau) + f))
    return h, h


@TABLE.paper(
    "CfC with irregular times",
    "arXiv:2106.13898",
    "liquid",
    lambda: {"bone": nn.Sequential(linear(FEATURES + SIZE, 24), nn.SiLU()), "heads": linear(24, 4 * SIZE)},
    **_TIMED,
)
def _closed_form(c: Any, x: Tensor, dt: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    f, g, a, b = c.heads(c.bone(torch.cat([x, h], -1))).chunk(4, -1)
    share = torch.sigmoid(a * dt + b)
    h = torch.tanh(f) * (1 - share) + share * torch.tanh(g)
    return h, h


@TABLE.paper(
    "liquid S4",
    "arXiv:2209.12951",
    "liquid",
    lambda: {"u": linear(FEATURES, SIZE), "A": weight(SIZE, 4), "B": weight(SIZE, 4), "C": weight(SIZE, 4)},
    {"s": (SIZE, 4)},
    output_size=SIZE,
)
def _liquid_s4(c: Any, x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    u = torch.tanh(c.u(x))[..., None]
    s = (torch.sigmoid(c.A) + c.B * u) * s + c.B * u
    return (c.C * s).sum(-1), s


@TABLE.paper(
    "saturated time constants", "Farsang 2024", "liquid", lambda: {**_both(), "g": linear(FEATURES + SIZE, SIZE)}
)
def _saturated(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    speed = F.hardsigmoid(c.g(torch.cat([x, h], -1)))
    h = h + speed * (-h + F.hardtanh(c.W(x) + c.U(h)))
    return h, h


# --- ODEs


def _field() -> dict[str, Any]:
    return {"net": nn.Sequential(linear(SIZE, 24), nn.Tanh(), linear(24, SIZE)), "gru": nn.GRUCell(FEATURES, SIZE)}


@TABLE.paper("ODE-RNN, Euler, irregular", "arXiv:1907.03907", "ode", _field, **_TIMED)
def _ode_euler(c: Any, x: Tensor, dt: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    for _ in range(4):
        h = h + dt / 4 * c.net(h)
    h = c.gru(x, h)
    return h, h


@TABLE.paper("ODE-RNN, Runge-Kutta", "arXiv:1907.03907", "ode", _field, **_TIMED)
def _ode_rk4(c: Any, x: Tensor, dt: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    k1 = c.net(h)
    k2 = c.net(h + dt / 2 * k1)
    k3 = c.net(h + dt / 2 * k2)
    k4 = c.net(h + dt * k3)
    h = c.gru(x, h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return h, h


@TABLE.paper(
    "GRU-ODE-Bayes",
    "arXiv:1905.12374",
    "ode",
    lambda: {
        "gate_maps": linear(SIZE, 2 * SIZE),
        "n": linear(SIZE, SIZE),
        "p": linear(SIZE, 2 * FEATURES),
        "gru": nn.GRUCell(4 * FEATURES, SIZE),
    },
    names=("x", "mask"),
    inputs=lambda steps, rows: (torch.randn(steps, rows, FEATURES), (torch.rand(steps, rows, FEATURES) < 0.5).float()),
)
def _bayes(c: Any, x: Tensor, mask: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    for _ in range(2):
        r, z = torch.sigmoid(c.gate_maps(h)).chunk(2, -1)
        h = h + 0.1 * (1 - z) * (torch.tanh(c.n(r * h)) - h)
    mean, log = c.p(h).chunk(2, -1)
    error = (x - mean) / torch.exp(0.5 * log)
    prepared = torch.cat([mean, log, error, x], -1) * mask.repeat(1, 4)
    seen = mask.amax(-1, keepdim=True)
    h = seen * c.gru(prepared, h) + (1 - seen) * h
    return h, h


@TABLE.paper(
    "neural CDE, Euler",
    "arXiv:2005.08926",
    "ode",
    lambda: {"net": nn.Sequential(linear(SIZE, 24), nn.ReLU(), linear(24, SIZE * FEATURES), nn.Tanh())},
    {"h": SIZE, "last": FEATURES},
)
def _controlled(c: Any, x: Tensor, h: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    field = c.net(h).view(-1, SIZE, FEATURES)
    h = h + torch.bmm(field, (x - last).unsqueeze(-1)).squeeze(-1)
    return h, h, x


@TABLE.paper(
    "Hamiltonian network, leapfrog",
    "arXiv:1906.01563",
    "ode",
    lambda: {"V": linear(8, 24), "v": weight(24), "m": filled(0.2, 8), "x": linear(FEATURES, 8)},
    {"q": 8, "p": 8},
    output_size=16,
)
def _hamiltonian(c: Any, x: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    def force(q: Tensor) -> Tensor:  # minus the gradient of v . log cosh(V q)
        return -(c.v * torch.tanh(c.V(q))) @ c.V.weight

    p = p + 0.05 * force(q) + 0.1 * c.x(x)
    q = q + 0.1 * p * F.softplus(c.m)
    p = p + 0.05 * force(q)
    return torch.cat([q, p], -1), q, p


@TABLE.paper(
    "implicit Euler, three Newton steps",
    "Hairer 1996",
    "ode",
    lambda: {"W": linear(FEATURES, 2), "A": weight(2, 2), "I": torch.eye(2)},
    {"h": 2},
)
def _implicit(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    y, drive = h, c.W(x)
    for _ in range(3):
        value = torch.tanh(y @ c.A.T + drive)
        J = c.I - 0.2 * (1 - value**2)[..., None] * c.A
        y = y - torch.linalg.solve(J, (y - h - 0.2 * value)[..., None]).squeeze(-1)
    return y, y


@TABLE.paper("Heun's method", "Funahashi 1993", "ode", lambda: {**_both(), "tau": filled(1.0, SIZE)})
def _heun(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    drive = c.W(x)
    a = (torch.tanh(drive + c.U(h)) - h) / c.tau
    b = (torch.tanh(drive + c.U(h + 0.2 * a)) - h - 0.2 * a) / c.tau
    h = h + 0.1 * (a + b)
    return h, h


# --- oscillators


@TABLE.paper(
    "UnICORNN, two layers",
    "arXiv:2103.05487",
    "oscillators",
    lambda: {
        "V": nn.ModuleList([linear(FEATURES, SIZE), linear(SIZE, SIZE)]),
        "w": weight(2, SIZE),
        "c": weight(2, SIZE),
    },
    {"y0": SIZE, "z0": SIZE, "y1": SIZE, "z1": SIZE},
)
def _unicornn(c: Any, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    after: list[Tensor] = []
    for i, V in enumerate(c.V):
        y, z = state[2 * i : 2 * i + 2]
        step = 0.1 * torch.sigmoid(c.c[i])
        z = z - step * (torch.tanh(c.w[i] * y + V(x)) + 0.9 * y)
        y = y + step * z
        x = y
        after += [y, z]
    return x, *after


@TABLE.paper(
    "LEM",
    "arXiv:2110.04744",
    "oscillators",
    lambda: {"a": linear(FEATURES + SIZE, 3 * SIZE), "b": linear(FEATURES + SIZE, SIZE)},
    {"y": SIZE, "z": SIZE},
)
def _long_memory(c: Any, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    s, t, g = c.a(torch.cat([x, y], -1)).chunk(3, -1)
    s, t = torch.sigmoid(s), torch.sigmoid(t)
    z = (1 - s) * z + s * torch.tanh(g)
    y = (1 - t) * y + t * torch.tanh(c.b(torch.cat([x, z], -1)))
    return y, y, z


@TABLE.paper(
    "LinOSS, implicit",
    "arXiv:2410.03943",
    "oscillators",
    lambda: {"A": weight(SIZE), "B": linear(FEATURES, SIZE), "C": linear(SIZE, SIZE)},
    {"y": SIZE, "z": SIZE},
)
def _linear_oscillators(c: Any, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    A, dt = torch.relu(c.A), 0.3
    z = (z - dt * A * y + dt * c.B(x)) / (1 + dt * dt * A)
    y = y + dt * z
    return F.gelu(c.C(y)), y, z


@TABLE.paper(
    "Kuramoto units",
    "arXiv:2410.13821",
    "oscillators",
    lambda: {"omega": weight(SIZE), "K": weight(SIZE, SIZE), "x": linear(FEATURES, SIZE)},
    {"theta": SIZE},
    output_size=2 * SIZE,
)
def _kuramoto(c: Any, x: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
    apart = theta[:, None, :] - theta[:, :, None]
    theta = torch.remainder(theta + 0.1 * (c.omega + (c.K * torch.sin(apart)).sum(-1) + c.x(x)), 2 * torch.pi)
    return torch.cat([theta.cos(), theta.sin()], -1), theta


@TABLE.paper(
    "graph-coupled oscillators",
    "arXiv:2202.02296",
    "oscillators",
    lambda: {"A": torch.rand(5, 5).softmax(-1), "W": linear(4, 4), "x": linear(FEATURES, 20)},
    {"y": (5, 4), "v": (5, 4)},
    output_size=(5, 4),
)
def _coupled(c: Any, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    v = v + 0.1 * (torch.tanh(c.A @ c.W(y) + c.x(x).view(-1, 5, 4)) - y - 0.5 * v)
    y = y + 0.1 * v
    return y, y, v


# --- neuroscience


@TABLE.paper(
    "excitatory and inhibitory rates, Dale",
    "Song 2016",
    "neuroscience",
    lambda: {
        "W": linear(FEATURES, SIZE),
        "J": weight(SIZE, SIZE),
        "sign": torch.ones(SIZE).index_fill(0, torch.arange(12, SIZE), -1.0),
        "mask": 1 - torch.eye(SIZE),
    },
)
def _dale(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    J = torch.abs(c.J) * c.mask * c.sign
    h = 0.8 * h + 0.2 * (torch.relu(h) @ J.T + c.W(x))
    return torch.relu(h), h


@TABLE.paper(
    "short-term plasticity, Mongillo",
    "Masse 2019",
    "neuroscience",
    lambda: {**_both(), "U0": nn.Parameter(torch.rand(SIZE) * 0.5)},
    {"h": SIZE, "u": SIZE, "r": SIZE},
)
def _synapses(c: Any, x: Tensor, h: Tensor, u: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    u = torch.clamp(u + 0.1 * (c.U0 - u) + 0.05 * c.U0 * (1 - u) * h, 0, 1)
    r = torch.clamp(r + 0.05 * (1 - r) - 0.05 * u * r * h, 0, 1)
    h = torch.relu(0.9 * h + 0.1 * (c.W(x) + c.U(u * r * h)))
    return h, h, u, r


@TABLE.paper(
    "Hebbian plasticity, Miconi",
    "arXiv:1804.02464",
    "neuroscience",
    lambda: {
        "x": linear(FEATURES, SIZE),
        "w": weight(SIZE, SIZE),
        "alpha": weight(SIZE, SIZE, scale=0.1),
        "eta": filled(0.1),
    },
    {"h": SIZE, "hebb": (SIZE, SIZE)},
)
def _hebbian(c: Any, x: Tensor, h: Tensor, hebb: Tensor) -> tuple[Tensor, ...]:
    new = torch.tanh(c.x(x) + torch.einsum("ni,nij->nj", h, c.w + c.alpha * hebb))
    hebb = torch.clamp(hebb + c.eta * h[:, :, None] * new[:, None], -2, 2)
    return new, new, hebb


@TABLE.paper(
    "neuromodulated plasticity, backpropamine",
    "arXiv:2002.10585",
    "neuroscience",
    lambda: {
        "x": linear(FEATURES, SIZE),
        "w": weight(SIZE, SIZE),
        "alpha": weight(SIZE, SIZE, scale=0.1),
        "m": linear(SIZE, 1),
    },
    {"h": SIZE, "E": (SIZE, SIZE), "P": (SIZE, SIZE)},
)
def _backpropamine(c: Any, x: Tensor, h: Tensor, E: Tensor, P: Tensor) -> tuple[Tensor, ...]:
    new = torch.tanh(c.x(x) + (h[:, None] @ (c.w + c.alpha * P)).squeeze(1))
    P = P + torch.tanh(c.m(new))[..., None] * E
    E = 0.9 * E + 0.1 * torch.bmm(h[:, :, None], new[:, None])
    return new, new, E, P


@TABLE.paper(
    "Wilson-Cowan",
    "Wilson 1972",
    "neuroscience",
    lambda: {"w": weight(4, SIZE), "x": linear(FEATURES, 2 * SIZE)},
    {"E": SIZE, "I": SIZE},
)
def _wilson(c: Any, x: Tensor, E: Tensor, I: Tensor) -> tuple[Tensor, ...]:  # noqa: E741
    drive = c.x(x)
    w = F.softplus(c.w)
    e, i = drive.chunk(2, -1)
    after = E + 0.2 * (-E + (1 - E) * torch.sigmoid(w[0] * E - w[1] * I + e))
    I = I + 0.1 * (-I + (1 - I) * torch.sigmoid(w[2] * E - w[3] * I + i))  # noqa: E741
    return after - I, after, I


@TABLE.paper("rates with noise of their own", "Yang 2019", "neuroscience", _both)
def _noisy(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    h = 0.8 * h + 0.2 * F.softplus(c.W(x) + c.U(h) + 0.1 * torch.randn_like(h))
    return h, h


@TABLE.paper(
    "divisive normalisation", "Carandini 2012", "neuroscience", lambda: {**_both(), "pool": weight(SIZE, SIZE)}
)
def _divisive(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    drive = torch.relu(c.W(x) + c.U(h)) ** 2
    h = 0.5 * h + 0.5 * drive / (0.3 + drive @ torch.softmax(c.pool, -1).T)
    return h, h


@TABLE.paper(
    "continuous attractor on a ring",
    "Zhang 1996",
    "neuroscience",
    lambda: {"J": torch.cos(2 * torch.pi * torch.arange(SIZE) / SIZE), "x": linear(FEATURES, 2)},
)
def _attractor(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    left, right = (torch.sigmoid(part) for part in c.x(x).chunk(2, -1))
    rate = F.softmax(h, -1)
    spread = torch.fft.irfft(torch.fft.rfft(rate) * torch.fft.rfft(c.J), n=SIZE)
    h = 0.9 * h + spread + 0.1 * (left * rate.roll(1, -1) + right * rate.roll(-1, -1))
    return h, h


@TABLE.paper(
    "predictive coding, two inner steps",
    "Rao 1999",
    "neuroscience",
    lambda: {"W": linear(SIZE, FEATURES, bias=False), "V": linear(SIZE, SIZE, bias=False)},
)
def _predictive(c: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    prior = c.V(h)
    r = prior
    for _ in range(2):
        error = x - torch.tanh(c.W(r))
        r = r + 0.1 * ((error * (1 - torch.tanh(c.W(r)) ** 2)) @ c.W.weight - (r - prior))
    return r, r
