"""Find the buffer, and the place in it, of every operand of the stages and the sums: the last part of scheduling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from fusecell.compiler.ir.affine import affine_parts
from fusecell.compiler.ir.graph import SAVED, Graph, Node
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.compiler.schedule.buffers import Buffers
from fusecell.compiler.schedule.phases import states_of
from fusecell.compiler.schedule.plan import Buffer, Location, Phase, Plan, Stage, Sum
from fusecell.compiler.schedule.weight_gradients import sums_over_rows
from fusecell.errors import CompilerError

__all__ = ["locate_operands"]


def locate_operands(graph: Graph, buffers: Buffers, *, backward: bool) -> Plan:
    """Complete a schedule with the location of everything that is read from memory.

    Raises:
        CompilerError: if an operand that must be in memory has no location: a defect of the scheduler.
    """
    sums = sums_over_rows(graph)
    operands = _Operands(graph, buffers, sums)
    vectors = [index for index in graph.leaves("weight") if index in buffers.locations]
    return Plan(
        graph=graph,
        stages=tuple(operands.completed(stage) for stage in buffers.stages),
        buffers=operands.scratch(),
        vectors={index: buffers.locations[index].buffer for index in vectors},
        gathered=operands.gathered,
        scattered={
            label: operands.operand(index, "post", f"output {label}") for label, index in buffers.scattered.items()
        },
        sums=tuple(operands.located(each) for each in sums),
        states=states_of(graph),
        backward=backward,
    )


class _Operands:
    """Locations of values, by the phase that reads them.

    Attributes:
        gathered: the inputs that stages outside the loop read, with the chunk's buffers that they are copied to.
    """

    def __init__(self, graph: Graph, buffers: Buffers, sums: Iterable[Sum]) -> None:
        self.graph, self.buffers = graph, buffers
        self.gathered: Mapping[int, Buffer] = {}
        self.gathered = self._gathered(sums)

    def _gathered(self, sums: Iterable[Sum]) -> dict[int, Buffer]:
        """Assign a chunk's buffer to each input that is read outside the loop; saved values have such rows already.

        A stage outside the loop takes all rows of a chunk as one matrix, while the caller's tensor may have any
        strides, and rows in another order.
        """
        read: set[int] = set()
        for stage in self.buffers.stages:
            if stage.phase in ("hoisted", "post"):
                read |= self._inputs_of(stage)
        for each in sums:
            read |= {_sliced(self.graph, operand)[0] for operand in (each.a, each.b) if operand is not None}
        nodes = {index: self.graph[index] for index in sorted(read)}
        return {
            index: Buffer(f"{node.name}.rows", "chunk", node.size)
            for index, node in nodes.items()
            if node.op == "input" and not node.name.startswith(SAVED)
        }

    def _inputs_of(self, stage: Stage) -> set[int]:
        """Return the inputs that a stage reads, directly or through values without a phase."""
        local = set(stage.results())
        pending = [arg for index in stage.computed() for arg in self.graph[index].args]
        pending += [index for index in stage.stores if index not in local]
        inputs, seen = set(), set(pending)
        while pending:
            index = pending.pop()
            node = self.graph[index]
            if node.op == "input":
                inputs.add(index)
            elif index not in local and (PRIMITIVES[node.op].in_place or self.location(index, stage.phase) is None):
                pending += [arg for arg in node.args if arg not in seen]
                seen.update(node.args)
        return inputs

    def location(self, index: int, phase: Phase) -> Location | None:
        """Return where a stage of ``phase`` reads a value; None if it is not in memory."""
        axes = _axes(self.graph[index])
        index, offset = _sliced(self.graph, index)
        node = self.graph[index]
        if node.op == "input" and phase in ("hoisted", "post") and not node.name.startswith(SAVED):
            rows = self.gathered.get(index)
        elif node.op == "state" and phase == "post":
            # After the loop the states' own memory holds those of the last step alone.
            rows = self.buffers.state_copies.get(index)
        else:
            location = self.buffers.locations.get(index)
            return location and Location(location.buffer, location.offset + offset, axes)
        return None if rows is None else Location(rows, offset, axes)

    def operand(self, index: int, phase: Phase, user: str) -> Location:
        """Return the location of a value that must be in memory."""
        location = self.location(index, phase)
        if location is None:
            raise CompilerError(f"{self.graph[index].name}, an operand of {user}, is nowhere in memory")
        return location

    def located(self, each: Sum) -> Sum:
        """Complete a sum with the locations of its operands."""
        operands = [operand for operand in (each.a, each.b) if operand is not None]
        return replace(each, operands={index: self.operand(index, "post", each.name) for index in operands})

    def completed(self, stage: Stage) -> Stage:
        """Complete a stage with the locations of all values that it reads."""
        operands: dict[int, Location] = {}
        starts: list[int] = []
        for index in stage.affines:
            start, terms = affine_parts(self.graph[index])
            starts += [] if start is None else [start]
            for row, _, _ in terms:
                operands[row] = self.operand(row, stage.phase, stage.name)
        if stage.nest is not None:
            for arg in self.graph[stage.nest].args:
                operands[arg] = self.operand(arg, stage.phase, stage.name)
        local = set(stage.results())
        ends = [*stage.stores, *(self.graph[index].args[0] for index in stage.reductions)]
        operands |= self._read(stage.phase, starts, set()) | self._read(stage.phase, ends, local)
        in_memory = stage.reductions if stage.nest is None else (stage.nest,)
        totals = {index: self.buffers.locations[index] for index in in_memory}
        return replace(stage, totals=totals, operands=operands)

    def _read(self, phase: Phase, roots: Iterable[int], local: set[int]) -> dict[int, Location]:
        """Return the locations that computing ``roots`` reads; ``local`` values are in registers."""
        operands: dict[int, Location] = {}
        pending = list(roots)
        seen = set(pending)
        while pending:
            index = pending.pop()
            location = None if index in local else self.location(index, phase)
            if location is not None:
                operands[index] = location
            elif self.graph[index].op != "affine":
                pending += [arg for arg in self.graph[index].args if arg not in seen]
                seen.update(self.graph[index].args)
        return operands

    def scratch(self) -> tuple[Buffer, ...]:
        """List every buffer of the scratch memory, once each."""
        buffers = [location.buffer for location in self.buffers.locations.values()]
        buffers += [*self.gathered.values(), *self.buffers.state_copies.values()]
        for stage in self.buffers.stages:
            buffers += [each.buffer for locations in stage.stores.values() for each in locations]
        return tuple(buffer for buffer in dict.fromkeys(buffers) if buffer.scope not in ("user", "saved"))


def _sliced(graph: Graph, index: int) -> tuple[int, int]:
    """Return the value that a slice, or a view, is a part of, and the feature at which the part begins."""
    offset = 0
    while PRIMITIVES[graph[index].op].in_place:
        node = graph[index]
        offset += node.attrs["start"] if node.op == "slice" else node.attrs["offset"]
        index = node.args[0]
    return index, offset


def _axes(node: Node) -> tuple[tuple[int, int], ...] | None:
    """Return the axes of a view, which is never one of another view."""
    if node.op != "view":
        return None
    return tuple(zip(node.attrs["shape"], node.attrs["strides"], strict=True))
