"""A layer under torch.compile and torch.export: one operator, the same bits as without."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs

import fusecell as fc
from fusecell.compiler.dispatch import torch_compile as operator
from fusecell.compiler.dispatch.scan_operator import scan
from fusecell.torch_internals import TAKES_MODULES_AS_CONSTANTS
from tests.compiler.tuned import tuned

pytestmark = pytest.mark.skipif(
    not TAKES_MODULES_AS_CONSTANTS, reason="before torch 2.12 layers are called between graphs"
)


@pytest.fixture(autouse=True)
def fresh():
    """Reset dynamo before each test, and let it trace subclasses of torch's recurrent layers."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


class Gain(fc.Cell):
    """An attribute in the step."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.inp = nn.Linear(input_size, hidden_size)
        self.gain = 0.5

    def step(self, x, state):
        (h,) = state
        h = torch.tanh(self.inp(x) + self.gain * h)
        return h, (h,)


class Refused(Gain):
    """A step that the compiler can't take."""

    def step(self, x, state):
        (h,) = state
        h = torch.tanh(self.inp(x) + h.cumsum(0))
        return h, (h,)


class Noisy(fc.Cell):
    """An input that is drawn, and one that is constant over time."""

    inputs = ("x", "context", "noise")

    def __init__(self):
        super().__init__(5, 7)
        self.inp, self.mix = nn.Linear(5, 7), nn.Linear(3, 7)

    def draw(self, steps, batch_size, *, dtype=None, device=None):
        return (torch.full((steps, batch_size, 7), 0.25, dtype=dtype, device=device),)

    def step(self, x, state):
        x, context, noise = x
        (h,) = state
        h = torch.tanh(self.inp(x) + self.mix(context) + noise * h)
        return h, (h,)


def run(layer, x, **options):
    """Outputs, states and gradients of a call."""
    layer.zero_grad()
    inputs = tuple(value.clone().requires_grad_() for value in x)
    y, after = layer(inputs if len(inputs) > 1 else inputs[0], **options)
    after = after if isinstance(after, tuple) else (after,)
    (y.sin().sum() + sum(value.sum() for value in after)).backward()
    grads = [value.grad for value in (*inputs, *layer.parameters())]
    return [y.detach(), *(value.detach() for value in after), *grads]


