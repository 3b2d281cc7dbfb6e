"""The compiled runner against the eager one, float64 and itself: numbers, bits, weights that change, odd calls."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fusecell as fc
import fusecell.compiler.dispatch.runner as compiled
from fusecell.cells import CELLS
from fusecell.compiler.backend import tuning
from fusecell.compiler.frontend import trace
from fusecell.compiler.programs import inference
from tests.compiler.traced_cells import FUNCTIONS, WEIGHTS, BodyCell, both
from tests.compiler.tuned import tuned

SHAPES = [(5, 3, 4, 10), (7, 33, 5, 16), (4, 1, 3, 40), (3, 9, 10, 257), (6, 2, 1, 2)]
NAMES = [member.name for member in CELLS]


def make(name: str, input_size: int, hidden_size: int, dtype: torch.dtype = torch.float32) -> fc.Cell:
    torch.manual_seed(0)
    member = next(each for each in CELLS if each.name == name)
    return member.make(input_size, hidden_size).to(dtype).eval()


def run(cell: fc.Cell, x: torch.Tensor, state=None, *, runner: str = "compiled", **options):
    with torch.no_grad(), fc.runner(runner):
        y, after = fc.scan(cell, x, state, **options)
    return y, after if isinstance(after, tuple) else (after,)


def furthest(actual, expected) -> float:
    """The largest difference, relative to the largest value where that is above 1."""
    pairs = [(actual[0], expected[0]), *zip(actual[1], expected[1], strict=True)]
    return max(((a.double() - b.double()).abs() / b.abs().max().clamp(min=1)).max().item() for a, b in pairs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_numbers(name, shape):
    steps, rows, inputs, hidden = shape
    cell = make(name, inputs, hidden)
    exact = copy.deepcopy(cell).double()
    x = torch.randn(steps, rows, inputs)
    lengths, resets = torch.randint(0, steps + 1, (rows,)), torch.rand(steps, rows) < 0.3
    for options in (
        {},
        {"lengths": lengths, "resets": resets},
        {"lengths": lengths, "resets": resets, "reverse": True},
    ):
        truth = run(exact, x.double(), runner="eager", **options)
        eager = furthest(run(cell, x, runner="eager", **options), truth)
        assert furthest(run(cell, x, **options), truth) <= max(4 * eager, 2e-6)
        assert furthest(run(exact, x.double(), **options), truth) <= 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_batch_chunks_or_layout(name, monkeypatch):
    cell = make(name, 19, 40)
    x = torch.randn(9, 13, 19)
    y, state = run(cell, x)
    for rows in (slice(0, 1), slice(5, 6), slice(0, 2), slice(3, 6), slice(2, 9)):
        assert torch.equal(run(cell, x[:, rows])[0], y[:, rows])
    first, middle = run(cell, x[:4])
    second, last = run(cell, x[4:], middle[0] if len(middle) == 1 else middle)
    assert torch.equal(torch.cat((first, second)), y)
    assert all(map(torch.equal, last, state))
    swapped = x.transpose(0, 1).contiguous()
    assert torch.equal(run(cell, swapped, batch_first=True)[0].transpose(0, 1), y)
    assert torch.equal(run(cell, torch.cat((x, x), -1)[..., 19:])[0], y)
    assert torch.equal(run(cell, x, lengths=[9] * 13)[0], y)
    tuned(monkeypatch, chunk_bytes=1)
    assert torch.equal(run(cell, x)[0], y)


class PartsCell(fc.Cell):
    """A cell that reads its whole input and a slice of it, at a multiple of 16 or, with ``odd``, not."""

    def __init__(self, odd: bool) -> None:
        super().__init__(32, 40)
        self.whole, self.part = nn.Linear(32, 40), nn.Linear(16, 40)
        self.recurrent, self.start = nn.Linear(40, 40), 9 if odd else 16

    def step(self, x, state):
        (h,) = state
        pre = self.whole(x) + self.part(x[:, self.start : self.start + 16].square()) + self.recurrent(h)
        new = torch.tanh(pre) - x.mean(1, keepdim=True)
        return new, (new,)


@pytest.mark.parametrize("rows", [1, 13, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "cell", [fc.GRUCell(32, 19), PartsCell(odd=False), PartsCell(odd=True)], ids=["gru", "", "odd"]
)
def test_inputs_in_place_match_gathered_inputs(cell, dtype, rows, monkeypatch):
    """Contiguous rows are multiplied in place, others copied first: the bits are the same."""
    cell = copy.deepcopy(cell).to(dtype)
    x = torch.randn(9, rows, 32, dtype=dtype)
    weight = torch.randn_like(x[..., :1])

    def all_of(x):
        leaf = x.detach().requires_grad_()
        y = fc.scan(cell, leaf)[0]
        return [run(cell, x)[0], y.detach(), *torch.autograd.grad((y * weight).sum(), [leaf, *cell.parameters()])]

    behind = torch.randn(9 * rows * 32 + 64, dtype=dtype)[1 : 1 + x.numel()].view(x.shape).copy_(x)
    between_rows = torch.randn(9, rows, 48, dtype=dtype)[..., :32].copy_(x)
    between_steps = torch.randn(18, rows, 32, dtype=dtype)[::2].copy_(x)
    by_row = x.transpose(0, 1).contiguous().transpose(0, 1)
    expected = all_of(x)
    for chunk in (tuning.TUNING.chunk_bytes, 1):
        tuned(monkeypatch, chunk_bytes=chunk)
        fc.refresh()
        for other in (x, behind, between_rows, between_steps, by_row):
            assert all(map(torch.equal, all_of(other), expected))
    one_step = x[:1].expand(9, -1, -1)
    assert torch.equal(run(cell, one_step)[0], run(cell, one_step.contiguous())[0])
    with fc.runner("eager"):
        eager = all_of(x)
    tolerance = 3e-5 if dtype == torch.float32 else 1e-12
    for actual, loop in zip(expected, eager, strict=True):
        torch.testing.assert_close(actual, loop, rtol=tolerance, atol=tolerance)


@given(
    name=st.sampled_from(NAMES),
    rows=st.integers(1, 20),
    hidden=st.integers(2, 50),
    split=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_bits_of_a_row_alone(name, rows, hidden, split, seed):
    cell = make(name, 3, hidden)
    torch.manual_seed(seed)
    x = torch.randn(6, rows, 3)
    y, _ = run(cell, x)
    row = seed % rows
    first, state = run(cell, x[:split, row : row + 1])
    rest, _ = run(cell, x[split:, row : row + 1], state[0] if len(state) == 1 else state)
    assert torch.equal(torch.cat((first, rest))[:, 0], y[:, row])


_BITS = """
import hashlib, torch, fusecell as fc
torch.set_num_threads(1)
digest = hashlib.sha256()
for zoo in fc.CELLS:
    torch.manual_seed(1)
    cell, x = zoo.make(7, 21).eval(), torch.randn(5, 6, 7)
    with torch.no_grad(), fc.runner("compiled"):
        digest.update(fc.scan(cell, x)[0].numpy().tobytes())
