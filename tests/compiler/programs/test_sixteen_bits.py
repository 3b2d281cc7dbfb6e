"""Layers in bfloat16 and float16: float32 inside, rounded once, and nearer to float64 than torch.nn's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusecell as fc
from fusecell.compiler.backend.target import host_target
from fusecell.compiler.dispatch import eligibility, fast_path
from fusecell.compiler.dispatch import runner as runners
from fusecell.compiler.frontend import trace
from fusecell.compiler.refusal import Refusal
from fusecell.eager import run_eager
from tests.compiler.cpu_levels import runs_here

DTYPES = [torch.bfloat16, torch.float16]
KINDS = ["RNN", "GRU", "LSTM"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
every_kind = pytest.mark.parametrize("kind", KINDS)
in_float32 = pytest.mark.usefixtures("products_in_float32")


@pytest.fixture
def products_in_float32(monkeypatch):
    """Compile for the highest level of CPUs that multiply no pairs of bfloat16 numbers."""
    if host_target().pair_dot is not None:
        level = max(filter(runs_here, host_target().isa.levels))
        monkeypatch.setenv("FUSECELL_TARGET", level)
        assert host_target().pair_dot is None
        fc.refresh()
    yield
    monkeypatch.undo()
    fc.refresh()


def tensors_in(value) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in tensors_in(part)]


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.detach().double() - exact.detach().double()).square().mean().sqrt())


def chance(exact: Tensor, dtype: torch.dtype) -> float:
    """Return an eighth of the last place, by which the errors of two roundings of alike numbers differ by chance."""
    return torch.finfo(dtype).eps / 8 * float(exact.detach().square().mean().sqrt())


def trained(layer, x, *args, **options):
    """Return outputs, states, and the gradients of input and parameters of a loss with fixed weights."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    results = tensors_in(layer(x, *args, **options))
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in results]
    # Rounded to bfloat16, so that a layer of any dtype gets the same.
    torch.autograd.backward(results, [g.bfloat16().to(v.dtype) for g, v in zip(grads, results, strict=True)])
    return [*results, x.grad, *[parameter.grad for parameter in layer.parameters()]]


def same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def rounded(values, dtype):
    return [value.to(dtype) for value in values]


SHAPES = {"small": (7, 3, 5, 9), "odd": (13, 5, 17, 33), "one row": (40, 1, 16, 32), "wide": (9, 16, 32, 64)}


@every_dtype
@every_kind
@pytest.mark.parametrize("shape", SHAPES)
def test_drop_ins_are_nearer_to_float64_than_torchs_own(kind, shape, dtype):
    steps, rows, inputs, units = SHAPES[shape]
    layer, reference = getattr(fc, kind)(inputs, units).to(dtype), getattr(nn, kind)(inputs, units).to(dtype)
    layer.load_state_dict(reference.state_dict())
    x = torch.randn(steps, rows, inputs).to(dtype)
    exact = trained(copy.deepcopy(reference).double(), x.double())
    with fc.runner("compiled"):
        actual = trained(layer, x)
    for value, torch_value, truth in zip(actual, trained(reference, x), exact, strict=True):
        assert value.dtype == dtype
        assert error(value, truth) <= error(torch_value, truth)


@in_float32
@every_dtype
@every_kind
@pytest.mark.parametrize("recompute", [False, True])
def test_numbers_are_those_of_float32_rounded_once(kind, dtype, recompute):
    layer = getattr(fc, kind)(5, 9, recompute=recompute).to(dtype)
    wide, x = copy.deepcopy(layer).float(), torch.randn(7, 3, 5).to(dtype)
    with fc.runner("compiled"):
        expected = rounded(trained(wide, x.float()), dtype)
        same(trained(layer, x), expected)  # the slow path
        same(trained(layer, x), expected)  # and the fast one
        with torch.no_grad():
            for _ in range(2):
                same(tensors_in(layer(x)), rounded(tensors_in(wide(x.float())), dtype))