LAYERS = {
    "cell": (lambda: fc.Recurrent(fc.GRUCell(5, 7)), {}),
    "two states": (lambda: fc.Recurrent(fc.LSTMCell(5, 7), batch_first=True, reverse=True), {}),
    "computed weights": (lambda: fc.Recurrent(fc.cells.AntisymmetricRNNCell(5, 7)), {}),
    "lengths and resets": (
        lambda: fc.Recurrent(fc.GRUCell(5, 7)),
        {"lengths": torch.tensor([6, 0, 3]), "resets": torch.eye(6, 3, dtype=torch.bool)},
    ),
    "stack": (lambda: fc.Recurrent(fc.Stack(fc.GRUCell(5, 7), fc.LSTMCell(7, 4))), {}),
    "GRU": (lambda: fc.GRU(5, 7, 2, bidirectional=True), {"lengths": [6, 1, 3]}),
    "the original GRU": (lambda: fc.GRU(5, 7, reset_after=False), {}),
    "LSTM": (lambda: fc.LSTM(5, 7, proj_size=3, batch_first=True), {}),
    "recompute": (lambda: fc.Recurrent(fc.GRUCell(5, 7), recompute=True), {}),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_has_the_bits_of_the_layer(kind):
    torch.manual_seed(0)
    make, options = LAYERS[kind]
    layer = make()
    x = torch.randn(3, 6, 5) if layer.batch_first else torch.randn(6, 3, 5)
    graphs = EagerAndRecordGraphs()
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    for actual, plain in zip(run(compiled, (x,), **options), run(layer, (x,), **options), strict=True):
        assert torch.equal(actual, plain)
    called = [str(node.target) for node in graphs.graphs[0].graph.nodes]
    cells = 2 if kind == "stack" else 4 if kind == "GRU" else 1
    assert called.count("fusecell.scan.default") == cells
    with torch.no_grad():
        assert torch.equal(compiled(x, **options)[0], layer(x, **options)[0])


def test_results_on_huge_pages(monkeypatch):
    """What is saved for the backward then lies where NumPy allocates it."""
    tuned(monkeypatch, huge_result_bytes=1 << 17)
    layer, x = fc.Recurrent(fc.GRUCell(5, 7)), torch.randn(40, 32, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert all(map(torch.equal, run(compiled, (x,)), run(layer, (x,))))


def test_compiled_takes_all_inputs():
    torch.manual_seed(1)
    layer = fc.Recurrent(Noisy())
    inputs = (torch.randn(6, 3, 5), torch.randn(1, 3, 3))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, plain in zip(run(compiled, inputs), run(layer, inputs), strict=True):
        torch.testing.assert_close(actual, plain, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_inductor():
    torch.manual_seed(2)
    model = nn.ModuleList([fc.Recurrent(fc.GRUCell(5, 7)), nn.Linear(7, 2)])

    def loss(x):
        return model[1](model[0](x)[0]).square().mean()

    x = torch.randn(6, 3, 5)
    grads = []
    for function in (torch.compile(loss, fullgraph=True), loss):
        model.zero_grad()
        function(x).backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for actual, plain in zip(*grads, strict=True):
        torch.testing.assert_close(actual, plain, rtol=1e-5, atol=1e-6)


def test_one_graph_for_all_lengths_and_batches():
    graphs = EagerAndRecordGraphs()
    layer = fc.Recurrent(fc.GRUCell(5, 7))
    compiled = torch.compile(layer, fullgraph=True, backend=graphs, dynamic=True)
    for steps, rows in ((6, 3), (9, 4), (13, 8)):
        x = torch.randn(steps, rows, 5)
        assert torch.equal(compiled(x)[0], layer(x)[0])
    assert len(graphs.graphs) == 1


def test_a_changed_attribute_is_seen():
    layer = fc.Recurrent(Gain(5, 7))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, 5)
    for gain in (0.5, 0.75, -1.0):
        layer.cell.gain = gain
        assert torch.equal(compiled(x)[0], layer(x)[0])


def test_a_changed_private_attribute_is_seen():
    class Private(fc.Cell):
        def __init__(self):
            super().__init__(5, 5)
            self._gain, self.unused = 0.5, math.nan

        def step(self, x, state):
            return self._gain * x, state

    layer = fc.Recurrent(Private())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, 5)
    for gain in (0.5, 0.75):
        layer.cell._gain = gain
        assert torch.equal(compiled(x)[0], layer(x)[0])


def test_what_cannot_be_compiled_is_unrolled():
    layer = fc.Recurrent(Refused(5, 7))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 5)
    with pytest.warns(fc.EagerWarning, match="Refused is unrolled: .*cumsum"):
        output = compiled(x)[0]
    with fc.runner("eager"):
        torch.testing.assert_close(output, layer(x)[0])


def test_the_eager_runner_is_unrolled_by_torch():
    graphs = EagerAndRecordGraphs()
    layer = fc.Recurrent(fc.GRUCell(5, 7))

    def loop(x):
        with fc.runner("eager"):
            return layer(x)[0]

    x = torch.randn(4, 3, 5)
    output = torch.compile(loop, backend=graphs)(x)
    assert not any("fusecell" in str(node.target) for graph in graphs.graphs for node in graph.graph.nodes)
    torch.testing.assert_close(output, layer(x)[0])


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "the original GRU"])
@pytest.mark.parametrize("how", ["export", "strict export", "compile", "one graph"])
def test_the_eager_runner_takes_the_drop_ins(kind, how):
    """The unrolled graph computes the same as the layer."""
    layer = LAYERS[kind][0]()
    x = torch.randn(3, 4, 5)
    with fc.runner("eager"), torch.no_grad():
        expected = layer(x)
        if how.endswith("export"):
            program = torch.export.export(layer, (x,), strict=how.startswith("strict")).module()
            assert not any("fusecell" in str(node.target) for node in program.graph.nodes)
        else:
            program = torch.compile(layer, fullgraph=how == "one graph", backend="eager")
        outputs = program(x)
    torch.testing.assert_close(outputs, expected)


