"""count_cells and summary, against the formulas and torch.nn."""

import pytest
import torch
from torch import nn

import fusecell as fc


@pytest.mark.parametrize("seq_len", [0, 1, 35])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [fc.GRU, nn.GRU, fc.LSTM, nn.RNN])
def test_a_layer_calls_a_cell_per_step_direction_and_layer(kind, bidirectional, num_layers, seq_len):
    layer = kind(3, 4, num_layers=num_layers, bidirectional=bidirectional)
    expected = seq_len * (2 if bidirectional else 1) * num_layers
    assert fc.count_cells(layer, seq_len) == expected
    assert fc.summary(layer, seq_len).calls == expected


def nested():
    return fc.Stack(fc.GRUCell(3, 4), fc.Stack(fc.LSTMCell(4, 5), fc.RNNCell(5, 6)))


SHARED = fc.Recurrent(fc.GRUCell(4, 4))


@pytest.mark.parametrize(
    ("module", "per_step"),
    [
        (fc.GRUCell(3, 4), 1),
        (nn.LSTMCell(3, 4), 1),
        (nested(), 3),
        (fc.Recurrent(nested()), 3),
        (fc.Bidirectional(fc.Recurrent(nested()), fc.Recurrent(fc.GRUCell(3, 2))), 4),
        (fc.Sequential(fc.Recurrent(nested()), nn.ReLU(), nn.GRU(6, 2, 2, bidirectional=True), nn.Linear(4, 1)), 7),
        (fc.Sequential(SHARED, nn.ReLU(), SHARED), 2),
        (nn.ModuleDict({"tagger": nn.GRU(3, 4), "other": nn.Linear(3, 4)}), 1),
        (nn.Linear(3, 4), 0),
    ],
)
def test_cells_are_counted_in_any_module(module, per_step):
    assert fc.count_cells(module, 35) == 35 * per_step


def test_cells_are_counted_as_they_are_called(monkeypatch):
    calls = []
    step = fc.GRUCell.step
    monkeypatch.setattr(fc.GRUCell, "step", lambda self, x, state: calls.append(self) or step(self, x, state))
    layer = fc.GRU(3, 4, num_layers=2, bidirectional=True)
    with fc.runner("eager"):
        layer(torch.randn(7, 2, 3))
    assert len(calls) == fc.count_cells(layer, 7) == 28


@pytest.mark.parametrize(("gates", "kind"), [(3, fc.GRU), (3, nn.GRU), (4, fc.LSTM), (1, fc.RNN)])
def test_a_standard_layer_costs_gates_times_hidden_times_inputs(gates, kind):
    seq_len, rows, width, hidden = 11, 3, 5, 7
    counted = fc.summary(kind(width, hidden, num_layers=2, bidirectional=True), seq_len, rows)
    first, second = gates * hidden * (width + hidden), gates * hidden * (2 * hidden + hidden)
    assert counted.macs == seq_len * rows * 2 * (first + second)
    assert counted.parameters == 2 * (first + second + 2 * 2 * gates * hidden)
    assert [layer.macs for layer in counted.layers] == [
        seq_len * rows * macs for macs in (first, first, second, second)
    ]


@pytest.mark.parametrize("options", [{}, {"reset_after": False}, {"bias": False}])
def test_a_cell_is_counted_by_running_its_step(options):
    counted = fc.summary(fc.Recurrent(fc.GRUCell(5, 7, **options)), seq_len=11, batch_size=3)
    assert counted.macs == 11 * 3 * (3 * 7 * (5 + 7))


def test_a_projected_lstm():
    counted = fc.summary(fc.LSTM(5, 8, proj_size=3), seq_len=2, batch_size=4)
    assert counted.macs == 2 * 4 * (4 * 8 * (5 + 3) + 3 * 8)
    assert counted.layers[0].states == {"h": (4, 3), "c": (4, 8)}
    assert counted.layers[0].output == (2, 4, 3)


class Products(fc.Cell):
    """A step through every kind of product; 12 multiply-accumulates of each per row."""

    def __init__(self):
        super().__init__(4, 3)
        self.weight = nn.Parameter(torch.randn(4, 3))

    def step(self, x, state):
        (h,) = state
        h = h + x @ self.weight + torch.einsum("ni,ih->nh", x, self.weight)
        h = h + nn.functional.linear(x, self.weight.T) + torch.addmm(h, x, self.weight)
        h = h + torch.bmm(x[:, None], self.weight.expand(len(x), -1, -1))[:, 0]
        h = h + torch.stack([torch.mv(self.weight.T, row) for row in x])
        return h, (h,)


def test_every_product_is_counted():
    assert fc.summary(Products(), seq_len=5, batch_size=2).macs == 6 * 12 * 5 * 2


@pytest.mark.parametrize("member", fc.CELLS, ids=lambda member: member.name)
def test_the_zoo_is_counted_alike_alone_and_in_a_batch(member):
    layer = fc.Recurrent(member.make(5, 6))
    one, many = fc.summary(layer, 1, 1), fc.summary(layer, 4, 3)
    assert many.macs == 4 * 3 * one.macs > 0
    assert one.parameters == sum(value.numel() for value in layer.parameters())