OPTIONS = {
    "lengths": {"lengths": [4, 0, 7]},
    "resets": {"resets": torch.rand(7, 3, generator=torch.Generator().manual_seed(0)) < 0.3},
    "mask": {"mask": torch.rand(7, 3, generator=torch.Generator().manual_seed(1)) < 0.7},
    "both": {"lengths": [7, 2, 5], "resets": torch.rand(7, 3, generator=torch.Generator().manual_seed(2)) < 0.3},
}


@in_float32
@every_dtype
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_resets_and_masks(kind, reverse, dtype):
    layer = fc.Recurrent(fc.LSTMCell(5, 9), reverse=reverse).to(dtype)
    wide, x = copy.deepcopy(layer).float(), torch.randn(7, 3, 5).to(dtype)
    state = tuple(torch.randn(3, 9).to(dtype) for _ in range(2))
    wide_state = tuple(value.float() for value in state)
    with fc.runner("compiled"):
        expected = trained(wide, x.float(), wide_state, **OPTIONS[kind])
        same(trained(layer, x, state, **OPTIONS[kind]), rounded(expected, dtype))
        with torch.no_grad():
            expected = tensors_in(wide(x.float(), wide_state, **OPTIONS[kind]))
            same(tensors_in(layer(x, state, **OPTIONS[kind])), rounded(expected, dtype))


@every_dtype
@every_kind
def test_layers_directions_and_packed_sequences(kind, dtype):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    layer, reference = getattr(fc, kind)(5, 9, **options).to(dtype), getattr(nn, kind)(5, 9, **options).to(dtype)
    layer.load_state_dict(reference.state_dict())
    exact, x = copy.deepcopy(reference).double(), torch.randn(3, 7, 5).to(dtype)
    with fc.runner("compiled"):
        actual = trained(layer, x)
        packed, _ = layer(pack_padded_sequence(x, [7, 5, 2], batch_first=True))
    for value, torch_value, truth in zip(actual, trained(reference, x), trained(exact, x.double()), strict=True):
        assert value.dtype == dtype
        assert error(value, truth) <= error(torch_value, truth)
    truth, _ = exact(pack_padded_sequence(x.double(), [7, 5, 2], batch_first=True))
    torch_value, _ = reference(pack_padded_sequence(x, [7, 5, 2], batch_first=True))
    assert packed.data.dtype == dtype
    assert error(packed.data, truth.data) <= error(torch_value.data, truth.data)


@in_float32
@every_dtype
def test_truncated_and_clipped_gradients(dtype):
    layer = fc.Recurrent(fc.LSTMCell(5, 9), tbptt=3, clip_state_grad=0.125).to(dtype)
    wide, x = copy.deepcopy(layer).float(), torch.randn(7, 3, 5).to(dtype)
    with fc.runner("compiled"):
        same(trained(layer, x), rounded(trained(wide, x.float()), dtype))


@every_dtype
def test_noise_of_wrappers(dtype):
    cell = fc.VariationalDropout(fc.Zoneout(fc.LSTMCell(5, 9), 0.3), input=0.2, state=0.2, output=0.2)
    layer, x = fc.Recurrent(cell).to(dtype), torch.randn(7, 3, 5).to(dtype)
    results = {}
    for runner in ("compiled", "eager"):
        torch.manual_seed(1)
        with fc.runner(runner):
            results[runner] = trained(layer, x)
    for value, loop in zip(results["compiled"], results["eager"], strict=True):
        assert value.dtype == loop.dtype == dtype
        torch.testing.assert_close(value.float(), loop.float(), rtol=0.05, atol=0.1)


@every_dtype
def test_an_input_that_is_constant_over_time(dtype):
    class Conditioned(fc.Cell):
        inputs = ("x", "speaker")

        def step(self, inputs, state):
            x, speaker = inputs
            h = torch.tanh(x + speaker * state[0])
            return h, (h,)

    cell, x, speaker = Conditioned(5, 5), torch.randn(7, 3, 5).to(dtype), torch.randn(1, 3, 5).to(dtype)
    results = []
    with fc.runner("compiled"):
        for cast in (dtype, torch.float32):
            leaves = [value.to(cast, copy=True).requires_grad_() for value in (x, speaker)]
            outputs, _ = fc.scan(cell, tuple(leaves))
            outputs.sum().backward()
            results.append([outputs, *[leaf.grad for leaf in leaves]])
    same(results[0], rounded(results[1], dtype))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "features first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "expanded": lambda x: x[:1].expand(7, 3, 5),
    "unaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(7, 3, 5),
}


