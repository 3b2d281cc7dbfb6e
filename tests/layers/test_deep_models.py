"""Deep models: stacks with residual and skip connections, against loops over their cells."""

from __future__ import annotations

import pytest
import torch

import fusecell as fc
from tests.wrappers.loops import LeakyCell, compare

T, N = 7, 3


@pytest.fixture
def x():
    return torch.randn(T, N, 4, dtype=torch.float64)


def cells(skip):
    more = 4 if skip else 0
    return fc.GRUCell(4, 6), fc.LSTMCell(6 + more, 6), LeakyCell(6 + more, 5)


def loop_of(parts, skip, residual):
    gru, lstm, leaky = parts

    def loop(x, state):
        h0, h1, c1, h2 = state
        outputs = []
        for x_t in x:
            h0 = gru(x_t, h0)
            below = torch.cat((h0, x_t), -1) if skip else h0
            h1, c1 = lstm(below, (h1, c1))
            y1 = h1 + h0 if residual else h1
            h2 = leaky(torch.cat((h1, x_t), -1) if skip else y1, h2)
            outputs.append(torch.cat((h0, h1, h2), -1) if skip else h2)
        return torch.stack(outputs), (h0, h1, c1, h2)

    return loop


@pytest.mark.parametrize("kind", ["plain", "residual", "skip"])
def test_stacks(x, kind):
    parts = cells(kind == "skip")
    stack = fc.Stack(*parts, skip=kind == "skip", residual=kind == "residual").double()
    state = tuple(torch.randn(N, size, dtype=torch.float64) for size in stack.state_sizes)
    loop = loop_of(parts, kind == "skip", kind == "residual")
    compare(fc.Recurrent(stack), loop, x, state, parameters=list(stack.parameters()))
    output, after = fc.step(stack, x[0], state)
    expected, last = loop(x[:1], state)
    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(after, last)


def test_skip_with_lengths_dropout_and_packed(x):
    stack = fc.Stack(*cells(True), skip=True, dropout=0.3).double()
    lengths = [7, 3, 5]
    torch.manual_seed(1)
    y, _ = fc.scan(stack, x, lengths=lengths)
    assert stack.output_size == y.shape[-1] == 17
    for row, length in enumerate(lengths):
        assert not y[length:, row].any()
    stack.eval()
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    opened, _ = torch.nn.utils.rnn.pad_packed_sequence(fc.scan(stack, packed)[0])
    torch.testing.assert_close(opened, fc.scan(stack, x, lengths=lengths)[0])
    fc.testing.check_cell(stack)


def test_errors():
    with pytest.raises(ValueError, match="choose one"):
        fc.Stack(*cells(True), skip=True, residual=True)
    with pytest.raises(
        ValueError, match="gives 6 features, with the stack's 4 behind them 10, and LSTMCell above it takes 6"
    ):
        fc.Stack(*cells(False), skip=True)
    with pytest.raises(TypeError, match="can't take a Stack with skip=True"):
        fc.Stream(fc.Stack(*cells(True), skip=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masked_output", ["hold", "zero"])
def test_residuals_under_a_mask(x, masked_output, reverse):
    """Running layer by layer equals running all cells step by step; masked inputs are never read."""
    stack = fc.Stack(fc.GRUCell(4, 4), fc.LSTMCell(4, 4), residual=True).double()
    mask = torch.rand(T, N) < 0.5
    mask[:2, 0] = False
    hidden = torch.where(mask[..., None], x, torch.full_like(x, float("nan"))).requires_grad_()
    for lengths in (None, [7, 5, 0]):
        options = {"mask": mask, "masked_output": masked_output, "reverse": reverse, "lengths": lengths}
        y, state = fc.scan(stack, hidden, **options)
        whole, last = fc.scan(fc.wrappers.Wrapper(stack), x, **options)
        torch.testing.assert_close(y, whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(y.square().sum(), hidden)
        assert gradient.isfinite().all()
        assert not gradient[~mask].any()
