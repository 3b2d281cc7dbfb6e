"""Recorded values against loops that compute the gates."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.compiler.refusal import Refusal
from fusecell.tape import recording


def gru(cell, x, h):
    """Compute a GRU's values by the equations in torch.nn's documentation."""
    values = {name: [] for name in ("r", "z", "n", "h", "output")}
    w_ih, w_hh = cell.weight_ih.chunk(3), cell.weight_hh.chunk(3)
    b_ih, b_hh = cell.bias_ih.chunk(3), cell.bias_hh.chunk(3)
    for step in x:
        r = torch.sigmoid(step @ w_ih[0].T + b_ih[0] + h @ w_hh[0].T + b_hh[0])
        z = torch.sigmoid(step @ w_ih[1].T + b_ih[1] + h @ w_hh[1].T + b_hh[1])
        n = torch.tanh(step @ w_ih[2].T + b_ih[2] + r * (h @ w_hh[2].T + b_hh[2]))
        h = (1 - z) * n + z * h
        for name, value in zip(values, (r, z, n, h, h), strict=True):
            values[name].append(value)
    return {name: torch.stack(each) for name, each in values.items()}


@pytest.fixture
def x():
    return torch.randn(7, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_gru_in_both_directions_with_lengths(x):
    torch.manual_seed(1)
    layer = fc.GRU(5, 9, num_layers=2, bidirectional=True).double()
    lengths = [7, 0, 4]
    tape = fc.record(layer, x, lengths=lengths)
    assert tape.kinds == ("GRUCell", "GRUCell")
    assert tape.directions == 2
    assert tape.names() == ("r", "z", "n", "h", "output")
    assert torch.equal(tape.outputs, layer(x, lengths=lengths)[0])
    cells = {(depth, way): cell for depth, way, cell in layer.leaf_cells()}
    for row, length in enumerate(lengths):
        sequence = x[:length, row]
        for depth in range(2):
            outputs = []
            for way in range(2):
                ordered = sequence.flip(0) if way else sequence
                expected = gru(cells[depth, way], ordered, torch.zeros(9, dtype=x.dtype)) if length else {}
                for name, value in expected.items():
                    value = value.flip(0) if way else value
                    recorded = tape.value(name, depth, way)[:, row]
                    torch.testing.assert_close(recorded[:length], value, rtol=1e-12, atol=1e-12)
                    assert recorded[length:].abs().sum() == 0
                outputs.append(tape.value("output", depth, way)[:length, row])
            sequence = torch.cat(outputs, -1)


@pytest.mark.parametrize("reverse", [False, True])
def test_every_cell_as_in_the_python_loop(zoo_cell, reverse, monkeypatch):
    torch.manual_seed(2)
    layer = fc.Recurrent(zoo_cell.make(5, 9, dtype=torch.float64), reverse=reverse)
    x, resets = torch.randn(6, 4, 5, dtype=torch.float64), torch.rand(6, 4) < 0.3
    tape = fc.record(layer, x, lengths=[6, 2, 0, 5], resets=resets)
    fc.refresh(layer)
    with monkeypatch.context() as patch:
        patch.setattr(recording, "trace", lambda *_, **__: Refusal(("not now",)))
        loop = fc.record(layer, x, lengths=[6, 2, 0, 5], resets=resets)
    fc.refresh(layer)  # else the refusal stays in the cache for later tests
    assert tape.names() == loop.names()
    assert tape.names()[-1] == "output"
    assert set(layer.cell.states) <= set(tape.names())
    for name in tape.names():
        torch.testing.assert_close(tape.value(name), loop.value(name), rtol=1e-11, atol=1e-12)


class Noting(fc.Cell):
    """A user's cell that notes intermediate values."""

    def __init__(self):
        super().__init__(5, 5)
        self.rate = nn.Parameter(torch.rand(5))

    def step(self, x, state):
        (h,) = state
        drive = self.note("drive", torch.relu(x))
        h = h + self.note("step", torch.sigmoid(self.rate) * (drive - h))
        return h, (h,)


