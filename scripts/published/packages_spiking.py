"""Packages' spiking neurons: snntorch's, norse's, spikingjelly's and sinabs'."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

import fusecell as fc

from .case import FEATURES, SIZE, CallingCell, Table

TABLE = Table()


def _fed(neuron: nn.Module) -> nn.Module:
    return nn.ModuleList([nn.Linear(FEATURES, SIZE), neuron])


# snntorch: the states are passed in and returned behind the spikes.
_SNNTORCH: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "Leaky": (("mem",), {"beta": 0.9, "learn_beta": True}),
    "Leaky to zero": (("mem",), {"beta": 0.8, "reset_mechanism": "zero", "learn_threshold": True}),
    "Lapicque": (("mem",), {"beta": 0.7}),
    "Synaptic": (("syn", "mem"), {"alpha": 0.8, "beta": 0.9, "learn_alpha": True}),
    "Alpha": (("syn_exc", "syn_inh", "mem"), {"alpha": 0.85, "beta": 0.8}),
    "RLeaky": (("spk", "mem"), {"beta": 0.9, "linear_features": SIZE}),
    "RSynaptic": (("spk", "syn", "mem"), {"alpha": 0.8, "beta": 0.9, "linear_features": SIZE}),
}


def _spikes_first(modules: Any, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    result = modules[1](modules[0](x), *state)
    # The package's spikes are float32 in a network of any dtype.
    result = tuple(value.to(x.dtype) for value in result)
    return result if len(result) == len(state) + 1 else (result[0], *result)


def _snntorch(name: str) -> fc.Cell:
    import snntorch

    states, options = _SNNTORCH[name]
    neuron = getattr(snntorch, name.split()[0])(**options)
    return CallingCell(_fed(neuron), _spikes_first, FEATURES, dict.fromkeys(states, SIZE))


def _snntorch_lstm() -> fc.Cell:
    import snntorch

    def step(module: Any, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.to(x.dtype) for value in module(x, syn, mem))

    # With other sizes than one the package begins with zeros at each step.
    return CallingCell(snntorch.SLSTM(SIZE, SIZE), step, SIZE, {"syn": SIZE, "mem": SIZE})


def _snntorch_conv_lstm() -> fc.Cell:
    import snntorch

    def step(module: Any, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Tensor, ...]:
        return module(x, syn, mem)

    image = (3, 6, 5)
    return CallingCell(snntorch.SConv2dLSTM(2, 3, 3), step, (2, 6, 5), {"syn": image, "mem": image})


class _Cast(nn.Module):
    """Spikes in the dtype of the network, where the package's are float32."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("like", torch.zeros(()))

    def forward(self, spikes: Tensor) -> Tensor:
        return spikes.to(self.like.dtype)


def _snntorch_hidden() -> fc.Cell:
    import snntorch

    net = nn.Sequential(
        nn.Linear(FEATURES, SIZE),
        snntorch.Leaky(beta=0.9, init_hidden=True),
        _Cast(),
        nn.Linear(SIZE, 5),
        snntorch.Leaky(beta=0.8, init_hidden=True),
    )
    return fc.wrap(net, input_size=FEATURES, states=("1.mem", "4.mem"))


for _name in _SNNTORCH:
    TABLE.package(f"snntorch {_name}", "snntorch", "spiking", lambda name=_name: _snntorch(name))
TABLE.package("snntorch SLSTM", "snntorch", "spiking", _snntorch_lstm)
TABLE.package("snntorch SConv2dLSTM", "snntorch", "spiking", _snntorch_conv_lstm)
TABLE.package("snntorch two layers, init_hidden", "snntorch", "spiking", _snntorch_hidden)


