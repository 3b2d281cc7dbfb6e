"""The contract of Stack, Bidirectional, Sequential and detach, on the reference runner."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn

import fusecell as fc
from tests.reference import LearnedStart, close, loop

pytestmark = pytest.mark.usefixtures("eager")

NAN = float("nan")


def mixed(**options) -> fc.Stack:
    inner = fc.Stack(fc.LSTMCell(4, 4), fc.cells.CoRNNCell(4, 4), residual=True)
    return fc.Stack(fc.GRUCell(4, 4), inner, fc.cells.SCRNCell(4, 3, 2), **options).double()


# Stack


def test_a_stack_concatenates_states_and_names_them_by_layer():
    stack = mixed()
    assert stack.states == ("h0", "h01", "c01", "y11", "z11", "h2", "s2")
    assert stack.state_sizes == (4, 4, 4, 4, 4, 3, 2)
    assert (stack.input_size, stack.output_size) == (4, 5)
    assert next(iter(stack.state_dict())) == "cells.0.weight_ih"


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_layer_by_layer_is_step_by_step(residual: bool, reverse: bool):
    stack = mixed(residual=residual)
    x = torch.randn(5, 3, 4).double()
    state = tuple(torch.randn(3, size).double() for size in stack.state_sizes)
    lengths, resets = [5, 0, 3], torch.rand(5, 3) < 0.3
    expected = loop(stack, x, state, lengths, resets, reverse)
    padded = x.masked_fill((torch.arange(5)[:, None] >= torch.tensor(lengths))[..., None], NAN)
    close(fc.scan(stack, padded, state, lengths=lengths, resets=resets, reverse=reverse), expected)


def test_residuals_add_the_input_after_dropout_where_sizes_agree():
    torch.manual_seed(5)
    stack = fc.Stack(fc.GRUCell(4, 4), fc.GRUCell(4, 6), fc.GRUCell(6, 6), residual=True, dropout=0.5).double()
    x = torch.randn(5, 3, 4).double()
    torch.manual_seed(6)
    y, _ = fc.scan(stack, x)
    torch.manual_seed(6)
    first, second, third = stack.cells
    below = nn.functional.dropout(fc.scan(first, x)[0], 0.5) + x
    above = nn.functional.dropout(fc.scan(second, below)[0], 0.5)
    close(y, fc.scan(third, above)[0] + above)


def test_residual_gradients_never_see_padding():
    stack = fc.Stack(fc.GRUCell(4, 4), fc.GRUCell(4, 4), residual=True).double()
    x = torch.randn(5, 2, 4).double()
    x[2:, 1] = NAN
    x.requires_grad_()
    y, _ = fc.scan(stack, x, lengths=[5, 2])
    gradients = torch.autograd.grad(y.square().sum(), [x, *stack.parameters()])
    assert (y[2:, 1] == 0).all()
    assert (gradients[0][2:, 1] == 0).all()
    assert all(value.isfinite().all() for value in gradients)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dropout_masks_are_those_of_torch(packed: bool, bias: bool):
    reference = nn.GRU(3, 5, num_layers=3, dropout=0.4, bias=bias, dtype=torch.float64)
    cells = [fc.GRUCell(3 if layer == 0 else 5, 5, bias=bias, dtype=torch.float64) for layer in range(3)]
    stack = fc.Stack(*cells, dropout=0.4)
    for layer, cell in enumerate(cells):
        cell.load_state_dict({n: getattr(reference, f"{n}_l{layer}") for n in cell.state_dict()})
    x = nn.utils.rnn.pack_sequence([torch.randn(n, 3).double() for n in (4, 6, 1)], enforce_sorted=False)
    if not packed:
        x = torch.randn(6, 3, 3).double()
    torch.manual_seed(9)
    expected, last = reference(x)
    torch.manual_seed(9)
    y, after = fc.scan(stack, x)
    close(y.data if packed else y, expected.data if packed else expected)
    close(torch.stack(after), last)
    close(fc.scan(stack.eval(), x)[1][2], reference.eval()(x)[1][2])


def test_what_a_stack_refuses():
    gru = fc.GRUCell(3, 4)
    with pytest.raises(ValueError, match="Stack needs at least one cell, got none"):
        fc.Stack()
    with pytest.raises(TypeError, match=r"Stack takes cells, got Linear. For layers use fusecell.Sequential"):
        fc.Stack(gru, nn.Linear(4, 4))
    with pytest.raises(ValueError, match="GRUCell gives 4 features and LSTMCell above it takes 5; they must agree"):
        fc.Stack(gru, fc.LSTMCell(5, 2))
    for dropout in (1.5, -0.1, True):
        with pytest.raises(ValueError, match=r"dropout should be a probability in \[0, 1\]"):
            fc.Stack(gru, fc.GRUCell(4, 4), dropout=dropout)
    with pytest.warns(UserWarning, match="Stack drops between cells, and there is only one"):
        fc.Stack(gru, dropout=0.5)
    with pytest.raises(ValueError, match="residual=True finds no cell as wide as its input among 3->4, 4->5"):
        fc.Stack(gru, fc.GRUCell(4, 5), residual=True)
    with pytest.raises(ValueError, match=r"Stack has 2 states \(h0, h1\), got 1"):
        fc.scan(fc.Stack(gru, fc.GRUCell(4, 4)), torch.randn(5, 2, 3), torch.zeros(2, 4))


# Bidirectional


@pytest.mark.parametrize("batch_first", [False, True])
def test_both_directions_side_by_side_in_input_time(batch_first: bool):
    ahead, back = LearnedStart(3, 4).double(), fc.LSTMCell(3, 2).double()
    both = fc.Bidirectional(*(fc.Recurrent(cell, batch_first=batch_first) for cell in (ahead, back)))
    form = (lambda value: value.transpose(0, 1)) if batch_first else (lambda value: value)
    x = torch.randn(5, 3, 3).double()
    h, state = torch.randn(3, 4).double(), (torch.randn(3, 2).double(), torch.randn(3, 2).double())
    lengths, resets = [2, 5, 0], torch.rand(5, 3) < 0.3
    y, (h_n, after) = both(form(x), (h, state), lengths=lengths, resets=form(resets))
    one, last = loop(ahead, x, (h,), lengths, resets)
    other, first = loop(back, x, state, lengths, resets, reverse=True)
    close(form(y), torch.cat((one, other), -1))
    close((h_n, after), (last[0], first))
    assert both.output_size == 6
    assert both(x[:, 0])[0].shape == (5, 6)


def test_bidirectional_is_torch_nn_gru():
    reference = nn.GRU(3, 4, bidirectional=True, dtype=torch.float64)
    cells = [fc.GRUCell(3, 4, dtype=torch.float64) for _ in range(2)]
    for cell, suffix in zip(cells, ("", "_reverse"), strict=True):
        cell.load_state_dict({n: getattr(reference, f"{n}_l0{suffix}") for n in cell.state_dict()})
    both = fc.Bidirectional(*(fc.Recurrent(cell) for cell in cells))
    for x in (
        torch.randn(5, 2, 3).double(),
        nn.utils.rnn.pack_sequence([torch.randn(n, 3).double() for n in (2, 6, 4)], enforce_sorted=False),
    ):
        y, state = both(x)
        expected, last = reference(x)
        close(getattr(y, "data", y), getattr(expected, "data", expected))
        close(torch.stack(state), last)


def test_what_bidirectional_refuses():
    layer = fc.Recurrent(fc.GRUCell(3, 4))
    with pytest.raises(ValueError, match="backward_layer has reverse=True; give two forward-running layers"):
        fc.Bidirectional(layer, fc.Recurrent(fc.GRUCell(3, 4), reverse=True))
    with pytest.raises(ValueError, match="forward_layer has reverse=True"):
        fc.Bidirectional(fc.Recurrent(fc.GRUCell(3, 4), reverse=True), layer)
    with pytest.raises(ValueError, match="both layers must agree in batch_first, got False and True"):
        fc.Bidirectional(layer, fc.Recurrent(fc.GRUCell(3, 4), batch_first=True))
    with pytest.raises(TypeError, match=r"forward_layer must be a fusecell.Recurrent, got GRUCell"):
        fc.Bidirectional(fc.GRUCell(3, 4), layer)
    with pytest.raises(ValueError, match="takes its state as a pair"):
        fc.Bidirectional(layer, layer)(torch.randn(5, 2, 3), torch.randn(2, 2, 4))


# Recurrent and Sequential


def test_layers_keep_their_parts_under_fixed_names():
    layer = fc.Recurrent(fc.GRUCell(3, 4), batch_first=True, reverse=True)
    both = fc.Bidirectional(fc.Recurrent(fc.GRUCell(3, 4)), fc.Recurrent(fc.GRUCell(3, 4)))
    assert list(layer.state_dict()) == ["cell.weight_ih", "cell.weight_hh", "cell.bias_ih", "cell.bias_hh"]
    assert {name.split(".")[0] for name in both.state_dict()} == {"forward_layer", "backward_layer"}
    assert "batch_first=True, reverse=True" in repr(layer)
    assert (layer.input_size, layer.output_size) == (3, 4)


def model() -> fc.Sequential:
    both = fc.Bidirectional(fc.Recurrent(fc.GRUCell(3, 4)), fc.Recurrent(fc.cells.LeakyCell(3, 4)))
    inner = fc.Sequential(fc.Recurrent(fc.LSTMCell(8, 5)), nn.Tanh())
    return fc.Sequential(both, nn.LayerNorm(8), inner, nn.Linear(5, 2)).double()


def test_a_sequence_of_layers_is_its_parts_in_order():
    parts = model()
    both, norm, inner, linear = parts
    x, lengths, resets = torch.randn(5, 3, 3).double(), [5, 2, 3], torch.rand(5, 3) < 0.3
    y, state = parts(x, lengths=lengths, resets=resets)
    first, h = both(x, lengths=lengths, resets=resets)
    second, lstm = inner[0](norm(first), lengths=lengths, resets=resets)
    close(y, linear(torch.tanh(second)))
    close(state, (h, (lstm,)))


def test_a_sequence_of_layers_carries_its_state_and_takes_packed_input():
    parts = fc.Sequential(fc.Recurrent(fc.GRUCell(3, 4)), nn.Linear(4, 4), fc.Recurrent(fc.LSTMCell(4, 2))).double()
    x = torch.randn(6, 2, 3).double()
    whole, last = parts(x)
    first, state = parts(x[:2])
    second, after = parts(x[2:], fc.detach(state))
    close(torch.cat((first, second)), whole)
    close(after, last)
    packed, h = parts(nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 1]]))
    expected, h_expected = parts(x, lengths=[6, 3])
    close(nn.utils.rnn.pad_packed_sequence(packed)[0], expected)
    close(h, h_expected)
    for wrong, got in (((None,), "1"), (iter(()), "a tuple_iterator")):
        with pytest.raises(ValueError, match=f"Sequential has 2 recurrent parts and takes a tuple of .*, got {got}"):
            parts(x, wrong)


def test_detach_keeps_the_form_and_cuts_the_history():
    pair = namedtuple("pair", "h c")
    h = torch.randn(2, 3, requires_grad=True) * 2
    state = {"a": [h, None], "b": pair(h, (h,))}
    detached = fc.detach(state)
    assert isinstance(detached["b"], pair)
    assert isinstance(detached["a"], list)
    assert detached["a"][1] is None
    for value in (detached["a"][0], detached["b"].h, detached["b"].c[0]):
        assert torch.equal(value, h)
        assert not value.requires_grad
    with pytest.raises(TypeError, match="detach takes tensors, None and tuples, lists or dicts of them, got str"):
        fc.detach("state")


@pytest.mark.parametrize("split", [1, 3])
def test_truncated_backpropagation_stops_at_detach(split: int):
    layer, x = fc.Recurrent(fc.GRUCell(3, 4)), torch.randn(5, 2, 3, requires_grad=True)
    _, state = layer(x[:split])
    y, _ = layer(x[split:], fc.detach(state))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (gradient[:split] == 0).all()
    assert (gradient[split:] != 0).any()
