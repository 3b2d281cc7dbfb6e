"""Group the values of each phase into stages, so that the operands of a stage are complete before it begins.

A stage computes values of one width, for every row: its products accumulate first, then its pointwise values are
their epilogue. A value begins a new stage where it needs all columns of another, as the operand of a product or a
reduction, because a stage computes a tile of columns from start to end before it begins the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusecell.compiler.ir.graph import Graph, Node
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.compiler.schedule.phases import Phases
from fusecell.compiler.schedule.plan import Phase, Stage

__all__ = ["Stages", "make_stages"]

Sources = Mapping[tuple[Phase, int], tuple[int, int]]
"""The values in stages that a value is, or is computed from without a stage: by phase and width, the latest rank from
which a column of them can be read, and from which all columns can. Merged like this, and not listed node by node, they
take the same time however deep a graph is."""
STAGE_COST = 640
"""Vector instructions of a stage's pointwise values, about, beyond which the next stage begins: LLVM's time for a
function grows with the square of its length."""
_COSTS = {
    **dict.fromkeys(("exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf"), 20),
    **dict.fromkeys(("sin", "cos", "pow"), 60),
    **dict.fromkeys(
        ("round", "copysign", "to_float16", "to_bfloat16", "to_float32", "fmod", "nextafter", "mantissa"), 10
    ),
    **dict.fromkeys(("atan", "atan2"), 30),
    **dict.fromkeys(("lgamma", "digamma", "trigamma", "erfinv", "i0e", "i1e", "erfcx", "ndtri"), 150),
}
"""Vector instructions of one value, about, where it is not one instruction or a few."""


@dataclass(frozen=True)
class Stages:
    """Stages of a graph, before memory is assigned.

    Attributes:
        stages: in the order in which they run.
        stage_of: the name of the stage that computes each value; slices and concats are in none.
        ranks: the rank of each value within its phase, slices and concats included.
        ready: for each node and phase, the rank from which all columns of a value, or of the values in stages that it
            is computed from, are in memory; 0 where it isn't listed.
    """

    stages: tuple[Stage, ...]
    stage_of: Mapping[int, str]
    ranks: Mapping[int, int]
    ready: Sequence[Mapping[Phase, int]]


def make_stages(graph: Graph, phases: Phases) -> Stages:
    """Give each value of a phase a rank, and group those of one rank and width in a stage."""
    ranks: dict[int, int] = {}
    ready: list[Mapping[Phase, int]] = []
    sources: list[Sources] = []
    values: dict[tuple[Phase, int, int], list[int]] = {}
    costs: dict[tuple[Phase, int, int], int] = {}
    nests: list[Stage] = []
    for index, node in graph:
        phase = phases.of.get(index)
        if phase is None:
            ready.append(_latest_ready(ready, node))
            sources.append(_joined(sources, node))
            continue
        primitive = PRIMITIVES[node.op]
        rank = _rank(graph, phases, ready, sources, index)
        if primitive.nest:
            nests.append(Stage(phase=phase, rank=rank, width=node.size, nest=index, label=node.name))
        # Later is always possible: a value may be computed in any rank from its first one on.
        if primitive.pointwise:
            while costs.get((phase, rank, node.size), 0) >= STAGE_COST:
                rank += 1
            costs[phase, rank, node.size] = costs.get((phase, rank, node.size), 0) + _COSTS.get(node.op, 1)
        ranks[index] = rank
        # Within its stage a column of a value can be used at once; all its columns are there in the next rank.
        whole = rank if primitive.movement else rank + 1
        ready.append({phase: whole})
        in_memory = primitive.reduction or primitive.movement or primitive.nest
        sources.append({(phase, node.size): (whole if in_memory else rank, whole)})
        # One stage for each width, as the values of a stage share a loop over its columns.
        if not (primitive.movement or primitive.nest):
            values.setdefault((phase, rank, _width(graph, node)), []).append(index)
    stages = [*(_stage(graph, *key, indices) for key, indices in values.items()), *nests]
    stage_of = {index: stage.name for stage in stages for index in stage.computed()}
    return Stages(tuple(sorted(stages, key=lambda stage: stage.order)), stage_of, ranks, ready)


def _width(graph: Graph, node: Node) -> int:
    """Return the columns that computing a value runs over: of a reduction those of its argument."""
    return graph[node.args[0]].size if PRIMITIVES[node.op].reduction else node.size


def _stage(graph: Graph, phase: Phase, rank: int, width: int, indices: Sequence[int]) -> Stage:
    affines = tuple(index for index in indices if graph[index].op == "affine")
    reductions = tuple(index for index in indices if PRIMITIVES[graph[index].op].reduction)
    pointwise = tuple(index for index in indices if index not in affines and index not in reductions)
    return Stage(phase=phase, rank=rank, width=width, affines=affines, pointwise=pointwise, reductions=reductions)


def _latest_ready(ready: Sequence[Mapping[Phase, int]], node: Node) -> Mapping[Phase, int]:
    """Return the rank, by phase, from which all arguments of a value without a phase are ready."""
    latest: dict[Phase, int] = {}
    for arg in node.args:
        for phase, rank in ready[arg].items():
            latest[phase] = max(rank, latest.get(phase, 0))
    return latest


def _joined(sources: Sequence[Sources], node: Node) -> Sources:
    """Merge the sources of all arguments of a node: the latest of each phase and width."""
    joined: dict[tuple[Phase, int], tuple[int, int]] = {}
    for arg in node.args:
        for key, (rank, whole) in sources[arg].items():
            latest = joined.get(key, (0, 0))
            joined[key] = max(rank, latest[0]), max(whole, latest[1])
    return joined


def _rank(
    graph: Graph, phases: Phases, ready: Sequence[Mapping[Phase, int]], sources: Sequence[Sources], index: int
) -> int:
    """Return the first rank at which a value can be computed, or moved if it is a slice or concat."""
    node, phase = graph[index], phases.of[index]
    if PRIMITIVES[node.op].in_place:
        return ready[node.args[0]].get(phase, 0)
    if node.op == "concat":
        return max(ready[arg].get(phase, 0) + (not _is_computed(graph, phases, arg, phase)) for arg in node.args)
    latest = 0
    for (source_phase, width), (rank, whole) in _joined(sources, node).items():
        if source_phase == phase:
            # A product or a nest needs all columns of its operand, and so does a value of another width.
            primitive = PRIMITIVES[node.op]
            columns = node.op == "affine" or primitive.nest or (not primitive.reduction and width != node.size)
            latest = max(latest, whole if columns else rank)
    return latest


def _is_computed(graph: Graph, phases: Phases, index: int, phase: Phase) -> bool:
    """Whether a stage of ``phase`` has a value in registers and can store it anywhere; else it is loaded first."""
    primitive = PRIMITIVES[graph[index].op]
    return phases.of.get(index) == phase and not (primitive.movement or primitive.reduction or primitive.nest)
