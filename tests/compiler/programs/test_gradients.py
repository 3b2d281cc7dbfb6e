"""The compiled gradient of every cell of the zoo, against finite differences, the Python loop and float64."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_flatten, tree_unflatten

import fusecell as fc
from fusecell.compiler.cache_registry import forget_programs
from fusecell.compiler.programs import launch as calls
from tests.compiler.tuned import tuned


def call(cell, x, state, gradients, options, runner):
    """Outputs, states, and the gradients of input, states and parameters."""
    x, state = x.clone().requires_grad_(), tuple(value.clone().requires_grad_() for value in state)
    cell.zero_grad()
    with fc.runner(runner):
        outputs, after = fc.scan(cell, x, state if len(state) > 1 else state[0], **options)
    after = after if isinstance(after, tuple) else (after,)
    torch.autograd.backward([outputs, *after], gradients)
    grads = [x.grad, *(value.grad for value in state), *(parameter.grad for parameter in cell.parameters())]
    return [outputs, *after, *(torch.zeros(()) if value is None else value for value in grads)]


def drawn(cell, steps, rows, dtype=torch.float64):
    """An input, states, and gradients of outputs and states."""
    states = [torch.randn(rows, size, dtype=dtype) for size in cell.state_sizes]
    gradients = [torch.randn(steps, rows, cell.output_size, dtype=dtype), *map(torch.randn_like, states)]
    return torch.randn(steps, rows, cell.input_size, dtype=dtype), states, gradients


CALLS = {
    "plain": (7, 3, {}),
    "one step": (1, 1, {}),
    "lengths": (9, 5, {"lengths": [4, 9, 0, 1, 9]}),
    "resets": (8, 4, {"resets": torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) < 0.3}),
    "all at once": (
        8,
        3,
        {
            "lengths": [3, 8, 0],
            "resets": torch.rand(8, 3, generator=torch.Generator().manual_seed(1)) < 0.4,
            "reverse": True,
        },
    ),
    # More rows than a block of a sum takes, and no multiple of it.
    "long": (607, 2, {}),
}


@pytest.mark.parametrize(
    ("kind", "recompute"), [*((kind, False) for kind in CALLS), ("plain", True), ("all at once", True), ("long", True)]
)
def test_equals_the_python_loop(zoo_cell, kind, recompute):
    torch.manual_seed(1)
    steps, rows, options = CALLS[kind]
    cell = zoo_cell.make(5, 9, dtype=torch.float64)
    arguments = drawn(cell, steps, rows)
    results = call(cell, *arguments, {**options, "recompute": recompute}, "compiled")
    for actual, loop in zip(results, call(cell, *arguments, options, "eager"), strict=True):
        # A chain of 607 steps of a layer norm magnifies the last bit.
        assert (actual - loop).abs().max() <= 1e-11 * max(1.0, loop.abs().max())


def test_gradcheck(zoo_cell):
    torch.manual_seed(2)
    cell = zoo_cell.make(3, 19, dtype=torch.float64)
    if "relu" in zoo_cell.name or zoo_cell.name in ("ligru", "leaky", "ind_rnn"):
        torch.manual_seed(5)  # finite differences must not step over a kink
    names = [name for name, _ in cell.named_parameters()]
    x, states, _ = drawn(cell, 4, 3)
    resets = torch.tensor([[False, True, False]] * 2 + [[False] * 3] * 2)

    def run(x, *rest):
        state, weights = rest[: len(states)], rest[len(states) :]
        arguments = (x, state if len(state) > 1 else state[0])
        tensors = dict(zip(names, weights, strict=True))
        layer = fc.Recurrent(cell, reverse=True)
        tensors = {f"cell.{name}": value for name, value in tensors.items()}
        options = {"lengths": [4, 2, 3], "resets": resets}
        with fc.runner("compiled"):
            outputs, after = torch.func.functional_call(layer, tensors, arguments, options)
        return (outputs, *(after if isinstance(after, tuple) else (after,)))

    weights = [parameter.detach().clone() for parameter in cell.parameters()]
    tensors = tuple(value.requires_grad_() for value in (x, *states, *weights))
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


def rms(actual, exact):
    """Return the root mean square error of each gradient against float64."""
    return [(value.double() - true).pow(2).mean().sqrt() for value, true in zip(actual, exact, strict=True)]


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
@pytest.mark.parametrize("steps", [35, 1000])
def test_float32_is_as_near_to_float64_as_torch(kind, steps):
    torch.manual_seed(3)
    reference = getattr(nn, kind)(13, 31)
    x, weight = torch.randn(steps, 5, 13), torch.randn(steps, 5, 31)
    first = [torch.randn(1, 5, 31) for _ in range(2 if kind == "LSTM" else 1)]
    gradients = []
    for module, dtype in ((fc, torch.float32), (nn, torch.float32), (nn, torch.float64)):
        layer = getattr(module, kind)(13, 31).to(dtype)
        layer.load_state_dict(reference.state_dict())
        leaf, *state = (value.to(dtype, copy=True).requires_grad_() for value in (x, *first))
        y, _ = layer(leaf, tuple(state) if kind == "LSTM" else state[0])
        (y * weight.to(dtype)).sum().backward()
        gradients.append([value.grad for value in (leaf, *state, *layer.parameters())])
    actual, torch_gradients, exact = gradients
    for one, other in zip(rms(actual, exact), rms(torch_gradients, exact), strict=True):
        assert one <= 4 * other


def test_float32_of_the_zoo(zoo_cell):
    """Against the same step in float32 as torch computes it, over several draws of weights and data.

    The error of a gradient that is one number, such as FastGRNN's zeta, is chance in a single draw, the loop's as ours.
    """
    errors = {"compiled": [], "eager": []}
    for seed in range(8):
        torch.manual_seed(seed)
        cell = zoo_cell.make(13, 31)
        x, states, gradients = drawn(cell, 30, 5, torch.float32)
        wide = [[value.double() for value in values] for values in ([x], states, gradients)]
        exact = call(copy.deepcopy(cell).double(), wide[0][0], wide[1], wide[2], {}, "eager")
        for name, rows in errors.items():
            rows.append(torch.stack(rms(call(cell, x, states, gradients, {}, name), exact)))
    compiled, eager = (torch.stack(rows).pow(2).mean(0).sqrt() for rows in errors.values())
    assert (compiled <= 4 * eager + 1e-9).all()


def equal_bits(first, again):
    return all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_bits_do_not_depend_on_chunks_or_runs(monkeypatch, zoo_cell):
    torch.manual_seed(4)
    cell = zoo_cell.make(5, 17)
    arguments = drawn(cell, 301, 3, torch.float32)
    options = {"lengths": [301, 117, 240]}
    first = call(cell, *arguments, options, "compiled")
    for chunk in (1, 50_000, 10**9):
        tuned(monkeypatch, chunk_bytes=chunk)
        assert equal_bits(first, call(cell, *arguments, options, "compiled"))


@pytest.mark.parametrize("make", [fc.GRUCell, fc.LSTMCell, fc.cells.LeakyCell, fc.cells.LayerNormGRUCell])
def test_bits_do_not_depend_on_threads(monkeypatch, make):
    """A call that would be too short for several threads is forced onto them."""
    torch.manual_seed(4)
    cell = make(5, 37)
    arguments = drawn(cell, 31, 19, torch.float32)  # more rows than a block of a sum takes
    options = {"lengths": torch.randint(0, 32, (19,)), "resets": torch.rand(31, 19) < 0.1}
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            monkeypatch.setattr(calls, "team_size", lambda *_, count=count: count)
            runs.append(call(cell, *arguments, options, "compiled"))
    finally:
        torch.set_num_threads(threads)
    assert equal_bits(runs[0], runs[1])
    assert equal_bits(runs[0], runs[2])


@pytest.mark.parametrize(("steps", "rows"), [(31, 19), (3, 301), (150, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_packed_operands(monkeypatch, steps, rows, threads):
    """Operands of weights' gradients are packed where they are large: here the small ones are as well."""
    torch.manual_seed(4)
    cell = fc.LSTMCell(37, 43)
    arguments = drawn(cell, steps, rows, torch.float32)
    first = call(cell, *arguments, {}, "compiled")
    tuned(monkeypatch, pack_min_row_bytes=1, pack_min_groups=1)
    monkeypatch.setattr(calls, "team_size", lambda *_: threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    forget_programs()
    try:
        packed = call(cell, *arguments, {}, "compiled")
    finally:
        torch.set_num_threads(before)
        forget_programs()
    assert equal_bits(first, packed)
    assert "pack.columns" in fc.explain(cell).backward.llvm


_DIGEST = """
import hashlib, torch, fusecell as fc
torch.manual_seed(0)
layer, x = fc.GRU(37, 61, bidirectional=True), torch.randn(83, 29, 37, requires_grad=True)
y, h = layer(x, lengths=torch.randint(1, 84, (29,)))
(y.square().sum() + h.sum()).backward()
digest = hashlib.sha256()
for value in (y, h, x.grad, *(parameter.grad for parameter in layer.parameters())):
    digest.update(value.detach().numpy().tobytes())
print(digest.hexdigest())
"""


def test_bits_are_those_of_every_process():
    digests = set()
    for seed in ("1", "2"):
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": seed}
        process = subprocess.run(
            [sys.executable, "-c", _DIGEST], check=True, env=settings, capture_output=True, timeout=600
        )
        digests.add(process.stdout)
    assert len(digests) == 1


def test_saving_for_backward_changes_no_bit_of_the_forward(zoo_cell):
    cell = zoo_cell.make(7, 33)
    x = torch.randn(6, 5, 7)
    for recompute in (False, True):
        with fc.runner("compiled"):
            training, _ = fc.scan(cell, x, recompute=recompute)
            with torch.no_grad():
                plain, _ = fc.scan(cell, x)
        assert torch.equal(training, plain)


def test_two_hundred_steps_of_adam_as_torch():
    """Our float32 curve is no further from torch's than twice what separates torch's float32 from its float64."""
    curves = {}
    for name, layer, dtype in (
        ("ours", fc.GRU, torch.float32),
        ("torch", nn.GRU, torch.float32),
        ("exact", nn.GRU, torch.float64),
    ):
        torch.manual_seed(6)
        model = nn.ModuleList([layer(5, 23), nn.Linear(23, 2)])
        x, y = torch.randn(40, 9, 5), torch.randn(40, 9, 2)
        model.to(dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        curves[name] = []
        for _ in range(200):
            loss = (model[1](model[0](x.to(dtype))[0]) - y.to(dtype)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[name].append(loss.item())
    curve, torch_curve, exact = (torch.tensor(curves[name], dtype=torch.float64) for name in ("ours", "torch", "exact"))
    assert exact[-1] < 0.9 * exact[0]
    noise = (torch_curve - exact).abs().max()
    assert (curve - exact).abs().max() <= 2 * noise


def _shared(kind):
    """Layers that use a cell twice: its gradient is the sum of both."""
    cell = fc.GRUCell(5, 5)
    layer = fc.Recurrent(cell)
    return {
        "one after another": lambda: fc.Sequential(layer, layer),
        "both ways": lambda: fc.Bidirectional(layer, layer),
        "both ways, two layers": lambda: fc.Bidirectional(layer, fc.Recurrent(cell)),
        "one on another": lambda: fc.Recurrent(fc.Stack(cell, cell)),
    }[kind]()


LAYERS = {
    **{kind: lambda kind=kind: _shared(kind) for kind in ("one after another", "both ways", "both ways, two layers")},
    "one on another": lambda: _shared("one on another"),
    "a mixed stack, reversed": lambda: fc.Recurrent(
        fc.Stack(fc.GRUCell(5, 5), fc.LSTMCell(5, 4), residual=True), reverse=True
    ),
    "mixed both ways": lambda: fc.Bidirectional(
        fc.Recurrent(fc.Stack(fc.LSTMCell(5, 4), fc.GRUCell(4, 3))), fc.Recurrent(fc.cells.LeakyCell(5, 3))
    ),
    "GRU": lambda: fc.GRU(5, 4, 2, bidirectional=True),
    "LSTM": lambda: fc.LSTM(5, 4, 2, proj_size=3, bidirectional=True),
}


@pytest.mark.parametrize("part", ["outputs", "state"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_cells(kind, part):
    """Gradients of all that goes in, from the outputs alone and from the returned state alone."""
    torch.manual_seed(8)
    layer, x = LAYERS[kind]().double(), torch.randn(6, 3, 5, dtype=torch.float64)
    data = {"lengths": [6, 0, 3], "resets": torch.rand(6, 3) < 0.3}
    _, form = layer(x)
    leaves, spec = tree_flatten(form)
    tensors = [torch.randn_like(value) for value in (x, *leaves)]
    results = []
    for runner in ("compiled", "eager"):
        inputs = [value.clone().requires_grad_() for value in tensors]
        layer.zero_grad()
        with fc.runner(runner):
            y, after = layer(inputs[0], tree_unflatten(inputs[1:], spec), **data)
        targets = [y] if part == "outputs" else tree_flatten(after)[0]
        sum(value.exp().sum() for value in targets).backward()
        grads = [value.grad for value in (*inputs, *layer.parameters())]
        results.append([torch.zeros(()) if value is None else value for value in grads])
    for actual, loop in zip(*results, strict=True):
        torch.testing.assert_close(actual, loop, rtol=1e-11, atol=1e-12)


class Parametrized(fc.Cell):
    """A recurrent weight of norm one, a tied and a sliced weight, and one that is used both ways round."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.inp = nn.Linear(input_size, 2 * hidden_size)
        self.rec = parametrizations.weight_norm(nn.Linear(hidden_size, hidden_size))
        self.tied = self.inp.bias

    def step(self, x, state):
        (h,) = state
        size = self.hidden_size
        gate = torch.sigmoid(nn.functional.linear(x, self.inp.weight[:size], self.tied[:size]))
        new = torch.tanh(nn.functional.linear(x, self.inp.weight[size:]) + self.rec(h) @ self.rec.weight)
        h = gate * h + (1 - gate) * new
        return h, (h,)


def test_weights_that_a_step_computes_slices_and_ties():
    torch.manual_seed(7)
    cell = Parametrized(5, 9).double()
    arguments = drawn(cell, 6, 3)
    pairs = zip(call(cell, *arguments, {}, "compiled"), call(cell, *arguments, {}, "eager"), strict=True)
    assert all((actual - loop).abs().max() <= 1e-12 * max(1, loop.abs().max()) for actual, loop in pairs)


@pytest.mark.parametrize("rows", [15, 16, 17])
def test_weight_gradients_around_one_row_block(rows):
    """A block takes 512 rows: fewer, as many, and more; weights of whole vectors, so that few are added up in place."""
    cell, x = fc.GRUCell(16, 32).double(), torch.randn(32, rows, 16, dtype=torch.float64)
    seen = []
    for name in ("compiled", "eager"):
        cell.zero_grad()
        with fc.runner(name):
            fc.scan(cell, x)[0].square().mean().backward()
        seen.append([parameter.grad.clone() for parameter in cell.parameters()])
    for actual, loop in zip(*seen, strict=True):
        torch.testing.assert_close(actual, loop, rtol=1e-11, atol=1e-13)


class Named(fc.Cell):
    """A leaky cell with states of other names."""

    def __init__(self, states):
        self.states = states
        super().__init__(5, 6)
        self.inp, self.rec = nn.Linear(5, 6), nn.Linear(6, 6)

    def step(self, x, state):
        total = self.inp(x) + sum(map(self.rec, state))
        state = tuple(0.5 * before + torch.tanh(total * (place + 1)) for place, before in enumerate(state))
        return state[-1].relu(), state


@pytest.mark.parametrize(
    "states", [("state", "output"), ("output",), ("output", "state.output"), ("x", "input"), ("grad", "saved.output")]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_states_may_have_any_name(states, recompute):
    torch.manual_seed(0)
    cell = Named(states).double()
    arguments = drawn(cell, 5, 3)
    results = [call(cell, *arguments, {"recompute": recompute}, runner) for runner in ("compiled", "eager")]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