cell, x = fc.GRUCell(7, 261), torch.randn(5, 6, 7)
for gradient in torch.autograd.grad(fc.scan(cell, x)[0].square().sum(), list(cell.parameters())):
    digest.update(gradient.numpy().tobytes())
print(digest.hexdigest())
"""


def test_bits_are_equal_on_every_level_with_fma(monkeypatch):
    import fusecell.compiler.backend.target as target

    if target.host_target().vector_bits < 512:
        pytest.skip("this CPU has no AVX-512 to compare with AVX2")
    digests = set()
    for level in ("x86-64-v3", "x86-64-v4"):
        monkeypatch.setenv("FUSECELL_TARGET", level)
        digests.add(subprocess.run([sys.executable, "-c", _BITS], capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("name", ["gru", "lstm", "rnn_relu", "min_gru", "gru_layer_norm"])
def test_special_values_go_through_as_in_torch(name, special):
    cell, x = make(name, 3, 10), torch.randn(4, 5, 3)
    x[1, 2, 0] = special
    actual, expected = run(cell, x)[0], run(cell, x, runner="eager")[0]
    assert torch.equal(actual.isnan(), expected.isnan())
    torch.testing.assert_close(actual, expected, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_padding_changes_no_result():
    cell, x = make("gru", 3, 10), torch.randn(4, 3, 3)
    lengths = [4, 0, 2]
    clean = run(cell, x, lengths=lengths)
    x[2:, 2], x[:, 1] = float("nan"), float("inf")
    dirty = run(cell, x, lengths=lengths)
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[1][0], clean[1][0])


def _changes():
    def optimizer(layer):
        (parameter,) = [p for name, p in layer.named_parameters() if name.endswith("weight_hh")]
        parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD([parameter], lr=0.1).step()

    def load(layer):
        layer.load_state_dict({name: value + 0.1 for name, value in layer.state_dict().items()})

    def data(layer):
        layer.cell.bias_ih.data.copy_(torch.ones(30))

    def replaced(layer):
        layer.cell.weight_hh = nn.Parameter(torch.eye(30, 10))

    def parametrized(layer):
        nn.utils.parametrizations.weight_norm(layer.cell, "weight_ih")
        with torch.no_grad():
            layer.cell.parametrizations.weight_ih.original0.mul_(2)

    return [optimizer, load, data, replaced, parametrized]


@pytest.mark.parametrize("change", _changes(), ids=lambda change: change.__name__)
def test_a_change_of_a_weight_is_seen(change):
    layer, x = fc.Recurrent(make("gru", 3, 10)), torch.randn(4, 5, 3)
    before = run(layer.cell, x)[0]
    change(layer)
    after = run(layer.cell, x)[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, run(layer.cell, x, runner="eager")[0], atol=1e-6, rtol=1e-5)


class Switches(fc.Cell):
    """h' = scale * h + x, doubled in training, with a mode in words."""

    def __init__(self):
        super().__init__(4, 4)
        self.scale, self.mode, self.lin = 0.5, "plain", nn.Linear(4, 4)

    def step(self, x, state):
        (h,) = state
        h = self.scale * h + self.lin(x)
        if self.training:
            h = 2 * h
        if self.mode == "squashed":
            h = torch.tanh(h)
        return h, (h,)


