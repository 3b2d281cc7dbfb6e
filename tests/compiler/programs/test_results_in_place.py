"""Results may be detached and changed in place, as torch.nn's may: none is a view, and gradients stay right."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusecell as fc

LAYERS = {
    "GRU": lambda first: fc.GRU(5, 8, batch_first=first),
    "LSTM": lambda first: fc.LSTM(5, 8, batch_first=first, proj_size=3),
    "two layers, two directions": lambda first: fc.LSTM(5, 8, 2, bidirectional=True, batch_first=first),
    "Recurrent": lambda first: fc.Recurrent(fc.LSTMCell(5, 8), batch_first=first, reverse=True),
    "a stack": lambda first: fc.Recurrent(fc.Stack(fc.GRUCell(5, 8), fc.LSTMCell(8, 8)), batch_first=first),
    "Bidirectional": lambda first: fc.Bidirectional(
        fc.Recurrent(fc.GRUCell(5, 8), batch_first=first), fc.Recurrent(fc.LSTMCell(5, 8), batch_first=first)
    ),
    "Sequential": lambda first: fc.Sequential(
        fc.Recurrent(fc.GRUCell(5, 8), batch_first=first), fc.LSTM(8, 8, batch_first=first)
    ),
    "a learnt state": lambda first: fc.Recurrent(fc.LearnedState(fc.GRUCell(5, 8)), batch_first=first),
    "tbptt": lambda first: fc.GRU(5, 8, tbptt=2, batch_first=first),
}
CELLS = {
    "GRUCell": lambda: fc.GRUCell(5, 8),
    "LSTMCell": lambda: fc.LSTMCell(5, 8),
    "RNNCell": lambda: fc.RNNCell(5, 8),
    "another": lambda: fc.cells.AntisymmetricRNNCell(5, 8),
}


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for part in ((value.data,) if isinstance(value, PackedSequence) else value) for each in flat(part)]


def detached(results):
    for value in flat(results):
        assert not value._is_view()
        value.detach_()
        assert not value.requires_grad
        value.zero_()


@pytest.mark.parametrize("runner", ["auto", "eager"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("kind", LAYERS)
def test_results_are_no_views(kind, first, grad, runner):
    layer = LAYERS[kind](first)
    x = torch.randn(4, 7, 5) if first else torch.randn(7, 4, 5)
    with fc.runner(runner), torch.set_grad_enabled(grad):
        for sequence in (x, x[:, 0] if not first else x[0], x[:, :0] if first else x[:0]):
            for _ in range(3):  # the first compiles, the second is remembered, the third goes straight to the kernel
                detached(layer(sequence))
        detached(layer(x, lengths=[7, 4, 0, 2]))
        valid = torch.rand(x.shape[:2]) > 0.5
        detached(layer(x, mask=valid))
        detached(layer(pack_padded_sequence(x, [7, 4, 2, 1], batch_first=first)))
        expected = [value.clone() for value in flat(layer(x))]
        detached(layer(x))
        for actual, plain in zip(flat(layer(x)), expected, strict=True):
            assert torch.equal(actual, plain)


@pytest.mark.parametrize("runner", ["auto", "eager"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("kind", CELLS)
def test_results_of_a_step_are_no_views(kind, grad, runner):
    cell = CELLS[kind]()
    with fc.runner(runner), torch.set_grad_enabled(grad):
        for x in (torch.randn(4, 5), torch.randn(5)):
            for _ in range(3):
                detached(cell(x))
                detached(fc.step(cell, x))
                detached(cell(x, cell(x)))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_large_results_are_no_views(grad, first):
    """Large results are NumPy's memory, on huge pages."""
    layer, x = fc.GRU(3, 64, batch_first=first), torch.randn(300, 64, 3)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            y, h = layer(x)
            assert y.numel() * 4 >= 1 << 22
            last = y[:, -1] if first else y[-1]
            assert torch.equal(last, h[0])
            detached((y, h))


CHANGES = {
    "y.mul_": lambda y, h: (y.mul_(2), h),
    "h.zero_": lambda y, h: (y, h.zero_()),
    "both": lambda y, h: (y.tanh_(), h.add_(y.sum())),
    "a part": lambda y, h: (y.index_fill_(0, torch.tensor([0]), 3.0), h.clamp_(min=0.01)),
    "copied": lambda y, h: (y.copy_(y.detach().flip(0)), h),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "remembered call"])
@pytest.mark.parametrize("first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_in_place_have_the_loops_gradients(change, first, warm):
    """The backward reads no memory that was returned as a result."""
    torch.manual_seed(0)
    layer, x = fc.GRU(5, 8, batch_first=first).double(), torch.randn(4, 7, 5, dtype=torch.float64)
    results = []
    for runner in ("auto", "eager"):
        twin, leaf = copy.deepcopy(layer), x.clone().requires_grad_()
        with fc.runner(runner):
            for _ in range(3 if warm else 0):
                twin(leaf)
            y, h = CHANGES[change](*twin(leaf))
        (y.sin().sum() + h.exp().sum()).backward()
        results.append([y.detach(), h.detach(), leaf.grad, *(parameter.grad for parameter in twin.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("changed", ["the input", "the state", "a weight"])
@pytest.mark.parametrize("warm", [False, True], ids=["first call", "remembered call"])
@pytest.mark.parametrize("library", [torch.nn, fc], ids=["torch.nn", "fusecell"])
def test_in_place_changes_of_saved_tensors_raise(library, warm, changed):
    """Torch's own error is raised, instead of a wrong gradient."""
    layer = library.GRU(5, 8)
    x, h = torch.randn(7, 4, 5, requires_grad=True), torch.randn(1, 4, 8, requires_grad=True)
    for _ in range(3 if warm else 1):
        sequence, state = x.clone(), h.clone()
        y, _ = layer(sequence, state)
    with torch.no_grad():
        {"the input": sequence, "the state": state, "a weight": layer.weight_hh_l0}[changed].mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        y.sum().backward()


def test_a_state_carried_on_and_changed_afterwards():
    layer = fc.GRU(5, 8)
    x = torch.randn(7, 4, 5)
    _, h = layer(x)
    y, _ = layer(x, h)
    h.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("runner", ["auto", "eager"])
def test_a_loop_that_detaches_in_place(runner):
    """Truncated backpropagation as many write it: the gradients are those with fc.detach."""
    torch.manual_seed(1)
    layer, x = fc.LSTM(5, 8), torch.randn(4, 7, 3, 5)
    grads = []
    for in_place in (False, True):
        layer.zero_grad()
        state = None
        with fc.runner(runner):
            for chunk in x:
                y, state = layer(chunk, state)
                y.square().sum().backward()
                if in_place:
                    for value in state:
                        value.detach_()
                else:
                    state = fc.detach(state)
        grads.append([parameter.grad.clone() for parameter in layer.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("grad", [False, True])
def test_a_cached_call_runs_no_operator_after_the_kernel(grad):
    """No operation of torch's comes after the kernel, whichever form its outputs have."""
    for first in (False, True):
        layer, x = fc.GRU(5, 8, batch_first=first), torch.randn(4, 4, 5)
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                layer(x)
            with torch.autograd.profiler.profile() as profile:
                layer(x)
        ops = {event.name for event in profile.function_events if event.name.startswith("aten::")}
        assert ops <= {"aten::new_empty", "aten::new_empty_strided", "aten::empty", "aten::empty_strided"}