class Model(nn.Module):
    """A layer as part of a model, as most are."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.out = layer, nn.Linear(8, 2)

    def forward(self, x):
        return self.out(torch.relu(self.layer(x)[0]))


DEFAULTS = {
    "GRU": lambda library: Model(library.GRU(5, 8)),
    "two layers": lambda library: Model(library.LSTM(5, 4, 2, bidirectional=True)),
    "alone": lambda library: library.RNN(5, 8),
}
OURS = ("fusecell/compiler", "fusecell/execution", "fusecell/eager")


def _compiled_frames(library, make):
    """Return the number of frames that torch.compile compiles for a model and a step of training."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fc.refresh()
    model, x = make(library), torch.randn(7, 4, 5)
    with torch._dynamo.config.patch(allow_rnn=False):
        compiled = torch.compile(model, backend="eager")
        for _ in range(3):
            result = compiled(x)
            result = result if isinstance(result, torch.Tensor) else result[0]
            result.sum().backward()
    plain = model(x)
    torch.testing.assert_close(result, plain if isinstance(plain, torch.Tensor) else plain[0])
    return torch._dynamo.utils.counters["frames"]["total"]


@pytest.mark.parametrize("kind", DEFAULTS)
def test_torch_compile_skips_the_frames_of_fusecell(kind):
    """Regression: dynamo compiled the tracer and code generator too, 42 s and 984 frames for one GRU."""
    torch_frames, frames = _compiled_frames(nn, DEFAULTS[kind]), _compiled_frames(fc, DEFAULTS[kind])
    seen = {code().co_filename for code in torch._dynamo.convert_frame.input_codes.seen if code() is not None}
    assert any("drop_in" in name for name in seen)
    assert not any(part in name for name in seen for part in OURS)
    assert frames <= torch_frames + 2


def test_plain_compile_where_a_scan_breaks_the_graph():
    """With tbptt the cell is made in the call, which no graph takes: it runs as it does without torch.compile."""
    torch.manual_seed(4)
    layer, x = fc.Recurrent(Gain(5, 7), tbptt=2), torch.randn(6, 3, 5)
    fc.refresh()
    compiled = torch.compile(layer, backend="eager")
    for actual, plain in zip(run(compiled, (x,)), run(layer, (x,)), strict=True):
        assert torch.equal(actual, plain)
    seen = {code().co_filename for code in torch._dynamo.convert_frame.input_codes.seen if code() is not None}
    assert not any(part in name for name in seen for part in OURS)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_gradients_gradient_is_an_error(backend):
    """torch's own compiled backward has none either; what matters is that it isn't taken for zero."""
    layer, x = fc.Recurrent(fc.GRUCell(5, 7)), torch.randn(4, 3, 5, requires_grad=True)
    y, _ = torch.compile(layer, fullgraph=True, backend=backend)(x)

    def penalty():
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)

    with pytest.raises(RuntimeError, match=r"no autograd formula was registered|double backward"):
        penalty()