def test_a_change_of_an_attribute_or_mode_is_seen():
    cell, x = Switches(), torch.randn(3, 2, 4)
    for change in (
        lambda: None,
        lambda: setattr(cell, "scale", 0.25),
        lambda: setattr(cell, "mode", "squashed"),
        cell.eval,
    ):
        change()
        torch.testing.assert_close(run(cell, x)[0], run(cell, x, runner="eager")[0], atol=1e-6, rtol=1e-5)


class Configured(fc.Cell):
    """h' = scale * h + x, with the scale kept in objects, a NumPy number, a list and an array."""

    def __init__(self):
        super().__init__(4, 4)
        self.config = SimpleNamespace(scale=0.5, inner=SimpleNamespace(sign=1))
        self.gain, self.table, self.array = np.float32(2), [3], np.array([1.0])

    def step(self, x, state):
        (h,) = state
        scale = self.config.scale * self.config.inner.sign * float(self.gain) / self.table[0] * float(self.array[0])
        return scale * h + x, (scale * h + x,)


def test_a_change_inside_an_attribute_is_seen():
    cell, x = Configured(), torch.randn(3, 2, 4)
    changes = (
        lambda: None,
        lambda: setattr(cell.config, "scale", 0.25),
        lambda: setattr(cell.config.inner, "sign", -1),
        lambda: setattr(cell, "gain", np.float32(3)),
        lambda: cell.table.__setitem__(0, 7),
        lambda: cell.array.fill(0.5),
    )
    for change in changes:
        change()
        torch.testing.assert_close(run(cell, x)[0], run(cell, x, runner="eager")[0], atol=1e-6, rtol=1e-5)


class Swap(fc.Cell):
    """A shift register: each state becomes the other."""

    states = ("a", "b")

    def step(self, x, state):
        a, b = state
        return a, (b, x)


