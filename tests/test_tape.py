"""What is recorded, against loops that compute the gates."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

import fusecell as fc


def gru(cell, x, h):
    """The gates of torch.nn's documentation."""
    found = {name: [] for name in ("r", "z", "n", "h", "output")}
    w_ih, w_hh = cell.weight_ih.chunk(3), cell.weight_hh.chunk(3)
    b_ih, b_hh = cell.bias_ih.chunk(3), cell.bias_hh.chunk(3)
    for step in x:
        r = torch.sigmoid(step @ w_ih[0].T + b_ih[0] + h @ w_hh[0].T + b_hh[0])
        z = torch.sigmoid(step @ w_ih[1].T + b_ih[1] + h @ w_hh[1].T + b_hh[1])
        n = torch.tanh(step @ w_ih[2].T + b_ih[2] + r * (h @ w_hh[2].T + b_hh[2]))
        h = (1 - z) * n + z * h
        for name, value in zip(found, (r, z, n, h, h), strict=True):
            found[name].append(value)
    return {name: torch.stack(each) for name, each in found.items()}


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
        given = x[:length, row]
        for depth in range(2):
            outputs = []
            for way in range(2):
                ordered = given.flip(0) if way else given
                expected = gru(cells[depth, way], ordered, torch.zeros(9, dtype=x.dtype)) if length else {}
                for name, value in expected.items():
                    value = value.flip(0) if way else value
                    found = tape.value(name, depth, way)[:, row]
                    torch.testing.assert_close(found[:length], value, rtol=1e-12, atol=1e-12)
                    assert found[length:].abs().sum() == 0
                outputs.append(tape.value("output", depth, way)[:length, row])
            given = torch.cat(outputs, -1)


@pytest.mark.parametrize("reverse", [False, True])
def test_every_cell_as_in_the_python_loop(zoo_cell, reverse, monkeypatch):
    torch.manual_seed(2)
    layer = fc.Recurrent(zoo_cell.make(5, 9, dtype=torch.float64), reverse=reverse)
    x, resets = torch.randn(6, 4, 5, dtype=torch.float64), torch.rand(6, 4) < 0.3
    tape = fc.record(layer, x, lengths=[6, 2, 0, 5], resets=resets)
    import fusecell.tape as module

    monkeypatch.setattr(module._programs, "find", lambda cell, inputs: module.Refusal(("not now",)))
    loop = fc.record(layer, x, lengths=[6, 2, 0, 5], resets=resets)
    assert tape.names() == loop.names()
    assert tape.names()[-1] == "output"
    assert set(layer.cell.states) <= set(tape.names())
    for name in tape.names():
        torch.testing.assert_close(tape.value(name), loop.value(name), rtol=1e-11, atol=1e-12)


class Noting(fc.Cell):
    """A cell of a user's that names what it does."""

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
    with pytest.raises(KeyError, match="GRUCell has r, z, n, h, output; no 'f'"):
        tape.value("f")
    with pytest.raises(IndexError, match=r"1 layer\(s\) and 1 direction\(s\), got layer 1"):
        tape.value("r", 1)
    with pytest.raises(TypeError, match="got Linear, in which no cell ran"):
        fc.record(nn.Linear(5, 2).double(), x)
    with pytest.raises(ValueError, match="a step and a row"):
        fc.record(fc.GRU(5, 9).double(), x[:0])