# norse: (module of the functional, state, fields, cell, whether it takes sizes)
_NORSE: dict[str, tuple[str, str, tuple[str, ...], bool]] = {
    "LIFCell": ("lif", "LIFFeedForwardState", ("v", "i"), False),
    "LIFRecurrentCell": ("lif", "LIFState", ("z", "v", "i"), True),
    "LSNNCell": ("lsnn", "LSNNFeedForwardState", ("v", "i", "b"), False),
    "LSNNRecurrentCell": ("lsnn", "LSNNState", ("z", "v", "i", "b"), True),
    "LIFAdExCell": ("lif_adex", "LIFAdExFeedForwardState", ("v", "i", "a"), False),
    "LIFAdExRecurrentCell": ("lif_adex", "LIFAdExState", ("z", "v", "i", "a"), True),
    "LIFExCell": ("lif_ex", "LIFExFeedForwardState", ("v", "i"), False),
    "LIFExRecurrentCell": ("lif_ex", "LIFExState", ("z", "v", "i"), True),
    "LIFBoxCell": ("lif_box", "LIFBoxFeedForwardState", ("v",), False),
    "LICell": ("leaky_integrator", "LIState", ("v", "i"), False),
    "LILinearCell": ("leaky_integrator", "LIState", ("v", "i"), True),
    "IAFCell": ("iaf", "IAFFeedForwardState", ("v",), False),
    "CobaLIFCell": ("coba_lif", "CobaLIFState", ("z", "v", "g_e", "g_i"), True),
    "LIFMCRecurrentCell": ("lif_mc", "LIFState", ("z", "v", "i"), True),
}


class _NorseStep:
    """The call of one of norse's cells, whose state is a NamedTuple."""

    def __init__(self, state: Any, fed: bool) -> None:
        self.state, self.fed = state, fed

    def __call__(self, module: Any, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        if self.fed:
            spikes, after = module[1](module[0](x), self.state(*state))
        else:
            spikes, after = module(x, self.state(*state))
        return spikes, *after


def _norse(name: str) -> fc.Cell:
    cells = importlib.import_module("norse.torch")
    functional, state, fields, sized = _NORSE[name]
    kind = getattr(importlib.import_module(f"norse.torch.functional.{functional}"), state)
    cell = getattr(cells, name, None) or getattr(importlib.import_module(f"norse.torch.module.{functional}"), name)
    module = cell(FEATURES, SIZE) if sized else _fed(cell())
    return CallingCell(module, _NorseStep(kind, not sized), FEATURES, dict.fromkeys(fields, SIZE))


def _norse_refractory(recurrent: bool) -> fc.Cell:
    from norse.torch.functional import lif, lif_refrac
    from norse.torch.module.lif_refrac import LIFRefracCell, LIFRefracRecurrentCell

    def alone(module: Any, x: Tensor, v: Tensor, i: Tensor, rho: Tensor) -> tuple[Tensor, ...]:
        state = lif_refrac.LIFRefracFeedForwardState(lif.LIFFeedForwardState(v, i), rho)
        spikes, after = module[1](module[0](x), state)
        return spikes, *after.lif, after.rho

    def together(module: Any, x: Tensor, z: Tensor, v: Tensor, i: Tensor, rho: Tensor) -> tuple[Tensor, ...]:
        spikes, after = module(x, lif_refrac.LIFRefracState(lif.LIFState(z, v, i), rho))
        return spikes, *after.lif, after.rho

    if recurrent:
        states = dict.fromkeys(("z", "v", "i", "rho"), SIZE)
        return CallingCell(LIFRefracRecurrentCell(FEATURES, SIZE), together, FEATURES, states)
    return CallingCell(_fed(LIFRefracCell()), alone, FEATURES, dict.fromkeys(("v", "i", "rho"), SIZE))


def _norse_izhikevich() -> fc.Cell:
    from norse.torch.functional.izhikevich import IzhikevichState, tonic_spiking
    from norse.torch.module.izhikevich import IzhikevichCell

    states = dict.fromkeys(("v", "u"), SIZE)
    return CallingCell(_fed(IzhikevichCell(tonic_spiking)), _NorseStep(IzhikevichState, True), FEATURES, states)


for _name in _NORSE:
    TABLE.package(f"norse {_name}", "norse", "spiking", lambda name=_name: _norse(name))
TABLE.package("norse LIFRefracCell", "norse", "spiking", lambda: _norse_refractory(False))
TABLE.package("norse LIFRefracRecurrentCell", "norse", "spiking", lambda: _norse_refractory(True))
TABLE.package("norse IzhikevichCell", "norse", "spiking", _norse_izhikevich)


# spikingjelly: the states are attributes of the neuron.
_SPIKINGJELLY: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "IFNode": (("v",), {}),
    "LIFNode": (("v",), {"tau": 3.0}),
    "LIFNode soft": (("v",), {"v_reset": None, "detach_reset": True}),
    "ParametricLIFNode": (("v",), {}),
    "KLIFNode": (("v",), {"scale_reset": True}),
    "QIFNode": (("v",), {}),
    "EIFNode": (("v",), {}),
    "IzhikevichNode": (("v", "w"), {"a": 0.1, "b": 0.2}),
    "ComplementaryLIFNode": (("v", "m"), {}),
    "CUBALIFNode": (("v", "c"), {}),
    "RAFNode": (("v", "u"), {}),
    "TernaryLIFNode": (("v",), {}),
    "HalfThresholdIFNode": (("v",), {}),
}