@in_float32
@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_and_weights(layout, dtype):
    layer, x = fc.GRU(5, 9).to(dtype), LAYOUTS[layout](torch.randn(7, 3, 5).to(dtype))
    layer.weight_hh_l0.data = layer.weight_hh_l0.data.t().contiguous().t()
    wide = copy.deepcopy(layer).float()
    with fc.runner("compiled"):
        expected = rounded(tensors_in(wide(x.float().contiguous())), dtype)
        for _ in range(3):
            same(tensors_in(layer(x)), expected)
        with torch.no_grad():
            for _ in range(3):
                same(tensors_in(layer(x)), expected)


@every_dtype
def test_the_zoo_is_as_near_to_float64_as_the_python_loop(zoo_cell, dtype):
    cell = zoo_cell.make(5, 9).to(dtype)
    exact, x = copy.deepcopy(cell).double(), torch.randn(11, 4, 5).to(dtype)
    results = {}
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            results[runner] = trained(fc.Recurrent(cell), x)
    truths = trained(fc.Recurrent(exact), x.double())
    for value, loop, truth in zip(results["compiled"], results["eager"], truths, strict=True):
        assert value.dtype == loop.dtype == dtype
        assert error(value, truth) <= error(loop, truth) + chance(truth, dtype)


# Steps that look at dtypes


class Careful(fc.Cell):
    """A cell that computes its norm in float32, as mixed-precision code does, with constants of every kind."""

    def __init__(self, input_size=5, hidden_size=9):
        super().__init__(input_size, hidden_size)
        self.inp, self.rec = nn.Linear(input_size, hidden_size), nn.Linear(hidden_size, hidden_size, bias=False)
        self.gain = nn.Parameter(torch.rand(hidden_size) + 0.5)
        self.register_buffer("rate", torch.tensor(0.3))

    def step(self, x, state):
        (h,) = state
        wide = (self.inp(x) + self.rec(h)).float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)
        new = torch.tanh(wide).to(x.dtype) * self.gain + torch.full((9,), 0.25, dtype=x.dtype) * torch.tensor(0.5)
        if x.dtype == torch.float64:
            new = new + 0.0
        h = (1 - self.rate) * h + self.rate * new + torch.zeros_like(h) + x.new_zeros(9)
        return h * h.new_tensor(2.0), (h,)


@every_dtype
def test_a_step_with_casts_and_constants(dtype):
    cell = Careful().to(dtype)
    exact, x = copy.deepcopy(cell).double(), torch.randn(11, 4, 5).to(dtype)
    layers = {runner: fc.Recurrent(cell) for runner in ("compiled", "eager")}
    results = {}
    for runner, layer in layers.items():
        with fc.runner(runner):
            results[runner] = trained(layer, x)
            layer(x)
    # The epsilon is that of x.dtype, which float64 must be told.
    eps = torch.finfo
    torch.finfo = lambda _: eps(dtype)
    try:
        with fc.runner("eager"):
            truths = trained(fc.Recurrent(exact), x.double())
    finally:
        torch.finfo = eps
    for value, loop, truth in zip(results["compiled"], results["eager"], truths, strict=True):
        assert value.dtype == loop.dtype
        assert error(value, truth) <= error(loop, truth) + chance(truth, dtype)  # both round 1 - rate


class Widening(fc.Cell):
    """A cell whose output has another dtype than its state."""

    def step(self, x, state):
        h = torch.tanh(x + state[0])
        return h.to(self.kind), (h,)


