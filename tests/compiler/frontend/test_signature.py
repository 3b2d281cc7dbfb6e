"""A program's key: whatever a step may read changes it, and nothing else does."""

from __future__ import annotations

import copy
import math
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.compiler.frontend.signature import signature, split_numbers


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor


class Scaled:
    """A function with a number of its own."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x):
        return self.factor * x


@dataclass(frozen=True)
class Fixed:
    factor: float


class Keeper(fc.Cell):
    """A cell with one attribute of every kind, in submodules too."""

    def __init__(self):
        super().__init__(3, 4)
        self.lin, self.part = nn.Linear(3, 4), nn.Dropout(0.25)
        self.register_buffer("mean", torch.zeros(3))
        self.flag, self.count, self.rate, self.mode, self.nothing = True, 1, 0.5, "plain", None
        self.pair, self.names, self.table = (1, 2.0), ["a", "b"], {"gain": 1.0, "inner": [1]}
        self.config = SimpleNamespace(scale=0.5, inner=SimpleNamespace(sign=1))
        self.slotted, self.scaled, self.fixed = Slotted(1.0), Scaled(1.0), Fixed(1.0)
        self.array, self.kinds, self.recent = np.ones((2, 2)), {1, 2}, deque([1, 2])
        self.function, self.number, self.dtype = torch.tanh, np.float32(2), torch.float32
        self.tensor = torch.ones(4)
        self.loose = [nn.Linear(2, 2)]


def _set(path: str, value):
    def change(cell):
        *parents, name = path.split(".")
        holder = cell
        for parent in parents:
            holder = getattr(holder, parent)
        setattr(holder, name, value)

    return pytest.param(change, id=f"{path}={value!r}"[:40])


CHANGES = [
    *[_set("flag", value) for value in (False, 1, None)],
    *[_set("count", value) for value in (2, 1.0, True)],
    *[_set("rate", value) for value in (0.25, math.nan, "0.5")],
    *[_set("mode", value) for value in ("squashed", None)],
    _set("nothing", 0),
    _set("pair", (1, 2)),
    _set("pair", [1, 2.0]),
    _set("config.scale", 0.25),
    _set("config.inner.sign", -1),
    _set("slotted.factor", 2.0),
    _set("scaled.factor", 2.0),
    _set("fixed", Fixed(2.0)),
    _set("kinds", {1, 2.0}),
    _set("function", torch.sigmoid),
    _set("number", np.float32(3)),
    _set("dtype", torch.float64),
    _set("part.p", 0.5),
    _set("part.training", False),
    _set("training", False),
    _set("tensor", torch.ones(5)),
    _set("lin.bias", None),
    _set("lin.weight", nn.Parameter(torch.zeros(3, 4))),
    _set("mean", torch.zeros(3, dtype=torch.float64)),
    pytest.param(lambda cell: cell.names.append("c"), id="a list grows"),
    pytest.param(lambda cell: cell.table.update(gain=2.0), id="an entry of a dict"),
    pytest.param(lambda cell: cell.table["inner"].append(2), id="a list in a dict"),
    pytest.param(lambda cell: cell.array.fill(2), id="an array's values"),
    pytest.param(lambda cell: cell.recent.append(3), id="a deque grows"),
    pytest.param(lambda cell: setattr(cell.loose[0], "training", False), id="a module in a list"),
    pytest.param(lambda cell: cell.lin.register_forward_hook(lambda *_: None), id="a hook"),
    pytest.param(lambda cell: cell.register_forward_pre_hook(lambda *_: None), id="a hook of the cell"),
    pytest.param(lambda cell: cell.add_module("more", nn.Linear(3, 4)), id="a submodule"),
    pytest.param(lambda cell: setattr(cell, "tensor", cell.lin.bias), id="a tensor tied to a parameter"),
    pytest.param(lambda cell: cell.double(), id="double"),
    pytest.param(lambda cell: cell.lin.weight.requires_grad_(False), id="a frozen weight"),
    pytest.param(lambda cell: setattr(cell, "function", cell.extra_repr), id="a method of its own"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    cell = Keeper()
    before = signature(cell)
    hash(before)
    change(cell)
    assert signature(cell) != before


def test_what_a_step_computes_from_alike_is_alike():
    cell = Keeper()
    before = signature(cell)
    with torch.no_grad():
        cell.lin.weight.add_(1)
        cell.mean.data = torch.ones(3)
    cell.lin.weight = nn.Parameter(torch.randn(4, 3))
    assert signature(cell) == before
    cell.rate, cell.names, cell.slotted, cell.tensor = float("0.5"), ["a", "b"], Slotted(1.0), torch.randn(4)
    assert signature(cell) == before
    assert signature(fc.GRUCell(5, 10)) == signature(fc.GRUCell(5, 10))
    alike = fc.LSTMCell(5, 10)
    assert signature(copy.deepcopy(alike)) == signature(alike)


def test_zeros_of_either_sign_and_nan():
    cell = Keeper()
    cell.rate = 0.0
    before = signature(cell)
    cell.rate = -0.0
    assert signature(cell) != before
    cell.rate = math.nan
    before = signature(cell)
    cell.rate = math.inf - math.inf
    assert signature(cell) == before


def test_tied_tensors_are_not_the_same_as_equal_ones():
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    apart, tied = fc.Cell(4, 4), fc.Cell(4, 4)
    apart.first, apart.second = one, other
    tied.first, tied.second = one, nn.Linear(4, 4)
    tied.second.weight = one.weight
    assert signature(apart) != signature(tied)


def test_objects_that_hold_each_other():
    cell = Keeper()
    cell.config.inner.owner = cell.config
    before = signature(cell)
    assert signature(cell) == before
    cell.config.scale = 3.0
    assert signature(cell) != before


def test_numbers_have_the_names_of_their_attributes():
    cell = Keeper()
    blank, numbers = split_numbers(signature(cell))
    expected = {"count": 1, "pair[0]": 1, "config.inner.sign": 1, "table.'inner'[0]": 1, "number": 2, "recent[1]": 2}
    assert {name: numbers[name] for name in expected} == expected
    floats = {name: float.fromhex(numbers[name]) for name in ("rate", "config.scale", "slotted.factor", "part.p")}
    assert floats == {"rate": 0.5, "config.scale": 0.5, "slotted.factor": 1.0, "part.p": 0.25}
    assert not {"flag", "training", "mode", "lin.weight", "tensor"} & set(numbers)
    cell.rate, cell.config.inner.sign, cell.part.p = 0.25, -1, 0.75
    other, changed = split_numbers(signature(cell))
    assert other == blank
    assert {name for name in numbers if numbers[name] != changed[name]} == {"rate", "config.inner.sign", "part.p"}
    cell.flag = False
    assert split_numbers(signature(cell))[0] != blank


def test_a_weak_reference_to_what_has_no_hash():
    cell = fc.Cell(4, 4)
    cell.lin = nn.Linear(4, 4)
    cell.handle = cell.lin.weight.register_hook(lambda grad: grad)  # it refers to the table of the hooks
    assert hash(signature(cell)) == hash(signature(cell))
