"""Define the plan of a kernel: its stages in the order in which they run, and where in memory each value is.

A plan is complete and frozen: each stage carries the location of all that it reads and writes, so that code
generation looks up nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from fusecell.compiler.ir.graph import SAVED, Graph

__all__ = ["PHASES", "SCOPES", "Buffer", "Location", "Phase", "Plan", "Scope", "Stage", "StrideKind", "Sum"]

Phase = Literal["once", "hoisted", "loop", "post"]
Scope = Literal["call", "step", "state", "chunk", "user", "saved"]
StrideKind = Literal["none", "padded", "caller"]

PHASES: tuple[Phase, ...] = ("once", "hoisted", "loop", "post")
"""In the order in which they run."""
SCOPES: Mapping[Phase, Literal["call", "chunk", "step"]] = {
    "once": "call",
    "hoisted": "chunk",
    "loop": "step",
    "post": "chunk",
}
"""How many rows the values of a phase have in memory."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory for a value: one row per call, a row per row of a step, of a chunk, or of the caller's own tensor.

    What is saved for the backward is the caller's too, but laid out as a chunk's rows are: one step after the other.
    """

    name: str
    scope: Scope
    size: int

    @property
    def stride(self) -> StrideKind:
        """From a row to the next: nothing, the row padded to whole vectors, or what the caller's tensor has."""
        if self.scope == "user":
            return "caller"
        return "none" if self.scope == "call" else "padded"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a value is in memory: a buffer, from one of its features on."""

    buffer: Buffer
    offset: int = 0

    @property
    def stride(self) -> StrideKind:
        """From a row to the next."""
        return self.buffer.stride


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """A contribution to the gradient of a weight: the sum over rows of a^T b, or of b alone.

    Attributes:
        name: what its function is called.
        label: the output of the graph that it belongs to.
        height: features of ``a``; 1 without.
        width: features of ``b``.
        corner: where in the gradient it belongs, in its own rows and columns.
        flipped: whether its rows are the gradient's columns.
        operands: where ``a`` and ``b`` are.
    """

    name: str
    label: str
    a: int | None
    b: int
    height: int
    width: int
    corner: tuple[int, int]
    flipped: bool
    operands: Mapping[int, Location] = field(default_factory=dict)

    @property
    def part(self) -> str:
        """The buffer of a block of rows that is being added up, from the second on."""
        return f"{self.name}.block"

    @property
    def total(self) -> str:
        """The buffer of the blocks added up; the first begins there."""
        return f"{self.name}.total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Values of one width that are computed together, row by row, column block by column block.

    Attributes:
        rank: its turn among the stages of its phase; those of one rank need nothing of each other.
        affines, pointwise, reductions: what it computes, as indices of nodes.
        stores: the values that it writes to memory, with every location that they are written to.
        totals: where each of its reductions is written once all columns are done.
        operands: where each value is that it reads from memory; what is in none is computed on the spot.
    """

    phase: Phase
    rank: int
    width: int
    affines: tuple[int, ...] = ()
    pointwise: tuple[int, ...] = ()
    reductions: tuple[int, ...] = ()
    stores: Mapping[int, tuple[Location, ...]] = field(default_factory=dict)
    totals: Mapping[int, Location] = field(default_factory=dict)
    operands: Mapping[int, Location] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.phase}{self.rank}.{self.width}"

    @property
    def order(self) -> tuple[int, int, int]:
        """What stages are sorted by."""
        return PHASES.index(self.phase), self.rank, self.width

    def results(self) -> Iterator[int]:
        """All that is computed here, reductions aside."""
        yield from self.affines
        yield from self.pointwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Stages in the order in which they run, and the memory of every value that crosses from one to another.

    Attributes:
        buffers: all of the scratch memory, in its order.
        vectors: the weights that are vectors, with the buffer that each is copied to, padded to whole vectors.
        gathered: the inputs whose rows are copied in, or read in place, for stages outside the loop.
        scattered: the outputs of stages outside the loop, by label, with the location that they are copied out from.
        sums: the contributions to gradients of weights.
        states: each state's leaf and its new value, by name.
        backward: whether the states are gradients: a reset cuts them off after the step, not before it.
    """

    graph: Graph
    stages: tuple[Stage, ...]
    buffers: tuple[Buffer, ...]
    vectors: Mapping[int, Buffer]
    gathered: Mapping[int, Buffer]
    scattered: Mapping[str, Location]
    sums: tuple[Sum, ...]
    states: Mapping[str, tuple[int, int]]
    backward: bool

    @property
    def text(self) -> str:
        """The plan for people: each stage with what it computes and where it goes."""
        lines = []
        for stage in self.stages:
            lines.append(f"{stage.name}: {stage.width} wide")
            for index in (*stage.results(), *stage.reductions):
                node = self.graph[index]
                lines.append(f"  {node.name} = {node.op}({', '.join(self.graph[arg].name for arg in node.args)})")
            for index, locations in stage.stores.items():
                targets = [f"{each.buffer.name}[{each.offset}:] by {each.buffer.scope}" for each in locations]
                lines.append(f"  store {self.graph[index].name} in {', '.join(targets)}")
        for each in self.sums:
            a = "" if each.a is None else f"{self.graph[each.a].name} x "
            lines.append(f"{each.name}: {each.label} at {list(each.corner)} += {a}{self.graph[each.b].name}")
        return "\n".join(lines) + "\n"

    def stages_of(self, phase: Phase) -> list[Stage]:
        """List the stages of a phase, in order."""
        return [stage for stage in self.stages if stage.phase == phase]

    def covered(self) -> set[str]:
        """Name the gradients that one sum makes whole: nothing has to be added up in them."""
        labels = [each.label for each in self.sums]
        whole = set()
        for each in self.sums:
            size = math.prod(self.graph[self.graph.outputs[each.label]].type.shape)
            if labels.count(each.label) == 1 and each.height * each.width == size:
                whole.add(each.label)
        return whole

    def saved(self) -> list[Buffer]:
        """List what the forward saves for the backward, or what the backward reads of it."""
        graph = self.graph
        names = [label for label in graph.outputs if label.startswith(SAVED)]
        sizes = {label: graph[graph.outputs[label]].size for label in names}
        sizes |= {graph[i].name: graph[i].size for i in graph.leaves("input") if graph[i].name.startswith(SAVED)}
        return [Buffer(name, "saved", size) for name, size in sizes.items()]