def test_a_cell_of_the_users_in_a_model():
    torch.manual_seed(3)
    model = fc.Sequential(fc.Recurrent(Noting()), nn.Linear(5, 4), fc.LSTM(4, 6))
    x = torch.randn(8, 2, 5)
    tape = fc.record(model, x)
    assert tape.kinds == ("Noting", "LSTMCell")
    assert tape.names(0) == ("drive", "step", "h", "output")
    assert tape.names(1) == ("i", "f", "g", "o", "h", "c", "output")
    assert torch.equal(tape.value("drive"), torch.relu(x))
    change = tape.value("h")[1:] - tape.value("h")[:-1]
    torch.testing.assert_close(change, tape.value("step")[1:])
    f, i, g, c = (tape.value(name, 1) for name in "figc")
    torch.testing.assert_close(c[1:], f[1:] * c[:-1] + i[1:] * g[1:])


def test_statistics_frame_and_file(tmp_path, x):
    tape = fc.record(fc.GRU(5, 9).double(), x, lengths=[7, 2, 4])
    z = torch.cat([tape.value("z")[:length, row] for row, length in enumerate((7, 2, 4))])
    assert tape.saturation("z", margin=0.4) == ((z < 0.4).double().mean(), (z > 0.6).double().mean())
    torch.testing.assert_close(tape.memory_length("z"), 1 / (1 - z.mean(0)))
    torch.testing.assert_close(tape.norms("h"), tape.value("h").square().sum(-1).sqrt())
    frame = tape.frame("z")
    assert isinstance(frame, pd.DataFrame)
    assert len(frame) == 13 * 9
    assert frame.query("step == 3 and row == 2 and unit == 5")["z"].item() == tape.value("z")[3, 2, 5].item()
    tape.save(tmp_path / "tape.safetensors")
    again = fc.Tape.load(tmp_path / "tape.safetensors")
    assert again.names() == tape.names()
    assert again.kinds == tape.kinds
    assert all(torch.equal(again.value(name), tape.value(name)) for name in tape.names())
    assert again.saturation("z") == tape.saturation("z")
    assert "Tape of 7 steps, 3 rows, 1 direction(s)" in repr(tape)


def test_recording_changes_nothing(x):
    torch.manual_seed(4)
    layer = fc.Recurrent(fc.LSTMCell(5, 9), batch_first=True).double()
    state = (torch.randn(7, 9).double(), torch.randn(7, 9).double())
    tape = fc.record(layer, x, state)
    assert torch.equal(tape.outputs, layer(x, state)[0])
    assert not tape.outputs.requires_grad
    before = tape.value("output").clone()
    tape.outputs.zero_()
    assert torch.equal(tape.value("output"), before)


def test_errors(x):
    tape = fc.record(fc.GRU(5, 9).double(), x)
    with pytest.raises(KeyError, match="GRUCell in layer 0 has no 'f'; it has r, z, n, h, output"):
        tape.value("f")
    with pytest.raises(IndexError, match=r"has 1 layer\(s\), got layer 1"):
        tape.value("r", 1)
    with pytest.raises(TypeError, match="got Linear, in which no cell ran"):
        fc.record(nn.Linear(5, 2).double(), x)
    with pytest.raises(ValueError, match="a step and a row"):
        fc.record(fc.GRU(5, 9).double(), x[:0])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", [fc.GRUCell, fc.LSTMCell, fc.cells.LayerNormGRUCell])