@pytest.mark.parametrize("kind", ["cell", "computed weights", "GRU"])
def test_exported_programs_take_any_length_and_batch(kind, tmp_path):
    torch.manual_seed(3)
    layer = LAYERS[kind][0]()
    steps, rows = torch.export.Dim("steps", min=2, max=4096), torch.export.Dim("rows", min=2, max=512)
    exported = torch.export.export(layer, (torch.randn(6, 3, 5),), dynamic_shapes=({0: steps, 1: rows},))
    x = torch.randn(9, 4, 5)
    expected = layer(x)[0]
    assert torch.equal(exported.module()(x)[0], expected)
    if kind != "computed weights":
        return
    torch.export.save(exported, tmp_path / "layer.pt2")
    torch.save((x, expected), tmp_path / "data.pt")
    # Another process has neither the layer nor its cell, only the operator.
    script = f"""
import torch, fusecell.compiler.dispatch.torch_compile
x, expected = torch.load({str(tmp_path / "data.pt")!r})
program = torch.export.load({str(tmp_path / "layer.pt2")!r})
assert torch.equal(program.module()(x)[0], expected)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)


def test_the_operator_passes_torchs_own_checks():
    cell = fc.GRUCell(5, 7)
    weights = [parameter for _, parameter in cell.named_parameters()]
    names = dict(cell.named_parameters())
    for required in (None, [True] * 5):
        flags = None if required is None else (True,)
        text, paths, *_ = operator._described(cell, -1, ((5,),), torch.float32, flags, False)
        weights = [names[path] for path in paths]
        x, h = torch.randn(6, 3, 5), torch.randn(3, 7)
        if required is None:
            weights = [value.detach() for value in weights]
        else:
            x.requires_grad_()
        arguments = (text, [x], [h], [], weights, torch.tensor([6, 2, 0]), None, False, False, required)
        # What is kept for the backward has gaps that hold anything, which its own comparison would not forgive.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(scan, arguments, test_utils=checks)
        if required is None:
            torch.library.opcheck(scan, arguments)


class Stateless(fc.Cell):
    """Without states and weights."""

    states = ()

    def step(self, x, state):
        return 2 * x, ()


@pytest.mark.parametrize(
    "make", [lambda: fc.Recurrent(Stateless(5, 5)), lambda: fc.GRU(5, 8, 2), lambda: fc.LSTM(5, 8)]
)
@pytest.mark.parametrize("gradients", [False, True])
def test_programs_pass_no_empty_list(make, gradients):
    """AOTInductor's packages call operators with None in the place of a list that is empty."""
    layer, x = make(), torch.randn(7, 3, 5)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(layer, (x,))
        scans = [node for node in program.graph.nodes if node.target is torch.ops.fusecell.scan.default]
        assert scans
        assert all(len(values) for node in scans for values in node.args[1:5])
        result = program.module()(x)[0]
    assert torch.equal(result, layer(x)[0])
    if gradients and result.requires_grad:
        result.sum().backward()
        taken = [parameter.grad for parameter in program.module().parameters()]
        assert all(grad is not None for grad in taken)


@pytest.mark.parametrize("make", [lambda library: library.GRU(5, 8), lambda library: library.RNN(5, 8, 2)])
def test_operations_are_counted_as_torchs(make):
    from torch.utils.flop_counter import FlopCounterMode

    x, counts = torch.randn(7, 3, 5), []
    for model in (make(nn), torch.export.export(make(fc), (x,)).module()):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    program = torch.export.export(make(fc), (x,)).module()
    with FlopCounterMode(display=False) as counter:
        program(x)[0].sum().backward()
    by_operator = {str(name): value for name, value in counter.get_flop_counts()["Global"].items()}
    # A weight's gradient and a state's take as many operations each as the forward; the first input's is not needed.
    assert by_operator["fusecell.scan"] == counts[0]
    assert counts[0] < by_operator["fusecell.scan_backward"] <= 2 * counts[0]


@pytest.mark.parametrize("gradients", [False, True])
def test_profiles_name_the_layer(gradients):
    layer, other, x = fc.GRU(5, 8), fc.Recurrent(fc.Stack(fc.LSTMCell(5, 8), fc.RNNCell(8, 3))), torch.randn(7, 3, 5)
    with torch.set_grad_enabled(gradients):
        for _ in range(2):
            layer(x)
        with torch.profiler.profile() as profile:
            layer(x)
            other(x)
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("fusecell")}
    assert counts == {"fusecell::GRU": 1, "fusecell::LSTMCell": 1, "fusecell::RNNCell": 1}


class Inside(fc.Cell):
    """A cell with a compiled submodule, and with a cell and a layer inside its step."""

    def __init__(self):
        super().__init__(5, 6)
        self.part = torch.compile(nn.Sequential(nn.Linear(5, 6), nn.Tanh()), backend="eager")
        self.cell, self.layer = fc.GRUCell(6, 6), fc.GRU(6, 6)

    def step(self, x, state):
        h = self.cell(self.part(x), state[0])
        return self.layer(h[None])[0][0], (h,)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by torch's compiler, where the loop runs it
def test_a_compiled_submodule_and_layers_inside_a_step_are_part_of_it():
    torch.manual_seed(0)
    layer, x = fc.Recurrent(Inside()), torch.randn(4, 3, 5, requires_grad=True)
    results = []
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            y, h = layer(x)
            results.append((y, h, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
