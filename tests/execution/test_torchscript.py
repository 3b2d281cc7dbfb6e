"""torch.jit.trace, torch.jit.script and the ONNX exporter built on them: torch.nn's own layer, or a sentence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.compiler.frontend import Traced, trace

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

LAYERS = {
    "GRU": lambda: fc.GRU(5, 8),
    "LSTM": lambda: fc.LSTM(5, 8, proj_size=3),
    "RNN": lambda: fc.RNN(5, 8, nonlinearity="relu"),
    "two layers, two directions": lambda: fc.GRU(5, 8, 2, bidirectional=True, batch_first=True),
    "recompute": lambda: fc.LSTM(5, 8, recompute=True, masked_output="zero"),
    "GRUCell": lambda: fc.GRUCell(5, 8),
    "LSTMCell": lambda: fc.LSTMCell(5, 8),
    "RNNCell": lambda: fc.RNNCell(5, 8),
}


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [each for part in value for each in flat(part)]


def ops(traced):
    """The operations of a trace, in order."""
    return [node.kind() for node in traced.inlined_graph.nodes()]


@pytest.mark.parametrize("ran", [False, True], ids=["first call", "after another"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_trace_is_that_of_torchs_layer(kind, ran):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    twin = copy.deepcopy(layer)
    fc.replace(twin, back=True)
    cell = kind.endswith("Cell")
    x, other = (torch.randn(4, 5), torch.randn(6, 5)) if cell else (torch.randn(7, 4, 5), torch.randn(9, 3, 5))
    if ran:
        layer(x)
    traced = torch.jit.trace(layer, x)
    assert ops(traced) == ops(torch.jit.trace(twin, x))
    for actual, expected in zip(flat(traced(other)), flat(twin(other)), strict=True):
        assert torch.equal(actual, expected)
    # The layer itself runs on as it was.
    for actual, expected in zip(flat(layer(other)), flat(twin(other)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_trace_takes_a_state_and_a_model_around_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = fc.LSTM(5, 8), nn.Linear(8, 2)

        def forward(self, x, h, c):
            y, _ = self.layer(x, (h, c))
            return self.out(y)

    torch.manual_seed(1)
    model = Model()
    traced = torch.jit.trace(model, (torch.randn(7, 4, 5), torch.randn(1, 4, 8), torch.randn(1, 4, 8)))
    arguments = torch.randn(3, 2, 5), torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    torch.testing.assert_close(traced(*arguments), model(*arguments), rtol=1e-4, atol=1e-5)


class Leaky(fc.Cell):
    def step(self, x, state):
        (h,) = state
        return 0.5 * (x + h), (0.5 * (x + h),)


REFUSED = {
    "a cell": (lambda: Leaky(5, 5), lambda layer, x: layer(x[0]), "Leaky: the trace would hold its loop unrolled"),
    "its layer": (lambda: fc.Recurrent(Leaky(5, 5)), lambda layer, x: layer(x)[0], "Leaky: the trace"),
    "a drop-in cell's layer": (lambda: fc.Recurrent(fc.GRUCell(5, 5)), lambda layer, x: layer(x)[0], "GRUCell: the"),
    "a step": (lambda: Leaky(5, 5), lambda layer, x: fc.step(layer, x[0])[0], "Leaky: the trace"),
    "scan": (lambda: Leaky(5, 5), lambda layer, x: fc.scan(layer, x)[0], "Leaky: the trace"),
    "another equation": (lambda: fc.GRU(5, 5, reset_after=False), lambda layer, x: layer(x)[0], "reset_after=False"),
    "another activation": (lambda: fc.LSTM(5, 5, activation="relu"), lambda layer, x: layer(x)[0], "torch.nn can't"),
    "a projected cell": (lambda: fc.LSTMCell(5, 6, proj_size=3), lambda layer, x: layer(x[0])[0], "proj_size=3"),
    "lengths": (lambda: fc.GRU(5, 5), lambda layer, x: layer(x, lengths=[1, 2, 3, 4])[0], "takes no lengths"),
    "resets": (lambda: fc.GRU(5, 5), lambda layer, x: layer(x, resets=x[..., 0] > 0)[0], "takes no lengths"),
    "mask": (lambda: fc.GRU(5, 5), lambda layer, x: layer(x, mask=x[..., 0] > 0)[0], "takes no lengths"),
    "tbptt": (lambda: fc.GRU(5, 5, tbptt=2), lambda layer, x: layer(x)[0], "has no tbptt"),
    "clip": (lambda: fc.GRU(5, 5, clip_state_grad=1.0), lambda layer, x: layer(x)[0], "has no tbptt"),
}


@pytest.mark.parametrize("runner", ["auto", "eager"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_trace_cannot_hold_is_a_sentence(kind, runner):
    make, call, text = REFUSED[kind]
    layer, x = make(), torch.randn(7, 4, 5)
    with fc.runner(runner):
        call(layer, x)
        with pytest.raises(RuntimeError, match=r"torch.jit.trace.* can't record ") as refused:
            torch.jit.trace(lambda value: call(layer, value), x)
    assert text in str(refused.value)
    assert "torch.export" in str(refused.value)
    assert "back=True" in str(refused.value)
    # Nothing of it stays behind.
    call(layer, x)
    assert torch._C._get_tracing_state() is None


def test_a_cell_is_compiled_in_the_middle_of_a_trace():
    """Torch's trace records nothing of the compiler's trace."""
    traces = []

    def function(value):
        traces.append(trace(Leaky(5, 5), [(5,)], torch.float32, gradients=True))
        return value + 1

    traced = torch.jit.trace(function, torch.randn(1, 5), check_trace=False)
    assert isinstance(traces[0], Traced)
    assert [kind for kind in ops(traced) if kind != "prim::Constant"] == ["aten::add"]


@pytest.mark.parametrize("make", [lambda: fc.GRU(5, 8), lambda: fc.GRUCell(5, 8), lambda: fc.Recurrent(Leaky(5, 5))])
def test_scripts_are_refused_with_a_sentence(make):
    model = nn.Sequential(make())
    before = model[0]
    with pytest.raises(RuntimeError, match=r"torch.jit.script can't compile .*back=True.*torch.export"):
        torch.jit.script(model)
    assert model[0] is before


@pytest.mark.parametrize("make", [lambda library: library.GRU(5, 8), lambda library: nn.Sequential(library.LSTM(5, 8))])
def test_the_older_onnx_exporter_writes_torchs_layer(make, tmp_path):
    """It hands over every argument by position, None where there is none."""
    torch.manual_seed(2)
    drop_in = make(fc).eval()
    reference = copy.deepcopy(drop_in)
    fc.replace(reference, back=True)
    files = []
    for model in (drop_in, reference):
        path = tmp_path / "model.onnx"
        torch.onnx.export(model, (torch.randn(7, 4, 5),), str(path), dynamo=False)
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_surplus_arguments_are_refused():
    layer, x = fc.GRU(5, 8), torch.randn(7, 4, 5)
    assert torch.equal(layer(x, None, None)[0], layer(x)[0])
    for surplus in ([7, 4, 1, 2],), (None, None, None, None):
        with pytest.raises(TypeError, match=r"GRU.forward takes input and hx by position.*lengths="):
            layer(x, None, *surplus)
