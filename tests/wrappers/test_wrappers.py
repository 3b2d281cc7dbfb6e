"""Each wrapper, compiled, against a plain loop: outputs, states and gradients in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import fusecell as fc
from tests.wrappers.loops import KINDS, LeakyCell, compare

T, N, D, H = 9, 4, 5, 7


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def x():
    return torch.randn(T, N, D, dtype=torch.float64)


def state_of(kind):
    return tuple(torch.randn(N, H, dtype=torch.float64) for _ in range(kind.states))


def masks_of(cell):
    """Return the masks that the next call under the same seed draws."""
    torch.manual_seed(7)
    return cell.draw(T, N, dtype=torch.float64)


def test_zoneout(kind, x):
    cell = fc.Zoneout(kind.make(D, H).double(), [0.3, 0.6][: kind.states])
    masks = masks_of(cell)
    assert len(masks) == kind.states

    def loop(x, state):
        outputs = []
        for t in range(T):
            new = kind.step(cell.cell, x[t], state)
            state = tuple(torch.where(m[t] == 1, old, now) for m, old, now in zip(masks, state, new, strict=True))
            outputs.append(state[0])
        return torch.stack(outputs), state

    compare(fc.Recurrent(cell), loop, x, state_of(kind), parameters=list(cell.parameters()))
    assert 0.2 < masks[0].mean() < 0.4


def test_zoneout_in_eval_is_the_expectation(kind, x):
    cell = fc.Zoneout(kind.make(D, H).double(), 0.3).eval()

    def loop(x, state):
        outputs = []
        for t in range(T):
            new = kind.step(cell.cell, x[t], state)
            state = tuple(0.3 * old + 0.7 * now for old, now in zip(state, new, strict=True))
            outputs.append(state[0])
        return torch.stack(outputs), state

    compare(fc.Recurrent(cell), loop, x, state_of(kind), parameters=list(cell.parameters()))


def test_zoneout_of_nothing_is_the_cell(x):
    cell = fc.GRUCell(D, H).double()
    for wrapped in (fc.Zoneout(cell, 0.0), fc.VariationalDropout(cell), fc.RecurrentDropout(cell, 0.0)):
        assert wrapped.draw(T, N) == ()
        assert torch.equal(fc.scan(wrapped, x)[0], fc.scan(cell, x)[0])


def recurrent_part(cell, h, mask):
    """A cell's gate sums with its state dropped in the product alone."""
    return (h * mask) @ cell.weight_hh.T + cell.bias_hh


def gru_dropped(cell, x, state, mask):
    (h,) = state
    x_r, x_z, x_n = (x @ cell.weight_ih.T + cell.bias_ih).chunk(3, -1)
    h_r, h_z, h_n = recurrent_part(cell, h, mask).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    return ((1 - z) * torch.tanh(x_n + r * h_n) + z * h,)


def lstm_dropped(cell, x, state, mask, candidate=1.0):
    h, c = state
    i, f, g, o = (x @ cell.weight_ih.T + cell.bias_ih + recurrent_part(cell, h, mask)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g) * candidate
    return torch.sigmoid(o) * torch.tanh(c), c


def leaky_dropped(cell, x, state, mask):
    (h,) = state
    return (0.7 * h + 0.3 * torch.tanh(cell.inp(x) + (h * mask) @ cell.weight_hh.T),)


DROPPED = {fc.GRUCell: gru_dropped, fc.LSTMCell: lstm_dropped, LeakyCell: leaky_dropped}


def test_variational_dropout(kind, x):
    cell = fc.VariationalDropout(kind.make(D, H).double(), input=0.2, state=0.3, output=0.4)
    of_x, of_h, of_y = masks_of(cell)
    assert [mask.shape for mask in (of_x, of_h, of_y)] == [(1, N, D), (1, N, H), (1, N, H)]
    step = DROPPED[kind.make]

    def loop(x, state):
        outputs = []
        for t in range(T):
            state = step(cell.cell, x[t] * of_x[0], state, of_h[0])
            outputs.append(state[0] * of_y[0])
        return torch.stack(outputs), state

    compare(fc.Recurrent(cell), loop, x, state_of(kind), parameters=list(cell.parameters()))


def gru_candidate(cell, x, state, mask):
    (h,) = state
    x_r, x_z, x_n = (x @ cell.weight_ih.T + cell.bias_ih).chunk(3, -1)
    h_r, h_z, h_n = (h @ cell.weight_hh.T + cell.bias_hh).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    return ((1 - z) * torch.tanh(x_n + r * h_n) * mask + z * h,)