def _spikingjelly(name: str) -> fc.Cell:
    from spikingjelly.activation_based import neuron

    names, options = _SPIKINGJELLY[name]
    module = nn.Sequential(nn.Linear(FEATURES, SIZE), getattr(neuron, name.split()[0])(**options))
    states = tuple(f"1.{state}" for state in names)
    return fc.wrap(module, input_size=FEATURES, state_sizes=(SIZE,) * len(names), states=states)


for _name in _SPIKINGJELLY:
    TABLE.package(f"spikingjelly {_name}", "spikingjelly", "spiking", lambda name=_name: _spikingjelly(name))


# sinabs: layers over (N, T, ...), whose states are buffers.
_SINABS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "LIF": (("v_mem",), {"tau_mem": 10.0}),
    "LIF with synapse": (("v_mem", "i_syn"), {"tau_mem": 10.0, "tau_syn": 5.0}),
    "IAF": (("v_mem",), {}),
    "ExpLeak": (("v_mem",), {"tau_mem": 10.0}),
    "ALIF": (("v_mem", "b", "spike_threshold"), {"tau_mem": 10.0, "tau_adapt": 10.0}),
    "LIFRecurrent": (("v_mem",), {"tau_mem": 10.0}),
}


class _OverTime(nn.Module):
    """A layer over (N, T, ...), for one step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.map, self.layer = nn.Linear(FEATURES, SIZE), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.map(x)[:, None])[:, 0]


def _sinabs(name: str) -> fc.Cell:
    from sinabs import layers

    names, options = _SINABS[name]
    if name == "LIFRecurrent":
        options = {**options, "rec_connect": nn.Linear(SIZE, SIZE, bias=False)}
    module = _OverTime(getattr(layers, name.split()[0])(**options))
    with torch.no_grad():
        module(torch.zeros(7, FEATURES))  # makes the states
    states = tuple(f"layer.{state}" for state in names)
    return fc.wrap(module, input_size=FEATURES, state_sizes=(SIZE,) * len(names), states=states)


def _thresholds(rows: int) -> tuple[Tensor, ...]:
    """Make a potential, an adaptation and a threshold, by which the package divides."""
    return torch.randn(rows, SIZE), torch.rand(rows, SIZE), 1 + torch.rand(rows, SIZE)


for _name in _SINABS:
    # The package's spikes are float32. In float64 ALIF's loop adds up the gradients of what multiplies them in float32,
    # and LIFRecurrent can't take them in.
    TABLE.package(
        f"sinabs {_name}",
        "sinabs",
        "spiking",
        lambda name=_name: _sinabs(name),
        start=_thresholds if _name == "ALIF" else "random",
        exact={"ALIF": 1e-6, "LIFRecurrent": 1e-5}.get(_name, 1e-10),
        in_double=_name != "LIFRecurrent",
    )