def test_a_state_that_becomes_another_state():
    cell, x = Swap(10, 10), torch.randn(5, 3, 10)
    actual, expected = run(cell, x), run(cell, x, runner="eager")
    assert torch.equal(actual[0], expected[0])
    assert all(map(torch.equal, actual[1], expected[1]))


class Reads(fc.Cell):
    """An output computed from the state by a product and a softmax, both of which run after the loop."""

    def __init__(self):
        super().__init__(3, 17)
        self.rec, self.out = nn.Linear(20, 17), nn.Linear(17, 5)
        self.output_size = 5

    def step(self, x, state):
        (h,) = state
        h = torch.tanh(self.rec(torch.cat((x, h), -1)))
        return torch.softmax(self.out(h), -1), (h,)


def test_outputs_that_leave_the_loop():
    cell, x = Reads(), torch.randn(6, 7, 3)
    for options in ({}, {"lengths": [6, 0, 3, 1, 5, 5, 2]}, {"lengths": [6, 0, 3, 1, 5, 5, 2], "reverse": True}):
        assert furthest(run(cell, x, **options), run(cell, x, runner="eager", **options)) < 2e-6


class Branches(fc.Cell):
    def step(self, x, state):
        (h,) = state
        if x.sum() > 0:
            h = h + x
        return h, (h,)


def test_what_cannot_be_compiled_says_why_and_runs_eagerly():
    cell, x = Branches(4, 4), torch.randn(3, 2, 4)
    with torch.no_grad(), fc.runner("compiled"), pytest.raises(fc.NotCompilable, match=r"if x\.sum\(\) > 0"):
        fc.scan(cell, x)
    with torch.no_grad(), pytest.warns(fc.EagerWarning, match="Branches"):
        y, _ = fc.scan(cell, x)
    assert torch.equal(y, run(cell, x, runner="eager")[0])


def test_returned_tensors_share_no_memory():
    cell, x, h = make("gru", 3, 10), torch.randn(4, 5, 3), torch.randn(5, 10)
    before = h.clone()
    y, (after,) = run(cell, x, h)
    y.fill_(0)
    assert torch.equal(h, before)
    assert not torch.equal(after, torch.zeros_like(after))
    after.fill_(1)
    assert torch.equal(y, torch.zeros_like(y))