def lstm_candidate(cell, x, state, mask):
    return lstm_dropped(cell, x, state, 1.0, mask)


def leaky_candidate(cell, x, state, mask):
    (h,) = state
    return (0.7 * h + 0.3 * mask * torch.tanh(cell.inp(x) + h @ cell.weight_hh.T),)


CANDIDATE = {fc.GRUCell: gru_candidate, fc.LSTMCell: lstm_candidate, LeakyCell: leaky_candidate}


def test_recurrent_dropout(kind, x):
    cell = fc.RecurrentDropout(kind.make(D, H).double(), 0.3)
    (mask,) = masks_of(cell)
    assert mask.shape == (T, N, H)
    step = CANDIDATE[kind.make]

    def loop(x, state):
        outputs = []
        for t in range(T):
            state = step(cell.cell, x[t], state, mask[t])
            outputs.append(state[0])
        return torch.stack(outputs), state

    compare(fc.Recurrent(cell), loop, x, state_of(kind), parameters=list(cell.parameters()))


def test_weight_drop(kind, x):
    cell = fc.WeightDrop(kind.make(D, H).double(), "weight_hh", 0.4)
    masks_of(cell)
    mask, raw = cell.mask_0.clone(), cell.cell.weight_hh
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - 0.4)}

    def loop(x, state):
        twin = kind.make(D, H).double()
        twin.load_state_dict(cell.cell.state_dict())
        dropped = {"weight_hh": raw * mask}
        outputs = []
        for t in range(T):
            state = torch.func.functional_call(
                twin, {**dict(cell.cell.named_parameters()), **dropped}, (x[t], bare(state))
            )
            state = state if isinstance(state, tuple) else (state,)
            outputs.append(state[0])
        return torch.stack(outputs), state

    compare(fc.Recurrent(cell), loop, x, state_of(kind), parameters=list(cell.parameters()))
    assert list(cell.state_dict()) == [f"cell.{name}" for name in cell.cell.state_dict()]


def bare(state):
    return state[0] if len(state) == 1 else state


def test_weight_drop_draws_anew_for_each_call_and_not_in_eval(x):
    layer = fc.Recurrent(fc.WeightDrop(fc.GRUCell(D, H).double(), ["weight_hh", "weight_ih"], 0.5))
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], fc.scan(layer.cell.cell, x)[0])