@every_dtype
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_result_of_another_dtype_is_left_to_the_loop(kind, dtype):
    cell, x = Widening(5, 5), torch.randn(7, 3, 5).to(dtype)
    cell.kind = kind
    with fc.runner("eager"):
        expected = fc.scan(cell, x)
    assert expected[0].dtype == kind
    with pytest.warns(fc.EagerWarning, match="Python loop: .*float"):
        same(tensors_in(fc.scan(cell, x)), tensors_in(expected))


class Passing(fc.Cell):
    """A cell that passes a value through a dtype."""

    def step(self, x, state):
        h = torch.tanh(x + state[0]).to(self.through).to(x.dtype)
        return h, (h,)


@every_dtype
def test_dtypes_inside_a_step(dtype):
    cell = Passing(5, 5)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    for through, compiled in ((torch.float32, True), (dtype, True), (torch.float64, False), (other, False)):
        cell.through = through
        result = trace(cell, [(5,)], dtype, gradients=True)
        assert isinstance(result, Refusal) != compiled
        if compiled:
            assert result.graph.dtype == "f32"
            assert result.dtype == dtype
        else:
            assert str(through) in result.reasons[0]
    # In a float32 step a cast to 16 bits is a rounding, and stays one.
    cell.through = dtype
    rounding = "to_" + str(dtype).removeprefix("torch.")
    assert rounding in {node.op for node in trace(cell, [(5,)], torch.float32, gradients=False).graph.nodes}


@every_dtype
def test_a_cell_without_weights_takes_the_dtype_of_its_input(dtype):
    cell, x = Passing(5, 5), torch.randn(7, 3, 5).to(dtype)
    cell.through = torch.float32
    with fc.runner("compiled"):
        outputs, after = fc.scan(cell, x)
        expected, _ = fc.scan(cell, x.float())
    assert after.dtype == dtype
    same([outputs], [expected.to(dtype)])


def test_weights_of_two_dtypes():
    class Mixed(fc.Cell):
        def __init__(self):
            super().__init__(5, 9)
            self.inp = nn.Linear(5, 9, dtype=torch.bfloat16)
            self.norm = nn.LayerNorm(9)

        def step(self, x, state):
            h = torch.tanh(self.norm((self.inp(x) + state[0]).float())).to(x.dtype)
            return h, (h,)

    layer, x = fc.Recurrent(Mixed()), torch.randn(7, 3, 5).bfloat16()
    for _ in range(2):
        with fc.runner("compiled"):
            actual = trained(layer, x)
        with fc.runner("eager"):
            expected = trained(layer, x)
        for value, loop in zip(actual, expected, strict=True):
            assert value.dtype == loop.dtype
            torch.testing.assert_close(value.float(), loop.float(), rtol=0.05, atol=0.05)
    assert layer.cell.norm.weight.grad.dtype == torch.float32


def test_a_computed_weight():
    class Gated(fc.Cell):
        def __init__(self):
            super().__init__(5, 9)
            self.weight = nn.Parameter(torch.randn(9, 5))
            self.scale = nn.Parameter(torch.rand(9, 1))

        def step(self, x, state):
            h = torch.tanh(x @ (self.weight * self.scale.sigmoid()).t() + state[0])
            return h, (h,)

    layer, x = fc.Recurrent(Gated()).bfloat16(), torch.randn(7, 3, 5).bfloat16()
    with fc.runner("compiled"):
        actual = trained(layer, x)
    with fc.runner("eager"):
        expected = trained(layer, x)
    truths = trained(copy.deepcopy(layer).double(), x.double())
    for value, loop, truth in zip(actual, expected, truths, strict=True):
        assert value.dtype == torch.bfloat16
        assert error(value, truth) <= error(loop, truth)


# What surrounds a call


@every_dtype
def test_default_dtype_of_the_layer(dtype):
    torch.set_default_dtype(dtype)
    try:
        cell = Careful()
        x = torch.randn(7, 3, 5)
        assert x.dtype == dtype
        with fc.runner("compiled"):
            outputs, _ = fc.scan(cell, x)
        with fc.runner("eager"):
            expected, _ = fc.scan(cell, x)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(outputs.float(), expected.float(), rtol=0.05, atol=0.05)


