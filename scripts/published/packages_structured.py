"""Packages' cells with matrices, wirings, ODEs or complex states: ncps, xlstm, mambapy, popgym, dnc and others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fusecell as fc

from .case import FEATURES, HEADS, SIZE, CallingCell, Table

TABLE = Table()


def _closed_form(mode: str) -> fc.Cell:
    from ncps.torch import CfCCell

    def step(module: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return module(x[:, 1:], h, torch.sigmoid(x[:, :1]))

    return CallingCell(CfCCell(FEATURES - 1, SIZE, mode=mode), step, FEATURES, {"h": SIZE})


def _wired_closed_form() -> fc.Cell:
    from ncps.torch import WiredCfCCell
    from ncps.wirings import AutoNCP

    def step(module: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return module(x, h, 1.0)

    return CallingCell(WiredCfCCell(FEATURES, AutoNCP(SIZE, 4)), step, FEATURES, {"h": SIZE}, 4)


def _time_constants(wired: bool) -> fc.Cell:
    from ncps.torch import LTCCell
    from ncps.wirings import AutoNCP, FullyConnected

    def step(module: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return module(x, h, 1.0)

    wiring = AutoNCP(SIZE, 4) if wired else FullyConnected(SIZE, SIZE)
    module = LTCCell(wiring, FEATURES, implicit_param_constraints=True)
    return CallingCell(module, step, FEATURES, {"h": SIZE}, module.motor_size)


def _ncps_lstm() -> fc.Cell:
    from ncps.torch.lstm import LSTMCell

    return fc.wrap(LSTMCell(FEATURES, SIZE))


for _mode in ("default", "pure", "no_gate"):
    TABLE.package(f"ncps CfC {_mode}", "ncps", "liquid", lambda mode=_mode: _closed_form(mode))
TABLE.package("ncps WiredCfC", "ncps", "liquid", _wired_closed_form)
TABLE.package("ncps LTC", "ncps", "liquid", lambda: _time_constants(False))
TABLE.package("ncps LTC, AutoNCP", "ncps", "liquid", lambda: _time_constants(True))
TABLE.package("ncps LSTM", "ncps", "classic", _ncps_lstm)


def _xlstm_mlstm() -> fc.Cell:
    from xlstm.blocks.mlstm.cell import mLSTMCell, mLSTMCellConfig

    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.ModuleList([nn.Linear(FEATURES, SIZE) for _ in range(3)])
            self.cell = mLSTMCell(mLSTMCellConfig(context_length=8, embedding_dim=SIZE, num_heads=HEADS))

        def forward(self, x: Tensor, state: Any) -> Any:
            q, k, v = (layer(x)[:, None] for layer in self.maps)
            output, after = self.cell.step(q, k, v, state)
            return output[:, 0], after

    d = SIZE // HEADS
    return fc.wrap(Mapped(), input_size=FEATURES, state_sizes=((HEADS, d, d), (HEADS, d, 1), (HEADS, 1, 1)))


def _xlstm_layer() -> fc.Cell:
    from xlstm.blocks.mlstm.layer import mLSTMLayer, mLSTMLayerConfig

    layer = mLSTMLayer(mLSTMLayerConfig(embedding_dim=SIZE, context_length=8, num_heads=HEADS))
    inner = layer.config._inner_embedding_dim
    d, taps = inner // HEADS, layer.config.conv1d_kernel_size

    def step(module: Any, x: Tensor, c: Tensor, n: Tensor, m: Tensor, conv: Tensor) -> tuple[Tensor, ...]:
        # The package's convolution writes into its state.
        output, after = module.step(x[:, None], mlstm_state=(c, n, m), conv_state=(conv.clone(),))
        return output[:, 0], *after["mlstm_state"], after["conv_state"][0]

    states = {"c": (HEADS, d, d), "n": (HEADS, d, 1), "m": (HEADS, 1, 1), "conv": (taps, inner)}
    return CallingCell(layer, step, SIZE, states, SIZE)


def _xlstm_slstm(function: str) -> fc.Cell:
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.Linear(FEATURES, 4 * SIZE)
            config = sLSTMCellConfig(
                hidden_size=SIZE,
                num_heads=HEADS,
                num_states=4 if function == "slstm" else 2,
                backend="vanilla",
                function=function,
                dtype="float32",
            )
            self.cell = sLSTMCell(config)

        def forward(self, x: Tensor, state: Any) -> Any:
            output, after = self.cell(self.maps(x)[:, None], torch.stack(state))
            return output[:, :, 0].flatten(1), tuple(after)

    return fc.wrap(Mapped(), input_size=FEATURES, state_sizes=(SIZE,) * (4 if function == "slstm" else 2))


TABLE.package("xlstm mLSTMCell", "xlstm", "xlstm", _xlstm_mlstm)
TABLE.package("xlstm mLSTMLayer", "xlstm", "xlstm", _xlstm_layer, start="zeros")
TABLE.package("xlstm sLSTMCell", "xlstm", "xlstm", lambda: _xlstm_slstm("slstm"), start="zeros")
TABLE.package("xlstm LSTMCell", "xlstm", "xlstm", lambda: _xlstm_slstm("lstm"))


def _mamba(visual: bool) -> fc.Cell:
    from mambapy import mamba, vim

    module = vim if visual else mamba
    config = module.MambaConfig(d_model=FEATURES, n_layers=1, d_state=4, **({} if visual else {"pscan": False}))
    block = module.VMambaBlock(config) if visual else module.MambaBlock(config)

    def step(block: Any, x: Tensor, h: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
        output, after = block.step(x, (h, inputs))
        return output, *after

    inner = config.d_inner
    return CallingCell(block, step, FEATURES, {"h": (inner, 4), "inputs": (inner, config.d_conv - 1)}, FEATURES)


def _mamba_model() -> fc.Cell:
    from mambapy.mamba import Mamba, MambaConfig

    config = MambaConfig(d_model=FEATURES, n_layers=2, d_state=4)

    def step(model: Any, x: Tensor, h0: Tensor, u0: Tensor, h1: Tensor, u1: Tensor) -> tuple[Tensor, ...]:
        output, after = model.step(x, [(h0, u0), (h1, u1)])
        return output, *after[0], *after[1]

    h, u = (config.d_inner, 4), (config.d_inner, config.d_conv - 1)
    return CallingCell(Mamba(config), step, FEATURES, {"h0": h, "u0": u, "h1": h, "u1": u}, FEATURES)


# The package casts two parameters to float32, and the loop thereby their gradients at each step.
TABLE.package("mambapy MambaBlock", "mambapy", "ssm", lambda: _mamba(False), exact=1e-6)
TABLE.package("mambapy VMambaBlock", "mambapy", "ssm", lambda: _mamba(True), exact=1e-6)
TABLE.package("mambapy Mamba, two layers", "mambapy", "ssm", _mamba_model, exact=1e-6)


def _legendre(learned: bool) -> fc.Cell:
    from popgym.baselines.models.lmu import LMUCell

    module = LMUCell(FEATURES, SIZE, 6, 10, learn_a=learned, learn_b=learned)
    return fc.wrap(module, input_size=FEATURES, state_sizes=(SIZE, 6))


def _fast_weights() -> fc.Cell:
    from popgym.baselines.models.fwp import FWPBlock

    def step(module: Any, x: Tensor, S: Tensor) -> tuple[Tensor, ...]:
        output, after = module(x[:, None], S[:, None])
        return output[:, 0], after[:, 0]

    return CallingCell(FWPBlock(FEATURES, SIZE), step, FEATURES, {"S": (SIZE, SIZE)}, SIZE)


def _linear_attention() -> fc.Cell:
    from popgym.baselines.models.linear_attention import LinearAttentionBlock

    def step(module: Any, x: Tensor, S: Tensor, Z: Tensor) -> tuple[Tensor, ...]:
        output, (S, Z) = module(x[:, None], [S[:, None], Z[:, None]])
        return output[:, 0], S[:, 0], Z[:, 0]

    states = {"S": (SIZE, SIZE), "Z": SIZE}
    return CallingCell(LinearAttentionBlock(FEATURES, SIZE), step, FEATURES, states, SIZE)


def _independent() -> fc.Cell:
    from popgym.baselines.models.indrnn import IndRNN

    def step(module: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        output, after = module(x[:, None], h)
        return output[:, 0], after

    return CallingCell(IndRNN(FEATURES, SIZE), step, FEATURES, {"h": (2, SIZE)}, SIZE)


def _diagonal() -> fc.Cell:
    from popgym.baselines.models.s4d import SSKernelDiag

    # Made as the package's combination of initialisations makes it: decay -1/2, frequencies pi n, and C at random.
    n = torch.arange(4)
    w = (-0.5 + 1j * torch.pi * n).to(torch.complex64).repeat(FEATURES, 1)
    B, C = torch.ones(FEATURES, 4, dtype=torch.complex64), torch.randn(1, FEATURES, 4, dtype=torch.complex64)
    module = SSKernelDiag(w, B, C, torch.rand(FEATURES) - 4)

    def step(module: Any, x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        dt, A = torch.exp(module.log_dt), module._A()
        B, C = torch.view_as_complex(module.B), torch.view_as_complex(module.C)
        turned = torch.exp(A * dt[:, None])
        module_like = type("Discrete", (), {"dA": turned, "dB": B * (turned - 1) / A, "dC": C})
        y, after = SSKernelDiag.step(module_like, x, torch.view_as_complex(s))
        return y[:, 0], torch.view_as_real(after)

    return CallingCell(module, step, FEATURES, {"s": (FEATURES, 4, 2)}, FEATURES)


TABLE.package("popgym LMUCell", "popgym", "ssm", lambda: _legendre(False))
TABLE.package("popgym LMUCell, learned", "popgym", "ssm", lambda: _legendre(True))
TABLE.package("popgym FWPBlock", "popgym", "matrix memory", _fast_weights)
TABLE.package("popgym LinearAttentionBlock", "popgym", "matrix memory", _linear_attention)
TABLE.package("popgym IndRNN", "popgym", "classic", _independent)
TABLE.package("popgym S4D", "popgym", "complex", _diagonal)


def _neural_computer() -> fc.Cell:
    from dnc.memory import Memory

    places, width, heads = 5, 4, 2

    class Computer(fc.Cell):
        """A controller with the package's memory: its step with the memory passed in."""

        names = ("memory", "link_matrix", "precedence", "read_weights", "write_weights", "usage_vector")
        states = ("h", "read", *names)

        def __init__(self) -> None:
            super().__init__(FEATURES, SIZE)
            self.state_sizes = (
                SIZE,
                heads * width,
                (places, width),
                (1, places, places),
                (1, places),
                (heads, places),
                (1, places),
                places,
            )
            self.controller = nn.GRUCell(FEATURES + heads * width, SIZE)
            self.store = Memory(SIZE, places, width, heads)
            self.readout = nn.Linear(SIZE + heads * width, SIZE)

        def initial_state(self, batch_size: int, **options: Any) -> tuple[Tensor, ...]:
            # Of equal usages the order is torch's own choice, and another on another machine.
            *rest, usage = super().initial_state(batch_size, **options)
            return *rest, usage + torch.linspace(0.0, 0.1, places).to(usage)

        def step(self, x: Tensor, state: tuple[Tensor, ...]) -> Any:
            h, read, *memory = state
            h = self.controller(torch.cat([x, read], -1), h)
            values, after = self.store(h, dict(zip(self.names, memory, strict=True)))
            read = values.flatten(1)
            output = self.readout(torch.cat([h, read], -1))
            return output, (h, read, *[after[name] for name in self.names])

    return Computer()


