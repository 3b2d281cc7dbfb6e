"""Cells for the tracer's tests, and the comparison of their graphs with torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fusecell as fc
from fusecell.compiler.frontend import Traced, trace
from fusecell.compiler.ir.interpreter import interpret

Body = Callable[[Any, Tensor, Tensor], Tensor]


class BodyCell(fc.Cell):
    """A cell whose step is a function of (cell, x, h), with weights of many shapes to use in it."""

    def __init__(self, body: Body) -> None:
        super().__init__(4, 6)
        self.body = body
        self.inp = nn.Linear(4, 6)
        self.rec = nn.Linear(6, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        for name, shape in {
            "vector": (6,),
            "scalar": (),
            "one": (1,),
            "line": (1, 6),
            "square": (6, 6),
            "tall": (18, 6),
            "long": (12,),
            "table": (3, 6),
            "pair": (2,),
        }.items():
            self.register_parameter(name, nn.Parameter(torch.rand(shape) * 0.8 - 0.3))
        self.register_buffer("mask", torch.rand(6, 6) > 0.4)
        self.register_buffer("flags", torch.tensor([True, False, True, True, False, True]))
        self.register_buffer("count", torch.tensor(3))

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        (h,) = state
        y = self.body(self, x, h)
        return y, (y,)


def both(cell: BodyCell, x: Tensor, h: Tensor) -> Tensor:
    """What most steps begin with."""
    total: Tensor = cell.inp(x) + cell.rec(h)
    return total


def traced(cell: fc.Cell, **options: Any) -> Traced:
    """The trace of a cell of one input, which must succeed."""
    made = trace(cell, [(cell.input_size,)], options.pop("dtype", torch.float64), **{"gradients": True, **options})
    assert isinstance(made, Traced), made
    return made


def values_of(made: Traced, cell: fc.Cell, given: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The values of a graph's leaves: the cell's weights, and ``given``, flattened."""
    names = [made.graph[index].name for index in made.graph.leaves("weight")]
    weights = zip(names, made.weights.values(cell), strict=True)
    return {name: value.detach() for name, value in weights} | {
        name: value.detach().reshape(len(value), -1) for name, value in given
    }


def compare(cell: fc.Cell, shapes: Sequence[tuple[int, ...]] | None = None, rows: int = 3) -> Traced:
    """Hold the graph of a float64 cell, forward and backward, against torch to 1e-12."""
    shapes = shapes or [(cell.input_size,)]
    made = trace(cell, shapes, torch.float64, gradients=True)
    assert isinstance(made, Traced), made
    x = [torch.randn(rows, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    state = [torch.randn(rows, size, dtype=torch.float64, requires_grad=True) for size in cell.state_sizes]
    output, after = cell.step(tuple(x) if len(x) > 1 else x[0], tuple(state))
    seeds = [torch.randn_like(value) for value in (output, *after)]
    labels = ["grad.output", *(f"grad.{name}" for name in cell.states)]
    given = [*zip(cell.inputs, x, strict=True), *zip(cell.states, state, strict=True), *zip(labels, seeds, strict=True)]
    found = interpret(made.graph, values_of(made, cell, given))
    close(found["output"], output)
    for name, value in zip(cell.states, after, strict=True):
        close(found[f"state.{name}"], value)
    parameters = [value for value in cell.parameters() if value.requires_grad]
    loss = sum((value * seed).sum() for value, seed in zip((output, *after), seeds, strict=True))
    wanted = torch.autograd.grad(loss, [*x, *state, *parameters], allow_unused=True)
    names = [f"grad.input.{name}" for name in cell.inputs] + [f"grad.state.{name}" for name in cell.states]
    for name, gradient in zip(names, wanted, strict=False):
        assert (name in found) == (gradient is not None), name
        if gradient is not None:
            close(found[name], gradient.reshape(rows, -1))
    for gradient, expected in zip(_through(made, cell, found, parameters), wanted[len(names) :], strict=True):
        close(torch.zeros(()) if gradient is None else gradient, torch.zeros(()) if expected is None else expected)
    return made


def _through(
    made: Traced, cell: fc.Cell, found: dict[str, Tensor], parameters: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The gradients of the weight leaves carried through the prologue to the parameters."""
    names = [made.graph[index].name for index in made.graph.leaves("weight")]
    pairs = [
        (value, found[f"grad.weight.{name}"])
        for name, value in zip(names, made.weights.values(cell), strict=True)
        if f"grad.weight.{name}" in found and value.requires_grad
    ]
    if not pairs:
        return [None] * len(parameters)
    return torch.autograd.grad(
        [value for value, _ in pairs], parameters, [gradient for _, gradient in pairs], allow_unused=True
    )


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-12, atol=1e-12, equal_nan=True)
