"""Models that tests of exports share; their sizes are multiples of nothing."""

from __future__ import annotations

import torch
from torch import nn

import fusecell as fc

__all__ = ["EveryFunction", "four_cells", "zoo"]


def zoo(name: str, input_size: int = 5, hidden_size: int = 13) -> fc.Recurrent:
    """Return a layer of a cell of the zoo."""
    (member,) = [each for each in fc.CELLS if each.name == name]
    return fc.Recurrent(member.make(input_size, hidden_size))


def four_cells() -> nn.Module:
    """Return four cells of the zoo and a readout: products, reductions, concatenations, several states."""
    return fc.Sequential(
        zoo("gru_layer_norm", 5, 13),
        fc.Recurrent(fc.Stack(fc.GRUCell(13, 13), residual=True)),
        zoo("lstm_projected", 13, 7),
        zoo("scrn", 3, 11),
        nn.Linear(16, 3),
        nn.Softmax(-1),
    ).eval()


class EveryFunction(fc.Cell):
    """A cell of what the zoo hasn't: the other functions, comparisons, choices, and a first state that isn't zero."""

    def __init__(self, periodic: bool = True):
        super().__init__(5, 17)
        self.inp, self.rec = nn.Linear(5, 17), nn.Linear(17, 17)
        self.scale = nn.Parameter(torch.rand(17))
        self.periodic = periodic

    def initial_state(self, batch_size, *, dtype=None, device=None):
        return (torch.linspace(-1, 1, 17, dtype=dtype).expand(batch_size, -1).clone(),)

    def step(self, x, state):
        (h,) = state
        a = self.inp(x) + self.rec(h)
        b = torch.exp(-a.abs()) + torch.log1p(h * h) + torch.erf(a) * torch.sqrt(1 + h * h)
        if self.periodic:
            b = b + torch.sin(3 * a) * torch.cos(h) + (0.1 + a.abs()) ** self.scale
        open_ = (a > 0) & (h < 0.5) | (h < -0.5)
        c = torch.where(open_, torch.where(self.scale > 0.5, b, a), torch.maximum(h, a.amax(-1, keepdim=True) - 1))
        h = torch.tanh(c + torch.floor(2 * a) * 0.25 - a.amin(-1, keepdim=True) * torch.rsqrt(1 + c * c))
        return torch.cat((h[:, 3:9], torch.sign(a) * h), -1)[:, :17], (h,)
