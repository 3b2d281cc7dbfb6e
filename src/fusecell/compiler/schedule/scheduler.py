"""From a graph to a plan: which value is computed where, in which stage, and in which memory it lives.

once   what needs weights only: one row, once per call.
lift   what needs x but no state and holds a product or a reduction: all rows of a chunk of steps at once.
loop   what leads from state to state: the rows of one step.
post   what nothing in the loop waits for: outputs read off by a product, sums for the gradients of weights.

A stage computes values of one width, for every row: its products accumulate first, then its pointwise values are
their epilogue. A value begins a new stage where it needs all columns of another: a product's operand, a reduction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from fusecell.compiler.ir.affine import affine_parts
from fusecell.compiler.ir.graph import SAVED, Graph
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.schedule.buffer_names import with_own_buffer_names
from fusecell.compiler.schedule.plan import Buffer, Phase, Place, Plan, Stage, Sum

__all__ = ["plan"]

PHASES: tuple[Phase, ...] = ("once", "lift", "loop", "post")
LEAVES = ("input", "state", "weight", "const")
REDUCTIONS = ("sum", "amax", "amin")
_MEMORY: dict[Phase, Literal["call", "chunk", "step"]] = {
    "once": "call",
    "lift": "chunk",
    "loop": "step",
    "post": "chunk",
}


def plan(graph: Graph, *, backward: bool = False) -> Plan:
    """Schedule a graph whose passes have run; ``backward`` if it is the gradient's."""
    return replace(_Scheduler(with_own_buffer_names(graph)).run(), backward=backward)


