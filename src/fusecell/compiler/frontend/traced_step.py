"""A traced step: its graph, what its weights are made of, and how a cell's tensors and inputs are called in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fusecell.attribute_paths import tensors_inside
from fusecell.cell import Cell
from fusecell.compiler.frontend.draws import Draw, draw_name
from fusecell.compiler.frontend.signature import attribute_names
from fusecell.compiler.frontend.weight_prologue import Prologue
from fusecell.compiler.ir.graph import Graph
from fusecell.shapes import Shape

__all__ = ["Traced", "attributes", "input_names"]


@dataclass(frozen=True)
class Traced:
    """A step as a graph.

    Attributes:
        graph: the step and, if asked for, its gradient: one joint graph.
        weights: how the weight leaves of the graph are made at each call, in the order of ``graph.leaves("weight")``.
        dtype: of the step's inputs, states and results; the graph computes in float32 where it has 16 bits.
        shapes: of a row of each output and note, by its label in the graph, which has all features in one dimension.
        draws: the random numbers that a step draws: inputs of the graph, behind the cell's own.
        leftovers: paths of attributes that each step sets to a tensor and no step reads.
        largest_integer: that inputs may have, so that all integers which the step computes of them are exact in the
            kernel; None for all that its dtype has.
        output_dtype: what the output is converted to after the kernel: that of spikes, say, of ``(v > 1).float()``.
    """

    graph: Graph
    weights: Prologue
    dtype: torch.dtype
    shapes: Mapping[str, Shape]
    draws: tuple[Draw, ...] = ()
    leftovers: tuple[str, ...] = ()
    output_dtype: torch.dtype | None = None
    largest_integer: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a call is the kernel and nothing before or after it."""
        return not (self.draws or self.leftovers or self.output_dtype is not None or self.weights.assumed)

    @property
    def draw_names(self) -> tuple[str, ...]:
        """The names of the inputs that are draws, which come behind the cell's own."""
        return tuple(map(draw_name, range(len(self.draws))))

    @cached_property
    def weight_names(self) -> tuple[str, ...]:
        """The names of the weight leaves, in order."""
        return tuple(self.graph[index].name for index in self.graph.leaves("weight"))


def input_names(cell: Cell) -> tuple[str, ...]:
    """Name the inputs of a cell's graph: as the cell does, but for one that has the name of a state."""
    return tuple(f"{name}.input" if name in cell.states else name for name in cell.inputs)


def attributes(cell: Cell) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that is an attribute of a cell or of its submodules, with its path."""
    for prefix, module in cell.named_modules():
        start = prefix + "." if prefix else ""
        own = attribute_names(module)
        for table in (module._parameters, module._buffers, vars(module)):
            for name, value in table.items():
                if isinstance(value, Tensor):
                    yield start + name, value
                elif name in own and name.isidentifier():
                    yield from tensors_inside(value, start + name)
