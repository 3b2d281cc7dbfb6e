"""What `fusecell bench` measures."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import fusecell as fc
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
def test_which_implementations_are_measured(make, names, training):
    layer = make()
    speed = measure(layer, 7, 3, training=training, seconds=0.0)
    assert set(speed.seconds) == names
    assert all(seconds > 0 for seconds in speed.seconds.values())
    assert speed.flops == 2 * fc.summary(layer, 7, 3).macs * (3 if training else 1)
    assert speed.share == speed.flops / speed.seconds["fusecell"] / speed.peak
    assert f"{speed.share:.0%} of the" in str(speed)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_module_that_is_no_layer_is_refused():
    with pytest.raises(TypeError):
        measure(nn.Linear(3, 3), 7, 3)


def python_calls(call):
    """Count the calls of Python and C functions, torch's operators included."""
    events = []
    sys.setprofile(lambda frame, event, value: events.append(event))
    try:
        call()
    finally:
        sys.setprofile(None)
    return events.count("call") + events.count("c_call")


@pytest.mark.parametrize("training", [False, True])
def test_a_long_sequence_takes_no_more_python_than_a_short_one(training):
    """Compiled, the number of Python calls doesn't depend on the steps; in the loop it does."""
    layer, counts = fc.GRU(16, 32), {}
    for name in ("compiled", "eager"):
        for steps in (20, 200):
            x = torch.randn(steps, 4, 16)

            def call(x=x):
                y, _ = layer(x)
                if training:
                    torch.autograd.grad(y.sum(), list(layer.parameters()))

            with fc.runner(name), torch.set_grad_enabled(training):
                for _ in range(2):
                    call()
                counts[name, steps] = python_calls(call)
    assert counts["compiled", 200] == counts["compiled", 20] < 300
    assert counts["eager", 200] - counts["eager", 20] > 10 * 180