def test_threads_share_a_program():
    cell, x = make("lstm", 5, 20), torch.randn(30, 4, 5)
    expected, outputs = run(cell, x)[0], []
    threads = [threading.Thread(target=lambda: outputs.append(run(cell, x)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 8
    assert all(torch.equal(y, expected) for y in outputs)


def test_the_callers_denormal_mode_is_restored():
    tiny = torch.tensor([1e-40])
    run(make("gru", 3, 10), torch.randn(4, 5, 3))
    assert (tiny * 1.0).item() != 0


class PartOfAState(fc.Cell):
    """A state that is a value concatenated with a slice of it."""

    def step(self, x, state):
        (h,) = state
        a = torch.tanh(x + h[:, :4])
        h = torch.cat((a, a[:, :2]), -1)
        return h, (h,)


def test_a_slice_of_a_value_used_with_the_value():
    cell, x = PartOfAState(4, 6), torch.randn(5, 3, 4)
    assert furthest(run(cell, x), run(cell, x, runner="eager")) < 1e-6


BODIES = [*FUNCTIONS, *WEIGHTS]


@pytest.mark.parametrize("name", BODIES)
def test_every_rule_of_the_tracer_compiled(name):
    torch.manual_seed(3)
    if name in WEIGHTS:
        cell = BodyCell(WEIGHTS[name]).double()
    else:
        cell = BodyCell(lambda cell, x, h: FUNCTIONS[name](both(cell, x, h))).double()
    x = torch.randn(5, 7, 4, dtype=torch.float64)
    for options in ({}, {"lengths": [5, 1, 0, 2, 3, 5, 4]}):
        actual, expected = run(cell, x, **options)[0], run(cell, x, runner="eager", **options)[0]
        torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-9, equal_nan=True)


def test_empty_sizes_run_eagerly_without_a_warning():
    with torch.no_grad():
        assert fc.GRUCell(5, 0)(torch.randn(3, 5)).shape == (3, 0)
        assert fc.GRU(5, 4)(torch.randn(0, 3, 5))[0].shape == (0, 3, 4)
        assert fc.GRU(5, 4)(torch.randn(6, 0, 5))[0].shape == (6, 0, 4)


def test_lazy_negation_and_expanded_tensors():
    cell, x = make("gru", 5, 10), torch.randn(4, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(fc.scan(cell, torch._neg_view(x))[0], fc.scan(cell, -x)[0], atol=1e-6, rtol=1e-5)
    wide = torch.randn(4, 1, 1).expand(4, 3, 5)
    torch.testing.assert_close(run(cell, wide)[0], run(cell, wide, runner="eager")[0], atol=1e-6, rtol=1e-5)
    state = torch.randn(1, 10).expand(3, 10)
    torch.testing.assert_close(run(cell, x, state)[0], run(cell, x, state, runner="eager")[0], atol=1e-6, rtol=1e-5)


def test_an_unfrozen_weight_gets_a_gradient():
    cell, x = make("gru", 3, 4), torch.randn(5, 2, 3)
    cell.weight_hh.requires_grad_(False)
    with fc.runner("compiled"):
        fc.scan(cell, x)[0].sum().backward()
        assert cell.weight_hh.grad is None
        cell.weight_hh.requires_grad_(True)
        fc.scan(cell, x)[0].sum().backward()
    assert cell.weight_hh.grad.abs().sum() > 0


@pytest.fixture
def compilations(monkeypatch) -> list[fc.Cell]:
    """The cells that are compiled while a test runs."""
    cells: list[fc.Cell] = []

    def counted(cell, *arguments, **options):
        cells.append(cell)
        return trace(cell, *arguments, **options)

    monkeypatch.setattr(inference, "trace", counted)
    fc.refresh()
    return cells


def test_one_program_serves_every_number_of_steps_and_rows(compilations):
    cell = make("rnn_tanh", 3, 4)
    assert run(cell, torch.randn(10, 2, 3))[0].shape == (10, 2, 4)
    one = compiled.find_program(cell, (torch.randn(10, 2, 3),))
    for shape in ((10_000, 1, 3), (1, 1, 3), (2, 501, 3)):
        x = torch.randn(shape)
        assert compiled.find_program(cell, (x,)) is one
        assert furthest(run(cell, x), run(cell, x, runner="eager")) < 1e-5
    assert compilations == [cell]


class Leaky(fc.Cell):
    """h' = (1 - alpha) h + alpha tanh(x), with alpha in an object."""

    def __init__(self, alpha):
        super().__init__(4, 4)
        self.alpha, self.config = alpha, SimpleNamespace(gain=1.0)

    def step(self, x, state):
        (h,) = state
        h = (1 - self.alpha) * h + self.alpha * self.config.gain * torch.tanh(x)
        return h, (h,)


def test_a_number_that_keeps_changing_is_compiled_three_times(compilations):
    cell, x = Leaky(0.1), torch.randn(3, 2, 4)
    for alpha in (0.1, 0.2, 0.3, 0.1, 0.2):
        cell.alpha = alpha
        torch.testing.assert_close(run(cell, x)[0], run(cell, x, runner="eager")[0], atol=1e-6, rtol=1e-5)
    assert len(compilations) == 3
    cell.alpha = 0.4
    with torch.no_grad(), pytest.warns(fc.EagerWarning, match=r"attribute alpha changes.*register_buffer\(\"alpha\""):
        y, _ = fc.scan(cell, x)
    assert torch.equal(y, run(cell, x, runner="eager")[0])
    with pytest.raises(fc.NotCompilable, match="attribute alpha changes"):
        run(cell, x)
    cell.alpha = 0.3
    run(cell, x)  # what was compiled stays
    cell.alpha, cell.config.gain = 0.5, 2.0
    with pytest.raises(fc.NotCompilable, match="attribute alpha changes"):
        run(cell, x)
    assert len(compilations) == 3
    cell.alpha = 0.3
    run(cell, x)  # another number, for the second time
    cell.config.gain = 3.0
    run(cell, x)
    cell.alpha, cell.config.gain = 0.6, 4.0
    with pytest.raises(fc.NotCompilable, match=r"attributes alpha, config\.gain change"):
        run(cell, x)
    assert len(compilations) == 5
    fc.refresh(cell)
    run(cell, x)
    assert len(compilations) == 6


def test_numbers_are_counted_for_each_cell(compilations):
    stack = fc.Recurrent(fc.Stack(*[Leaky(alpha / 10) for alpha in range(1, 9)]))
    x = torch.randn(3, 2, 4)
    with torch.no_grad(), fc.runner("compiled"):
        actual, _ = stack(x)
    with torch.no_grad(), fc.runner("eager"):
        expected, _ = stack(x)
    assert len(compilations) == 8
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


class Buffered(Leaky):
    """The same with alpha a value of the run."""

    def __init__(self):
        super().__init__(0.5)
        del self.alpha
        self.register_buffer("alpha", torch.tensor(0.5))


def test_a_number_in_a_buffer_is_compiled_once(compilations):
    cell, x = Buffered(), torch.randn(3, 2, 4)
    for alpha in (0.1, 0.2, 0.3, 0.4, 0.5):
        cell.alpha.fill_(alpha)
        torch.testing.assert_close(run(cell, x)[0], run(cell, x, runner="eager")[0], atol=1e-6, rtol=1e-5)
    assert len(compilations) == 1


_gain = {"value": 1.0}  # what is inside is not followed


class ReadsAGlobal(fc.Cell):
    def step(self, x, state):
        return _gain["value"] * x, state


def test_refresh_forgets_the_programs_of_the_cells_inside(compilations, monkeypatch):
    cell, other, x = ReadsAGlobal(4, 4), make("rnn_tanh", 4, 4), torch.ones(2, 3, 4)
    drop_in = fc.GRU(4, 4)
    for module in (fc.Recurrent(cell), drop_in):
        with torch.no_grad(), fc.runner("compiled"):
            module(x)
    run(other, x)
    monkeypatch.setitem(_gain, "value", 2.0)
    assert run(cell, x)[0].max() == 1.0
    fc.refresh(nn.ModuleList([fc.Recurrent(cell)]))
    assert run(cell, x)[0].max() == 2.0
    run(other, x)
    assert [type(each).__name__ for each in compilations] == ["ReadsAGlobal", "GRUCell", "RNNCell", "ReadsAGlobal"]
    fc.refresh(drop_in)
    with torch.no_grad(), fc.runner("compiled"):
        drop_in(x)
    assert type(compilations[-1]) is fc.GRUCell
    fc.refresh()
    run(other, x)
    assert compilations[-1] is other


class NamedAsBuffers(fc.Cell):
    """A step whose variables have the names of a kernel's buffers and slots."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.of_x = nn.Linear(input_size, 5 * hidden_size)
        self.of_h = nn.Linear(hidden_size, hidden_size)

    def step(self, x, state):
        (h,) = state
        order, starts, strips, scratch, rows = self.of_x(x).chunk(5, -1)
        order, starts, strips, scratch, rows = (1.5 * each for each in (order, starts, strips, scratch, rows))
        value = torch.tanh(h * order + starts * self.of_h(h) + strips * rows * h)
        return value + scratch * h, (value,)


@pytest.mark.parametrize("lengths", [None, [7, 3, 5, 7, 1, 2]])
def test_variables_may_have_the_names_of_kernel_buffers(lengths):
    """Regression: such a value took the buffer's place, so wrong memory was read and written."""
    cell, x = NamedAsBuffers(5, 40), torch.randn(7, 6, 5)
    results = {}
    for name in ("compiled", "eager"):
        with fc.runner(name):
            inputs = x.clone().requires_grad_()
            y, state = fc.scan(cell, inputs, lengths=lengths)
            (y.square().sum() + state.sum()).backward()
            results[name] = (y, state, inputs.grad)
    for actual, eager in zip(results["compiled"], results["eager"], strict=True):
        torch.testing.assert_close(actual, eager, rtol=1e-4, atol=1e-5)