def test_learned_state_begins_and_resets(kind, x):
    cell = fc.LearnedState(kind.make(D, H).double())
    with torch.no_grad():
        for name in cell.states:
            getattr(cell, f"initial_{name}").normal_()
    resets = torch.rand(T, N) < 0.3
    resets[0, 1] = True
    first = [getattr(cell, f"initial_{name}") for name in cell.states]

    def loop(x, _):
        state = tuple(value.expand(N, -1) for value in first)
        outputs = []
        for t in range(T):
            again = zip(first, state, strict=True)
            state = tuple(torch.where(resets[t, :, None], begin.expand(N, -1), value) for begin, value in again)
            state = kind.step(cell.cell, x[t], state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    compare(fc.Recurrent(cell), loop, x, parameters=list(cell.parameters()), resets=resets)
    assert list(cell.state_dict())[: kind.states] == [f"initial_{name}" for name in cell.states]


def test_readout_projection_and_residual(kind, x):
    inner = kind.make(D, H).double()
    readout = nn.Sequential(nn.Linear(H, 3), nn.Tanh()).double()
    cell = fc.Residual(fc.Projected(fc.WithReadout(inner, readout), D, bias=True))
    linear = cell.cell.module

    def loop(x, state):
        outputs = []
        for t in range(T):
            state = kind.step(inner, x[t], state)
            outputs.append(x[t] + readout(state[0]) @ linear.weight.T + linear.bias)
        return torch.stack(outputs), state

    compare(fc.Recurrent(cell), loop, x, state_of(kind), parameters=list(cell.parameters()))


def test_wrappers_nest_and_stack(x):
    def cell(size):
        return fc.Zoneout(fc.VariationalDropout(fc.Zoneout(fc.LSTMCell(size, H), 0.1), state=0.2), (0.0, 0.2))

    layer = fc.Recurrent(fc.Stack(cell(D), cell(H), dropout=0.1).double())
    assert len(set(layer.cell.inputs)) == len(layer.cell.inputs)
    results = []
    for name in ("compiled", "eager"):
        torch.manual_seed(3)
        layer.zero_grad()
        with fc.runner(name):
            y, _ = layer(x, lengths=[9, 0, 4, 7], resets=torch.arange(T)[:, None].expand(T, N) % 4 == 3)
        y.square().sum().backward()
        results.append([y, *(parameter.grad for parameter in layer.parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert fc.explain(layer).training_runner == "compiled"


def test_wrapped_cells_stream_and_take_one_step(x):
    for cell in (
        fc.Zoneout(fc.LSTMCell(D, H), 0.2),
        fc.Projected(fc.GRUCell(D, H), 3),
        fc.LearnedState(fc.GRUCell(D, H)),
    ):
        layer = fc.Recurrent(cell.double()).eval()
        y, _ = layer(x)
        stream = fc.Stream(layer, N)
        assert torch.equal(torch.stack([torch.from_numpy(stream.step(x_t)) for x_t in x]), y)
        output, state = fc.step(cell, x[0])
        torch.testing.assert_close(output, y[0], rtol=1e-12, atol=1e-12)
        assert len(state) == len(cell.states)


def test_a_seed_gives_the_same_noise_on_both_runners(x):
    layer = fc.Recurrent(fc.Zoneout(fc.RecurrentDropout(fc.GRUCell(D, H).double(), 0.2), 0.3))
    outputs = []
    for name in ("compiled", "eager", "compiled"):
        torch.manual_seed(11)
        with fc.runner(name):
            outputs.append(layer(x)[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(layer(x)[0], layer(x)[0])


class Silent(fc.Cell):
    """A cell without notes and without a product of its state."""

    def step(self, x, state):
        (h,) = state
        h = torch.tanh(x + 0.5 * h)
        return h, (h,)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: fc.Zoneout(nn.GRUCell(3, 3)), TypeError, "goes around a fusecell cell, got GRUCell"),
        (lambda: fc.Zoneout(fc.GRUCell(3, 3), 1.0), ValueError, r"probability in \[0, 1\), got 1.0"),
        (lambda: fc.Zoneout(fc.LSTMCell(3, 3), (0.1, 0.2, 0.3)), ValueError, r"states \(h, c\), got 3"),
        (lambda: fc.VariationalDropout(fc.GRUCell(3, 3), input=-0.1), ValueError, "input must be a probability"),
        (lambda: fc.VariationalDropout(Silent(3, 3), state=0.1), ValueError, "nowhere to drop it"),
        (lambda: fc.RecurrentDropout(Silent(3, 3)), ValueError, r"found no g or n .* notes \(nothing\)"),
        (lambda: fc.RecurrentDropout(fc.GRUCell(3, 3), name="q"), ValueError, r"found no q .* \(r, z, n\)"),
        (lambda: fc.WeightDrop(fc.GRUCell(3, 3), "weight_hx"), ValueError, "no parameter 'weight_hx'; it has"),
        (lambda: fc.Residual(fc.GRUCell(3, 4)), ValueError, "takes 3 features and gives 4"),
        (lambda: fc.WithReadout(fc.GRUCell(3, 4), nn.Linear(5, 2)), ValueError, "doesn't take GRUCell's output of 4"),
        (lambda: fc.WithReadout(fc.GRUCell(3, 4), torch.relu), TypeError, "takes a module to read"),
        (lambda: fc.LearnedState(3), TypeError, "got int"),
        (lambda: fc.Projected(nn.GRUCell(3, 4), 2), TypeError, "goes around a fusecell cell"),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: fc.Zoneout(fc.GRUCell(3, 4), 0.3),
        lambda: fc.VariationalDropout(fc.LSTMCell(3, 4), input=0.1, state=0.2, output=0.1),
        lambda: fc.RecurrentDropout(fc.LSTMCell(3, 4), 0.3),
        lambda: fc.LearnedState(fc.LSTMCell(3, 4)),
        lambda: fc.Residual(fc.Projected(fc.GRUCell(3, 4), 3)),
        lambda: fc.WithReadout(fc.GRUCell(3, 4), nn.Linear(4, 2)),
        lambda: fc.WeightDrop(fc.GRUCell(3, 4)).eval(),
    ],
    ids=["zoneout", "variational", "recurrent", "learned", "residual", "readout", "weights"],
)
def test_wrappers_keep_the_contract(make):
    fc.testing.check_cell(make())


def test_weights_are_dropped_anew_where_the_state_is_passed(x):
    layer = fc.Recurrent(fc.WeightDrop(fc.GRUCell(D, H).double(), ["weight_hh"], 0.5))
    state = torch.zeros(x.shape[1], H, dtype=torch.float64)
    outputs = [layer(x, state)[0] for _ in range(4)]
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(outputs))
