"""Assign a buffer to every value that one stage writes and another reads, and have stages store and find them there.

Values that pass from one stage to another within a step need memory for a step's rows; those that stages outside the
loop read need it for all rows of a chunk. A concatenation is never computed: each of its parts is stored where it
belongs in the whole. What only moves, such as an input that is saved as it is, is loaded by some stage of its width
and stored again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate

from fusecell.compiler.ir.affine import affine_parts
from fusecell.compiler.ir.graph import SAVED, Graph
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.compiler.ir.sizes import padded
from fusecell.compiler.schedule.phases import Phases, row_outputs, states_of
from fusecell.compiler.schedule.plan import PHASES, SCOPES, Buffer, Location, Phase, Plan, Scope, Stage, Sum
from fusecell.compiler.schedule.stages import Stages
from fusecell.errors import CompilerError

__all__ = ["assign_buffers"]


def assign_buffers(graph: Graph, phases: Phases, stages: Stages, *, backward: bool) -> Plan:
    """Complete a schedule: memory for values, what stages store, and where they find what they read."""
    assignment = _Assignment(graph, phases, stages)
    assignment.place_leaves()
    assignment.place_shared_values()
    scattered = assignment.place_outputs()
    sums = _sums(graph)
    assignment.copy_states_for_post()
    assignment.gather_inputs(sums)
    completed = tuple(assignment.completed(stage) for stage in assignment.stages)
    return Plan(
        graph=graph,
        stages=completed,
        buffers=assignment.scratch(),
        vectors={index: assignment.locations[index].buffer for index in _vectors(graph)},
        gathered=assignment.gathered,
        scattered={label: assignment.operand(index, "post", f"output {label}") for label, index in scattered.items()},
        sums=tuple(assignment.located(each) for each in sums),
        states=states_of(graph),
        backward=backward,
    )


class _Assignment:
    """What has been assigned so far.

    Attributes:
        locations: where each value is, for those that are in memory.
        gathered: the inputs that stages outside the loop read, with the chunk's buffers they are copied into.
        state_copies: the states that stages after the loop read, with the chunk's buffers that keep them for it.
        stages: in the order in which they run; some are added only to move values.
        stores: what each stage writes, by its name.
    """

    def __init__(self, graph: Graph, phases: Phases, stages: Stages) -> None:
        self.graph, self.phases, self.schedule = graph, phases, stages
        self.users = graph.users()
        self.locations: dict[int, Location] = {}
        self.gathered: dict[int, Buffer] = {}
        self.state_copies: dict[int, Buffer] = {}
        self.stages: list[Stage] = list(stages.stages)
        self.stores: dict[str, dict[int, list[Location]]] = {stage.name: {} for stage in stages.stages}

    # Which values are in memory.

    def place_leaves(self) -> None:
        """Place inputs where the caller has them, states in their two copies, and vectors of weights in one of ours."""
        for index, node in self.graph:
            if node.op == "input":
                saved = node.name.startswith(SAVED)
                self._place(index, node.name if saved else f"in.{node.name}", "saved" if saved else "user")
            elif node.op == "state":
                self._place(index, f"state.{node.name}", "state")
            elif node.op == "weight" and len(node.type.shape) < 2:
                self._place(index, f"{node.name}.packed", "call")

    def _place(self, index: int, name: str, scope: Scope) -> None:
        self.locations[index] = Location(Buffer(name, scope, self.graph[index].size))

    def place_shared_values(self) -> None:
        """Place every value that another stage reads."""
        for index, node in self.graph:
            phase = self.phases.of.get(index)
            if phase is None or node.op == "slice":
                continue
            reading = self._reading_phases(index)
            if reading:
                self._place_value(index, "chunk" if phase == "loop" and reading - {"loop"} else SCOPES[phase])

    def _reading_phases(self, index: int) -> set[Phase]:
        """The phases of the stages that read a value from memory, by itself, by slices or as a part of a whole."""
        reading: set[Phase] = set()
        pending, seen = [index], {index}
        while pending:
            value = pending.pop()
            for user in self.users[value]:
                if PRIMITIVES[self.graph[user].op].movement and user in self.phases.of:
                    if user not in seen:
                        seen.add(user)
                        pending.append(user)
                elif self.graph[user].op in ("outer", "rowsum"):
                    reading.add("post")
                elif user not in self.phases.of:
                    reading |= self.phases.readers[user]
                elif not self._is_register(value, user):
                    reading.add(self.phases.of[user])
        return reading

    def _is_register(self, index: int, user: int) -> bool:
        """Whether a value is still in a register when a user of it is computed."""
        primitive = PRIMITIVES[self.graph[index].op]
        if primitive.reduction or primitive.movement or self.graph[user].op == "affine":
            return False
        return self.schedule.stage_of[user] == self.schedule.stage_of[index]

    def _place_value(self, index: int, scope: Scope) -> None:
        """Give a value a buffer and have its stage store it there; a reduction's total is written there anyway."""
        node = self.graph[index]
        location = Location(Buffer(node.name, scope, node.size))
        if not PRIMITIVES[node.op].reduction:
            self._store(index, location, before=index if node.op == "concat" else None)
        self.locations[index] = location

    def _ensure_placed(self, index: int) -> None:
        """Give a value memory of which at least a part is loaded to be stored again."""
        while self.graph[index].op == "slice":
            index = self.graph[index].args[0]
        phase = self.phases.of.get(index)
        if phase is not None and index not in self.locations:
            self._place_value(index, SCOPES[phase])

    # Which stage stores them.

    def _store(self, index: int, location: Location, before: int | None = None) -> None:
        """Have the stage that computes a value store it, and of a concatenation each part where it is in the whole.

        Arguments:
            before: the concatenation that this is stored for, if a stage waits for it.
        """
        pending = [(index, location.offset)]
        while pending:
            value, offset = pending.pop()
            node = self.graph[value]
            if node.op == "concat" and value not in self.locations:
                starts = accumulate((self.graph[part].size for part in node.args), initial=offset)
                pending.extend(reversed(list(zip(node.args, starts, strict=False))))
            else:
                target = Location(location.buffer, offset)
                self.stores[self._storing_stage(value, target, before)].setdefault(value, []).append(target)

    def _storing_stage(self, index: int, location: Location, before: int | None) -> str:
        """Name the stage that stores a value; one that isn't computed there is loaded by it first."""
        phase = self.phases.of.get(index)
        by_step = location.buffer.scope in ("state", "user", "step")
        primitive = PRIMITIVES[self.graph[index].op]
        if phase is not None and not (primitive.movement or primitive.reduction) and (phase == "loop" or not by_step):
            return self.schedule.stage_of[index]
        self._ensure_placed(index)
        if by_step:
            return self._moving_stage(index, "loop", before)
        if phase is None:
            waiting: Phase = "hoisted" if before is None else self.phases.of[before]
            phase = max(waiting, self._latest_phase(index), key=PHASES.index)
        return self._moving_stage(index, phase, before)

    def _moving_stage(self, index: int, phase: Phase, before: int | None) -> str:
        """Name a stage of a value's width that runs after the value is ready, and before what waits for it.

        Where there is none, one is added that does nothing else.
        """
        size, rank = self.graph[index].size, self.schedule.ready[index].get(phase, 0)
        end = math.inf
        if before is not None and self.phases.of[before] == phase:
            end = self.schedule.ranks[before]
        for stage in self.stages:
            if stage.phase == phase and stage.width == size and rank <= stage.rank < end:
                return stage.name
        stage = Stage(phase=phase, rank=rank, width=size)
        self.stages.append(stage)
        self.stages.sort(key=lambda stage: stage.order)
        self.stores[stage.name] = {}
        return stage.name

    def _latest_phase(self, index: int) -> Phase:
        """The first phase in which all is at hand that a value is computed from on the spot."""
        latest: Phase = "once"
        pending, seen = [index], {index}
        while pending:
            value = pending.pop()
            node = self.graph[value]
            if value in self.phases.of or PRIMITIVES[node.op].leaf:
                phase = self.phases.of.get(value) or ("loop" if node.op == "state" else "once")
                latest = max(latest, phase, key=PHASES.index)
            else:
                pending += [arg for arg in node.args if arg not in seen]
                seen.update(node.args)
        return latest

    def place_outputs(self) -> dict[str, int]:
        """Have states, saved values and outputs stored for the next step, the backward and the caller.

        Returns:
            The outputs of stages outside the loop, which are copied to the caller's rows a chunk at a time.
        """
        scattered: dict[str, int] = {}
        for name, (_, new) in states_of(self.graph).items():
            self._store(new, Location(Buffer(f"state.{name}", "state", self.graph[new].size)))
        for label, index in row_outputs(self.graph).items():
            size = self.graph[index].size
            if label.startswith("state."):
                continue
            if label.startswith(SAVED):
                self._store(index, Location(Buffer(label, "saved", size)))
            elif self.phases.of.get(index) in ("hoisted", "post"):
                scattered[label] = index
                self._ensure_placed(index)
            else:
                self._store(index, Location(Buffer(f"out.{label}", "user", size)))
        return scattered

    def copy_states_for_post(self) -> None:
        """Have a state that a stage after the loop reads copied for it, step by step."""
        for index in self.graph.leaves("state"):
            if "post" in self.phases.readers[index]:
                node = self.graph[index]
                self.state_copies[index] = Buffer(f"{node.name}.rows", "chunk", node.size)
                self._store(index, Location(self.state_copies[index]))

    def gather_inputs(self, sums: Iterable[Sum]) -> None:
        """Have the inputs that are read outside the loop brought into rows of the chunk, but for what is saved."""
        reading: set[int] = set()
        for stage in self.stages:
            if stage.phase in ("hoisted", "post"):
                reading |= self._inputs_of(stage)
        for each in sums:
            reading |= {_sliced(self.graph, operand)[0] for operand in (each.a, each.b) if operand is not None}
        for index in sorted(reading):
            node = self.graph[index]
            if node.op == "input" and not node.name.startswith(SAVED):
                self.gathered[index] = Buffer(f"{node.name}.rows", "chunk", node.size)

    def _inputs_of(self, stage: Stage) -> set[int]:
        """The inputs that a stage reads, directly or through values that it computes on the spot."""
        local = set(stage.results())
        pending = [arg for index in (*stage.reductions, *local) for arg in self.graph[index].args]
        pending += [index for index in self.stores[stage.name] if index not in local]
        inputs, seen = set(), set(pending)
        while pending:
            index = pending.pop()
            node = self.graph[index]
            if node.op == "input":
                inputs.add(index)
            elif index not in local and (node.op == "slice" or self.location(index, stage.phase) is None):
                pending += [arg for arg in node.args if arg not in seen]
                seen.update(node.args)
        return inputs

    # Where they are read.

    def location(self, index: int, phase: Phase) -> Location | None:
        """Where a stage of ``phase`` finds a value; None if it is nowhere in memory."""
        index, offset = _sliced(self.graph, index)
        node = self.graph[index]
        if node.op == "input" and phase in ("hoisted", "post") and not node.name.startswith(SAVED):
            rows = self.gathered.get(index)
        elif node.op == "state" and phase == "post":
            rows = self.state_copies.get(index)
        else:
            location = self.locations.get(index)
            return location and Location(location.buffer, location.offset + offset)
        return None if rows is None else Location(rows, offset)

    def operand(self, index: int, phase: Phase, user: str) -> Location:
        """Where a value is that can't be computed on the spot."""
        location = self.location(index, phase)
        if location is None:
            raise CompilerError(f"{self.graph[index].name}, an operand of {user}, is nowhere in memory")
        return location

    def located(self, each: Sum) -> Sum:
        """A sum with the locations of its operands."""
        operands = [operand for operand in (each.a, each.b) if operand is not None]
        return replace(each, operands={index: self.operand(index, "post", each.name) for index in operands})

    def completed(self, stage: Stage) -> Stage:
        """A stage with all that it stores and the locations of all that it reads."""
        stores = {index: tuple(locations) for index, locations in self.stores[stage.name].items()}
        operands: dict[int, Location] = {}
        starts: list[int] = []
        for index in stage.affines:
            start, terms = affine_parts(self.graph[index])
            starts += [] if start is None else [start]
            for row, _, _ in terms:
                operands[row] = self.operand(row, stage.phase, stage.name)
        local = set(stage.results())
        ends = [*stores, *(self.graph[index].args[0] for index in stage.reductions)]
        operands |= self._read(stage.phase, starts, set()) | self._read(stage.phase, ends, local)
        totals = {index: self.locations[index] for index in stage.reductions}
        return replace(stage, stores=stores, totals=totals, operands=operands)

    def _read(self, phase: Phase, roots: Iterable[int], local: set[int]) -> dict[int, Location]:
        """The locations that computing ``roots`` reads; ``local`` values are in registers."""
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
        """Every buffer of the scratch memory, once each."""
        buffers = [location.buffer for location in self.locations.values()]
        buffers += [*self.gathered.values(), *self.state_copies.values()]
        for stage in self.stages:
            buffers += [each.buffer for locations in self.stores[stage.name].values() for each in locations]
        return tuple(buffer for buffer in dict.fromkeys(buffers) if buffer.scope not in ("user", "saved"))