class _Scheduler:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.users = graph.users()
        self.late = graph.reaches(graph.leaves("state"))
        self.states = {
            graph[index].name: (index, graph.outputs[f"state.{graph[index].name}"]) for index in graph.leaves("state")
        }
        self.rows = {label: i for label, i in graph.outputs.items() if graph[i].type.kind in ("row", "mask")}
        self.row_outputs = {label: i for label, i in self.rows.items() if not label.startswith("state.")}
        self.phase: dict[int, Phase] = {}
        self.rank: dict[int, int] = {}
        self.homes: dict[int, Place] = {}
        self.gathered: dict[int, Buffer] = {}

    def run(self) -> Plan:
        self._choose_phases()
        stages = self._make_stages()
        made = Plan(self.graph, stages, self.homes, self.gathered, {}, [], {}, self.states)
        self._give_memory(made)
        return made

    # Which phase computes a value; those in none are cheap values of x and numbers, computed wherever they are used.

    def _choose_phases(self) -> None:
        graph = self.graph
        for_state = graph.needed(new for _, new in self.states.values())
        heavy = graph.reaches(i for i, node in graph if node.op in ("affine", *REDUCTIONS))
        for index, node in graph:
            if node.op in LEAVES or node.type.kind == "sum":
                continue
            if node.type.kind == "weight":
                self.phase[index] = "once"
            elif self.late[index]:
                after = node.op == "affine" or any(self.phase.get(arg) == "post" for arg in node.args)
                self.phase[index] = "post" if after and not for_state[index] else "loop"
            elif heavy[index]:
                self.phase[index] = "lift"
        self._choose_for_cheap()

    def _choose_for_cheap(self) -> None:
        """A cheap value that must be in memory is computed where the first of its users runs; users come last."""
        graph, outputs = self.graph, set(self.rows.values())
        for index in range(len(graph.nodes) - 1, -1, -1):
            node = graph[index]
            if index in self.phase or node.op in LEAVES or node.type.kind == "sum":
                continue
            phases: set[Phase] = {"loop"} if index in outputs else set()
            phases |= set(self._used_in(index))
            if phases and (node.op == "concat" or index in outputs or self._is_read_whole(index)):
                self.phase[index] = min(phases, key=PHASES.index)
        for index, node in graph:
            if node.op == "slice" and index not in self.phase and node.args[0] in self.phase:
                self.phase[index] = self.phase[node.args[0]]

    def _is_read_whole(self, index: int) -> bool:
        """Whether a value is read from memory for some user, though it is cheap: an operand, or cut into parts."""
        for user in self.users[index]:
            node = self.graph[user]
            if node.op in ("outer", "rowsum", "slice"):
                return True
            if node.op == "affine" and index in [row for row, _, _ in affine_parts(node)[1]]:
                return True
        return False

    def _used_in(self, index: int) -> Iterator[Phase]:
        """The phases that read a value, looking through parts and what is computed wherever it is used."""
        for user in self.users[index]:
            node = self.graph[user]
            if node.op in ("outer", "rowsum"):
                yield "post"
            elif user in self.phase and node.op != "slice":
                yield self.phase[user]
            else:
                yield from self._used_in(user)

    # Stages: a rank within each phase, so that a stage's operands are complete before it begins.

    def _make_stages(self) -> list[Stage]:
        stages: dict[tuple[Phase, int, int], Stage] = {}
        for index, node in self.graph:
            phase = self.phase.get(index)
            if phase is None:
                continue
            rank = self.rank[index] = self._rank(index)
            if node.op in ("slice", "concat"):
                continue
            width = self.graph[node.args[0]].size if node.op in REDUCTIONS else node.size
            stage = stages.setdefault((phase, rank, width), Stage(phase, rank, width))
            kind = "affines" if node.op == "affine" else "reductions" if node.op in REDUCTIONS else "pointwise"
            getattr(stage, kind).append(index)
        return sorted(stages.values(), key=lambda stage: (PHASES.index(stage.phase), stage.rank, stage.width))

    def _rank(self, index: int) -> int:
        node, phase = self.graph[index], self.phase[index]
        if node.op == "slice":
            return self._ready(node.args[0], phase)
        if node.op == "concat":
            return max(self._ready(arg, phase) + (not self._is_computed(arg, phase)) for arg in node.args)
        ranks = [0]
        for arg in self._local_args(index):
            if self.phase.get(arg) != phase:
                continue
            other = self.graph[arg]
            whole = node.op == "affine" or other.op in (*REDUCTIONS, "slice", "concat")
            whole |= node.op not in REDUCTIONS and other.size != node.size
            ranks.append(self._ready(arg, phase) if whole else self.rank[arg])
        return max(ranks)

    def _ready(self, index: int, phase: Phase) -> int:
        """The rank from which all columns of a value are in memory, or of all that it is computed from on the spot."""
        node = self.graph[index]
        if index not in self.phase and node.op not in LEAVES:
            return max((self._ready(arg, phase) for arg in node.args), default=0)
        if self.phase.get(index) != phase:
            return 0
        return self.rank[index] + (0 if node.op in ("slice", "concat") else 1)

    def _is_computed(self, index: int, phase: Phase) -> bool:
        """Whether a stage of ``phase`` makes a value and can store it anywhere; else it has to be loaded first."""
        return self.phase.get(index) == phase and self.graph[index].op not in ("slice", "concat", *REDUCTIONS)

    def _local_args(self, index: int) -> Iterator[int]:
        """The arguments in some phase, looking through those that are computed wherever they are used."""
        for arg in self.graph[index].args:
            if arg in self.phase or self.graph[arg].op in LEAVES:
                yield arg
            else:
                yield from self._local_args(arg)

    # Memory.

    def _give_memory(self, made: Plan) -> None:
        graph = self.graph
        for index, node in graph:
            if node.op == "input":
                saved = node.name.startswith(SAVED)
                buffer = (
                    Buffer(node.name, "saved", node.size) if saved else Buffer(f"in.{node.name}", "user", node.size)
                )
                self.homes[index] = Place(buffer)
            elif node.op == "state":
                self.homes[index] = Place(Buffer(f"state.{node.name}", "state", node.size))
            elif node.op == "weight" and len(node.type.shape) < 2:
                self.homes[index] = Place(Buffer(f"{node.name}.packed", "call", node.size))
        for index, node in graph:
            if index in self.phase and node.op not in ("slice",):
                self._give_home(made, index)
        self._give_outputs(made)
        self._give_sums(made)
        self._keep_states(made)
        self._gather_inputs(made)

    def _give_home(self, made: Plan, index: int) -> None:
        """Memory for a value that another stage reads."""
        phases = {phase for phase in self._read_in(index) if phase is not None}
        if phases:
            late = self.phase[index] == "loop" and phases - {"loop"}
            self._make_home(made, index, "chunk" if late else _MEMORY[self.phase[index]])

    def _make_home(self, made: Plan, index: int, scope: Literal["call", "chunk", "step"]) -> None:
        node = self.graph[index]
        place = Place(Buffer(node.name, scope, node.size))
        if node.op == "concat":
            self._store_parts(made, index, place, before=index)
        elif node.op not in REDUCTIONS:  # they write where they live by themselves
            self._store(made, index, place)
        self.homes[index] = place

    def _read_in(self, index: int) -> Iterator[Phase | None]:
        """The phases of the stages that read a value from memory; None for a use that reads a register."""
        mine, rank = self.phase[index], self.rank[index]
        node = self.graph[index]
        for user in self.users[index]:
            other = self.graph[user]
            if other.op in ("slice", "concat") and user in self.phase:
                yield from self._read_in(user)
            elif other.op in ("outer", "rowsum"):
                yield "post"
            elif user not in self.phase:
                yield from self._used_in(user)
            elif node.op in (*REDUCTIONS, "slice", "concat") or other.op == "affine" or self.phase[user] != mine:
                yield self.phase[user]
            else:
                same = self.rank[user] == rank and self._stage_width(user) == self._stage_width(index)
                yield None if same else mine

    def _stage_width(self, index: int) -> int:
        node = self.graph[index]
        return self.graph[node.args[0]].size if node.op in REDUCTIONS else node.size

    def _store(self, made: Plan, index: int, place: Place, before: int | None = None) -> None:
        """Have the stage that computes a value store it; what can't be stored from there is loaded and stored again.

        Arguments:
            before: the joined value that this is stored for, if any waits for it.
        """
        if self.graph[index].op == "concat" and index not in self.homes:
            self._store_parts(made, index, place, before)
        else:
            self._stage_of(made, index, place, before).stores.setdefault(index, []).append(place)

    def _store_parts(self, made: Plan, index: int, place: Place, before: int | None) -> None:
        offset = place.offset
        for part in self.graph[index].args:
            self._store(made, part, Place(place.buffer, offset), before)
            offset += self.graph[part].size

    def _stage_of(self, made: Plan, index: int, place: Place, before: int | None) -> Stage:
        size, mine = self.graph[index].size, self.phase.get(index)
        stepwise = place.buffer.scope in ("state", "user", "step")
        if mine is not None and self._is_computed(index, mine) and (mine == "loop" or not stepwise):
            return next(stage for stage in made.stages if index in stage.results() and stage.phase == mine)
        # What is only moved is loaded and stored by a stage of its width, or by one made for it.
        self._ensure_home(made, index)
        joined: Phase = "lift" if before is None else self.phase[before]
        at_hand = max([joined, self._latest(index)], key=PHASES.index)
        phase: Phase = "loop" if stepwise else mine or at_hand
        rank = self._ready(index, phase)
        waits = before is not None and self.phase[before] == phase
        for stage in made.stages:
            in_time = before is None or not waits or stage.rank < self.rank[before]
            if stage.phase == phase and stage.width == size and stage.rank >= rank and in_time:
                return stage
        stage = Stage(phase, rank, size)
        made.stages.append(stage)
        made.stages.sort(key=lambda stage: (PHASES.index(stage.phase), stage.rank, stage.width))
        return stage

    def _latest(self, index: int) -> Phase:
        """The first phase in which all is at hand that a value is computed from on the spot."""
        node = self.graph[index]
        if index in self.phase or node.op in LEAVES:
            return self.phase.get(index) or ("loop" if node.op == "state" else "once")
        phases: list[Phase] = [self._latest(arg) for arg in node.args]
        return max(phases, key=PHASES.index)

    def _ensure_home(self, made: Plan, index: int) -> None:
        """Memory for a value of which at least a part is loaded to be stored again."""
        if self.graph[index].op == "slice":
            self._ensure_home(made, self.graph[index].args[0])
        elif index in self.phase and index not in self.homes:
            self._make_home(made, index, _MEMORY[self.phase[index]])

    def _give_outputs(self, made: Plan) -> None:
        for name, (_, new) in self.states.items():
            self._store(made, new, Place(Buffer(f"state.{name}", "state", self.graph[new].size)))
        for label, index in self.row_outputs.items():
            if label.startswith(SAVED):
                self._store(made, index, Place(Buffer(label, "saved", self.graph[index].size)))
            elif self.phase.get(index) in ("lift", "post"):
                made.scattered[label] = index
                self._ensure_home(made, index)
            else:
                self._store(made, index, Place(Buffer(f"out.{label}", "user", self.graph[index].size)))

    def _give_sums(self, made: Plan) -> None:
        for label, index in self.graph.outputs.items():
            if self.graph[index].type.kind == "sum":
                for a, b, flipped, corner in _contributions(self.graph, index, False, (0, 0)):
                    made.sums.append(self._sum(f"sum.{len(made.sums)}", label, a, b, flipped, corner))

    def _sum(self, name: str, label: str, a: int | None, b: int, flipped: bool, corner: tuple[int, int]) -> Sum:
        """A sum whose columns, whole vectors, run over the operand that fills them better."""
        size = self.graph[b].size
        if a is None:
            return Sum(name, label, None, b, 1, size, corner, flipped)
        height = self.graph[a].size
        if height * -(-size // LANES) > size * -(-height // LANES):
            return Sum(name, label, b, a, size, height, corner[::-1], not flipped)
        return Sum(name, label, a, b, height, size, corner, flipped)

    def _keep_states(self, made: Plan) -> None:
        """A state that a product after the loop reads is copied for it, step by step."""
        for index in self.graph.leaves("state"):
            if any(phase == "post" for phase in self._used_in(index)):
                node = self.graph[index]
                made.kept[index] = Buffer(f"{node.name}.rows", "chunk", node.size)
                self._store(made, index, Place(made.kept[index]))

    def _gather_inputs(self, made: Plan) -> None:
        """Inputs that products outside the loop read are brought into rows of the chunk."""
        read: set[int] = set()
        for stage in made.stages:
            if stage.phase in ("lift", "post"):
                read |= _leaf_inputs(made, stage)
        for found in made.sums:
            for operand in (found.a, found.b):
                if operand is not None:
                    read |= _leaves_of(self.graph, operand)
        for index in sorted(read):
            node = self.graph[index]
            if node.name.startswith(SAVED):
                continue
            self.gathered[index] = Buffer(f"{node.name}.rows", "chunk", node.size)


def _leaf_inputs(made: Plan, stage: Stage) -> set[int]:
    """The inputs that a stage reads, directly or through values computed wherever they are used."""
    graph, found = made.graph, set()
    local = set(stage.results())
    computed = [*stage.reductions, *local]
    stack = [arg for index in computed for arg in graph[index].args]
    stack += [index for index in stage.stores if index not in local]
    seen: set[int] = set()
    while stack:
        index = stack.pop()
        if index in seen:
            continue
        seen.add(index)
        node = graph[index]
        if node.op == "input":
            found.add(index)
        elif index not in local and (node.op == "slice" or made.place(index, stage.phase) is None):
            stack.extend(node.args)
    return found


def _leaves_of(graph: Graph, index: int) -> set[int]:
    node = graph[index]
    if node.op == "slice":
        return _leaves_of(graph, node.args[0])
    return {index} if node.op == "input" else set()


def _contributions(
    graph: Graph, index: int, flipped: bool, corner: tuple[int, int]
) -> Iterator[tuple[int | None, int, bool, tuple[int, int]]]:
    """The outer products and row sums that a gradient of a weight is made of; a vector is a matrix of one row."""
    node = graph[index]
    if node.op == "total":
        for arg in node.args:
            yield from _contributions(graph, arg, flipped, corner)
    elif node.op == "transpose":
        yield from _contributions(graph, node.args[0], not flipped, corner[::-1])
    elif node.op == "place":
        offset = (0, *node.attrs["corner"])[-2:]
        yield from _contributions(graph, node.args[0], flipped, (corner[0] + offset[0], corner[1] + offset[1]))
    elif node.op == "outer":
        yield node.args[0], node.args[1], flipped, corner
    else:
        yield None, node.args[0], flipped, corner
