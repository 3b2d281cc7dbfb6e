"""The fast path of repeated calls: whatever changes between two calls is seen by the second."""

from __future__ import annotations

import copy
import dataclasses
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fusecell as fc
from fusecell.compiler.backend.tuning import TUNING
from fusecell.compiler.dispatch import fast_path
from fusecell.compiler.dispatch.program_cache import PROGRAMS, TRAINABLE_STEPS
from fusecell.compiler.frontend.guards import guards_of
from fusecell.compiler.ir.sizes import align_up
from fusecell.compiler.programs import launch
from fusecell.execution.call_path import register_call_cache
from tests.several_inputs import CELLS


class Scaled(fc.Cell):
    """A cell with one attribute of every kind that guards compare by identity."""

    def __init__(self, input_size=5, hidden_size=9):
        super().__init__(input_size, hidden_size)
        self.inp, self.rec = nn.Linear(input_size, hidden_size), nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = nn.LayerNorm(hidden_size)
        self.register_buffer("gain", torch.tensor(0.5))
        self.rate, self.flag, self.pair, self.function = 0.5, True, (1.0, 2.0), torch.tanh
        self.shift = torch.full((hidden_size,), 0.1)

    def step(self, x, state):
        (h,) = state
        new = self.function(self.norm(self.inp(x)) * self.gain + self.rec(h) * self.pair[0]) + self.shift
        h = self.rate * h + (1 - self.rate) * (new if self.flag else -new)
        return 2 * h, (h,)


