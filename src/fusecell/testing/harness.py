"""The harness of the cell checks: random inputs, runs over sequences, and comparisons in sentences."""

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
from fusecell.shapes import Outputs, feature_shape, in_order, map_outputs, output_shapes, tensors_of
from fusecell.validation import state_tuple

__all__ = ["Outcome", "Trial", "apart", "outputs_of", "kinds", "name_of", "same"]

Outcome = tuple[Outputs, State]
"""The outputs of a sequence and the state after it."""


@dataclass(frozen=True)
class Trial:
    """A cell with random inputs and states, and the ways of running it on them.

    Arguments:
        cell: the cell under test.
        steps, batch_size: T and N.
        seed: the seed of the inputs; ``seed + 1`` is the states' and ``seed + 2`` that of ``draw``.
        extras: values for the cell's inputs after x, without those that ``draw`` returns.
        dtype: the dtype for a cell without parameters; torch's default if left out.
        x: the first input, (T, N, ...); random numbers if left out.
    """

    cell: Cell
    steps: int
    batch_size: int
    seed: int
    extras: State = ()
    dtype: torch.dtype | None = None
    x: Tensor | None = None

    @cached_property
    def like(self) -> Tensor:
        """An empty tensor with the cell's dtype and device."""
        for value in (*self.cell.parameters(), *self.cell.buffers()):
            if value.is_floating_point():
                return value.detach().new_empty(0)
        return torch.empty(0, dtype=self.dtype)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.like.dtype, device=self.like.device)

    @cached_property
    def caller_inputs(self) -> State:
        """The inputs that a caller passes to a layer, (T, N, ...) each: x and the extras."""
        torch.manual_seed(self.seed)
        cast = (value.to(self.like) if value.is_floating_point() else value for value in self.extras)
        x = self.random(self.steps, self.batch_size, *feature_shape(self.cell.input_size)) if self.x is None else self.x
        return (x.to(self.like) if x.is_floating_point() else x, *cast)

    @cached_property
    def state(self) -> State:
        """A random start state, (N, size) each."""
        torch.manual_seed(self.seed + 1)
        # Halved: most states are in (-1, 1), where activations aren't saturated and gradients not 0.
        return tuple(self.random(self.batch_size, *feature_shape(size)) / 2 for size in self.cell.state_sizes)

    def draw(self, steps: int, rows: int) -> State:
        """Draw the cell's own inputs; the same in every call."""
        # Seeded in every call, so that a layer, which draws by itself, gets the numbers of the plain loop.
        torch.manual_seed(self.seed + 2)
        return self.cell.draw(steps, rows, dtype=self.like.dtype, device=self.like.device)

    @cached_property
    def inputs(self) -> State:
        """All inputs of a sequence: the caller's and those that the cell draws."""
        return self.caller_inputs + self.draw(self.steps, self.batch_size)

    def check_extras(self) -> None:
        """Raise ValueError unless x, the extras and what the cell draws are all its inputs."""
        passed, names = 1 + len(self.extras), self.cell.inputs
        drawn = len(self.draw(self.steps, self.batch_size))
        if passed + drawn != len(names):
            raise ValueError(
                f"{name_of(self.cell)} has the inputs ({', '.join(names)}) and draws {drawn} of them; pass the "
                f"{len(names) - drawn - 1} between as extras=, got {len(self.extras)}."
            )

    def at(self, t: int, inputs: State | None = None, rows: slice = slice(None)) -> Any:
        """Return the x of ``step`` at time t, for all rows or some."""
        values = tuple(v[t if v.shape[0] != 1 else 0, rows] for v in (self.inputs if inputs is None else inputs))
        return values if len(self.cell.inputs) > 1 else values[0]

    def scan(self, inputs: State | None = None, state: State | None = None, **options: Any) -> Outcome:
        """Run the sequence through the active runner; the cell draws the same as in :attr:`inputs`."""
        x, start = self.caller_inputs if inputs is None else inputs, self.state if state is None else state
        torch.manual_seed(self.seed + 2)
        with torch.set_grad_enabled(any(value.requires_grad for value in (*x, *start))):
            outputs, after = scan(self.cell, x if len(x) > 1 else x[0], start, **options)
        return outputs, state_tuple(self.cell, after)

    def loop(self, inputs: State | None = None, state: State | None = None, rows: slice = slice(None)) -> Outcome:
        """Run a plain Python loop over ``step``, for all rows or some, without a runner."""
        outputs, now = [], self.state if state is None else state
        for t in range(self.steps):
            output, now = self.cell.step(self.at(t, inputs, rows), now)
            outputs.append(output)
        return map_outputs(lambda *values: torch.stack(values), *outputs), now

    def doubled(self) -> Trial:
        """Return the same trial in float64, with a copy of the cell."""
        return Trial(
            copy.deepcopy(self.cell).double(),
            self.steps,
            self.batch_size,
            self.seed,
            self.extras,
            torch.float64,
            self.x,
        )

    def close(self, actual: Tensor, expected: Tensor) -> bool:
        """Return whether two tensors agree to about 3 decimal digits less than the dtype has."""
        # 2048 eps: kernels add in another order than the loop, and rounding errors grow over the steps; a wrong state,
        # reset or length is off by far more.
        tolerance = max(2048 * torch.finfo(self.like.dtype).eps, 1e-12)
        return actual.shape == expected.shape and torch.allclose(actual, expected, tolerance, tolerance, equal_nan=True)

    def compare(self, actual: Outcome, expected: Outcome, where: str, fix: str) -> list[str]:
        """Return a sentence for the outputs and each state that differ: which, ``where``, by how much, and ``fix``."""
        names = output_shapes(self.cell.output_size)
        labels = (*(f"the {name}" for name in names), *(f"state {name}" for name in self.cell.states))
        # In the order of output_size, in which runners return a dict and a step need not.
        (one, after), (other, before) = actual, expected
        pairs = zip(
            labels,
            (*outputs_of(self.cell, one), *after),
            (*outputs_of(self.cell, other), *before),
            strict=True,
        )
        return [f"{label} {where} {apart(a, b)}. {fix}" for label, a, b in pairs if not self.close(a, b)]


def outputs_of(cell: Cell, outputs: Outputs) -> State:
    """Return the tensors of an output, a dict's in the order of ``output_size``."""
    return tensors_of(in_order(cell.output_size, outputs))


def name_of(cell: Cell) -> str:
    """Return the name of a cell's class."""
    return type(cell).__name__


def kinds(result: object) -> str:
    """Name the types in a function's result, for a sentence: ``(Tensor, list)``."""
    if isinstance(result, tuple):
        return "(" + ", ".join(kinds(value) for value in result) + ")"
    return type(result).__name__


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, NaN being equal to NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(same_number(a, b).all())


def apart(actual: Tensor, expected: Tensor) -> str:
    """Say how two tensors differ: by their shapes, or where the difference is largest."""
    if actual.shape != expected.shape:
        return f"has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = torch.where(same_number(actual, expected), 0, (actual.double() - expected.double()).abs())
    # NaN against a number is the largest difference there is.
    where = tuple(torch.unravel_index(difference.nan_to_num(torch.inf).argmax(), difference.shape))
    index = ", ".join(str(int(axis)) for axis in where)
    return f"is {actual.detach()[where].item():.6g} at [{index}], expected {expected.detach()[where].item():.6g}"


def same_number(a: Tensor, b: Tensor) -> Tensor:
    """Return where two tensors are equal, elementwise, NaN being equal to NaN."""
    return (a == b) | ((a != a) & (b != b))
