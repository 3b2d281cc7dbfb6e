"""Packages' gated cells: all of torchrecurrent's, speechbrain's, sheeprl's, neuralhydrology's, pypots' and others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import fusecell as fc

from .case import FEATURES, SIZE, CallingCell, Table

TABLE = Table()

# In the order of the package's documentation; the state is one tensor unless said otherwise below.
_TORCHRECURRENT = """
    ATR AntisymmetricRNN BR CFN DSGU FastGRNN FastRNN GatedAntisymmetricRNN IndRNN IntersectionRNN JANET LEM LiGRU
    LightRU MCLSTM MGU MUT1 MUT2 MUT3 MiRU1 MiRU2 MinimalRNN MultiplicativeLSTM NAS NBR OriginalLSTM PeepholeLSTM RAN
    ResLSTM SCRN SGRN SGU STAR TGRU TLSTM TRNN UGRNN UnICORNN WMCLSTM coRNN tauGRU
"""


def _torchrecurrent(name: str) -> fc.Cell:
    import torchrecurrent

    kind = getattr(torchrecurrent, f"{name}Cell")
    if name == "IntersectionRNN":
        return fc.wrap(kind(SIZE, SIZE))
    if name in ("TGRU", "TLSTM"):  # they keep the last input, of x's size
        return _with_last_input(kind(FEATURES, SIZE), name)
    if name == "tauGRU":
        return CallingCell(kind(FEATURES, SIZE), _delayed, FEATURES, {"h": SIZE, "before": SIZE})
    return fc.wrap(kind(FEATURES, SIZE))


def _with_last_input(module: nn.Module, name: str) -> fc.Cell:
    if name == "TGRU":
        return CallingCell(module, _twice_passed, FEATURES, {"h": SIZE, "last": FEATURES})
    return CallingCell(module, _memory_passed, FEATURES, {"c": SIZE, "last": FEATURES})


def _delayed(module: nn.Module, x: Tensor, h: Tensor, before: Tensor) -> tuple[Tensor, ...]:
    new = module(x, h, before)
    return new, new, h


def _twice_passed(module: nn.Module, x: Tensor, h: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    h, last = module(x, (h, last))
    return h, h, last


def _memory_passed(module: nn.Module, x: Tensor, c: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    h, (c, last) = module(x, (c, last))
    return h, c, last


for _name in _TORCHRECURRENT.split():
    TABLE.package(f"torchrecurrent {_name}", "torchrecurrent", "gated zoo", lambda name=_name: _torchrecurrent(name))


def _speechbrain(name: str) -> fc.Cell:
    from speechbrain.nnet import RNN

    if name == "LiGRU":
        return CallingCell(_light_gru(RNN), _light_gru_step, FEATURES, {"h": SIZE})
    module = getattr(RNN, f"{name}Cell")(SIZE, input_size=FEATURES)
    return fc.wrap(_OneLayer(module), input_size=FEATURES, state_sizes=(SIZE, SIZE) if name == "LSTM" else (SIZE,))


class _OneLayer(nn.Module):
    """A cell of the package, whose states have a first dimension of layers, with one layer."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, state: Any) -> Any:
        pair = isinstance(state, tuple)
        output, after = self.module(x, tuple(v[None] for v in state) if pair else state[None])
        return output, tuple(v[0] for v in after) if pair else after[0]


def _light_gru(RNN: Any) -> nn.Module:
    return RNN.LiGRU_Layer(FEATURES, SIZE, num_layers=1, batch_size=5, normalization="layernorm")


