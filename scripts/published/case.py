"""``Case``: one published cell, and the two forms in which the tables write them down."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fusecell as fc

FEATURES, SIZE, HEADS = 12, int(os.environ.get("PUBLISHED_CELLS_SIZE", "16")), 4
"""Features of x, features of a state, a multiple of the third, and heads of a cell that has some."""

Inputs = Tensor | tuple[Tensor, ...]
Equations = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """One published cell.

    Attributes:
        name: a name that is unique among the cases.
        source: the package that it is imported from, or the paper that its equations are from.
        family: the kind of cell.
        make: builds it; an ImportError says that the package is missing.
        inputs: random inputs of a sequence, of (steps, rows); by default x of the cell's input_size.
        start: "random", or "zeros", the cell's own, where it only makes sense from there; or a function of rows that
            makes the states.
        trains: whether the cell is measured in training mode; one that draws at random is.
        exact: how closely the kernel agrees with the loop, relative to the larger of one and the number.
        in_double: whether the loop runs in float64 at all; a package that casts to float32 in its step can only be
            compared there.
    """

    name: str
    source: str
    family: str
    make: Callable[[], fc.Cell]
    inputs: Callable[[int, int], Inputs] | None = None
    start: str | Callable[[int], tuple[Tensor, ...]] = "random"
    trains: bool = True
    exact: float = 1e-10
    in_double: bool = True


class CallingCell(fc.Cell):
    """A module that a function calls as a user's own step would.

    Arguments:
        module: the package's module.
        call: (module, x, *states) -> (output, *states).
        states: the sizes of the states by name.
        output_size: by default that of the first state.
    """

    def __init__(
        self, module: nn.Module, call: Equations, input_size: Any, states: Mapping[str, Any], output_size: Any = None
    ) -> None:
        super().__init__(input_size, next(iter(states.values())))
        self.module, self.call = module, call
        self.states = tuple(states)
        self.state_sizes = tuple(states.values())
        if output_size is not None:
            self.output_size = output_size

    def step(self, x: Any, state: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
        output, *after = self.call(self.module, x, *state)
        return output, tuple(after)


class EquationsCell(fc.Cell):
    """A step written from a paper: ``equations(cell, x, *states) -> (output, *states)``, with parts as attributes.

    Arguments:
        parts: modules, parameters, buffers (tensors) and numbers by name.
        equations: the step.
        states: the sizes of the states by name.
        inputs: the names of the inputs.
        output_size: by default that of the first state.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        equations: Equations,
        input_size: Any,
        states: Mapping[str, Any],
        inputs: tuple[str, ...] = ("x",),
        output_size: Any = None,
    ) -> None:
        super().__init__(input_size, next(iter(states.values())))
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.equations = equations
        self.states, self.inputs = tuple(states), inputs
        self.state_sizes = tuple(states.values())
        if output_size is not None:
            self.output_size = output_size

    def step(self, x: Any, state: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
        output, *after = self.equations(self, *(x if len(self.inputs) > 1 else (x,)), *state)
        return output, tuple(after)


class Table:
    """The cases of one file, in the order in which they are written."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def package(self, name: str, source: str, family: str, make: Callable[[], fc.Cell], **options: Any) -> None:
        """Add a package's own module."""
        self.cases.append(Case(name, source, family, make, **options))

    def paper(
        self,
        name: str,
        source: str,
        family: str,
        parts: Callable[[], Mapping[str, Any]],
        states: Mapping[str, Any] | None = None,
        *,
        input_size: Any = FEATURES,
        names: tuple[str, ...] = ("x",),
        output_size: Any = None,
        **options: Any,
    ) -> Callable[[Equations], Equations]:
        """Add the decorated equations; ``parts`` makes what they use."""
        sizes = states or {"h": SIZE}

        def added(equations: Equations) -> Equations:
            def make() -> fc.Cell:
                return EquationsCell(parts(), equations, input_size, sizes, names, output_size)

            self.cases.append(Case(name, source, family, make, **options))
            return equations

        return added


def linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """Make a linear map."""
    return nn.Linear(inputs, outputs, bias=bias)


def weight(*shape: int, scale: float | None = None) -> nn.Parameter:
    """Make a parameter of normal numbers, by default divided by the root of its last size."""
    return nn.Parameter(torch.randn(*shape) * (shape[-1] ** -0.5 if scale is None else scale))


def filled(value: float, *shape: int) -> nn.Parameter:
    """Make a parameter of one number."""
    return nn.Parameter(torch.full(shape, value))
