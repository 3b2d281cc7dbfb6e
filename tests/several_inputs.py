"""Cells of several inputs or outputs, with inputs of each; sizes are multiples of nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fusecell as fc

__all__ = ["CELLS", "Case", "NamedOutputs", "TupleOfOutputs", "by_name"]


class NamedOutputs(fc.Cell):
    """A cell of three inputs, one of them a number, a state that is a matrix, and a dict of outputs."""

    inputs = ("key", "value", "strength")
    states = ("h", "memory")

    def __init__(self):
        super().__init__(3, 7)
        self.state_sizes = (7, (2, 3))
        self.output_size = {"read": 2, "the state": 7, "memory": (2, 3), "norm": ()}
        self.inp, self.rec = nn.Linear(5, 7), nn.Linear(7, 7)

    def step(self, x, state):
        key, value, strength = x
        h, memory = state
        h = torch.tanh(self.inp(torch.cat((key, value), -1)) + self.rec(h) + strength[:, None])
        memory = 0.5 * memory + value[:, :, None] * key[:, None, :]
        read = (memory * key[:, None, :]).sum(-1)
        return {"read": read, "the state": h, "memory": memory, "norm": memory.square().sum((1, 2))}, (h, memory)


class TupleOfOutputs(fc.Cell):
    """A cell of numbers and ids, and a tuple of outputs."""

    inputs = ("x", "ids")

    def __init__(self):
        super().__init__(3, 5)
        self.output_size = ((5,), (2, 2))
        self.table, self.gru, self.out = nn.Embedding(11, 4), nn.GRUCell(7, 5), nn.Linear(5, 4)

    def step(self, x, state):
        value, ids = x
        h = self.gru(torch.cat((self.table(ids), value), -1), state[0])
        return (h, self.out(h).reshape(-1, 2, 2)), (h,)


class Masked(fc.Cell):
    """A cell of numbers, ids and truth values."""

    inputs = ("x", "ids", "is_seen")

    def __init__(self):
        super().__init__(3, 5)
        self.table, self.gru = nn.Embedding(11, 4), nn.GRUCell(7, 5)

    def step(self, x, state):
        value, ids, is_seen = x
        h = self.gru(torch.cat((value, self.table(ids)), -1), state[0])
        h = torch.where(is_seen[:, None], h, state[0])
        return h, (h,)


@dataclass(frozen=True)
class Case:
    """How to build a cell, the sizes of its inputs, and which of these are ids, or truth values."""

    make: Callable[[], fc.Cell]
    sizes: tuple[int | tuple[int, ...], ...]
    ids: tuple[int, ...] = ()
    masks: tuple[int, ...] = ()

    def cell(self) -> fc.Cell:
        """Build it, with the same weights each time."""
        torch.manual_seed(0)
        return self.make().eval()

    def inputs(self, steps: int, rows: int) -> tuple[Tensor, ...]:
        """Draw a sequence of each input."""
        torch.manual_seed(1)
        shapes = [size if isinstance(size, tuple) else (size,) for size in self.sizes]
        values = [torch.rand(steps, rows, *shape) + 0.1 for shape in shapes]
        for place in self.ids:
            values[place] = (9 * values[place]).long()
        for place in self.masks:
            values[place] = values[place] > 0.5
        return tuple(values)


CELLS = {
    "dict": Case(NamedOutputs, (3, 2, ())),
    "tuple": Case(TupleOfOutputs, (3, ()), ids=(1,)),
    "masked": Case(Masked, (3, (), ()), ids=(1,), masks=(2,)),
    "gru_d": Case(lambda: fc.cells.GRUDCell(5, 9), (5, 5, 5)),
    "cfc": Case(lambda: fc.cells.CfCCell(5, 9, backbone=6), (5, 1)),
    "attention": Case(lambda: fc.cells.AttentionGRUCell(5, 9, memory=(4, 3)), (5, (4, 3))),
    "rssm": Case(lambda: fc.cells.RSSMCell(2, 5, 9, 3), (2, 5, 3)),
}


def by_name(outputs: object) -> dict[object, object]:
    """Return outputs by name, by number in a tuple."""
    if isinstance(outputs, dict):
        return outputs
    return dict(enumerate(outputs if isinstance(outputs, tuple) else (outputs,)))
