"""The contract of sequences: lengths, resets, reverse, padding, empty ones, memory, packing."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import fusecell as fc
from tests.reference import LearnedStart, close, loop

pytestmark = pytest.mark.usefixtures("eager")

NAN = float("nan")


@given(
    steps=st.integers(1, 6),
    rows=st.integers(1, 4),
    reverse=st.booleans(),
    with_lengths=st.booleans(),
    with_resets=st.booleans(),
    batch_first=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_sequence_is_its_loop(steps, rows, reverse, with_lengths, with_resets, batch_first, seed):
    torch.manual_seed(seed)
    cell = LearnedStart(3, 5).double()
    x, h = torch.randn(steps, rows, 3).double(), torch.randn(rows, 5).double()
    lengths = torch.randint(0, steps + 1, (rows,)) if with_lengths else None
    resets = torch.rand(steps, rows) < 0.4 if with_resets else None
    expected, (last,) = loop(cell, x, (h,), lengths, resets, reverse)
    if with_lengths:
        x = x.masked_fill((torch.arange(steps)[:, None] >= lengths)[..., None], NAN)
    form = (lambda value: value.transpose(0, 1)) if batch_first else (lambda value: value)
    layer = fc.Recurrent(cell, batch_first=batch_first, reverse=reverse)
    y, h_n = layer(form(x), h, lengths=lengths, resets=None if resets is None else form(resets))
    close(form(y), expected)
    close(h_n, last)


@given(lengths=st.lists(st.integers(0, 4), min_size=3, max_size=3), reverse=st.booleans())
def test_gradients_go_through_lengths_and_resets_and_never_see_padding(lengths, reverse):
    cell = LearnedStart(3, 5).double()
    x = torch.randn(4, 3, 3).double()
    h = torch.randn(3, 5).double()
    resets = torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).bool()
    padding = (torch.arange(4)[:, None] >= torch.tensor(lengths))[..., None]
    weight_y, weight_h = torch.randn(4, 3, 5).double(), torch.randn(3, 5).double()

    def gradients(run, x):
        leaves = [x.requires_grad_(), h.clone().requires_grad_(), *cell.parameters()]
        y, h_n = run(leaves[0], leaves[1])
        return torch.autograd.grad((y * weight_y).sum() + (h_n * weight_h).sum(), leaves, materialize_grads=True)

    def by_loop(x, h):
        y, (h_n,) = loop(cell, x, (h,), lengths, resets, reverse)
        return y, h_n

    def by_scan(x, h):
        return fc.scan(cell, x, h, lengths=lengths, resets=resets, reverse=reverse)

    expected = gradients(by_loop, x.clone())
    close(gradients(by_scan, x.masked_fill(padding, NAN)), expected)
    close(gradients(by_scan, x.masked_fill(padding, float("inf"))), expected)


@pytest.mark.parametrize("lengths", [[4, 2, 0], (4, 2, 0), torch.tensor([4, 2, 0], dtype=torch.uint8)])
def test_lengths_come_in_many_forms(lengths):
    layer, x = fc.Recurrent(fc.GRUCell(3, 4)), torch.randn(4, 3, 3)
    h = torch.randn(3, 4)
    y, h_n = layer(x, h, lengths=lengths)
    again, _ = layer(x, h, lengths=np.array([4, 2, 0]))
    assert torch.equal(y, again)
    assert torch.equal(h_n[2], h[2])
    assert (y[:, 2] == 0).all()
    assert torch.equal(h_n[1], y[1, 1])


def test_unbatched_sequences():
    cell = fc.LSTMCell(3, 4).double()
    x, h, c = torch.randn(5, 3).double(), torch.randn(4).double(), torch.randn(4).double()
    resets = torch.tensor([0, 0, 1, 0, 1]).bool()
    y, (h_n, c_n) = fc.scan(cell, x, (h, c), lengths=[4], resets=resets)
    expected, last = loop(cell, x[:, None], (h[None], c[None]), [4], resets[:, None])
    close(y, expected[:, 0])
    close((h_n, c_n), tuple(value[0] for value in last))
    assert fc.Recurrent(cell, batch_first=True)(x)[0].shape == (5, 4)


@pytest.mark.parametrize("shape", [(0, 2, 3), (5, 0, 3), (0, 0, 3)])
@pytest.mark.parametrize("reverse", [False, True])
def test_no_steps_and_no_rows(shape, reverse: bool):
    steps, rows, _ = shape
    stack = fc.Stack(fc.GRUCell(3, 4), fc.LSTMCell(4, 2))
    state = tuple(torch.randn(rows, size, requires_grad=True) for size in (4, 2, 2))
    x = torch.randn(shape, requires_grad=True)
    lengths, resets = torch.zeros(rows, dtype=torch.int64), torch.zeros(steps, rows, dtype=torch.bool)
    y, after = fc.scan(stack, x, state, lengths=lengths, resets=resets, reverse=reverse)
    assert y.shape == (steps, rows, 2)
    for given_value, value in zip(state, after, strict=True):
        assert value.shape == given_value.shape
        assert torch.equal(value, given_value)
    total = sum(value.sum() for value in after)
    assert torch.equal(torch.autograd.grad(total, state[0], allow_unused=True)[0], torch.ones(rows, 4))


def storages(*values: Tensor) -> set[int]:
    return {value.untyped_storage().data_ptr() for value in values if value.numel()}


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("lengths", [None, [0, 0]])
def test_results_share_no_memory_with_arguments(steps: int, lengths):
    cell = fc.LSTMCell(3, 4)
    x, h, c = torch.randn(steps, 2, 3), torch.randn(2, 4), torch.randn(2, 4)
    y, (h_n, c_n) = fc.scan(cell, x, (h, c), lengths=lengths)
    results = [y, h_n, c_n] if steps else [h_n, c_n]
    assert len(storages(*results)) == len(results)
    assert not storages(*results) & storages(x, h, c, *cell.parameters())


def test_results_may_be_changed_before_backward():
    layer, x = fc.Recurrent(fc.LSTMCell(3, 4)), torch.randn(5, 2, 3)
    y, (h, c) = layer(x)
    expected = torch.autograd.grad(2 * y.sum() + 3 * h.sum() + c.sum(), layer.parameters())
    y, (h, c) = layer(x)
    y.mul_(2)
    h.mul_(3)
    c.add_(1)
    actual = torch.autograd.grad(y.sum() + h.sum() + c.sum(), layer.parameters())
    torch.testing.assert_close(actual, expected)


def test_packed_sequences():
    rows = [torch.randn(n, 3).double() for n in (2, 5, 3)]
    packed = nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
    padded = nn.utils.rnn.pad_sequence(rows)
    h = torch.randn(3, 4).double()
    layer = fc.Recurrent(fc.GRUCell(3, 4).double())
    y, h_n = layer(packed, h)
    expected, last = layer(padded, h, lengths=[2, 5, 3])
    unpacked, lengths = nn.utils.rnn.pad_packed_sequence(y)
    close(unpacked, expected)
    close(h_n, last)
    assert lengths.tolist() == [2, 5, 3]
    with pytest.raises(ValueError, match="A PackedSequence carries its own lengths"):
        layer(packed, lengths=[2, 5, 3])
    with pytest.raises(ValueError, match="takes neither lengths nor resets"):
        layer(packed, resets=torch.zeros(5, 3, dtype=torch.bool))
