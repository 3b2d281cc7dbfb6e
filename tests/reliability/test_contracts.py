"""Machine code reads as much as it was told: what a cell or a caller hands over is held to that before it runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusecell as fc

X = torch.randn(7, 300, 5)


class Starting(fc.Cell):
    """A cell with a first state, and noise, of any form."""

    def __init__(self, start=None, noise=None):
        super().__init__(5, 9)
        self.inp, self.rec = nn.Linear(5, 9), nn.Linear(9, 9)
        self.start, self.noise = start, noise
        if noise is not None:
            self.inputs = ("x", "noise")

    def initial_state(self, batch_size, *, dtype=None, device=None):
        return super().initial_state(batch_size, dtype=dtype, device=device) if self.start is None else self.start

    def draw(self, steps, batch_size, *, dtype=None, device=None):
        return () if self.noise is None else (self.noise,)

    def step(self, x, state):
        (h,) = state
        x, noise = x if self.noise is not None else (x, 0.0)
        h = torch.tanh(self.inp(x) + self.rec(h)) + noise
        return h, (h,)


STARTS = {
    "one row for all": (torch.zeros(1, 9),),
    "too narrow": (torch.zeros(300, 3),),
    "without rows": (torch.zeros(9),),
    "with an axis more": (torch.zeros(1, 300, 9),),
    "two of them": (torch.zeros(300, 9),) * 2,
    "no tensor": (0.0,),
}
RESETS = torch.rand(7, 300) < 0.3


@pytest.mark.parametrize("runner", ["auto", "eager"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("given", ["nothing", "a state"])
@pytest.mark.parametrize("kind", STARTS)
def test_first_states(kind, given, training, runner):
    """Those that are started from, and those that resets go back to; the compiler read beyond them."""
    cell = Starting(STARTS[kind])
    state = {"nothing": None, "a state": torch.zeros(300, 9)}[given]
    with torch.set_grad_enabled(training), fc.runner(runner), pytest.raises((TypeError, ValueError), match="state"):
        fc.scan(cell, X, state, resets=RESETS)


@pytest.mark.parametrize("training", [False, True])
def test_first_states_of_another_dtype(training):
    """A reset to them would have read other bytes than they have."""
    cell = Starting((torch.zeros(300, 9, dtype=torch.float64),))
    with (
        torch.set_grad_enabled(training),
        pytest.raises(ValueError, match=r"made h in torch.float64 on cpu, asked for"),
    ):
        fc.scan(cell, X, torch.zeros(300, 9), resets=RESETS)


def test_first_states_of_streams_and_tapes():
    for call in (lambda cell: fc.Stream(cell, 300), lambda cell: fc.record(fc.Recurrent(cell), X)):
        with pytest.raises(ValueError, match=r"expected state h of shape \(300, 9\), got \(300, 3\)"):
            call(Starting((torch.zeros(300, 3),)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 9), (7, 1, 9), (3, 300, 9), (7, 299, 9), (7,)], ids=str)
def test_what_a_cell_draws(shape, training):
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match="draw returned a tensor of shape"):
        fc.scan(Starting(noise=torch.zeros(shape)), X)


@pytest.mark.parametrize("training", [False, True])
def test_a_weight_that_has_left_the_cpu(training):
    """There is nothing at the address of a weight on ``meta``."""
    cell = Starting()
    with torch.set_grad_enabled(training), fc.runner("compiled"):
        fc.scan(cell, X)
        cell.rec.weight = nn.Parameter(torch.zeros(9, 9, device="meta"))
        with pytest.raises(fc.NotCompilable, match=r"Its rec\.weight is not a dense tensor on the CPU"):
            fc.scan(cell, X)


class Caught(Exception):
    pass


@pytest.fixture(scope="module")
def arguments():
    """What torch's operator is called with, by name: for inference and for training."""
    from fusecell.compiler.dispatch import torch_operator as operator

    found = {}
    for training in (False, True):

        def catch(*args):
            found[training] = operator._Given(*args)  # noqa: B023  # called in this turn
            raise Caught

        with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(training):
            patch.setattr(operator, "_scan", catch)
            h = torch.zeros(4, 9)
            with pytest.raises(Caught):
                operator.run_traced(fc.GRUCell(5, 9), (torch.randn(7, 4, 5),), (h,), _options())
    return found


def _options():
    from fusecell.execution.options import Options

    return Options(torch.tensor([7, 0, 2, 7]), torch.zeros(7, 4, dtype=torch.bool))


CHANGES = {
    "fewer rows of state": ("state", [torch.zeros(3, 9)]),
    "a narrow state": ("state", [torch.zeros(4, 8)]),
    "no state": ("state", []),
    "no state to go back to": ("start", []),
    "a wide input": ("inputs", [torch.zeros(7, 4, 6)]),
    "an input in float64": ("inputs", [torch.zeros(7, 4, 5, dtype=torch.float64)]),
    "a weight less": ("weights", []),
    "small weights": ("weights", [torch.zeros(1, 1)] * 4),
    "two lengths": ("lengths", torch.tensor([1, 2])),
    "lengths in 32 bits": ("lengths", torch.ones(4, dtype=torch.int32)),
    "resets of another shape": ("resets", torch.zeros(4, 7, dtype=torch.bool)),
    "resets in 32 bits": ("resets", torch.zeros(7, 4)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", CHANGES)
def test_the_operator_called_by_hand(arguments, training, kind):
    name, value = CHANGES[kind]
    given = arguments[training]
    made = torch.ops.fusecell.scan(*given)
    with pytest.raises(ValueError, match="not what its graph reads"):
        torch.ops.fusecell.scan(*given._replace(**{name: value}))
    if training:
        *grads, saved = made
        torch.ops.fusecell.scan_backward(saved, grads, *given)
        with pytest.raises(ValueError, match="not what its graph reads"):
            torch.ops.fusecell.scan_backward(saved, grads, *given._replace(**{name: value}))
        for wrong in ((saved[:-1], grads), (saved, grads[:-1]), (saved, [grads[0][:-1], *grads[1:]])):
            with pytest.raises(ValueError, match="another fusecell::scan"):
                torch.ops.fusecell.scan_backward(*wrong, *given)