class Computed(Scaled):
    """The same with weights that torch computes from others, and from numbers that the step spells out."""

    def step(self, x, state):
        (h,) = state
        weight = nn.functional.softplus(self.rec.weight) / 9
        slope = torch.tensor([0.5, 2.0, 1.0], dtype=x.dtype).repeat(self.hidden_size // 3) * torch.exp(self.inp.bias)
        new = self.function(self.norm(self.inp(x)) * self.gain * slope + h @ weight.t() * self.pair[0]) + self.shift
        h = self.rate * h + (1 - self.rate) * (new if self.flag else -new)
        return 2 * h, (h,)


class Started(Scaled):
    """The same with a first state of its own, which is learnt."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.linspace(-1, 1, 9))

    def initial_state(self, batch_size, *, dtype=None, device=None):
        return (self.start.to(dtype).expand(batch_size, -1),)


class Memory(fc.Cell):
    """A cell with a vector and a matrix as states."""

    states = ("h", "memory")

    def __init__(self):
        super().__init__(5, 9)
        self.state_sizes = (9, (3, 4))
        self.inp, self.rec = nn.Linear(5, 12), nn.Linear(12, 9)

    def step(self, x, state):
        h, memory = state
        memory = 0.9 * memory + torch.tanh(self.inp(x)).view(-1, 3, 4) * h[:, :3, None]
        h = torch.sigmoid(self.rec(memory.flatten(1)) + h)
        return h, (h, memory)


def learns(parameter):
    parameter.requires_grad_(not parameter.requires_grad)


def doubled(tensor):
    with torch.no_grad():
        tensor.mul_(2)


CHANGES = {
    "a number": lambda cell: setattr(cell, "rate", 0.25),
    "a number of another type": lambda cell: setattr(cell, "flag", 0),
    "a number in a tuple": lambda cell: setattr(cell, "pair", (3.0, 2.0)),
    "a function": lambda cell: setattr(cell, "function", torch.sigmoid),
    "a function of Python's": lambda cell: setattr(cell, "function", lambda x: 2 * torch.tanh(x)),
    "a list in a tuple's place": lambda cell: setattr(cell, "pair", [3.0, 2.0]),
    "a submodule's number": lambda cell: setattr(cell.norm, "eps", 0.5),
    "a submodule": lambda cell: setattr(cell, "rec", nn.Linear(9, 9).double()),
    "a submodule of another kind": lambda cell: setattr(cell, "norm", nn.Identity()),
    "a submodule that is gone": lambda cell: setattr(cell.norm, "bias", None),
    "a bias where there was none": lambda cell: setattr(cell.rec, "bias", nn.Parameter(torch.ones(9).double())),
    "a parameter's values": lambda cell: doubled(cell.inp.weight),
    "a parameter's values, past its version": lambda cell: cell.inp.weight.data.mul_(2),
    "a parameter's data": lambda cell: setattr(cell.inp.weight, "data", torch.ones(9, 5).double()),
    "a parameter's layout": lambda cell: setattr(cell.inp.weight, "data", torch.rand(5, 9).double().t()),
    "another parameter": lambda cell: setattr(cell.inp, "weight", nn.Parameter(torch.rand(9, 5).double())),
    "a buffer's values": lambda cell: doubled(cell.gain),
    "a buffer": lambda cell: setattr(cell, "gain", torch.tensor(3.0).double()),
    "a tensor attribute": lambda cell: setattr(cell, "shift", torch.rand(9).double()),
    "a state_dict": lambda cell: cell.load_state_dict({k: v + 1 for k, v in cell.state_dict().items()}),
    "a tied weight": lambda cell: setattr(cell.norm, "weight", cell.norm.bias),
    "a frozen weight": lambda cell: learns(cell.inp.weight),
    "a parametrization": lambda cell: parametrize.register_parametrization(cell.rec, "weight", nn.Softplus()),
    "a class": lambda cell: setattr(cell, "__class__", Other),
}


class Other(Scaled):
    def step(self, x, state):
        output, state = super().step(x, state)
        return output + 1, state


def in_a_loop(call):
    with fc.runner("eager"):
        return call()


def results_of(cell, x, state):
    """Return the results of steps and sequences, and all gradients."""
    cell.zero_grad()
    results = [cell(x[0], state), *fc.step(cell, x[0])[1], *fc.scan(cell, x, state), *fc.Recurrent(cell)(x)]
    sum(value.square().sum() for value in results).backward()
    with torch.no_grad():
        results += [cell(x[0], state), cell(x[0, 0]), *fc.scan(cell, x), *fc.scan(cell, x, state, reverse=True)]
    grads = {name: value.grad.clone() for name, value in cell.named_parameters() if value.grad is not None}
    return {**{str(index): value.detach() for index, value in enumerate(results)}, **grads}


@pytest.mark.filterwarnings("ignore::fusecell.EagerWarning")
@pytest.mark.parametrize("kind", [Scaled, Computed, Started])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_between_two_calls_is_seen(change, kind):
    cell, x, state = kind().double(), torch.randn(4, 3, 5).double(), torch.randn(3, 9).double()
    cell.shift = cell.shift.double()
    for _ in range(2):
        results_of(cell, x, state)
    change(cell)
    for _ in range(2):
        actual, loop = results_of(cell, x, state), in_a_loop(lambda: results_of(cell, x, state))
        assert actual.keys() == loop.keys()
        for name, value in actual.items():
            torch.testing.assert_close(value, loop[name], rtol=1e-10, atol=1e-11)


@pytest.fixture
def hits():
    """The number of calls that the fast path takes while a test runs."""
    counts = {"calls": 0}

    class CountingCache:
        keep = staticmethod(fast_path.CACHE.keep)

        @staticmethod
        def find(*arguments):
            result = fast_path.CACHE.find(*arguments)
            counts["calls"] += result is not None
            return result

    fast_path.forget()
    register_call_cache(CountingCache())
    yield counts
    register_call_cache(fast_path.CACHE)


def test_the_second_call_takes_the_fast_path(hits, zoo_cell):
    cell, x = zoo_cell.make(5, 9).eval(), torch.randn(4, 3, 5)
    layer = fc.Recurrent(cell)
    for calls in range(3):
        with torch.no_grad():
            cell(x[0])
            layer(x)
        layer(x)[0].sum().backward()
        cell(x[0])
        assert hits["calls"] == 4 * calls


def test_first_states_that_are_drawn_are_drawn_once_for_each_call(hits):
    cell, x = Scaled(), torch.randn(4, 3, 5)
    cell.initial_state = lambda rows, **_: (torch.randn(rows, 9),)

    def run():
        torch.manual_seed(3)
        return [fc.scan(cell, x)[0] for _ in range(3)] + [torch.rand(2)]

    torch.testing.assert_close(run(), in_a_loop(run))
    assert hits["calls"] == 0


@pytest.mark.parametrize("name", ["gru_d", "cfc", "attention"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("passes_state", [False, True])
def test_several_inputs(name, batch_first, passes_state, hits):
    case = CELLS[name]
    cell = case.cell().double()
    layer = fc.Recurrent(cell, batch_first=batch_first)

    def run(inputs):
        layer.zero_grad()
        state = cell.initial_state(3, dtype=torch.float64) if passes_state else None
        state = None if state is None else tuple([(value + 0.1).requires_grad_() for value in state])
        inputs = tuple(value.clone().requires_grad_() for value in inputs)
        y, after = layer(inputs, state)
        after = after if isinstance(after, tuple) else (after,)
        (y.square().sum() + sum(value.sum() for value in after)).backward()
        row = tuple(value[0].detach() for value in inputs)
        with torch.no_grad():
            results = [y, *after, layer(inputs, state)[0], layer(row)[0], fc.step(cell, row)[0]]
        leaves = (*inputs, *(state or ()), *layer.parameters())
        return [value.detach() for value in results], [value.grad for value in leaves]

    for repeat in range(3):
        inputs = tuple((value + 0.1 * repeat).double() for value in case.inputs(3, 3))
        hits["calls"] = 0
        actual = run(inputs)
        assert hits["calls"] == (4 if repeat else 0)
        expected = in_a_loop(lambda inputs=inputs: run(inputs))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def test_an_input_that_is_the_same_at_all_steps(hits):
    case = CELLS["attention"]
    cell, (x, memory) = case.cell(), case.inputs(4, 3)
    memory = memory[:1].clone()
    for repeat in range(3):
        memory.requires_grad_(repeat == 2)
        cell.zero_grad()
        y, _ = fc.scan(cell, (x, memory))
        y.sum().backward()
        torch.testing.assert_close(y, in_a_loop(lambda: fc.scan(cell, (x, memory))[0]))
    assert hits["calls"] == 1  # the gradient of a memory is a sum over steps
    expected = memory.grad.clone()
    memory.grad = None
    in_a_loop(lambda: fc.scan(cell, (x, memory))[0].sum().backward())
    torch.testing.assert_close(memory.grad, expected)


def test_gradients_of_gradients_with_several_inputs(hits):
    case = CELLS["cfc"]
    cell = case.cell().double()
    inputs = tuple(value.double().requires_grad_() for value in case.inputs(3, 2))

    def penalty():
        gradients = torch.autograd.grad(fc.scan(cell, inputs)[0].square().sum(), inputs, create_graph=True)
        loss = sum(gradient.square().sum() for gradient in gradients)
        return torch.autograd.grad(loss, (*inputs, *cell.parameters()))

    penalty()
    torch.testing.assert_close(penalty(), in_a_loop(penalty), rtol=1e-10, atol=1e-11)
    assert hits["calls"] == 1


def test_first_states_of_a_cell_are_asked_for_anew(hits):
    cell, x = Started().double(), torch.randn(4, 3, 5, dtype=torch.float64)
    cell.shift = cell.shift.double()

    def run():
        cell.zero_grad()
        fc.scan(cell, x)[0].square().sum().backward()
        with torch.no_grad():
            return [cell.start.grad.clone(), cell(x[0]), cell(x[0, 0]), fc.scan(cell, x[:, 0])[0]]

    run()
    torch.testing.assert_close(run(), in_a_loop(run))
    assert hits["calls"] == 4
    with torch.no_grad():
        cell.start.mul_(2)
    hits["calls"] = 0
    torch.testing.assert_close(run(), in_a_loop(run))
    assert hits["calls"] == 4
    # What it returns may change in more than its values.
    cell.initial_state = lambda rows, **_: (torch.full((9, rows), 0.5, dtype=torch.float64).t(),)
    cell.start.requires_grad_(False)
    for _ in range(3):
        with torch.no_grad():
            actual = cell(x[0]), fc.scan(cell, x)[0]
            torch.testing.assert_close(actual, in_a_loop(lambda: (cell(x[0]), fc.scan(cell, x)[0])))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_weights_of_one_number_are_learned_in_repeated_calls(hits, shape):
    class OneNumber(fc.Cell):
        def __init__(self):
            super().__init__(3, 3)
            self.rate = nn.Parameter(torch.full(shape, 0.4))

        def step(self, x, state):
            h = self.rate * state[0] + torch.tanh(x)
            return h, (h,)

    cell, x = OneNumber().double(), torch.randn(4, 2, 3, dtype=torch.float64)

    def run():
        return torch.autograd.grad(fc.scan(cell, x)[0].square().sum(), cell.rate)

    for _ in range(3):
        torch.testing.assert_close(run(), in_a_loop(run), rtol=1e-12, atol=1e-12)
    assert hits["calls"] == 2


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("passes_state", [False, True])
def test_states_that_are_matrices(hits, batch_first, passes_state):
    layer = fc.Recurrent(Memory().double(), batch_first=batch_first)

    def run(x, h, memory):
        layer.zero_grad()
        state = (h.requires_grad_(), memory.requires_grad_()) if passes_state else None
        y, after = layer(x.requires_grad_(), state)
        (y.square().sum() + after[0].sum() + (after[1] * memory).sum()).backward()
        last = fc.step(layer.cell, x[0].detach(), tuple(value.detach() for value in after))[1]
        with torch.no_grad():
            results = [y, *after, layer(x, state)[0], layer(x[0] if not batch_first else x[:, 0])[0], *last]
        leaves = (x, h, memory) if passes_state else (x,)
        return [value.detach() for value in results], [v.grad for v in (*leaves, *layer.parameters())]

    for repeat in range(3):
        torch.manual_seed(repeat)
        arguments = [torch.randn(size, dtype=torch.float64) for size in ((3, 3, 5), (3, 9), (3, 3, 4))]
        hits["calls"] = 0
        actual = run(*(value.clone() for value in arguments))
        assert hits["calls"] == (4 if repeat else 0)
        expected = in_a_loop(lambda arguments=arguments: run(*(value.clone() for value in arguments)))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def test_computed_weights_have_gradients_of_gradients(hits):
    cell = Computed(2, 3)
    cell.shift = cell.shift[:3]
    cell, x = cell.double(), torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    cell.shift = cell.shift.double()

    def penalty():
        gradients = torch.autograd.grad(fc.scan(cell, x)[0].square().sum(), (x, cell.rec.weight), create_graph=True)
        loss = sum(gradient.square().sum() for gradient in gradients)
        return torch.autograd.grad(loss, (x, *cell.parameters()), allow_unused=True, materialize_grads=True)

    penalty()
    hits["calls"] = 0
    actual = penalty()
    assert hits["calls"] == 1
    for value, expected in zip(actual, in_a_loop(penalty), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-11)


def test_a_weight_that_another_is_computed_from_must_not_change_before_the_backward():
    cell, x = Computed(), torch.randn(4, 3, 5)
    for _ in range(2):
        y, _ = fc.scan(cell, x)
        with torch.no_grad():
            cell.rec.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("kind", [fc.RNN, fc.GRU, fc.LSTM])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=str)
def test_layers_take_the_fast_path_and_see_changes(hits, kind, options):
    reference = getattr(nn, kind.__name__)(5, 9, **options).double()
    drop_in = kind(5, 9, **options).double()
    x = torch.randn(3, 3, 5, dtype=torch.float64)
    state = torch.randn(1, 3, 9, dtype=torch.float64)
    state = (state, state.clone()) if kind is fc.LSTM else state

    def check(count):
        hits["calls"] = 0
        drop_in.load_state_dict(reference.state_dict())
        for arguments in ((x,), (x, state), (x[0],)):
            results = []
            for layer in (drop_in, reference):
                layer.zero_grad()
                y, after = layer(*arguments)
                (y.square().sum() + (after if kind is not fc.LSTM else after[1]).sum()).backward()
                with torch.no_grad():
                    results.append([y, layer(*arguments)[0], *(parameter.grad for parameter in layer.parameters())])
            for value, expected in zip(*results, strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
        assert hits["calls"] == count

    check(0)
    check(6)
    with torch.no_grad():
        reference.weight_hh_l0.mul_(2)
    check(6)
    reference.train(False)
    drop_in.train(False)
    check(0)
    check(6)


def test_weights_from_outside_and_copies(hits):
    layer, x = fc.GRU(5, 9), torch.randn(4, 3, 5)
    with torch.no_grad():
        for _ in range(2):
            before = layer(x)[0]
        other = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
        replaced = functional_call(layer, other, (x,))[0]
        assert torch.equal(layer(x)[0], before)
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(x)[0], before)
        twin.load_state_dict(other)
        assert torch.equal(twin(x)[0], replaced)
        assert not torch.equal(before, replaced)


def enclosing(cell):
    return lambda value: torch.tanh(value) * cell.rate


def test_caches_keep_no_cell_or_weight_alive():
    cell, layer, x = Scaled(), fc.GRU(5, 9), torch.randn(4, 3, 5)
    cell.function = enclosing(cell)
    for _ in range(2):
        fc.scan(cell, x)[0].sum().backward()
        layer(x)[0].sum().backward()
    weights = [weakref.ref(value) for value in (cell.inp.weight, layer.weight_hh_l0, cell, layer)]
    before = len(fast_path._CALLS)
    layer.weight_hh_l0 = nn.Parameter(torch.zeros_like(layer.weight_hh_l0))
    gc.collect()
    assert weights[1]() is None
    for cache in (PROGRAMS, TRAINABLE_STEPS):
        cache.forget({Scaled})  # their keys hold functions
    del cell, layer
    gc.collect()
    assert [weight() for weight in weights] == [None] * 4
    assert len(fast_path._CALLS) <= before - 2


@dataclasses.dataclass
class Config:
    """What people keep a model's settings in."""

    rate: float = 0.5
    sizes: list[int] = dataclasses.field(default_factory=lambda: [1, 2])


class Configured(fc.Cell):
    """A cell whose attributes may change inside."""

    def __init__(self):
        super().__init__(5, 9)
        self.config, self.scales, self.names = Config(), [1.0, 2.0], {"gate": "tanh", "on": True}
        self.linear = nn.Linear(14, 9)

    def step(self, x, state):
        h = torch.cat((x, state[0]), -1)
        h = getattr(torch, self.names["gate"])(self.linear(h)) * self.scales[0] + self.config.rate
        return (h if self.names["on"] else -h) * self.config.sizes[1], (h,)


@pytest.mark.parametrize(
    "change",
    [
        lambda cell: setattr(cell.config, "rate", -0.5),
        lambda cell: cell.config.sizes.__setitem__(1, 3),
        lambda cell: cell.scales.__setitem__(0, 3.0),
        lambda cell: cell.names.update(gate="sigmoid"),
        lambda cell: cell.names.update(on=0),
        lambda cell: cell.names.update(gate="sigmoid", more=1),
        lambda cell: setattr(cell, "scales", (0.25, 1.0)),
        lambda cell: cell.scales.__setitem__(0, torch.tensor(3.0)),
    ],
)
def test_changes_inside_of_an_attribute_are_seen(change, hits):
    cell, x = Configured(), torch.randn(4, 3, 5)
    with torch.no_grad():
        for calls in range(3):
            before = fc.scan(cell, x)[0]
            assert hits["calls"] == calls
        change(cell)
        hits["calls"] = 0
        actual = fc.scan(cell, x)[0]
        assert hits["calls"] == 0
        assert not torch.equal(actual, before)
        torch.testing.assert_close(actual, in_a_loop(lambda: fc.scan(cell, x)[0]))


@pytest.mark.parametrize(
    "value",
    [[torch.zeros(1)], {"a": nn.Linear(2, 2)}, list(range(100)), nn.Linear(2, 2).forward, [Scaled]],
    ids=["tensor", "module", "long", "method", "class"],
)
def test_mutable_attributes_have_no_guards(value):
    cell = Scaled()
    assert guards_of(cell) is not None
    cell.more = value
    assert guards_of(cell) is None
    cell = Scaled()
    cell.norm.register_forward_hook(lambda *_: None)
    assert guards_of(cell) is None


def test_a_list_that_changes_inside():
    cell, x = Scaled(), torch.randn(4, 3, 5)
    cell.pair = [1.0, 2.0]
    for factor in (1.0, 1.0, 3.0):
        cell.pair[0] = factor
        torch.testing.assert_close(fc.scan(cell, x)[0], in_a_loop(lambda: fc.scan(cell, x)[0]))


def test_a_hook_that_comes_later():
    cell, x = Scaled(), torch.randn(4, 3, 5)
    for _ in range(2):
        fc.scan(cell, x)
    cell.norm.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.warns(fc.EagerWarning, match="hook"):
        actual = fc.scan(cell, x)[0]
    torch.testing.assert_close(actual, in_a_loop(lambda: fc.scan(cell, x)[0]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own forward-mode rules
def test_modes_around_a_cached_call(hits):
    cell, x = fc.GRUCell(5, 9), torch.randn(3, 5)
    with torch.no_grad():
        for _ in range(2):
            expected = cell(x)
        assert hits["calls"] == 1
        mapped = torch.func.vmap(cell)(x)
        torch.testing.assert_close(mapped, expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(cell(x), expected)
        with fc.runner("eager"):
            torch.testing.assert_close(cell(x), expected)
        with torch.inference_mode():
            assert torch.equal(cell(x), expected)
        assert hits["calls"] == 1
        with torch.device("meta"):
            assert torch.equal(cell(x), expected)
        with torch.autograd.forward_ad.dual_level():
            tangent = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            assert torch.autograd.forward_ad.unpack_dual(cell(tangent)).tangent is not None


def test_gradients_of_gradients_of_a_cached_call(hits):
    cell, x = fc.LSTMCell(5, 9).double(), torch.randn(3, 5, dtype=torch.float64)
    layer = fc.GRU(5, 9).double()

    def penalty():
        leaf = x.clone().requires_grad_()
        loss = sum(value.square().sum() for value in (*cell(leaf), layer(leaf[None])[0], layer(leaf)[0]))
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [leaf, *cell.parameters(), *layer.parameters()])

    for _ in range(2):
        actual = penalty()
    assert hits["calls"] >= 2
    for value, expected in zip(actual, in_a_loop(penalty), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("early", [False, True])
def test_checkpointing_before_and_after_a_call_is_cached(early):
    layer, x = fc.GRU(5, 9), torch.randn(4, 3, 5, requires_grad=True)
    if early:
        for _ in range(2):
            layer(x)
    checkpoint(lambda x: layer(x)[0], x, use_reentrant=False).square().sum().backward()
    expected, x.grad = x.grad, None
    layer(x)[0].square().sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, h: y.sum(),
        lambda y, h: h.sum(),
        lambda y, h: (y[1].exp() * y[0]).sum(),
        lambda y, h: (y.transpose(0, 2) * torch.arange(4.0)).sum() + h.t().square().sum(),
        lambda y, h: (y[..., ::2] * h[:, ::2]).sum(),
    ],
    ids=["outputs alone", "the state alone", "some steps", "transposed", "every second feature"],
)
def test_incoming_gradients(hits, loss):
    cell, x, state = Scaled(), torch.randn(4, 3, 5), torch.randn(3, 9, requires_grad=True)
    results = []
    for name in ("auto", "auto", "eager"):
        cell.zero_grad()
        state.grad = None
        with fc.runner(name):
            loss(*fc.scan(cell, x, state)).backward()
        results.append([state.grad, *(parameter.grad for parameter in cell.parameters())])
    assert hits["calls"] == 1
    for first, second, loop in zip(*results, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(second, loop, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("state_too", [False, True])
def test_negated_gradients(state_too, hits):
    """torch may pass a gradient on as a view with a flag that says it is negated: its memory has the wrong sign."""
    layer, x = fc.Recurrent(fc.GRUCell(5, 10)), torch.randn(7, 3, 5, requires_grad=True)
    grads = [torch._neg_view(torch.randn(7, 3, 10)), torch.randn(3, 10, dtype=torch.cfloat).conj().imag]
    assert all(grad.is_neg() for grad in grads)

    def gradients():
        results = layer(x)[: 1 + state_too]
        return torch.autograd.grad(results, x, grads[: 1 + state_too])[0]

    with fc.runner("eager"):
        expected = gradients()
    for _ in range(3):
        torch.testing.assert_close(gradients(), expected)
    assert hits["calls"] == 2


def test_results_share_no_memory(hits):
    cell, x = fc.LSTMCell(5, 9), torch.randn(3, 5)
    layer = fc.Recurrent(cell)
    for _ in range(2):
        first, second = [[*cell(x), layer(x[None])[0], *layer(x[None])[1]] for _ in range(2)]
    assert hits["calls"] > 0
    tensors = [x, *cell.parameters(), *first, *second]
    assert len({value.untyped_storage().data_ptr() for value in tensors}) == len(tensors)
    first[0].mul_(2)


def test_many_threads():
    cell, x = Scaled(), torch.randn(4, 3, 5)
    weights = [torch.randn_like(cell.inp.weight) for _ in range(4)]
    expected = [functional_call(fc.Recurrent(cell), {"cell.inp.weight": weight}, (x,))[0] for weight in weights]
    cells = [copy.deepcopy(cell) for _ in weights]
    wrong = []

    def work(place):
        with torch.no_grad():
            cells[place].inp.weight.copy_(weights[place])
        for _ in range(200):
            if not torch.equal(fc.scan(cells[place], x)[0], expected[place]):
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_calls_that_never_repeat_leave_the_cache(hits):
    """After some dozens of sizes that never repeat, no more calls are cached until ``refresh``."""
    cell = fc.GRUCell(5, 9)
    with torch.no_grad():
        for rows in range(1, 200):
            cell(torch.randn(rows, 5))
        for _ in range(2):
            cell(torch.randn(199, 5))
        assert hits["calls"] == 0
        fc.refresh(cell)
        for _ in range(2):
            cell(torch.randn(199, 5))
        assert hits["calls"] == 1


@pytest.mark.parametrize(
    "size", [100, TUNING.small_scratch_bytes, TUNING.huge_scratch_bytes + 1, TUNING.large_scratch_bytes + 1]
)
def test_scratch_is_aligned_and_large_enough(size):
    """Large blocks are NumPy's, which don't begin at a multiple of 64."""
    memory = launch._scratch(size)
    room = memory.data_ptr() + memory.numel() - align_up(memory.data_ptr())
    assert align_up(memory.data_ptr()) % 64 == 0
    assert room >= size
