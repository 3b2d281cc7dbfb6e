"""Iterating over the cells in a module: which, in what order, and in which dtype they compute."""

import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.cell_tree import iter_cells
from fusecell.inspection.recurrent_parts import named_recurrent_parts
from fusecell.validation import weights_dtype


class Constant(fc.Cell):
    """A cell without parameters whose plain tensor is no weight."""

    def __init__(self):
        super().__init__(3, 3)
        self.scale = torch.full((3,), 2.0)

    def step(self, x, state):
        (h,) = state
        h = h + x * self.scale
        return h, (h,)


def kinds(cells):
    return [type(cell).__name__ for cell in cells]


def test_cells_come_with_those_they_wrap_and_those_of_drop_in_layers():
    stack = fc.Stack(fc.Zoneout(fc.GRUCell(3, 4)), fc.cells.LeakyCell(4, 4))
    model = nn.ModuleDict({"stack": fc.Recurrent(stack), "layers": fc.LSTM(4, 5, 2, bidirectional=True)})
    assert kinds(iter_cells(model)) == ["Stack", "Zoneout", "GRUCell", "LeakyCell", *["LSTMCell"] * 4]
    assert kinds(iter_cells(stack.cells[1])) == ["LeakyCell"]
    assert not list(iter_cells(nn.GRU(3, 4)))


def test_named_recurrent_parts():
    cell = fc.GRUCell(4, 4)
    model = nn.ModuleDict(
        {"ours": fc.Recurrent(fc.Stack(fc.Zoneout(cell), cell)), "theirs": nn.Sequential(nn.GRU(4, 4), nn.Linear(4, 2))}
    )
    parts = [(name, type(part).__name__) for name, part in named_recurrent_parts(model)]
    assert parts == [
        ("ours.cell.cells.0", "Zoneout"),
        ("ours.cell.cells.1", "GRUCell"),
        ("theirs.0", "GRU"),
    ]
    assert fc.count_cells(model, 7) == 7 * 3


@pytest.mark.parametrize("kind", [fc.RNN, fc.GRU, fc.LSTM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cells_of_drop_in_layers_compute_in_the_dtype_of_its_weights(kind, dtype):
    layer = kind(3, 4, 2, dtype=dtype)
    for cell in iter_cells(layer):
        assert weights_dtype(cell) == weights_dtype(fc.Zoneout(cell)) == dtype


def test_a_plain_tensor_is_no_weight():
    cell = Constant()
    assert weights_dtype(cell) is None
    with fc.runner("eager"):
        y, h = fc.Recurrent(cell)(torch.ones(2, 1, 3, dtype=torch.float64))
    assert y.dtype == h.dtype == torch.float64
    assert y[:, 0].tolist() == [[2.0] * 3, [4.0] * 3]
