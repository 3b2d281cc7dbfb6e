"""What `fusecell bench` measures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.compiler.runtime import guard_pages as check
from fusecell.inspection.benchmark import measure


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: fc.GRU(5, 9, num_layers=2, bidirectional=True), {"fusecell", "Python loop", "torch.nn"}),
        (lambda: fc.LSTM(5, 9, batch_first=True, proj_size=4).double(), {"fusecell", "Python loop", "torch.nn"}),
        (lambda: fc.Recurrent(fc.GRUCell(5, 9), batch_first=True), {"fusecell", "Python loop", "torch.nn"}),
        (lambda: fc.GRU(5, 9, reset_after=False), {"fusecell", "Python loop"}),
        (lambda: fc.Recurrent(fc.cells.MGUCell(5, 9)), {"fusecell", "Python loop"}),
    ],
    ids=["gru", "lstm", "recurrent", "reset-before", "mgu"],
)
def test_who_is_measured(make, names, training):
    layer = make()
    found = measure(layer, 7, 3, training=training, seconds=0.0)
    assert set(found.seconds) == names
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.flops == 2 * fc.summary(layer, 7, 3).macs * (3 if training else 1)
    assert 0 < found.share < 1.5
    assert f"{found.share:.0%} of the" in str(found)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_layer_that_is_none():
    with pytest.raises(TypeError):
        measure(nn.Linear(3, 3), 7, 3)


def test_a_long_sequence_is_faster_compiled(monkeypatch):
    monkeypatch.setattr(check, "ENABLED", False)  # its copies take longer than the kernel
    found = measure(fc.GRU(16, 32), 200, 4, seconds=0.3)
    assert found.seconds["Python loop"] > 3 * found.seconds["fusecell"]
    assert found.threads == torch.get_num_threads()
