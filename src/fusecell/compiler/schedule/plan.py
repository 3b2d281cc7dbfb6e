"""Plan of a kernel: its stages in the order in which they run, and where in memory each value is.

A plan is complete and frozen: each stage has the location of all that it reads and writes, so that code generation
decides nothing about memory.
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
"""The scope of the memory of a phase's values: how many rows they have."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory of a value: one row per call, or a row for each row of a step, of a chunk, or of the caller's tensor.

    Saved values are the caller's too, but laid out as the rows of a chunk are: one step after the other.

    Attributes:
        size: features of a row.
        in_pairs: whether it has bfloat16 numbers, two a word, and zeros behind them up to a whole word.
    """

    name: str
    scope: Scope
    size: int
    in_pairs: bool = False

    @property
    def stride(self) -> StrideKind:
        """Bytes from a row to the next: none, those of a row padded to whole vectors, or the caller's stride."""
        if self.scope == "user":
            return "caller"
        return "none" if self.scope == "call" else "padded"


@dataclass(frozen=True, slots=True)
class Location:
    """Location of a value in memory: a buffer, and the feature of it at which the value begins.

    Attributes:
        axes: (extent, stride) of each axis of a view, in features; None where the value's features are neighbours.
    """

    buffer: Buffer
    offset: int = 0
    axes: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """A contribution to the gradient of a weight: the sum over rows of a^T b, of b alone, or of a nest of both.

    Attributes:
        name: of its function in the kernel.
        label: of the output of the graph that it belongs to.
        height: features of ``a``; 1 without it.
        width: features of ``b``.
        corner: its position in the gradient, in its own rows and columns.
        flipped: whether its rows are the gradient's columns.
        nest: the node of the graph that it is, if that is a contraction or a scatter.
        pairs: whether ``a`` and ``b`` are rounded to bfloat16, and multiplied by pairs of rows.
        same_as: the name of an earlier sum of the same rows, which is added up for both; else "".
        operands: the locations of ``a`` and ``b``.
    """

    name: str
    label: str
    a: int | None
    b: int
    height: int
    width: int
    corner: tuple[int, int]
    flipped: bool
    nest: int | None = None
    pairs: bool = False
    same_as: str = ""
    operands: Mapping[int, Location] = field(default_factory=dict)

    @property
    def part(self) -> str:
        """The buffer in which row panels are added up, from the second on."""
        return f"{self.same_as or self.name}.part"

    @property
    def total(self) -> str:
        """The buffer of the sum of row panels; the first is added up there."""
        return f"{self.same_as or self.name}.total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Values of one width that are computed together, row by row, column group by column group.

    Attributes:
        rank: its position among the stages of its phase; stages of one rank are independent of each other.
        affines, pointwise, reductions: the values that it computes, as indices of nodes.
        nest: the one value that it computes by loops of its own, if it does.
        label: what tells it from other stages of its phase, rank and width: the name of its nest.
        stores: the values that it writes to memory, with every location that they are written to.
        totals: the location of each of its reductions, written once all columns are done, or of its nest.
        operands: the location of each value that it reads from memory; others are computed where they are needed.
    """

    phase: Phase
    rank: int
    width: int
    affines: tuple[int, ...] = ()
    pointwise: tuple[int, ...] = ()
    reductions: tuple[int, ...] = ()
    nest: int | None = None
    label: str = ""
    stores: Mapping[int, tuple[Location, ...]] = field(default_factory=dict)
    totals: Mapping[int, Location] = field(default_factory=dict)
    operands: Mapping[int, Location] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return (
            f"{self.phase}{self.rank}.{self.width}" if not self.label else f"{self.phase}{self.rank}.nest.{self.label}"
        )

    @property
    def order(self) -> tuple[int, int, int]:
        """The key by which stages are sorted."""
        return PHASES.index(self.phase), self.rank, self.width

    def results(self) -> Iterator[int]:
        """Yield all that it computes, except reductions and nests: what it has in registers."""
        yield from self.affines
        yield from self.pointwise

    def computed(self) -> Iterator[int]:
        """Yield all that it computes."""
        yield from self.results()
        yield from self.reductions
        if self.nest is not None:
            yield self.nest


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Stages in the order in which they run, and the memory of every value that crosses from one to another.

    Attributes:
        buffers: all of the scratch memory, in its order.
        vectors: the weights that are vectors, with the buffer that each is copied to, padded to whole vectors.
        gathered: the inputs that stages outside the loop read, with the buffer that their rows are copied to.
        scattered: the outputs of stages outside the loop, by label, with the location that they are copied from.
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
        """The plan as text: each stage with the values that it computes, and where it stores them."""
        lines = []
        for stage in self.stages:
            lines.append(f"{stage.name}: {stage.width} wide")
            for index in stage.computed():
                node = self.graph[index]
                lines.append(f"  {node.name} = {node.op}({', '.join(self.graph[arg].name for arg in node.args)})")
            for index, locations in stage.stores.items():
                targets = [f"{each.buffer.name}[{each.offset}:] by {each.buffer.scope}" for each in locations]
                lines.append(f"  store {self.graph[index].name} in {', '.join(targets)}")
        for each in self.sums:
            a = "" if each.a is None else f"{self.graph[each.a].name} x "
            rows = f"the rows of {each.same_as}" if each.same_as else f"{a}{self.graph[each.b].name}"
            lines.append(f"{each.name}: {each.label} at {list(each.corner)} += {rows}")
        return "\n".join(lines) + "\n"

    @property
    def distinct_sums(self) -> list[Sum]:
        """The sums over rows that are added up: of several that are the same the first."""
        return [each for each in self.sums if not each.same_as]

    def stages_of(self, phase: Phase) -> list[Stage]:
        """List the stages of a phase, in order."""
        return [stage for stage in self.stages if stage.phase == phase]

    def covered(self) -> set[str]:
        """Return the labels of gradients that are a single sum: these are stored, not added."""
        labels = [each.label for each in self.sums]
        whole = set()
        for each in self.sums:
            size = math.prod(self.graph[self.graph.outputs[each.label]].type.shape)
            if labels.count(each.label) == 1 and each.height * each.width == size:
                whole.add(each.label)
        return whole

    def saved(self) -> list[Buffer]:
        """List the values that the forward saves for the backward, or those that the backward reads."""
        graph = self.graph
        names = [label for label in graph.outputs if label.startswith(SAVED)]
        sizes = {label: graph[graph.outputs[label]].size for label in names}
        sizes |= {graph[i].name: graph[i].size for i in graph.leaves("input") if graph[i].name.startswith(SAVED)}
        return [Buffer(name, "saved", size) for name, size in sizes.items()]
