"""Assign a buffer to every value that one stage writes and another reads, and have stages store them there.

Values that pass from one stage to another within a step need memory for a step's rows; those that stages outside the
loop read need it for all rows of a chunk. A concatenation is never computed: each of its parts is stored where it
belongs in the whole. A value that is only moved, such as an input that is saved, is loaded by some stage of its width
and stored again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from fusecell.compiler.ir.affine import paired_operands
from fusecell.compiler.ir.graph import SAVED, Graph
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.compiler.schedule.phases import Phases, row_outputs, states_of
from fusecell.compiler.schedule.plan import PHASES, SCOPES, Buffer, Location, Phase, Scope, Stage
from fusecell.compiler.schedule.stages import Stages

__all__ = ["Buffers", "assign_buffers"]


@dataclass(frozen=True)
class Buffers:
    """Memory of a schedule.

    Attributes:
        stages: in the order in which they run, with all that they store; some are added only to move values.
        locations: of all values that are in memory.
        state_copies: the states that stages after the loop read, with the chunk's buffers that they are copied to.
        scattered: the outputs of stages outside the loop, which are copied to the caller's rows a chunk at a time.
    """

    stages: tuple[Stage, ...]
    locations: Mapping[int, Location]
    state_copies: Mapping[int, Buffer]
    scattered: Mapping[str, int]


def assign_buffers(graph: Graph, phases: Phases, stages: Stages) -> Buffers:
    """Give memory to leaves, to values that another stage reads, and to outputs, and have each stored by a stage."""
    assignment = _Assignment(graph, phases, stages)
    assignment.place_leaves()
    assignment.place_shared_values()
    scattered = assignment.place_outputs()
    assignment.copy_states_for_post()
    return Buffers(assignment.stages_with_stores(), assignment.locations, assignment.state_copies, scattered)


class _Assignment:
    """Buffer assignment in progress.

    Attributes:
        locations: of all values that are in memory so far.
        state_copies: the states that stages after the loop read, with the chunk's buffers that they are copied to.
        stages: in the order in which they run; some are added only to move values.
        stores: the values that each stage writes, by its name, with their locations.
    """

    def __init__(self, graph: Graph, phases: Phases, stages: Stages) -> None:
        self.graph, self.phases, self.schedule = graph, phases, stages
        self.users = graph.users()
        self.in_pairs = paired_operands(graph)
        self.locations: dict[int, Location] = {}
        self.state_copies: dict[int, Buffer] = {}
        self.stages: list[Stage] = list(stages.stages)
        self.stores: dict[str, dict[int, list[Location]]] = {stage.name: {} for stage in stages.stages}

    # Which values are in memory.

    def place_leaves(self) -> None:
        """Place inputs in the caller's tensors, states in two copies, and vectors of weights in a padded copy."""
        for index, node in self.graph:
            if node.op == "input":
                saved = node.name.startswith(SAVED)
                self._place(index, node.name if saved else f"in.{node.name}", "saved" if saved else "user")
            elif node.op == "state":
                self._place(index, f"state.{node.name}", "state")
            elif node.op == "weight" and (len(node.type.shape) < 2 or self._is_read_by_nest(index)):
                self._place(index, f"{node.name}.packed", "call")

    def _is_read_by_nest(self, index: int) -> bool:
        primitives = (PRIMITIVES[self.graph[user].op] for user in self.users[index])
        return any(primitive.is_whole or primitive.in_place for primitive in primitives)

    def _place(self, index: int, name: str, scope: Scope) -> None:
        self.locations[index] = Location(Buffer(name, scope, math.prod(self.graph[index].type.shape)))

    def place_shared_values(self) -> None:
        """Place every value that another stage reads."""
        for index, node in self.graph:
            phase = self.phases.of.get(index)
            if phase is None or PRIMITIVES[node.op].in_place:
                continue
            reading = self._reading_phases(index)
            # A step's memory is overwritten by the next step: what is read after the loop has a chunk's.
            if reading:
                self._place_value(index, "chunk" if phase == "loop" and reading - {"loop"} else SCOPES[phase])

    def _reading_phases(self, index: int) -> set[Phase]:
        """Return the phases of the stages that read a value from its own memory: all of it, or slices of it."""
        reading: set[Phase] = set()
        pending, seen = [index], {index}
        while pending:
            value = pending.pop()
            for user in self.users[value]:
                if self.graph[user].op == "concat" and user in self.phases.of:
                    continue  # its parts are stored in its own memory
                if PRIMITIVES[self.graph[user].op].movement and user in self.phases.of:
                    if user not in seen:
                        seen.add(user)
                        pending.append(user)
                elif PRIMITIVES[self.graph[user].op].reads_rows:
                    reading.add("post")
                elif user not in self.phases.of:
                    reading |= self.phases.readers[user]
                elif not self._is_register(value, user):
                    reading.add(self.phases.of[user])
        return reading

    def _is_register(self, index: int, user: int) -> bool:
        """Whether a value is still in a register when a user of it is computed."""
        primitive, op = PRIMITIVES[self.graph[index].op], self.graph[user].op
        # An epilogue goes through a tile row by row and column by column: of a value it has just these in registers.
        if primitive.reduction or primitive.movement or primitive.nest or op == "affine" or PRIMITIVES[op].nest:
            return False
        return self.schedule.stage_of[user] == self.schedule.stage_of[index]

    def _place_value(self, index: int, scope: Scope) -> None:
        """Give a value a buffer and have its stage store it there; reductions and nests are written there anyway."""
        node = self.graph[index]
        # The prefix tells it from a kernel's own buffers, whatever the user's variable is called.
        location = Location(Buffer(f"value.{node.name}", scope, node.size, index in self.in_pairs))
        if not (PRIMITIVES[node.op].reduction or PRIMITIVES[node.op].nest):
            self._store(index, location, before=index if node.op == "concat" else None)
        self.locations[index] = location

    def _ensure_placed(self, index: int) -> None:
        """Place a value that a stage is going to load, all of it or a slice, to store it elsewhere."""
        while PRIMITIVES[self.graph[index].op].in_place:
            index = self.graph[index].args[0]
        phase = self.phases.of.get(index)
        if phase is not None and index not in self.locations:
            self._place_value(index, SCOPES[phase])

    # Which stage stores them.

    def _store(self, index: int, location: Location, before: int | None = None) -> None:
        """Have the stage that computes a value store it; of a concatenation, each part at its offset in the whole.

        Arguments:
            before: the concatenation that it is a part of, if a stage waits for that.
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
        """Return the name of the stage that stores a value; it loads the value first if it doesn't compute it."""
        phase = self.phases.of.get(index)
        # States and the caller's rows are addressed step by step, so that only a stage of the loop can write them.
        by_step = location.buffer.scope in ("state", "user", "step")
        primitive = PRIMITIVES[self.graph[index].op]
        in_memory = primitive.movement or primitive.reduction or primitive.nest
        if phase is not None and not in_memory and (phase == "loop" or not by_step):
            return self.schedule.stage_of[index]
        self._ensure_placed(index)
        if by_step:
            return self._moving_stage(index, "loop", before)
        needed_in: Phase = "hoisted" if before is None else self.phases.of[before]
        earliest: Phase = max(needed_in, self._latest_phase(index), key=PHASES.index)
        return self._moving_stage(index, phase or earliest, before)

    def _moving_stage(self, index: int, phase: Phase, before: int | None) -> str:
        """Return the name of a stage of a value's width that runs after the value is ready, and before it is needed.

        Where there is none, one is added that does nothing else.
        """
        size, rank = self.graph[index].size, self.schedule.ready[index].get(phase, 0)
        end = math.inf
        if before is not None and self.phases.of[before] == phase:
            end = self.schedule.ranks[before]
        for stage in self.stages:
            is_free = stage.nest is None and stage.phase == phase and stage.width == size
            if is_free and rank <= stage.rank < end:
                return stage.name
        stage = Stage(phase=phase, rank=rank, width=size)
        self.stages.append(stage)
        self.stages.sort(key=lambda stage: stage.order)
        self.stores[stage.name] = {}
        return stage.name

    def _latest_phase(self, index: int) -> Phase:
        """Return the first phase in which all values are available that a value without a phase is computed from."""
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
        """Have new states, saved values and outputs stored for the next step, the backward and the caller.

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
        """Have the states that stages after the loop read copied in each step, as the next step overwrites them."""
        for index in self.graph.leaves("state"):
            if "post" in self.phases.readers[index]:
                node = self.graph[index]
                self.state_copies[index] = Buffer(f"{node.name}.rows", "chunk", node.size)
                self._store(index, Location(self.state_copies[index]))

    def stages_with_stores(self) -> tuple[Stage, ...]:
        """List the stages with all that they store."""
        return tuple(
            replace(stage, stores={index: tuple(each) for index, each in self.stores[stage.name].items()})
            for stage in self.stages
        )