def shapes_of(output, state):
    flat = []

    def walk(value):
        if isinstance(value, torch.Tensor):
            flat.append(tuple(value.shape))
        else:
            for part in value:
                walk(part)

    walk(state)
    return tuple(output.shape), flat


@pytest.mark.parametrize("batch_first", [False, True])
def test_shapes_are_those_of_a_run(batch_first):
    ahead = fc.Recurrent(fc.Stack(fc.GRUCell(8, 4), fc.LSTMCell(4, 3)), batch_first=batch_first)
    back = fc.Recurrent(fc.LSTMCell(8, 2), batch_first=batch_first)
    inner = fc.Sequential(fc.Bidirectional(ahead, back), nn.Linear(5, 4), nn.LayerNorm(4))
    model = fc.Sequential(
        nn.Embedding(9, 8), fc.Recurrent(fc.GRUCell(8, 8), batch_first=batch_first), inner, nn.Linear(4, 6)
    )
    counted = fc.summary(model, seq_len=7, batch_size=3)
    output, states = shapes_of(*model(torch.zeros((3, 7) if batch_first else (7, 3), dtype=torch.int64)))
    assert counted.layers[-1].output == output
    assert [shape for layer in counted.layers for shape in layer.states.values()] == states
    assert counted.parameters == sum(value.numel() for value in model.parameters())
    assert counted.layers[-1].macs == 7 * 3 * 4 * 6


def test_a_shared_layer_has_its_parameters_once_and_its_work_twice():
    one, two = fc.summary(SHARED, 5), fc.summary(fc.Sequential(SHARED, SHARED), 5)
    assert two.parameters == one.parameters
    assert two.macs == 2 * one.macs


class WithContext(fc.Cell):
    inputs = ("x", "context")

    def step(self, x, state):
        x, context = x
        h = torch.tanh(x + context + state[0])
        return h, (h,)


def test_undeclared_inputs_leave_the_work_unknown():
    counted = fc.summary(WithContext(4, 4), 5)
    assert counted.macs is None
    assert "unknown" in str(counted)
    assert counted.calls == 5


def test_counting_draws_nothing_and_changes_nothing():
    layer = fc.Sequential(fc.Recurrent(fc.GRUCell(3, 4)), nn.Dropout(0.5), nn.Linear(4, 2))
    weights = {name: value.clone() for name, value in layer.state_dict().items()}
    before = torch.random.get_rng_state()
    fc.summary(layer, 5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(weights[name], value) for name, value in layer.state_dict().items())


def test_the_table_and_its_html():
    counted = fc.summary(fc.GRU(5, 10, num_layers=2, bidirectional=True), seq_len=35, batch_size=3)
    lines = str(counted).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert lines[-1].split() == ["T=35", "N=3", "total", "2,940", "283,500", "140", "134,400"]
    assert len({line.index("MACs") + 4 for line in lines[:1]} | {line.index("283,500") + 7 for line in lines[-1:]}) == 1
    page = counted._repr_html_()
    assert page.count("<tr>") == 6
    assert "283,500" in page


@pytest.mark.parametrize(("seq_len", "error"), [(-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_a_seq_len_is_a_whole_number(seq_len, error):
    with pytest.raises(error, match="seq_len"):
        fc.count_cells(fc.GRUCell(3, 4), seq_len)


def test_errors_say_what_to_do():
    with pytest.raises(TypeError, match=r"got Linear.*fusecell\.Sequential"):
        fc.summary(nn.Linear(3, 4), 5)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        fc.summary(fc.GRUCell(3, 4), 5, 0)
    with pytest.raises(ValueError, match="input_size"):
        fc.summary(fc.Sequential(nn.ReLU()), 5)


def test_saved_bytes_of_training():
    """A GRU keeps five numbers per unit, in whole vectors; recomputing keeps its state alone."""
    layer = fc.Recurrent(fc.GRUCell(13, 31)).double()
    assert fc.summary(layer, 7, 3).saved == 7 * 3 * 5 * 32 * 8
    with fc.recompute():
        assert fc.summary(layer, 7, 3).saved == 7 * 3 * 32 * 8
    drop_in = fc.GRU(13, 31, num_layers=2, bidirectional=True)
    assert [row.saved for row in fc.summary(drop_in, 7, 3).layers] == [7 * 3 * 5 * 32 * 4] * 4
    drop_in.recompute = True
    assert [row.saved for row in fc.summary(drop_in, 7, 3).layers] == [7 * 3 * 32 * 4] * 4
    ahead = fc.Recurrent(fc.GRUCell(13, 31), recompute=True)
    both = fc.Bidirectional(ahead, fc.Recurrent(fc.GRUCell(13, 31)))
    assert [row.saved for row in fc.summary(both, 7, 3).layers] == [7 * 3 * 32 * 4, 7 * 3 * 5 * 32 * 4]
    assert fc.summary(nn.GRU(13, 31), 7, 3).layers[0].saved is None
    assert fc.summary(layer.to(torch.bfloat16), 7, 3).saved == 7 * 3 * 5 * 32 * 4
