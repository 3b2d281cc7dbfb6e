"""Calls that are remembered: whatever changes between two of them is seen by the second."""

from __future__ import annotations

import copy
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
from fusecell.compiler.dispatch import fast_path as repeat
from fusecell.compiler.dispatch.guards import guards_of
from fusecell.compiler.programs import launch as call


class Scaled(fc.Cell):
    """One of everything that is proven by identity."""

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


def found(cell, x, state):
    """What a step, a sequence and their gradients are."""
    cell.zero_grad()
    results = [cell(x[0], state), *fc.step(cell, x[0])[1], *fc.scan(cell, x, state), *fc.Recurrent(cell)(x)]
    sum(value.square().sum() for value in results).backward()
    with torch.no_grad():
        results += [cell(x[0], state), cell(x[0, 0]), *fc.scan(cell, x), *fc.scan(cell, x, state, reverse=True)]
    grads = {name: value.grad.clone() for name, value in cell.named_parameters() if value.grad is not None}
    return {**{str(index): value.detach() for index, value in enumerate(results)}, **grads}


@pytest.mark.filterwarnings("ignore::fusecell.EagerWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_between_two_calls_is_seen(change):
    cell, x, state = Scaled().double(), torch.randn(4, 3, 5).double(), torch.randn(3, 9).double()
    cell.shift = cell.shift.double()
    for _ in range(2):
        found(cell, x, state)
    change(cell)
    for _ in range(2):
        mine, loop = found(cell, x, state), in_a_loop(lambda: found(cell, x, state))
        assert mine.keys() == loop.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, loop[name], rtol=1e-10, atol=1e-11)


@pytest.fixture
def ways(monkeypatch):
    """How many calls went the short way while a test runs."""
    counts = {"short": 0}
    for kind in (repeat._Answering, repeat._Learning):
        call = kind.__call__

        def counted(self, *args, call=call):
            counts["short"] += 1
            return call(self, *args)

        monkeypatch.setattr(kind, "__call__", counted)
    repeat.forget()
    return counts


def test_the_second_call_goes_the_short_way(ways, zoo_cell):
    cell, x = zoo_cell.make(5, 9).eval(), torch.randn(4, 3, 5)
    layer = fc.Recurrent(cell)
    if type(cell).__name__ in ("FastGRNNCell", "AntisymmetricRNNCell"):
        pytest.skip("Its weights are computed in every call.")
    for calls in range(3):
        with torch.no_grad():
            cell(x[0])
            layer(x)
        layer(x)[0].sum().backward()
        cell(x[0])
        assert ways["short"] == 4 * calls


