"""What a schedule comes to: stages in the order in which they run, and where in memory every value is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from fusecell.compiler.ir.graph import SAVED, Graph

__all__ = ["Buffer", "Phase", "Place", "Plan", "Stage", "Sum"]

Phase = Literal["once", "lift", "loop", "post"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory for a value: one row per call, a row per row of a step, of a chunk, or of the caller's own tensor.

    What is saved for the backward is the caller's too, but laid out as a chunk's rows are: one step after the other.
    """

    name: str
    scope: Literal["call", "step", "state", "chunk", "user", "saved"]
    size: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value can be read: a buffer, from a feature on."""

    buffer: Buffer
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Sum:
    """A contribution to the gradient of a weight: the sum over rows of a^T b, or of b alone."""

    name: str
    label: str
    a: int | None
    b: int
    height: int
    """Features of ``a``; 1 without."""
    width: int
    corner: tuple[int, int]
    """Where in the gradient it belongs, in its own rows and columns."""
    flipped: bool
    """Whether its rows are the gradient's columns."""

    @property
    def part(self) -> str:
        """The buffer of a block of rows that is being added up, from the second on."""
        return f"{self.name}.block"

    @property
    def total(self) -> str:
        """The buffer of the blocks added up; the first begins there."""
        return f"{self.name}.total"


@dataclass(slots=True)
class Stage:
    """Values of one width computed together, row by row, column block by column block."""

    phase: Phase
    rank: int
    width: int
    affines: list[int] = field(default_factory=list)
    pointwise: list[int] = field(default_factory=list)
    reductions: list[int] = field(default_factory=list)
    stores: dict[int, list[Place]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.phase}{self.rank}.{self.width}"

    def results(self) -> Iterator[int]:
        """All that is computed here, reductions aside."""
        yield from self.affines
        yield from self.pointwise


@dataclass(slots=True)
class Plan:
    """Stages in the order in which they run, and the memory of every value that crosses from one to another."""

    graph: Graph
    stages: list[Stage]
    homes: dict[int, Place]
    gathered: dict[int, Buffer]
    scattered: dict[str, int]
    sums: list[Sum]
    kept: dict[int, Buffer]
    states: dict[str, tuple[int, int]]
    """Each state's leaf and its new value."""
    backward: bool = False
    """Whether the states are gradients: a reset cuts them off after the step instead of setting them before it."""

    @property
    def text(self) -> str:
        """The plan for people: each stage with what it computes and where it goes."""
        lines = []
        for stage in self.stages:
            lines.append(f"{stage.name}: {stage.width} wide")
            for index in (*stage.results(), *stage.reductions):
                node = self.graph[index]
                lines.append(f"  {node.name} = {node.op}({', '.join(self.graph[arg].name for arg in node.args)})")
            for index, places in stage.stores.items():
                targets = [f"{place.buffer.name}[{place.offset}:] by {place.buffer.scope}" for place in places]
                lines.append(f"  store {self.graph[index].name} in {', '.join(targets)}")
        for found in self.sums:
            a = "" if found.a is None else f"{self.graph[found.a].name} x "
            lines.append(f"{found.name}: {found.label} at {list(found.corner)} += {a}{self.graph[found.b].name}")
        return "\n".join(lines) + "\n"

    def place(self, index: int, phase: Phase) -> Place | None:
        """Where a value is found by a stage of ``phase``; None if it is nowhere in memory."""
        offset, node = 0, self.graph[index]
        while node.op == "slice":
            offset, index = offset + node.attrs["start"], node.args[0]
            node = self.graph[index]
        whole = self._whole(index, phase)
        return Place(whole.buffer, whole.offset + offset) if whole is not None and offset else whole

    def _whole(self, index: int, phase: Phase) -> Place | None:
        node = self.graph[index]
        if node.op == "input" and phase in ("lift", "post") and not node.name.startswith(SAVED):
            return Place(self.gathered[index]) if index in self.gathered else None
        if node.op == "state" and phase == "post":
            return Place(self.kept[index]) if index in self.kept else None
        return self.homes.get(index)

    def stages_of(self, phase: Phase) -> list[Stage]:
        """The stages of a phase, in order."""
        return [stage for stage in self.stages if stage.phase == phase]

    def buffers(self) -> list[Buffer]:
        """Every buffer of the scratch memory, once each."""
        found = {place.buffer: None for place in self.homes.values()}
        found.update(dict.fromkeys([*self.gathered.values(), *self.kept.values()]))
        for stage in self.stages:
            found.update({place.buffer: None for places in stage.stores.values() for place in places})
        return [buffer for buffer in found if buffer.scope not in ("user", "saved")]

    def covered(self) -> set[str]:
        """The gradients that one sum makes whole: nothing has to be added up in them."""
        labels = [found.label for found in self.sums]
        found = set()
        for each in self.sums:
            size = math.prod(self.graph[self.graph.outputs[each.label]].type.shape)
            if labels.count(each.label) == 1 and each.height * each.width == size:
                found.add(each.label)
        return found

    def saved(self) -> list[Buffer]:
        """What the forward keeps, or the backward finds."""
        graph = self.graph
        names = [label for label in graph.outputs if label.startswith(SAVED)]
        sizes = {label: graph[graph.outputs[label]].size for label in names}
        sizes |= {graph[i].name: graph[i].size for i in graph.leaves("input") if graph[i].name.startswith(SAVED)}
        return [Buffer(name, "saved", size) for name, size in sizes.items()]
