"""A cell with inputs and states to try it on, and the words for what differs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.execution.options import State
from fusecell.layers import scan
from fusecell.validation import state_tuple

__all__ = ["Outcome", "Trial", "apart", "kinds", "name_of", "same"]

Outcome = tuple[Tensor, State]
"""The outputs of a sequence and the state after it."""


@dataclass(frozen=True)
class Trial:
    """A cell with inputs and states to try it on."""

    cell: Cell
    steps: int
    batch_size: int
    seed: int
    extras: State = ()
    dtype: torch.dtype | None = None  # of a cell without parameters

    @cached_property
    def like(self) -> Tensor:
        """An empty tensor of the cell's dtype and device."""
        for value in (*self.cell.parameters(), *self.cell.buffers()):
            if value.is_floating_point():
                return value.detach().new_empty(0)
        return torch.empty(0, dtype=self.dtype)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.like.dtype, device=self.like.device)

    @cached_property
    def given(self) -> State:
        """x and the extras, as a caller hands them to a layer."""
        torch.manual_seed(self.seed)
        cast = (value.to(self.like) if value.is_floating_point() else value for value in self.extras)
        return (self.random(self.steps, self.batch_size, self.cell.input_size), *cast)

    @cached_property
    def state(self) -> State:
        torch.manual_seed(self.seed + 1)
        return tuple(self.random(self.batch_size, size) / 2 for size in self.cell.state_sizes)

    def draw(self, steps: int, rows: int) -> State:
        torch.manual_seed(self.seed + 2)
        return self.cell.draw(steps, rows, dtype=self.like.dtype, device=self.like.device)

    @cached_property
    def inputs(self) -> State:
        """All inputs of a sequence, the drawn ones among them."""
        return self.given + self.draw(self.steps, self.batch_size)

    def demand_extras(self) -> None:
        have, names = 1 + len(self.extras), self.cell.inputs
        drawn = len(self.draw(self.steps, self.batch_size))
        if have + drawn != len(names):
            raise ValueError(
                f"{name_of(self.cell)} has the inputs ({', '.join(names)}) and draws {drawn} of them; pass the "
                f"{len(names) - drawn - 1} between as extras=, got {len(self.extras)}."
            )

    def at(self, t: int, inputs: State | None = None, rows: slice = slice(None)) -> Any:
        """The x that ``step`` gets at t."""
        values = tuple(v[t if v.shape[0] != 1 else 0, rows] for v in (self.inputs if inputs is None else inputs))
        return values if len(self.cell.inputs) > 1 else values[0]

    def scan(self, inputs: State | None = None, state: State | None = None, **options: Any) -> Outcome:
        """The sequence through the runner in force, drawing what :attr:`inputs` drew."""
        given, start = self.given if inputs is None else inputs, self.state if state is None else state
        torch.manual_seed(self.seed + 2)
        with torch.no_grad():
            outputs, after = scan(self.cell, given if len(given) > 1 else given[0], start, **options)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"scan gave {type(outputs).__name__} for a tensor.")
        return outputs, state_tuple(self.cell, after)

    def loop(self, inputs: State | None = None, state: State | None = None, rows: slice = slice(None)) -> Outcome:
        """The plain loop over ``step``, for all rows or some, without a runner."""
        outputs, now = [], self.state if state is None else state
        for t in range(self.steps):
            output, now = self.cell.step(self.at(t, inputs, rows), now)
            outputs.append(output)
        return torch.stack(outputs), now

    def doubled(self) -> Trial:
        """The same trial in float64, on a copy of the cell."""
        return Trial(
            copy.deepcopy(self.cell).double(), self.steps, self.batch_size, self.seed, self.extras, torch.float64
        )

    def close(self, found: Tensor, expected: Tensor) -> bool:
        tolerance = max(2048 * torch.finfo(self.like.dtype).eps, 1e-12)
        return found.shape == expected.shape and torch.allclose(found, expected, tolerance, tolerance, equal_nan=True)

    def compare(self, found: Outcome, expected: Outcome, where: str, fix: str) -> list[str]:
        """A sentence for every output or state that differs."""
        labels = ("the output", *(f"state {name}" for name in self.cell.states))
        pairs = zip(labels, (found[0], *found[1]), (expected[0], *expected[1]), strict=True)
        return [f"{label} {where} {apart(a, b)}. {fix}" for label, a, b in pairs if not self.close(a, b)]


def name_of(cell: Cell) -> str:
    return type(cell).__name__


def kinds(result: object) -> str:
    """The types in what a function returned, for a sentence."""
    if isinstance(result, tuple):
        return "(" + ", ".join(kinds(value) for value in result) + ")"
    return type(result).__name__


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, with NaN equal to NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(same_number(a, b).all())


def apart(found: Tensor, expected: Tensor) -> str:
    """How two tensors differ, for a sentence."""
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    difference = torch.where(same_number(found, expected), 0, (found.double() - expected.double()).abs())
    where = tuple(torch.unravel_index(difference.nan_to_num(torch.inf).argmax(), difference.shape))
    place = ", ".join(str(int(index)) for index in where)
    return f"is {found.detach()[where].item():.6g} at [{place}], expected {expected.detach()[where].item():.6g}"


def same_number(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | ((a != a) & (b != b))