def test_gradients_of_every_value(kind, reverse):
    """Against a loop over ``step`` in which every noted value and state keeps its gradient."""
    torch.manual_seed(5)
    cell = kind(5, 6).double()
    x, steps = torch.randn(7, 3, 5, dtype=torch.float64), range(7)
    values = {name: [None] * 7 for name in fc.record(fc.Recurrent(cell), x).names()}

    def keep(t):
        def collect(_, name, value):
            value.retain_grad()
            values[name][t] = value

        return collect

    state, outputs = cell.initial_state(3, dtype=torch.float64), [None] * 7
    for t in reversed(steps) if reverse else steps:
        with fc.cell.capture_intermediates(keep(t)):
            output, state = cell.step(x[t], state)
        for name, value in zip(cell.states, state, strict=True):
            value.retain_grad()
            values[name][t] = value
        outputs[t] = output
    weights = torch.randn(7, 3, 6, dtype=torch.float64)
    (torch.stack(outputs) * weights).sin().sum().backward()

    tape = fc.record(fc.Recurrent(cell, reverse=reverse), x, gradients=True)
    with pytest.raises(RuntimeError, match="call backward on a loss"):
        tape.gradient("h")
    (tape.outputs * weights).sin().sum().backward()
    for name in tape.names():
        if name == "output":
            expected = (tape.outputs * weights).cos() * weights
        else:
            expected = torch.stack([value.grad for value in values[name]])
        torch.testing.assert_close(tape.gradient(name), expected.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(tape.norms(name, gradient=True), expected.norm(dim=-1).detach())


def test_gradients_through_layers_with_lengths_resets_and_noise(x):
    torch.manual_seed(6)
    model = fc.Sequential(fc.Recurrent(fc.Zoneout(fc.LSTMCell(5, 6), 0.2)), fc.GRU(6, 4, bidirectional=True)).double()
    data = {"lengths": [7, 3, 0], "resets": torch.rand(7, 3) < 0.3}
    results = []
    for name in ("compiled", "eager"):
        torch.manual_seed(7)
        with fc.runner(name):
            tape = fc.record(model, x, gradients=True, **data)
        model.zero_grad()
        tape.outputs.square().sum().backward()
        gradients = [tape.gradient(each, depth) for depth in range(2) for each in tape.names(depth)]
        results.append(
            [tape.outputs.detach(), *gradients, *(parameter.grad.clone() for parameter in model.parameters())]
        )
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    torch.manual_seed(7)
    plain, _ = model(x, **data)
    torch.testing.assert_close(plain.detach(), results[0][0], rtol=1e-12, atol=1e-12)


def test_states_before_each_step(x):
    cell = fc.LSTMCell(5, 4).double()
    state = (torch.randn(3, 4).double(), torch.randn(3, 4).double())
    resets = torch.zeros(7, 3, dtype=torch.bool)
    resets[3, 1] = True
    for reverse in (False, True):
        tape = fc.record(fc.Recurrent(cell, reverse=reverse), x, state, lengths=[7, 5, 2], resets=resets)
        for row, length in enumerate((7, 5, 2)):
            h = state[0][row]
            for t in reversed(range(length)) if reverse else range(length):
                h = torch.zeros(4).double() if resets[t, row] else h
                assert torch.equal(tape.track(0, 0).before["h"][t, row], h)
                h = tape.value("h")[t, row]
            assert not tape.track(0, 0).before["h"][length:, row].any()


def test_labels_and_what_is_saved_with_a_tape(tmp_path, x):
    tape = fc.record(fc.GRU(5, 9, bidirectional=True).double(), x, labels="abcdefg", gradients=True)
    tape.outputs.sum().backward()
    tape.save(tmp_path / "it")
    again = fc.Tape.load(tmp_path / "it")
    assert again.labels == tuple("abcdefg")
    for direction in range(2):
        for name in tape.names():
            assert torch.equal(again.gradient(name, 0, direction), tape.gradient(name, 0, direction))
    assert again.track(0, 1).equation == tape.track(0, 1).equation != ""
    assert "def step" in again.track(0, 0).source
    with pytest.raises(ValueError, match="one label for each of the 7 steps, got 3"):
        fc.record(fc.GRU(5, 9).double(), x, labels="abc")


@pytest.mark.parametrize("change", ["cut", "empty", "pickle"])
def test_damaged_tapes_are_refused(tmp_path, x, change):
    path = tmp_path / "it"
    fc.record(fc.GRU(5, 9).double(), x).save(path)
    if change == "pickle":
        torch.save({"a": x}, path)
    else:
        path.write_bytes(path.read_bytes()[: 300 if change == "cut" else 0])
    with pytest.raises(ValueError, match="is not a tape that was saved, or is damaged"):
        fc.Tape.load(path)
    with pytest.raises(FileNotFoundError):
        fc.Tape.load(tmp_path / "nowhere")


def test_equations_are_those_of_the_cell():
    x = torch.randn(2, 1, 3)
    assert "r·(Un h)" in fc.record(fc.GRU(3, 4), x).track(0, 0).equation
    assert "Un (r·h)" in fc.record(fc.GRU(3, 4, reset_after=False), x).track(0, 0).equation
    assert "P (o·tanh(c'))" in fc.record(fc.LSTM(3, 4, proj_size=2), x).track(0, 0).equation
    assert "relu" in fc.record(fc.RNN(3, 4, nonlinearity="relu"), x).track(0, 0).equation
    noting = fc.record(fc.Recurrent(Noting()), torch.randn(2, 1, 5)).track(0, 0)
    assert noting.equation == "drive = relu(x); step = (drive − h)·rate_sigmoid; h' = h + step"  # its graph's
    wrapped = fc.record(fc.Recurrent(fc.Zoneout(fc.Zoneout(fc.LSTMCell(3, 4), 0.1), 0.1)), x).track(0, 0)
    assert wrapped.equation == ""  # its c' is not the equation's
    assert "f * c + i * g" in wrapped.source


def test_plots_and_tables_for_notebooks(x):
    import matplotlib as mpl

    mpl.use("Agg")
    tape = fc.record(fc.LSTM(5, 9).double(), x, labels="abcdefg", lengths=[7, 2, 4])
    figure = tape.plot(["f", "c"], row=2)
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert torch.equal(torch.from_numpy(images[0].get_array().data), tape.value("f")[:, 2].T)
    assert images[0].get_clim() == (0, 1)
    assert images[1].get_clim()[0] == -images[1].get_clim()[1]
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == list("abcdefg")
    assert len(tape.plot().axes) == 12
    with pytest.raises(IndexError, match="got row 3"):
        tape.plot(row=3)
    table = tape._repr_html_()
    assert table.count("<tr>") == 1 + 7
    assert f"<td>{tape.saturation('f')[0]:.0%}</td>" in table
    layer = fc.Recurrent(fc.GRUCell(3, 4))
    for shown in (fc.explain(layer), fc.summary(layer, 7)):
        assert "GRUCell" in shown._repr_html_()


def test_layers_of_one_direction_and_of_two_in_one_model():
    both = fc.Bidirectional(
        fc.Recurrent(fc.Stack(fc.GRUCell(4, 3), fc.LSTMCell(3, 2))),
        fc.Recurrent(fc.Stack(fc.RNNCell(4, 5), fc.GRUCell(5, 6))),
    )
    model = fc.Sequential(fc.GRU(5, 4), both, fc.Recurrent(fc.RNNCell(8, 3), reverse=True), fc.GRU(3, 2))
    x = torch.randn(6, 2, 5)
    tape = fc.record(model, x)
    tracks = [(layer, direction, track.kind, track.reverse) for layer, direction, track in tape.tracks()]
    assert tracks == [
        (0, 0, "GRUCell", False),
        (1, 0, "GRUCell", False),
        (1, 1, "RNNCell", True),
        (2, 0, "LSTMCell", False),
        (2, 1, "GRUCell", True),
        (3, 0, "RNNCell", True),
        (4, 0, "GRUCell", False),
    ]
    assert torch.equal(tape.value("output", 4), tape.outputs)
    with pytest.raises(IndexError, match=r"Layer 3 of the tape has 1 direction\(s\), got direction 1"):
        tape.value("h", 3, 1)