@in_float32
@every_dtype
def test_repeated_calls_take_the_fast_path_and_follow_the_weights(dtype, monkeypatch):
    hits = []
    find = fast_path.find

    def counted(*args):
        result = find(*args)
        hits.append(result is not None)
        return result

    monkeypatch.setattr(type(fast_path.CACHE), "find", staticmethod(counted))
    layer, x = fc.LSTM(5, 9).to(dtype), torch.randn(7, 3, 5).to(dtype)
    with fc.runner("compiled"):
        for grad in (False, True):
            hits.clear()
            with torch.set_grad_enabled(grad):
                for _ in range(3):
                    layer.weight_hh_l0.data.mul_(0.5)
                    actual = tensors_in(layer(x))
                    same(actual, rounded(tensors_in(copy.deepcopy(layer).float()(x.float())), dtype))
            assert hits[0::2] == [False, True, True]


@every_dtype
@pytest.mark.parametrize("calls", [1, 2])
def test_gradients_of_gradients(dtype, calls):
    layer, x = fc.GRU(5, 9).to(dtype), torch.randn(4, 3, 5).to(dtype).requires_grad_()
    results = {}
    for runner in ("compiled", "eager"):
        with fc.runner(runner):
            for _ in range(calls):  # the second on the fast path
                outputs, _ = layer(x)
        (first,) = torch.autograd.grad(outputs.float().square().sum(), x, create_graph=True)
        results[runner] = [first, *torch.autograd.grad(first.float().square().sum(), list(layer.parameters()))]
    for value, loop in zip(results["compiled"], results["eager"], strict=True):
        assert value.dtype == loop.dtype == dtype
        torch.testing.assert_close(value.float(), loop.float(), rtol=0.05, atol=0.05)


@every_dtype
def test_one_step(dtype):
    cell = fc.GRUCell(5, 9).to(dtype)
    wide, x, h = copy.deepcopy(cell).float(), torch.randn(3, 5).to(dtype), torch.randn(3, 9).to(dtype)
    with fc.runner("compiled"), torch.no_grad():
        for _ in range(2):
            same([fc.step(cell, x, h)[0]], [fc.step(wide, x.float(), h.float())[0].to(dtype)])


def test_rounding_is_to_the_nearest_and_to_even_between_two():
    class Adding(fc.Cell):
        def step(self, x, state):
            return x + 1.0, state

    # The half of the last place of 1 and thrice that lie between two numbers each; a little more lies above.
    eps = torch.finfo(torch.bfloat16).eps
    x = torch.tensor([eps / 2, 3 * eps / 2, eps / 2 + eps / 64, 0.0]).bfloat16()[None, None]
    with fc.runner("compiled"):
        outputs, _ = fc.scan(Adding(4, 4), x)
    assert outputs[0, 0].tolist() == [1.0, 1 + 2 * eps, 1 + eps, 1.0]


def test_sums_of_gradients_are_accumulated_in_float32():
    """A bias's gradient over 4096 steps of 1 is 4096; added in bfloat16, it would stop at 256."""

    class Shift(fc.Cell):
        def __init__(self):
            super().__init__(4, 4)
            self.bias = nn.Parameter(torch.zeros(4))

        def step(self, x, state):
            return x + self.bias, ()

        states = ()

    layer = fc.Recurrent(Shift()).bfloat16()
    with fc.runner("compiled"):
        layer(torch.zeros(4096, 1, 4).bfloat16())[0].sum().backward()
    assert layer.cell.bias.grad.dtype == torch.bfloat16
    assert layer.cell.bias.grad.tolist() == [4096.0] * 4


def test_an_optimiser_trains_a_bfloat16_layer():
    layer, readout = fc.GRU(8, 32).bfloat16(), nn.Linear(32, 4).bfloat16()
    x, y = torch.randn(20, 8, 8).bfloat16(), torch.randn(20, 8, 4).bfloat16()
    optimiser = torch.optim.Adam([*layer.parameters(), *readout.parameters()], 0.01)
    losses = []
    with fc.runner("compiled"):
        for _ in range(60):
            optimiser.zero_grad()
            loss = (readout(layer(x)[0]) - y).float().square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@every_dtype
