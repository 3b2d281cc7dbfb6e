"""recompute="chunk": the numbers and gradients of the whole sequence, and the memory of a chunk."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fusecell as fc
from fusecell.compiler.programs.chunked import chunk_steps

LAYERS = {
    "two directions": (lambda each: fc.GRU(5, 7, 2, bidirectional=True, recompute=each), {}),
    "lengths": (lambda each: fc.LSTM(5, 7, recompute=each), {"lengths": [37, 0, 12]}),
    "reverse": (
        lambda each: fc.Recurrent(fc.cells.UGRNNCell(5, 7), recompute=each, reverse=True),
        {"lengths": [1, 36, 12]},
    ),
    "resets": (lambda each: fc.Recurrent(fc.LearnedState(fc.GRUCell(5, 7)), recompute=each), {"resets": True}),
    "stack": (lambda each: fc.Recurrent(fc.Stack(fc.GRUCell(5, 7), fc.LSTMCell(7, 3)), recompute=each), {}),
    "image": (lambda each: fc.Recurrent(fc.cells.ConvGRUCell(1, 2, size=(1, 5)), recompute=each), {}),
    "mask": (lambda each: fc.Recurrent(fc.GRUCell(5, 7), recompute=each, tbptt=5), {"mask": True}),
}


def run(name, recompute, double_backward=False):
    make, data = LAYERS[name]
    torch.manual_seed(1)
    layer = make(recompute).double()
    shape = (37, 3, 1, 1, 5) if name == "image" else (37, 3, 5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    data = {key: torch.rand(37, 3) < 0.3 if value is True else value for key, value in data.items()}
    with fc.runner("compiled"):
        y, state = layer(x, **data)
    states = state if isinstance(state, tuple) else (state,)
    loss = (y * torch.randn_like(y)).sum() + sum(value.square().sum() for value in states)
    leaves = [x, *layer.parameters()]
    gradients = torch.autograd.grad(loss, leaves, create_graph=double_backward)
    if double_backward:
        gradients += torch.autograd.grad(sum(value.square().sum() for value in gradients), leaves)
    return y, *states, *gradients


@pytest.mark.parametrize("name", LAYERS)
def test_numbers_and_gradients_are_those_of_the_whole(name):
    for value, expected in zip(run(name, "chunk"), run(name, False), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)


def test_gradients_of_gradients():
    for value, expected in zip(run("two directions", "chunk", True), run("two directions", False, True), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 17, 64, 65])
def test_any_number_of_steps(steps):
    layer, x = fc.GRU(3, 4), torch.randn(steps, 2, 3)
    (whole,) = torch.autograd.grad(layer(x)[0].square().sum(), layer.weight_hh_l0)
    with fc.recompute("chunk"):
        (of_chunks,) = torch.autograd.grad(layer(x)[0].square().sum(), layer.weight_hh_l0)
    torch.testing.assert_close(of_chunks, whole)
    size = chunk_steps(steps)
    assert size * size >= steps
    assert size <= steps


def test_packed_sequences_constant_inputs_and_other_dtypes():
    layer, chunked = fc.GRU(3, 4), fc.GRU(3, 4, recompute="chunk")
    chunked.load_state_dict(layer.state_dict())
    packed = pack_sequence([torch.randn(length, 3) for length in (2, 19, 7)], enforce_sorted=False)
    for each in (layer, chunked):
        each(packed)[0].data.square().sum().backward()
    torch.testing.assert_close(chunked.weight_ih_l0.grad, layer.weight_ih_l0.grad)

    class Driven(fc.Cell):
        inputs = ("x", "drive")

        def __init__(self):
            super().__init__(3, 3)

        def step(self, x, state):
            (h,) = state
            h = torch.tanh(x[0] * x[1] + h)
            return h, (h,)

    x, drive = torch.randn(23, 2, 3, requires_grad=True), torch.randn(1, 2, 3, requires_grad=True)
    results = []
    for recompute in (False, "chunk"):
        y, _ = fc.scan(Driven(), (x, drive), recompute=recompute)
        results.append(torch.autograd.grad(y.square().sum(), (x, drive)))
    torch.testing.assert_close(results[0], results[1])
    half = fc.GRU(3, 4, recompute="chunk").bfloat16()
    half(torch.randn(9, 2, 3, dtype=torch.bfloat16))[0].sum().backward()
    assert half.weight_hh_l0.grad.dtype is torch.bfloat16


def test_what_is_saved():
    saved = []

    def pack(value):
        saved.append(value.numel())
        return value

    layer, x = fc.LSTM(3, 16, recompute="chunk"), torch.randn(400, 2, 3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        layer(x)
    weights = sum(value.numel() for value in layer.parameters())
    assert sum(saved) <= x.numel() + weights + 2 * 2 * 16 + 20 * 2 * 2 * 16
    summary = fc.summary(layer, 400, 2)
    assert summary.saved == summary.saved_with("chunk") < summary.saved_with(True) < summary.saved_with(False)
    assert summary.saved_with(False) == fc.summary(fc.LSTM(3, 16), 400, 2).saved
    assert "recompute='chunk'" in str(fc.summary(fc.LSTM(3, 16), 400_000, 2))
    assert "recompute" not in str(fc.summary(fc.LSTM(3, 16), 400, 2))
    with fc.recompute("chunk"):
        assert fc.summary(fc.LSTM(3, 16), 400, 2).saved == summary.saved


@pytest.mark.parametrize("value", ["chunks", 2, None])
def test_other_values_are_refused(value):
    for make in (
        lambda: fc.GRU(3, 4, recompute=value),
        lambda: fc.Recurrent(fc.GRUCell(3, 4), recompute=value),
        lambda: fc.scan(fc.GRUCell(3, 4), torch.randn(2, 3), recompute=value),
        lambda: fc.recompute(value).__enter__(),
    ):
        with pytest.raises(ValueError, match="recompute must be True, False or 'chunk', got"):
            make()


def test_an_attribute_that_is_set():
    layer, x = fc.GRU(3, 4), torch.randn(9, 2, 3)
    expected = layer(x)[0]
    for value in ("chunk", True, False):
        layer.recompute = value
        assert torch.equal(layer(x)[0], expected)
    layer.recompute = "chunks"
    with pytest.raises(ValueError, match="GRU: recompute must be True"):
        layer(x)


def test_it_is_seen():
    assert "recompute='chunk'" in repr(fc.GRU(3, 4, recompute="chunk"))
    assert "recompute='chunk'" in repr(fc.Recurrent(fc.GRUCell(3, 4), recompute="chunk"))
    assert "recompute=True" in repr(fc.GRU(3, 4, recompute=True))