TABLE.package("dnc Memory", "dnc", "matrix memory", _neural_computer, start="zeros")


def _neural_ode(method: str) -> fc.Cell:
    from torchdiffeq import odeint

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))
            self.gru = nn.GRUCell(FEATURES, SIZE)
            self.register_buffer("times", torch.linspace(0.0, 1.0, 3))

        def derivative(self, t: Tensor, h: Tensor) -> Tensor:
            return self.net(h)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            h = odeint(self.derivative, h, self.times, method=method)[-1]
            return self.gru(x, h)

    return fc.wrap(Between(), input_size=FEATURES, state_sizes=SIZE)


for _method in ("euler", "midpoint", "rk4"):
    TABLE.package(f"torchdiffeq ODE-RNN {_method}", "torchdiffeq", "ode", lambda method=_method: _neural_ode(method))


def _constrained(kind: str) -> fc.Cell:
    import geotorch

    class Constrained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs, self.recurrent = nn.Linear(FEATURES, SIZE), nn.Linear(SIZE, SIZE, bias=False)
            getattr(geotorch, kind)(self.recurrent, "weight")

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(self.inputs(x) + self.recurrent(h))

    return fc.wrap(Constrained(), input_size=FEATURES, state_sizes=SIZE)


for _kind in ("orthogonal", "skew", "symmetric"):
    TABLE.package(f"geotorch {_kind}", "geotorch", "parametrised", lambda kind=_kind: _constrained(kind))


def _cortex(noise: float) -> fc.Cell:
    from nn4n.model import CTRNN

    model = CTRNN(dims=[FEATURES, SIZE, 3], preact_noise=noise, postact_noise=noise)

    def step(layer: Any, x: Tensor, rate: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        rate, v = layer._recurrence(rate, v, x)
        return rate, rate, v

    return CallingCell(model.recurrent_layer, step, FEATURES, {"rate": SIZE, "v": SIZE})


# The package casts x to float32, whatever its weights are.
TABLE.package("nn4n CTRNN", "nn4n", "neuroscience", lambda: _cortex(0.0), exact=1e-5, in_double=False)
TABLE.package("nn4n CTRNN, noise", "nn4n", "neuroscience", lambda: _cortex(0.1), exact=1e-5, in_double=False)