def _light_gru_step(module: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    h = module._ligru_cell(module.norm(module.w(x))[:, None], h)[:, 0]
    return h, h


for _name in ("RNN", "GRU", "LSTM", "LiGRU"):
    # LiGRU keeps a counter of dropout masks in training, which belongs to a whole sequence.
    TABLE.package(
        f"speechbrain {_name}",
        "speechbrain",
        "audio",
        lambda name=_name: _speechbrain(name),
        trains=_name != "LiGRU",
    )


def _sheeprl() -> fc.Cell:
    from sheeprl.models.models import LayerNormGRUCell

    return fc.wrap(LayerNormGRUCell(FEATURES, SIZE, layer_norm_cls=nn.LayerNorm))


TABLE.package("sheeprl LayerNormGRU", "sheeprl", "normed", _sheeprl)


def _neuralhydrology_lstm() -> fc.Cell:
    from neuralhydrology.modelzoo.customlstm import _LSTMCell

    def step(module: nn.Module, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        after = module(x, h, c)
        return after["h_n"], after["h_n"], after["c_n"]

    return CallingCell(_LSTMCell(FEATURES, SIZE), step, FEATURES, {"h": SIZE, "c": SIZE})


def _neuralhydrology_mass() -> fc.Cell:
    from neuralhydrology.modelzoo.mclstm import _MCLSTMCell

    class MassConserving(_MCLSTMCell):
        def _step(self, xt_m: Tensor, xt_a: Tensor, c: Tensor) -> Any:
            # The package divides by a norm over the whole batch; here by each row's.
            share = c / (c.norm(1, dim=-1, keepdim=True) + 1e-5)
            features = torch.cat([xt_m, xt_a, share], dim=-1)
            i, r, o = self.input_gate(features), self.redistribution(features), self.output_gate(features)
            m = torch.matmul(xt_m.unsqueeze(-2), i).squeeze(-2) + torch.matmul(c.unsqueeze(-2), r).squeeze(-2)
            return o * m, (1 - o) * m

    def step(module: Any, x: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return module._step(x[:, :1].abs(), x[:, 1:], c)

    config = SimpleNamespace(initial_forget_bias=3.0)
    return CallingCell(MassConserving(1, FEATURES - 1, SIZE, config), step, FEATURES, {"c": SIZE})


def _neuralhydrology_gates() -> fc.Cell:
    from neuralhydrology.modelzoo.ealstm import _DynamicGates

    class EntityAware(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = SimpleNamespace(hidden_size=SIZE, initial_forget_bias=3.0)
            self.input_gate = nn.Linear(4, SIZE)
            self.dynamic_gates = _DynamicGates(config, FEATURES - 4)

        def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            h, c = state
            i = torch.sigmoid(self.input_gate(x[:, :4]))
            f, o, g = self.dynamic_gates(h, x[:, 4:]).chunk(3, -1)
            c = torch.sigmoid(f) * c + i * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c

    return fc.wrap(EntityAware(), input_size=FEATURES, state_sizes=(SIZE, SIZE))


def _neuralhydrology_ode(method: str) -> fc.Cell:
    from neuralhydrology.modelzoo.odelstm import _ODERNNCell

    class ODELSTM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.ode = nn.LSTMCell(FEATURES, SIZE), _ODERNNCell(SIZE, SIZE, 3, method)

        def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            h, c = self.lstm(x, state)
            return self.ode(h, state[0], 0.5), c

    return fc.wrap(ODELSTM(), input_size=FEATURES, state_sizes=(SIZE, SIZE))


TABLE.package("neuralhydrology CustomLSTM", "neuralhydrology", "classic", _neuralhydrology_lstm)
TABLE.package("neuralhydrology MC-LSTM", "neuralhydrology", "conditional", _neuralhydrology_mass, start="zeros")
TABLE.package("neuralhydrology EA-LSTM", "neuralhydrology", "conditional", _neuralhydrology_gates)
for _method in ("euler", "heun", "rk4"):
    TABLE.package(
        f"neuralhydrology ODE-LSTM {_method}",
        "neuralhydrology",
        "ode",
        lambda method=_method: _neuralhydrology_ode(method),
    )


def _pypots_peephole() -> fc.Cell:
    from pypots.nn.modules.vader.layers import PeepholeLSTMCell

    cell = PeepholeLSTMCell(FEATURES, SIZE)
    return fc.wrap(cell)


def _pypots_tkan() -> fc.Cell:
    from pypots.nn.modules.tkan.layers import TKANCell

    states = {"h": SIZE, "c": SIZE, "sub": FEATURES}

    def step(module: nn.Module, x: Tensor, h: Tensor, c: Tensor, sub: Tensor) -> tuple[Tensor, ...]:
        h, c, subs = module(x, h, c, [sub])
        return h, h, c, subs[0]

    return CallingCell(TKANCell(FEATURES, SIZE), step, FEATURES, states)


def _pypots_grud() -> fc.Cell:
    from pypots.nn.modules.grud.layers import TemporalDecay

    return _GRUD(TemporalDecay)


class _GRUD(fc.Cell):
    """GRU-D's step with the package's decay: x, whether it was measured, and the time since."""

    inputs = ("x", "mask", "delta")
    states = ("h", "last")

    def __init__(self, decay: Any) -> None:
        super().__init__(FEATURES, SIZE)
        self.state_sizes = (SIZE, FEATURES)
        self.decay_h, self.decay_x = decay(FEATURES, SIZE), decay(FEATURES, FEATURES, diag=True)
        self.rnn = nn.GRUCell(2 * FEATURES, SIZE)

    def step(self, x: Any, state: tuple[Tensor, ...]) -> Any:
        (value, mask, delta), (h, last) = x, state
        last = mask * value + (1 - mask) * last
        filled = mask * value + (1 - mask) * self.decay_x(delta) * last
        h = self.rnn(torch.cat([filled, mask], dim=1), self.decay_h(delta) * h)
        return h, (h, last)


def _gaps(steps: int, rows: int) -> tuple[Tensor, ...]:
    shape = (steps, rows, FEATURES)
    return torch.randn(shape), (torch.rand(shape) < 0.6).float(), torch.rand(shape)


def _pypots_rits() -> fc.Cell:
    from pypots.nn.modules.brits.layers import FeatureRegression
    from pypots.nn.modules.grud.layers import TemporalDecay

    return _RITS(TemporalDecay, FeatureRegression)


class _RITS(fc.Cell):
    """RITS' step with the package's decay and its regression over features."""

    inputs = ("x", "mask", "delta")
    states = ("h", "c")

    def __init__(self, decay: Any, regression: Any) -> None:
        super().__init__(FEATURES, SIZE)
        self.output_size = {"imputed": FEATURES, "hidden": SIZE}
        self.decay_h, self.decay_x = decay(FEATURES, SIZE), decay(FEATURES, FEATURES, diag=True)
        self.history, self.features = nn.Linear(SIZE, FEATURES), regression(FEATURES)
        self.mix, self.rnn = nn.Linear(2 * FEATURES, FEATURES), nn.LSTMCell(2 * FEATURES, SIZE)

    def step(self, x: Any, state: tuple[Tensor, ...]) -> Any:
        (value, mask, delta), (h, c) = x, state
        h = h * self.decay_h(delta)
        guess = self.history(h)
        filled = mask * value + (1 - mask) * guess
        other = self.features(filled)
        share = torch.sigmoid(self.mix(torch.cat([self.decay_x(delta), mask], dim=1)))
        imputed = mask * value + (1 - mask) * (share * other + (1 - share) * guess)
        h, c = self.rnn(torch.cat([imputed, mask], dim=1), (h, c))
        return {"imputed": imputed, "hidden": h}, (h, c)


TABLE.package("pypots PeepholeLSTM", "pypots", "classic", _pypots_peephole)
TABLE.package("pypots TKAN", "pypots", "parametrised", _pypots_tkan)
TABLE.package("pypots GRU-D decay", "pypots", "missing data", _pypots_grud, inputs=_gaps)
TABLE.package("pypots RITS", "pypots", "missing data", _pypots_rits, inputs=_gaps)


def _minimal(name: str) -> fc.Cell:
    from minGRU_pytorch.minGRU import minGRU
    from minGRU_pytorch.minLSTM import minLSTM

    def step(module: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        output, after = module(x[:, None], h[:, None], return_next_prev_hidden=True)
        return output[:, 0], after[:, 0]

    module = {"minGRU": minGRU, "minLSTM": minLSTM}[name](FEATURES, expansion_factor=1.5)
    return CallingCell(module, step, FEATURES, {"h": FEATURES * 3 // 2}, FEATURES)


TABLE.package("minGRU-pytorch minGRU", "minGRU-pytorch", "ssm", lambda: _minimal("minGRU"))
TABLE.package("minGRU-pytorch minLSTM", "minGRU-pytorch", "ssm", lambda: _minimal("minLSTM"))


def _griffin() -> fc.Cell:
    from griffin_torch.main import RGLRU

    class OneStep(RGLRU):
        """The body of the package's loop over time, with its state passed in."""

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            r, i = torch.sigmoid(x @ self.Wa + self.ba), torch.sigmoid(x @ self.Wx + self.bx)
            a = torch.sigmoid(self.Lambda) / self.c**r
            return a * h + ((1 - a**2) ** 0.5) * (i * x)

    return fc.wrap(OneStep(FEATURES, 1), input_size=FEATURES, state_sizes=FEATURES)


TABLE.package("griffin-torch RG-LRU", "griffin-torch", "ssm", _griffin)


def _torch(name: str) -> fc.Cell:
    return fc.wrap(getattr(nn, f"{name}Cell")(FEATURES, SIZE))


for _name in ("RNN", "GRU", "LSTM"):
    TABLE.package(f"torch.nn.{_name}Cell", "torch", "classic", lambda name=_name: _torch(name))
