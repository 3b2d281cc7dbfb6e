"""mask, lengths, resets, tbptt and clip_state_grad, on any cell, against plain loops in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusecell as fc
from tests.wrappers.loops import KINDS, compare

T, N, D, H = 9, 4, 5, 7


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def x():
    return torch.randn(T, N, D, dtype=torch.float64)


def state_of(kind):
    return tuple(torch.randn(N, H, dtype=torch.float64) for _ in range(kind.states))


def rows_loop(kind, cell, mask, *, hold=True, lengths=None, resets=None, reverse=False):
    """Define mask, lengths and resets by a loop over rows and steps."""

    def loop(x, state):
        ends, outputs = [], []
        begin = tuple(torch.zeros(1, H, dtype=x.dtype) for _ in state)
        for n in range(x.shape[1]):
            now, last = tuple(value[n : n + 1] for value in state), torch.zeros(1, H, dtype=x.dtype)
            times = range(len(x) if lengths is None else lengths[n])
            row = [torch.zeros(1, H, dtype=x.dtype)] * len(x)
            for t in reversed(times) if reverse else times:
                if mask[t, n]:
                    if resets is not None and resets[t, n]:
                        now = begin
                    now = kind.step(cell, x[t, n : n + 1], now)
                    last = now[0]
                    row[t] = last
                elif hold:
                    row[t] = last
            outputs.append(torch.stack(row))
            ends.append(now)
        return torch.cat(outputs, 1), tuple(torch.cat(column) for column in zip(*ends, strict=True))

    return loop


@pytest.mark.parametrize("masked_output", ["hold", "zero"])
def test_mask(kind, x, masked_output):
    cell = kind.make(D, H).double()
    mask = torch.rand(T, N) < 0.6
    mask[:, 0], mask[:3, 1], mask[:, 2] = False, False, True
    loop = rows_loop(kind, cell, mask, hold=masked_output == "hold")
    layer = fc.Recurrent(cell, masked_output=masked_output)
    compare(layer, loop, x, state_of(kind), parameters=list(cell.parameters()), mask=mask)


@pytest.mark.parametrize("reverse", [False, True])
def test_mask_with_lengths_and_resets(kind, x, reverse):
    cell = kind.make(D, H).double()
    mask, resets, lengths = torch.rand(T, N) < 0.7, torch.rand(T, N) < 0.4, [9, 0, 4, 7]
    resets[0] = True
    loop = rows_loop(kind, cell, mask, lengths=lengths, resets=resets, reverse=reverse)
    data = {"mask": mask, "resets": resets, "lengths": lengths}
    layer = fc.Recurrent(cell, reverse=reverse)
    compare(layer, loop, x, state_of(kind), parameters=list(cell.parameters()), **data)


@given(st.data())
def test_any_flags(data):
    """Lengths, resets and masks as they come: none, all, zero-length rows, a reset at the first step, reversed."""
    kind = KINDS[data.draw(st.sampled_from(sorted(KINDS)))]
    steps, rows = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 5))

    def flags():
        return torch.tensor(data.draw(st.lists(st.booleans(), min_size=steps * rows, max_size=steps * rows)))

    mask, resets = flags().reshape(steps, rows), flags().reshape(steps, rows)
    lengths = data.draw(st.lists(st.integers(0, steps), min_size=rows, max_size=rows))
    reverse, hold = data.draw(st.booleans()), data.draw(st.booleans())
    cell = kind.make(D, H).double()
    loop = rows_loop(kind, cell, mask, hold=hold, lengths=lengths, resets=resets, reverse=reverse)
    layer = fc.Recurrent(cell, reverse=reverse, masked_output="hold" if hold else "zero")
    x = torch.randn(steps, rows, D, dtype=torch.float64)
    state = tuple(torch.randn(rows, H, dtype=torch.float64) for _ in range(kind.states))
    parameters = list(cell.parameters())
    compare(layer, loop, x, state, parameters=parameters, mask=mask, lengths=lengths, resets=resets)


def test_what_is_masked_is_never_seen(kind, x):
    layer = fc.Recurrent(kind.make(D, H).double())
    mask = torch.rand(T, N) < 0.5
    results = []
    for hidden in (0.0, float("nan")):
        leaf = torch.where(mask[..., None], x, torch.full_like(x, hidden)).requires_grad_()
        layer.zero_grad()
        y, _ = layer(leaf, mask=mask)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(parameter.grad for parameter in layer.parameters())])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert not results[0][1][~mask].any()


def test_a_mask_of_prefixes_is_lengths(kind, x):
    cell = kind.make(D, H).double()
    lengths = torch.tensor([9, 0, 4, 7])
    mask = torch.arange(T)[:, None] < lengths
    y, _ = fc.scan(cell, x, lengths=lengths)
    masked, _ = fc.scan(cell, x, mask=mask, masked_output="zero")
    assert torch.equal(y, masked)


def chunks_loop(kind, cell, every):
    def loop(x, state):
        outputs = []
        for t in range(T):
            if t and t % every == 0:
                state = tuple(value.detach() for value in state)
            state = kind.step(cell, x[t], state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    return loop


@pytest.mark.parametrize("every", [1, 4, 20])
def test_tbptt_is_chunks_with_detach(kind, x, every):
    cell = kind.make(D, H).double()
    parameters = list(cell.parameters())
    compare(fc.Recurrent(cell, tbptt=every), chunks_loop(kind, cell, every), x, state_of(kind), parameters=parameters)


def test_tbptt_counts_a_rows_own_steps(x):
    """Reversed, each row begins at its own end."""
    cell, lengths = fc.GRUCell(D, H).double(), torch.tensor([9, 0, 4, 7])
    layer = fc.Recurrent(cell, tbptt=3, reverse=True)

    def loop(x, state):
        rows, ends = [], []
        for n, length in enumerate(lengths.tolist()):
            h, row = state[0][n : n + 1], [torch.zeros(1, H, dtype=x.dtype)] * T
            for gone, t in enumerate(reversed(range(length))):
                if gone and gone % 3 == 0:
                    h = h.detach()
                (h,) = KINDS["GRU"].step(cell, x[t, n : n + 1], (h,))
                row[t] = h
            rows.append(torch.stack(row))
            ends.append(h)
        return torch.cat(rows, 1), (torch.cat(ends),)

    state = (torch.randn(N, H, dtype=torch.float64),)
    compare(layer, loop, x, state, parameters=list(cell.parameters()), lengths=lengths)


def test_clip_state_grad(kind, x):
    cell = kind.make(D, H).double()
    seen = []

    def clip(gradient):
        seen.append(gradient.abs().max().item())
        return gradient.clamp(-0.05, 0.05)

    def loop(x, state):
        outputs = []
        for t in range(T):
            state = tuple(value.clone() for value in state)
            for value in state:
                value.register_hook(clip)
            state = kind.step(cell, x[t], state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    layer = fc.Recurrent(cell, clip_state_grad=0.05)
    compare(layer, loop, x, state_of(kind), parameters=list(cell.parameters()))
    assert max(seen) > 0.05


@pytest.mark.parametrize("kind_of_layer", [fc.RNN, fc.GRU, fc.LSTM])
def test_the_drop_ins_take_them_too(kind_of_layer, x):
    torch.manual_seed(5)
    plain = kind_of_layer(D, H, num_layers=2, bidirectional=True, batch_first=True).double()
    torch.manual_seed(5)
    layer = kind_of_layer(
        D, H, num_layers=2, bidirectional=True, batch_first=True, tbptt=4, clip_state_grad=0.5, masked_output="zero"
    ).double()
    mask = torch.rand(N, T) < 0.7
    results = []
    for name in ("compiled", "eager"):
        layer.zero_grad()
        with fc.runner(name):
            y, _ = layer(x.transpose(0, 1), mask=mask)
        y.square().sum().backward()
        results.append([y, *(parameter.grad for parameter in layer.parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert not results[0][0][~mask].any()
    assert torch.equal(layer(x.transpose(0, 1))[0], plain(x.transpose(0, 1))[0])
    assert "tbptt=4, clip_state_grad=0.5" in repr(layer)


def test_masks_go_through_both_directions_sequential_and_record(x):
    layer = fc.Bidirectional(fc.Recurrent(fc.GRUCell(D, H), tbptt=2), fc.Recurrent(fc.LSTMCell(D, H)))
    mask = torch.rand(T, N) < 0.7
    y, _ = layer(x.float(), mask=mask)
    back, _ = fc.scan(layer.backward_layer.cell, x.float(), mask=mask, reverse=True)
    assert torch.equal(y[..., H:], back)
    model = fc.Sequential(layer, torch.nn.ReLU())
    assert torch.equal(model(x.float(), mask=mask)[0], y.relu())
    tape = fc.record(layer.forward_layer, x.float(), mask=mask)
    torch.testing.assert_close(tape.value("output"), y[..., :H].detach())
    assert tape.kinds == ("GRUCell",)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"mask": torch.ones(T, N)}, TypeError, "mask must be bool, True where a row takes part"),
        ({"mask": torch.ones(N, T, dtype=torch.bool)}, ValueError, r"mask must have shape \(9, 4\)"),
        ({"masked_output": "last"}, ValueError, "must be 'hold' or 'zero', got 'last'"),
        ({"tbptt": 0}, ValueError, "1 or more steps, got 0"),
        ({"tbptt": 2.5}, TypeError, "an int, got 2.5"),
        ({"clip_state_grad": 0}, ValueError, "above 0, got 0"),
        ({"clip_state_grad": float("nan")}, ValueError, "above 0, got nan"),
        ({"clip_state_grad": "1"}, TypeError, "a bound for a gradient"),
    ],
)
def test_errors(x, arguments, error, text):
    with pytest.raises(error, match=text):
        fc.scan(fc.GRUCell(D, H).double(), x, **arguments)


def test_a_packed_sequence_takes_no_mask(x):
    packed = torch.nn.utils.rnn.pack_padded_sequence(x.float(), [9, 4, 2, 1])
    for call in (fc.Recurrent(fc.GRUCell(D, H)), fc.GRU(D, H)):
        with pytest.raises(ValueError, match="nor a mask"):
            call(packed, mask=torch.ones(T, N, dtype=torch.bool))
