"""Cells of a new class for each test, run by the compiled and the eager runner."""

from __future__ import annotations

import torch
from torch import nn

import fusecell as fc

__all__ = ["both", "fresh_layer", "weight_gradient"]


class Fresh(fc.Cell):
    """A base for classes made inside a test, which are traced there for the first time."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.inp = nn.Linear(input_size, hidden_size)
        self.rec = nn.Linear(hidden_size, hidden_size)
        self.register_buffer("gain", torch.tensor(0.7))

    def step(self, x, state):
        (h,) = state
        z = torch.sigmoid(self.rec(h))
        new = torch.tanh(nn.functional.layer_norm(self.inp(x) * self.gain, (self.hidden_size,)))
        h = (1 - z) * new + z * h
        return h, (h,)


def fresh_layer():
    """Build a layer of a cell of a new class."""
    torch.manual_seed(0)
    return fc.Recurrent(type("Own", (Fresh,), {})(5, 9))


def both(layer, x, **options):
    """Return the outputs of the compiled and the eager runner."""
    outputs = []
    for name in ("compiled", "eager"):
        with fc.runner(name):
            outputs.append(layer(x, **options)[0])
    return outputs


def weight_gradient(layer, x):
    """The gradient of the input weight."""
    layer.zero_grad()
    with fc.runner("compiled"):
        layer(x)[0].square().sum().backward()
    return layer.cell.inp.weight.grad.clone()
