"""Assign a buffer to every value that one stage writes and another reads, and have stages store them there.

Values that pass from one stage to another within a step need memory for a step's rows; those that stages outside the
loop read need it for all rows of a chunk. A concatenation is never computed: each of its parts is stored where it
belongs in the whole. What only moves, such as an input that is saved as it is, is loaded by some stage of its width
and stored again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from fusecell.compiler.ir.graph import SAVED, Graph
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.compiler.schedule.phases import Phases, row_outputs, states_of
from fusecell.compiler.schedule.plan import PHASES, SCOPES, Buffer, Location, Phase, Scope, Stage
from fusecell.compiler.schedule.stages import Stages

__all__ = ["Buffers", "assign_buffers"]


@dataclass(frozen=True)
class Buffers:
    """The memory of a schedule.

    Attributes:
        stages: in the order in which they run, with all that they store; some are added only to move values.
        locations: where each value is, for those that are in memory.
        state_copies: the states that stages after the loop read, with the chunk's buffers that keep them for it.
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
    """Assign buffers one by one; what has been assigned so far is in the attributes.

    Attributes:
        locations: where each value is, for those that are in memory.
        state_copies: the states that stages after the loop read, with the chunk's buffers that keep them for it.
        stages: in the order in which they run; some are added only to move values.
        stores: what each stage writes, by its name.
    """

    def __init__(self, graph: Graph, phases: Phases, stages: Stages) -> None:
        self.graph, self.phases, self.schedule = graph, phases, stages
        self.users = graph.users()
        self.locations: dict[int, Location] = {}
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
        """Return the phases of the stages that read a value from memory, alone, in slices or as a part of a whole."""
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
        # The prefix tells it from a kernel's own buffers, whatever the user's variable is called.
        location = Location(Buffer(f"value.{node.name}", scope, node.size))
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
        waiting: Phase = "hoisted" if before is None else self.phases.of[before]
        at_hand: Phase = max(waiting, self._latest_phase(index), key=PHASES.index)
        return self._moving_stage(index, phase or at_hand, before)

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
        """Return the first phase in which all is at hand that a value is computed from on the spot."""
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

    def stages_with_stores(self) -> tuple[Stage, ...]:
        """List the stages with all that they store."""
        return tuple(
            replace(stage, stores={index: tuple(each) for index, each in self.stores[stage.name].items()})
            for stage in self.stages
        )
