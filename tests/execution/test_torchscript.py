"""torch.jit.trace, torch.jit.script and the ONNX exporter built on them: torch.nn's own layer, or a sentence."""

from __future__ import annotations

import copy
import pickle
import re

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


class Around(nn.Module):
    """A model whose forward uses a layer as most do."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.out = layer, nn.Linear(16 if layer.bidirectional else 8, 2)

    def forward(self, x):
        y, state = self.layer(x)
        return self.out(torch.relu(y)), state


def scripted(make, kind, library, **options):
    torch.manual_seed(3)
    model = make(getattr(library, kind)(5, 8, **options))
    return model, torch.jit.script(model)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GRU", {}),
        ("LSTM", {"num_layers": 2, "bidirectional": True, "dropout": 0.2}),
        ("RNN", {"nonlinearity": "relu", "batch_first": True, "bias": False}),
    ],
)
def test_a_script_is_that_of_torchs_layer(kind, options, tmp_path):
    model, script = scripted(Around, kind, fc, **options)
    layer = model.layer
    _, reference = scripted(Around, kind, nn, **options)
    assert script.code == reference.code
    graphs = [str(model.inlined_graph).replace("___torch_mangle_", "").split("\n") for model in (script, reference)]
    assert [re.sub(r"__torch__\S*", "", line) for line in graphs[0]] == [
        re.sub(r"__torch__\S*", "", line) for line in graphs[1]
    ]
    assert script.state_dict().keys() == reference.state_dict().keys()
    # What is saved has torch's class, and no attribute besides its own.
    torch.jit.save(script, tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    assert loaded.layer.original_name == kind
    assert not hasattr(loaded.layer, "masked_output")
    x = torch.randn(7, 4, 5)
    for one, two in zip(flat(loaded.eval()(x)), flat(reference.eval()(x)), strict=True):
        assert torch.equal(one, two)
    # The layer has become itself again.
    assert model.layer is layer
    assert layer.__class__ is type(layer) is getattr(fc, kind)
    assert "__overloads__" not in vars(layer)
    y, _ = layer(x, lengths=[2] * x.shape[0 if layer.batch_first else 1])
    assert y.abs().sum() > 0
    torch.testing.assert_close(model.eval()(x)[0], loaded(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["GRUCell", "LSTMCell", "RNNCell"])
def test_a_script_is_that_of_torchs_cell(kind):
    cell, script = scripted(lambda layer: layer, kind, fc)
    _, reference = scripted(lambda layer: layer, kind, nn)
    assert script.code == reference.code
    x = torch.randn(4, 5)
    for one, two in zip(flat(script(x)), flat(reference(x)), strict=True):
        assert torch.equal(one, two)
    assert cell.__class__ is type(cell) is getattr(fc, kind)


def test_a_script_takes_packed_sequences_and_states():
    """Of torch's layer it has each overload, which torch finds by the class's name and source."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fc.GRU(5, 8)

        def forward(self, x, lengths, h):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            y, _ = self.layer(packed, h)
            return nn.utils.rnn.pad_packed_sequence(y)[0]

    model = Packed()
    x, lengths, h = torch.randn(7, 3, 5), torch.tensor([2, 7, 4]), torch.randn(1, 3, 8)
    torch.testing.assert_close(torch.jit.script(model)(x, lengths, h), model(x, lengths, h), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("then", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), None])
def test_after_a_script_a_layer_is_copied_trained_and_scripted_as_before(then):
    model = Around(fc.LSTM(5, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.jit.script(model)
    twin = model if then is None else then(model)
    assert twin.layer.__class__ is type(twin.layer) is fc.LSTM
    model(torch.randn(7, 4, 5))[0].sum().backward()
    optimizer.step()
    x = torch.randn(7, 4, 5)
    torch.testing.assert_close(torch.jit.script(model)(x)[0], model(x)[0], rtol=1e-4, atol=1e-5)


def test_a_script_that_fails_leaves_the_layer_as_it_was():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fc.GRU(5, 8)

        def forward(self, x):
            return self.layer(x)[0].no_such_method()

    model = Failing()
    with pytest.raises(RuntimeError, match="no_such_method"):
        torch.jit.script(model)
    assert model.layer.__class__ is fc.GRU
    model.layer(torch.randn(7, 4, 5), lengths=[7, 4, 2, 1])


def test_a_subclass_with_a_forward_of_its_own_is_scripted_by_it():
    class Doubled(fc.GRU):
        def forward(self, input):
            return 2 * input

    x = torch.randn(3, 2, 5)
    assert torch.equal(torch.jit.script(Doubled(5, 8))(x), 2 * x)

    class Named(fc.GRU):
        pass

    torch.manual_seed(4)
    model = Around(Named(5, 8))
    torch.testing.assert_close(torch.jit.script(model)(x)[0], model(x)[0], rtol=1e-4, atol=1e-5)
    assert model.layer.__class__ is Named


class Halved(fc.GRUCell):
    def step(self, x, state):
        (h,) = state
        return 0.5 * h, (0.5 * h,)


NOT_SCRIPTED = {
    "a cell": (lambda: Leaky(5, 5), "Leaky: only torch's own cells"),
    "its layer": (lambda: fc.Recurrent(Leaky(5, 5)), "Leaky: only torch's own"),
    "a cell of another equation": (lambda: fc.GRUCell(5, 5, reset_after=False), "reset_after=False"),
    "a layer of another": (lambda: fc.LSTM(5, 5, activation="relu"), "activation='relu'"),
    "a step of a user's": (lambda: Halved(5, 5), "Halved: torch.nn can't compute"),
    "tbptt": (lambda: fc.GRU(5, 5, tbptt=2), "has no tbptt"),
    "clip": (lambda: fc.GRU(5, 5, clip_state_grad=1.0), "clip_state_grad"),
}


@pytest.mark.parametrize("kind", NOT_SCRIPTED)
def test_what_a_script_cannot_hold_is_a_sentence(kind):
    make, text = NOT_SCRIPTED[kind]
    model = nn.Sequential(make())
    before = model[0]
    with pytest.raises(RuntimeError, match=r"torch.jit.script can't compile .*torch.export.*back=True") as refused:
        torch.jit.script(model)
    assert text in str(refused.value)
    assert model[0] is before


def test_a_trace_never_records_torchs_cell_for_a_step_of_a_users():
    with pytest.raises(RuntimeError, match=r"can't record Halved: torch.nn can't compute"):
        torch.jit.trace(Halved(5, 5), torch.randn(3, 5))
