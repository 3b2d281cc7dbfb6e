"""Plain loops over three cells in torch's own functions, the reference for every feature."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fusecell as fc

State = tuple[Tensor, ...]
Step = Callable[[fc.Cell, Tensor, State], State]


def gru(cell: fc.GRUCell, x: Tensor, state: State) -> State:
    return (torch.gru_cell(x, state[0], cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh),)


def lstm(cell: fc.LSTMCell, x: Tensor, state: State) -> State:
    return torch.lstm_cell(x, state, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)


class LeakyCell(fc.Cell):
    """A user's cell."""

    gates = ("h",)

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.inp = torch.nn.Linear(input_size, hidden_size)
        self.weight_hh = torch.nn.Parameter(torch.randn(hidden_size, hidden_size) / hidden_size**0.5)

    def step(self, x, state):
        (h,) = state
        n = self.note("n", torch.tanh(self.inp(x) + h @ self.weight_hh.T))
        h = 0.7 * h + 0.3 * n
        return h, (h,)


def leaky(cell: LeakyCell, x: Tensor, state: State) -> State:
    (h,) = state
    return (0.7 * h + 0.3 * (x @ cell.inp.weight.T + cell.inp.bias + h @ cell.weight_hh.T).tanh(),)


@dataclass(frozen=True)
class Kind:
    """A cell, and its step by torch's functions; the output is the first state."""

    make: Callable[[int, int], fc.Cell]
    step: Step
    states: int = 1


KINDS = {"GRU": Kind(fc.GRUCell, gru), "LSTM": Kind(fc.LSTMCell, lstm, 2), "Leaky": Kind(LeakyCell, leaky)}


def compare(layer, loop, x, state=(), *, parameters=(), tolerance=1e-11, **data):
    """Compare a compiled layer's outputs, last states and gradients with those of ``loop(x, state)``."""
    results = []
    for run in ("compiled", "loop"):
        leaf = x.clone().requires_grad_()
        first = tuple(value.clone().requires_grad_() for value in state)
        torch.manual_seed(7)
        if run == "loop":
            y, after = loop(leaf, first)
        else:
            with fc.runner("compiled"):
                y, after = layer(leaf, (first if len(first) > 1 else first[0]) if first else None, **data)
            after = after if isinstance(after, tuple) else (after,)
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)
        loss = (y * weights).sin().sum() + sum((value * value).sum() for value in after)
        leaves = [leaf, *first, *parameters]
        results.append([y, *after, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