def _sliced(graph: Graph, index: int) -> tuple[int, int]:
    """The value that a slice, or a slice of a slice, is a part of, and the feature at which the part begins."""
    offset = 0
    while graph[index].op == "slice":
        offset += graph[index].attrs["start"]
        index = graph[index].args[0]
    return index, offset


def _vectors(graph: Graph) -> list[int]:
    """The weights that are vectors."""
    return [index for index in graph.leaves("weight") if len(graph[index].type.shape) < 2]


def _sums(graph: Graph) -> list[Sum]:
    """The sums over rows that the gradients of weights are made of."""
    sums: list[Sum] = []
    for label, index in graph.outputs.items():
        if graph[index].type.kind == "sum":
            for a, b, flipped, corner in _contributions(graph, index):
                sums.append(_sum(graph, f"sum.{len(sums)}", label, a, b, flipped, corner))
    return sums


def _sum(graph: Graph, name: str, label: str, a: int | None, b: int, flipped: bool, corner: tuple[int, int]) -> Sum:
    """A sum whose columns, whole vectors, run over the operand that fills them better."""
    height, width = 1 if a is None else graph[a].size, graph[b].size
    if a is not None and height * padded(width) > width * padded(height):
        a, b, height, width, corner, flipped = b, a, width, height, corner[::-1], not flipped
    return Sum(name=name, label=label, a=a, b=b, height=height, width=width, corner=corner, flipped=flipped)


def _contributions(graph: Graph, index: int) -> Iterator[tuple[int | None, int, bool, tuple[int, int]]]:
    """The outer products and row sums that a gradient of a weight is made of; a vector is a matrix of one row."""
    pending: list[tuple[int, bool, tuple[int, int]]] = [(index, False, (0, 0))]
    while pending:
        value, flipped, corner = pending.pop()
        node = graph[value]
        if node.op == "total":
            pending += [(arg, flipped, corner) for arg in reversed(node.args)]
        elif node.op == "transpose":
            pending.append((node.args[0], not flipped, corner[::-1]))
        elif node.op == "place":
            row, column = (0, *node.attrs["corner"])[-2:]
            pending.append((node.args[0], flipped, (corner[0] + row, corner[1] + column)))
        elif node.op == "outer":
            yield node.args[0], node.args[1], flipped, corner
        else:
            yield None, node.args[0], flipped, corner