@pytest.mark.parametrize("kind", [fc.RNN, fc.GRU, fc.LSTM])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=str)
def test_layers_go_the_short_way_and_see_changes(ways, kind, options):
    theirs = getattr(nn, kind.__name__)(5, 9, **options).double()
    mine = kind(5, 9, **options).double()
    x = torch.randn(3, 3, 5, dtype=torch.float64)
    state = torch.randn(1, 3, 9, dtype=torch.float64)
    state = (state, state.clone()) if kind is fc.LSTM else state

    def check(short):
        ways["short"] = 0
        mine.load_state_dict(theirs.state_dict())
        for given in ((x,), (x, state), (x[0],)):
            results = []
            for layer in (mine, theirs):
                layer.zero_grad()
                y, after = layer(*given)
                (y.square().sum() + (after if kind is not fc.LSTM else after[1]).sum()).backward()
                with torch.no_grad():
                    results.append([y, layer(*given)[0], *(parameter.grad for parameter in layer.parameters())])
            for value, expected in zip(*results, strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
        assert ways["short"] == short

    check(0)
    check(6)
    with torch.no_grad():
        theirs.weight_hh_l0.mul_(2)
    check(6)
    theirs.train(False)
    mine.train(False)
    check(0)
    check(6)


def test_weights_from_outside_and_copies(ways):
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


def test_nothing_is_kept_alive():
    cell, layer, x = Scaled(), fc.GRU(5, 9), torch.randn(4, 3, 5)
    cell.function = enclosing(cell)
    for _ in range(2):
        fc.scan(cell, x)[0].sum().backward()
        layer(x)[0].sum().backward()
    weights = [weakref.ref(value) for value in (cell.inp.weight, layer.weight_hh_l0, cell, layer)]
    before = len(repeat._KNOWN)
    layer.weight_hh_l0 = nn.Parameter(torch.zeros_like(layer.weight_hh_l0))
    gc.collect()
    assert weights[1]() is None
    for kept in (repeat.PROGRAMS, repeat.TRAINABLE_STEPS):
        kept.forget({Scaled})  # their keys hold functions
    del cell, layer
    gc.collect()
    assert [weight() for weight in weights] == [None] * 4
    assert len(repeat._KNOWN) <= before - 2


@pytest.mark.parametrize("value", [[1.0], {"a": 1}, torch.nn.Linear(2, 2).forward], ids=["list", "dict", "method"])
def test_what_may_change_inside_is_not_taken_for_a_fact(value):
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
        mine = fc.scan(cell, x)[0]
    torch.testing.assert_close(mine, in_a_loop(lambda: fc.scan(cell, x)[0]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own forward-mode rules
def test_modes_around_a_remembered_call(ways):
    cell, x = fc.GRUCell(5, 9), torch.randn(3, 5)
    with torch.no_grad():
        for _ in range(2):
            expected = cell(x)
        assert ways["short"] == 1
        mapped = torch.func.vmap(cell)(x)
        torch.testing.assert_close(mapped, expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(cell(x), expected)
        with fc.runner("eager"):
            torch.testing.assert_close(cell(x), expected)
        with torch.inference_mode():
            assert torch.equal(cell(x), expected)
        assert ways["short"] == 1
        with torch.device("meta"):
            assert torch.equal(cell(x), expected)
        with torch.autograd.forward_ad.dual_level():
            tangent = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            assert torch.autograd.forward_ad.unpack_dual(cell(tangent)).tangent is not None


def test_gradients_of_gradients_of_a_remembered_call(ways):
    cell, x = fc.LSTMCell(5, 9).double(), torch.randn(3, 5, dtype=torch.float64)
    layer = fc.GRU(5, 9).double()

    def penalty():
        leaf = x.clone().requires_grad_()
        loss = sum(value.square().sum() for value in (*cell(leaf), layer(leaf[None])[0], layer(leaf)[0]))
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [leaf, *cell.parameters(), *layer.parameters()])

    for _ in range(2):
        mine = penalty()
    assert ways["short"] >= 2
    for value, expected in zip(mine, in_a_loop(penalty), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("early", [False, True])
def test_checkpointing_before_and_after_a_call_is_remembered(early):
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
def test_incoming_gradients(ways, loss):
    cell, x, state = Scaled(), torch.randn(4, 3, 5), torch.randn(3, 9, requires_grad=True)
    results = []
    for name in ("auto", "auto", "eager"):
        cell.zero_grad()
        state.grad = None
        with fc.runner(name):
            loss(*fc.scan(cell, x, state)).backward()
        results.append([state.grad, *(parameter.grad for parameter in cell.parameters())])
    assert ways["short"] == 1
    for first, second, loop in zip(*results, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(second, loop, rtol=2e-5, atol=2e-5)


def test_results_share_no_memory(ways):
    cell, x = fc.LSTMCell(5, 9), torch.randn(3, 5)
    layer = fc.Recurrent(cell)
    for _ in range(2):
        first, second = [[*cell(x), layer(x[None])[0], *layer(x[None])[1]] for _ in range(2)]
    assert ways["short"] > 0
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


def test_calls_that_never_come_again_are_not_remembered_for_ever(ways):
    cell = fc.GRUCell(5, 9)
    with torch.no_grad():
        for rows in range(1, 200):
            cell(torch.randn(rows, 5))
    assert len(repeat._KNOWN[id(cell)].calls) <= repeat._MOST_MISSED
    fc.refresh(cell)
    assert id(cell) not in repeat._KNOWN


@pytest.mark.parametrize(
    "size", [100, TUNING.small_scratch_bytes, TUNING.huge_scratch_bytes + 1, TUNING.large_scratch_bytes + 1]
)
def test_scratch_holds_what_was_asked_for(size):
    """From the first address that a kernel may be given; large blocks, NumPy's, begin between two of those."""
    memory = call._scratch(size)
    room = memory.data_ptr() + memory.numel() - call._aligned(memory)
    assert call._aligned(memory) % 64 == 0
    assert room >= size