def test_a_weight_changed_before_the_backward(dtype):
    layer, x = fc.Recurrent(fc.GRUCell(5, 9)).to(dtype), torch.randn(7, 3, 5).to(dtype)
    before = copy.deepcopy(layer)
    before(x)[0].sum().backward()
    outputs, _ = layer(x)
    with torch.no_grad():
        layer.cell.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()
    # The fast path reads its copies alone, and so has the gradient of its forward.
    layer.load_state_dict(before.state_dict())
    outputs, _ = layer(x)
    with torch.no_grad():
        layer.cell.weight_hh.mul_(2)
    outputs.sum().backward()
    assert torch.equal(layer.cell.weight_hh.grad, before.cell.weight_hh.grad)


@in_float32
@pytest.mark.parametrize("grad", [False, True])
def test_few_steps_of_a_large_cell_run_the_loop(grad, monkeypatch):
    monkeypatch.setattr(eligibility, "_LARGE_CELL", 400)
    large, small = (fc.Recurrent(fc.GRUCell(5, size)).bfloat16() for size in (9, 4))
    for layer, steps, loops in ((large, 1, True), (large, 2, True), (large, 3, False), (small, 1, False)):
        x = torch.randn(steps, 3, 5).bfloat16()
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                with monkeypatch.context() as patch:
                    runs = []
                    patch.setattr(runners, "run_eager", lambda *args, runs=runs: runs.append(1) or run_eager(*args))
                    layer(x)
                assert bool(runs) == loops
            with fc.runner("compiled"):
                expected = tensors_in(copy.deepcopy(layer).float()(x.float()))
                same(tensors_in(layer(x)), rounded(expected, torch.bfloat16))
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(runners, "run_eager", None)
        large.float()(torch.randn(1, 3, 5))  # nothing is converted


# The rest of the package


@every_dtype
def test_record(dtype):
    layer, x = fc.GRU(5, 9).to(dtype), torch.randn(7, 3, 5).to(dtype)
    tape = fc.record(layer, x, lengths=[7, 2, 5], gradients=True)
    with fc.runner("eager"):
        expected = fc.record(layer, x, lengths=[7, 2, 5])
    for name in expected.names():
        assert tape.value(name).dtype == expected.value(name).dtype == dtype
        torch.testing.assert_close(tape.value(name).float(), expected.value(name).float(), rtol=0.05, atol=0.05)
    same([tape.outputs], [layer(x, lengths=[7, 2, 5])[0]])
    tape.outputs.sum().backward()
    assert tape.gradient("z").dtype == dtype


@every_dtype
def test_explain_and_summary(dtype):
    layer = fc.GRU(13, 31).to(dtype)
    explanation = fc.explain(layer)
    assert (explanation.runner, explanation.training_runner, explanation.reasons) == ("compiled", "compiled", ())
    assert f"{str(dtype).removeprefix('torch.')} outside, float32 in the kernels" in explanation.text
    assert fc.summary(layer, 7, 3).saved == 7 * 3 * 5 * 32 * 4


def test_streams_are_refused_in_one_sentence():
    with pytest.raises(TypeError, match="float32 or float64"):
        fc.Stream(fc.GRU(5, 9).bfloat16())


@every_dtype
@pytest.mark.parametrize("lengths", [None, [7, 2, 5]])
def test_torch_compile(dtype, lengths):
    layer, x = fc.Recurrent(fc.GRUCell(5, 9)).to(dtype), torch.randn(7, 3, 5).to(dtype)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    lengths = None if lengths is None else torch.tensor(lengths)
    same(trained(compiled, x, lengths=lengths), trained(layer, x, lengths=lengths))
    torch.compiler.reset()


def test_torch_export():
    layer, x = fc.GRU(5, 9, num_layers=2).bfloat16(), torch.randn(7, 3, 5).bfloat16()
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        assert "fusecell.scan" in str(program.graph)
        same(tensors_in(program.module()(x)), tensors_in(layer(x)))
